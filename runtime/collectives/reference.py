"""What the fused op computes, in plain torch.

    norm, residual_out = all_reduce(x) + residual, then RMSNorm

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

c10d = torch.ops._c10d_functional


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of ``x`` over the ranks of a group, in a new contiguous tensor of its dtype."""
    reduced: Tensor = c10d.wait_tensor(c10d.all_reduce(x.contiguous(), "sum", group_name))
    return reduced


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float) -> Tensor:
    """``x * rsqrt(mean(x ** 2, -1) + eps) * (weight_bias + weight)``, computed in float32 (float64 for float64).

    ``x`` is ``[..., hidden]``; ``weight`` is ``[hidden]`` or None for ones. One
    rounding, at the end, to the dtype of ``x``.
    """
    if x.is_cuda and weight_bias == 0:  # one kernel with the same roundings, row by row whatever the token count
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.to(wide.dtype) + weight_bias)
    return out.to(x.dtype)


def add_rms_norm(
    reduced: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """``(norm, sum)`` of an already reduced tensor and its residual."""
    summed = (reduced + residual).contiguous()
    return rms_norm(summed, weight, eps, weight_bias), summed
