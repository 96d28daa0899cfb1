"""Stand-ins for engines' ops: their names and schemas, with plain torch inside. Their sums are of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

if __name__ != "engine_ops":  # of the clone's root, which is no package
    raise ImportError("import engine_ops, with tests/ on the path")

ALL_REDUCES = (
    "vllm::all_reduce(Tensor tensor, str group_name) -> Tensor",
    "sglang::outplace_all_reduce(Tensor tensor, str group_name, str outplace_all_reduce_method) -> Tensor",
    "sglang::inplace_all_reduce(Tensor(a!) tensor, str group_name) -> ()",
    "trtllm::allreduce(Tensor input, Tensor? residual, Tensor? norm_weight, Tensor? scale, Tensor? bias, "
    "Tensor? workspace, int[] group, int strategy, int op, float eps, bool trigger_completion_at_end) -> Tensor[]",
    "auto_deploy::trtllm_dist_all_reduce(Tensor t, str strategy) -> Tensor",
)
NORMS = (
    "vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor",
    "vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, "
    "SymInt? variance_size=None) -> (Tensor, Tensor)",
    "_C::rms_norm(Tensor(a!) out, Tensor input, Tensor? weight, float epsilon) -> ()",
    "_C::fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, float epsilon) -> ()",
    "sgl_kernel::rmsnorm(Tensor(a!) output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "sgl_kernel::fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, bool enable_pdl) "
    "-> ()",
    "sgl_kernel::gemma_rmsnorm(Tensor(a!) output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "sgl_kernel::gemma_fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, "
    "bool enable_pdl) -> ()",
    "flashinfer::rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "flashinfer::fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, bool enable_pdl) "
    "-> ()",
    "flashinfer::gemma_rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "flashinfer::gemma_fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, "
    "bool enable_pdl) -> ()",
    "trtllm::flashinfer_rmsnorm(Tensor input, Tensor weight, float eps) -> Tensor",
    "trtllm::flashinfer_fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()",
    "trtllm::flashinfer_gemma_rmsnorm(Tensor input, Tensor weight, float eps) -> Tensor",
    "trtllm::flashinfer_gemma_fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()",
    "auto_deploy::torch_rmsnorm(Tensor input, Tensor weight, float eps) -> Tensor",
)


#: What vLLM's models call where it compiles: the arguments are given away.
MAYBE_IN_PLACE = (
    "vllm_ir::fused_add_rms_norm.maybe_inplace(Tensor(a0!) x, Tensor(a1!) x_residual, Tensor? weight, float epsilon, "
    "SymInt? variance_size=None) -> (Tensor, Tensor)"
)


def name_of(schema: str) -> str:
    return schema.partition("(")[0]


def op(name: str) -> Any:
    namespace, _, bare = name.partition("::")
    return getattr(getattr(torch.ops, namespace), bare)


def rms(x: Tensor, weight: Tensor | None, eps: float, bias: float = 0.0) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * ((weight.float() if weight is not None else 1.0) + bias)).to(x.dtype)


def define() -> list[Library]:
    """Register all that are not there; they go with what is returned."""
    libraries = []
    for schema in ALL_REDUCES:
        body: Callable[..., Any] = _returned_sum
        if "Tensor[]" in schema:
            body = _listed_sum
        elif "a!" in schema:
            body = _nothing
        libraries += _define(schema, body, body)
    for schema in NORMS:
        bias = 1.0 if "gemma" in schema else 0.0
        body, fake = _norm(schema, bias)
        libraries += _define(schema, body, fake)
    return libraries


def _define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> list[Library]:
    namespace, _, bare = name_of(schema).partition("::")
    if hasattr(getattr(torch.ops, namespace), bare):
        return []
    library = Library(namespace, "FRAGMENT")
    library.define(schema.partition("::")[2])
    library.impl(bare, body, "CPU")
    library.impl(bare, body, "CUDA")
    library.impl(bare, fake, "Meta")
    return [library]


def _returned_sum(x: Tensor, *_: Any) -> Tensor:
    return x.clone()


def _listed_sum(x: Tensor, *_: Any) -> list[Tensor]:
    return [x.clone()]


def _nothing(*_: Any) -> None:
    pass


def _norm(schema: str, bias: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if "b!" in schema:

        def add_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *_: Any) -> None:
            residual.add_(x)
            x.copy_(rms(residual, weight, eps, bias))

        return add_in_place, _nothing
    if "a!" in schema:

        def write(out: Tensor, x: Tensor, weight: Tensor, eps: float, *_: Any) -> None:
            out.copy_(rms(x, weight, eps, bias))

        return write, _nothing
    if "(Tensor, Tensor)" in schema:

        def add(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *_: Any) -> tuple[Tensor, Tensor]:
            return rms(x + residual, weight, eps, bias), x + residual

        return add, lambda x, *_: (torch.empty_like(x), torch.empty_like(x))

    def plain(x: Tensor, weight: Tensor | None, eps: float, *_: Any) -> Tensor:
        return rms(x, weight, eps, bias)

    return plain, lambda x, *_: torch.empty_like(x)
