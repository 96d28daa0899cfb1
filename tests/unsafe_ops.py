"""Ops that are known to be unsafe in a captured piece, under their real names: an op can be registered once."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("_C_custom_ar::all_reduce", mutates_args=())
def unregistered(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("flashinfer::trtllm_custom_all_reduce", mutates_args=())
def with_host_epoch(x: Tensor, flag_value: int) -> Tensor:
    return x.clone()


@torch.library.custom_op("sgl_kernel::all_reduce", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def registered_late(x: Tensor) -> Tensor:
    return x.clone()


unregistered.register_fake(torch.empty_like)
registered_late.register_fake(torch.empty_like)
with_host_epoch.register_fake(lambda x, flag_value: torch.empty_like(x))
