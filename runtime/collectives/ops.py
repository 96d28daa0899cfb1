"""The fused ops that every compiler carries.

    ringfence::all_reduce_add_rms_norm(input, residual, weight, eps, weight_bias, group, collective)
        -> (norm, residual_out)
    ringfence::all_reduce_rms_norm(input, weight, eps, weight_bias, group, collective)
        -> (norm, reduced)
    ringfence::all_reduce(input, group, collective)
        -> reduced

All are functional: they allocate what they return and alias nothing, so no pass
has to undo a functionalisation. All tensors are ``[..., hidden]``, of one shape and
one of float16, bfloat16, float32; ``weight`` is ``[hidden]``, of the same dtype, or
None for ones. ``group`` is the name of a process group; every rank of it must make
the call, in the same order.

``collective`` says who carries the sum out: "reference", or a collective whose workspace
belongs to the group. A call that the workspace does not serve (too large, another dtype, no
workspace) is carried out by the reference: the shapes decide, which are the same on every rank.

An empty tensor is refused with :class:`InputError`: the fused kernels cannot launch
on zero tokens, and a rank that returned early would leave the others waiting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CollectiveUnavailableError, InputError
from ..hazards.situation import Collective, Strategy
from . import reference
from .workspace import Workspace, workspaces_of

#: Who can be named in a graph.
COLLECTIVES = (Collective.REFERENCE, Collective.TRTLLM, Collective.MNNVL)


def _workspace(input: Tensor, group: str, collective: str) -> Workspace | None:
    if collective not in COLLECTIVES:
        raise CollectiveUnavailableError(
            f"collective '{collective}' has no runtime in this process; use one of {[str(c) for c in COLLECTIVES]}"
        )
    if input.numel() == 0:
        raise InputError(
            f"fused all-reduce of an empty tensor of shape {list(input.shape)}; pad to at least one token on every rank"
        )
    if collective == Collective.REFERENCE:
        return None
    return workspaces_of(group).find(collective, input.device, input.dtype, input.numel() * input.element_size())


def _rows(tensor: Tensor) -> Tensor:
    """``[tokens, hidden]``, contiguous."""
    return _readable(tensor).view(-1, tensor.shape[-1])


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels take for granted."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _fused(
    workspace: Workspace,
    strategy: Strategy,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    shape: torch.Size,
) -> tuple[Tensor, Tensor]:
    if weight is None:
        weight, weight_bias = workspace.constant("ones", x, x.shape[1]), 0.0
    for name, other in (("residual", residual), ("weight", weight)):
        if other.dtype != x.dtype or other.device != x.device or other.shape[-1] != x.shape[1]:
            raise InputError(  # the kernel would read it as if it were, and return garbage
                f"{name} is {other.dtype} {list(other.shape)} on {other.device}, "
                f"and the input is {x.dtype} {list(x.shape)} on {x.device}"
            )
    norm, out = torch.empty_like(x), torch.empty_like(x)
    workspace.kernels.fused(x, residual, _readable(weight), eps, weight_bias, strategy, norm, out)
    return norm.view(shape), out.view(shape)


@torch.library.custom_op("ringfence::all_reduce_add_rms_norm", mutates_args=())
def _all_reduce_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group: str,
    collective: str,
) -> tuple[Tensor, Tensor]:
    workspace = _workspace(input, group, collective)
    if workspace is not None:
        x = _rows(input)
        strategy = workspace.strategy(x.shape[0], x.shape[1], x.dtype)
        if strategy is not None:
            return _fused(workspace, strategy, x, _rows(residual), weight, eps, weight_bias, input.shape)
    return reference.add_rms_norm(reference.all_reduce(input, group), residual, weight, eps, weight_bias)


@torch.library.custom_op("ringfence::all_reduce_rms_norm", mutates_args=())
def _all_reduce_rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, weight_bias: float, group: str, collective: str
) -> tuple[Tensor, Tensor]:
    workspace = _workspace(input, group, collective)
    if workspace is not None:
        x = _rows(input)
        strategy = workspace.strategy(x.shape[0], x.shape[1], x.dtype)
        if strategy is not None:  # the kernels have no form without a residual
            zeros = workspace.constant("zeros", x, x.numel()).view_as(x)
            return _fused(workspace, strategy, x, zeros, weight, eps, weight_bias, input.shape)
    reduced = reference.all_reduce(input, group)
    return reference.rms_norm(reduced, weight, eps, weight_bias), reduced


@torch.library.custom_op("ringfence::all_reduce", mutates_args=())
def _all_reduce(input: Tensor, group: str, collective: str) -> Tensor:
    workspace = _workspace(input, group, collective)
    if workspace is not None and input.dim():
        x = _rows(input)
        strategy = workspace.all_reduce_strategy(x.shape[0], x.shape[1], x.dtype)
        if strategy is not None:
            out = torch.empty_like(x)
            workspace.kernels.all_reduce(x, out, strategy)
            return out.view(input.shape)
    return reference.all_reduce(input, group)


def _contiguous_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@_all_reduce_add_rms_norm.register_fake
def _(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group: str,
    collective: str,
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(input), _contiguous_like(input)


@_all_reduce_rms_norm.register_fake
def _(
    input: Tensor, weight: Tensor | None, eps: float, weight_bias: float, group: str, collective: str
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(input), _contiguous_like(input)


@_all_reduce.register_fake
def _(input: Tensor, group: str, collective: str) -> Tensor:
    return _contiguous_like(input)


all_reduce_add_rms_norm = torch.ops.ringfence.all_reduce_add_rms_norm.default
all_reduce_rms_norm = torch.ops.ringfence.all_reduce_rms_norm.default
all_reduce = torch.ops.ringfence.all_reduce.default
