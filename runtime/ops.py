"""The fused ops, as torch ops that every compiler carries.

    ringfence::all_reduce_add_rms_norm(input, residual, weight, eps, weight_bias, group, collective)
        -> (norm, residual_out)
    ringfence::all_reduce_rms_norm(input, weight, eps, weight_bias, group, collective)
        -> (norm, reduced)

Both are functional: they allocate what they return and alias nothing, so no pass
has to undo a functionalisation. All tensors are ``[..., hidden]``, of one shape and
one of float16, bfloat16, float32; ``weight`` is ``[hidden]``, of the same dtype, or
None for ones. ``group`` is the name of a process group; every rank of it must make
the call, in the same order. ``collective`` says who carries the sum out.

An empty tensor is refused with :class:`InputError`: the fused kernels cannot launch
on zero tokens, and a rank that returned early would leave the others waiting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .errors import CollectiveUnavailableError, InputError

#: The collectives whose runtime is in this package.
COLLECTIVES = ("reference",)


def _check(input: Tensor, collective: str) -> None:
    if collective not in COLLECTIVES:
        raise CollectiveUnavailableError(
            f"collective '{collective}' has no runtime in this process; use one of {list(COLLECTIVES)}"
        )
    if input.numel() == 0:
        raise InputError(
            f"fused all-reduce of an empty tensor of shape {list(input.shape)}; pad to at least one token on every rank"
        )


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
    _check(input, collective)
    return reference.add_rms_norm(reference.all_reduce(input, group), residual, weight, eps, weight_bias)


@torch.library.custom_op("ringfence::all_reduce_rms_norm", mutates_args=())
def _all_reduce_rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, weight_bias: float, group: str, collective: str
) -> tuple[Tensor, Tensor]:
    _check(input, collective)
    reduced = reference.all_reduce(input, group)
    return reference.rms_norm(reduced, weight, eps, weight_bias), reduced


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


all_reduce_add_rms_norm = torch.ops.ringfence.all_reduce_add_rms_norm.default
all_reduce_rms_norm = torch.ops.ringfence.all_reduce_rms_norm.default
