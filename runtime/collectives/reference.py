"""What the fused ops compute, in plain torch: :func:`apply` is the meaning of an :class:`.epilogue.Epilogue`.

The order of roundings is the FlashInfer kernels' own (``kARResidualRMSNorm``): the
sum with the residual is rounded once to the activation dtype; the norm is
accumulated in float32 on that rounded sum, multiplied by ``weight_bias + weight``
in float32, and rounded once.

Runs on any process group and device. It is also what a fused kernel falls back to,
so it never leaves the all-reduce out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import is_registered, resolve_group
from ..hazards.situation import Collective
from .epilogue import Epilogue, RmsNorm
from .kernels import Implementation

c10d = torch.ops._c10d_functional


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of ``x`` over the ranks of a group, in a new contiguous tensor of its dtype.

    Raises :class:`GroupError` where this process has no group of that name, as when a graph comes from another one.
    """
    x = x.contiguous()
    try:
        unfinished = c10d.all_reduce(x, "sum", group_name)
    except RuntimeError:
        if is_registered(group_name):
            raise
        resolve_group(group_name, x.device)  # one that is named by its ranks is known to torch from now on
        unfinished = c10d.all_reduce(x, "sum", group_name)
    reduced: Tensor = c10d.wait_tensor(unfinished)
    return reduced


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float) -> Tensor:
    """``x * rsqrt(mean(x ** 2, -1) + eps) * (weight_bias + weight)``, computed in float32 (float64 for float64).

    ``x`` is ``[..., hidden]``; ``weight`` is ``[hidden]`` or None for ones. One
    rounding, at the end, to the dtype of ``x``.
    """
    if x.is_cuda and weight_bias == 0:  # one kernel with the same roundings, row by row whatever the token count
        norm = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        return norm.to(x.dtype)  # under autocast it is float32, not rounded yet
    wide = x if x.dtype == torch.float64 else x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.to(wide.dtype) + weight_bias)
    return out.to(x.dtype)


def add_rms_norm(
    reduced: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """``(norm, sum)`` of an already reduced tensor and its residual."""
    norm, summed = apply(Epilogue(True, RmsNorm(eps, weight_bias)), reduced, residual, weight)
    return norm, summed


def apply(
    epilogue: Epilogue, reduced: Tensor, residual: Tensor | None = None, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What follows the sum ``reduced`` ``[..., hidden]`` of the ranks: ``(norm, sum)``, or ``(sum,)`` without a norm.

    residual: of the same shape, where the epilogue has one. weight: ``[hidden]`` or None for ones. The sum that is
    returned is contiguous; without a residual it is ``reduced`` itself.
    """
    if epilogue.residual:
        assert residual is not None
        reduced = (reduced + residual).contiguous()
    if epilogue.norm is None:
        return (reduced,)
    return rms_norm(reduced, weight, epilogue.norm.eps, epilogue.norm.weight_bias), reduced


#: Any group, any dtype and size; NCCL's order of summation is not shown to be the same for each.
IMPLEMENTATION = Implementation(Collective.REFERENCE, None, strategies=())
