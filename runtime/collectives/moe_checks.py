"""MoE checks: what a dispatch and a combine must look like, before a flag moves.

Each raises :class:`InputError` for what kernels would write over somebody else's rows with, and not tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..capturing import is_capturing
from ..errors import InputError
from .epilogue import DTYPES

#: FlashInfer's kernels carry six, of which the ids are one.
MOST_PAYLOADS = 5
_IDS = (torch.int32, torch.int64)


def check_dispatch(
    payloads: Sequence[Tensor], topk_ids: Tensor, capacity: int, num_experts: int, empty_id: int | None, ranks: int
) -> None:
    """Raises :class:`InputError` for what kernels would write over somebody else's rows with, and not tell."""
    if not payloads or not all(isinstance(one, Tensor) for one in (*payloads, topk_ids)):
        raise InputError("a dispatch takes a list of payloads, and topk_ids, all of them tensors")
    _check_ids(topk_ids, num_experts, empty_id, ranks)
    if not 1 <= len(payloads) <= MOST_PAYLOADS:
        raise InputError(
            f"a dispatch takes 1 to {MOST_PAYLOADS} payloads beside the ids, and was given {len(payloads)}"
        )
    tokens = topk_ids.shape[0]
    for i, payload in enumerate(payloads):
        if payload.ndim != 2 or payload.shape[0] != tokens or payload.shape[1] < 1:
            raise InputError(
                f"payload {i} is {list(payload.shape)}; with topk_ids of {list(topk_ids.shape)} it is [{tokens}, width]"
            )
        if payload.device != topk_ids.device:
            raise InputError(f"payload {i} is on {payload.device}, and topk_ids on {topk_ids.device}")
    if capacity < 1:
        raise InputError(f"a capacity of {capacity}; it is at least 1, also where no rank has a token")
    if tokens > capacity:
        raise InputError(
            f"{tokens} tokens do not fit a capacity of {capacity}: the rest would lie over another rank's rows. The "
            "capacity is the largest number of tokens that any rank has in this call"
        )


def _check_ids(topk_ids: Tensor, num_experts: int, empty_id: int | None, ranks: int) -> None:
    if topk_ids.ndim != 2 or topk_ids.shape[1] < 1 or topk_ids.dtype not in _IDS:
        raise InputError(
            f"topk_ids is {topk_ids.dtype} {list(topk_ids.shape)}; it is [tokens, top_k] of int32 or int64"
        )
    if num_experts < ranks:
        raise InputError(f"{num_experts} experts on {ranks} ranks; every rank has at least one")
    if topk_ids.shape[1] > num_experts:
        raise InputError(f"top_k is {topk_ids.shape[1]}, and there are {num_experts} experts")
    if empty_id is not None and not -(2**31) <= empty_id < 2**31:
        raise InputError(f"empty_id={empty_id} is no int32")
    if topk_ids.device.type == "cpu" and topk_ids.numel() and not is_capturing(topk_ids.device):  # no wait for a device
        low, high = (int(bound) for bound in topk_ids.aminmax())
        if low < 0 or high >= num_experts:
            raise InputError(
                f"topk_ids holds {low if low < 0 else high}, and the experts are 0 to {num_experts - 1}; a row that is "
                "only padding has an expert of this rank, and a weight of 0"
            )


def check_combine(partial: Tensor, route: Tensor, ranks: int) -> None:
    """Raises :class:`InputError`."""
    if not isinstance(partial, Tensor) or not isinstance(route, Tensor):
        raise InputError("a combine takes two tensors: what became of the rows, and the route of their dispatch")
    if route.ndim != 2 or route.dtype != torch.int32 or route.shape[1] != ranks:
        raise InputError(
            f"route is {route.dtype} {list(route.shape)}; pass the one that the dispatch over these {ranks} ranks gave"
        )
    if partial.dtype not in DTYPES:
        raise InputError(f"partial is {partial.dtype}; it is one of {', '.join(map(str, DTYPES))}")
    if partial.ndim != 2 or partial.shape[0] % ranks or partial.shape[1] < 1:
        raise InputError(f"partial is {list(partial.shape)}; it is [{ranks} * capacity, hidden], as what was received")
    if partial.device != route.device:
        raise InputError(f"partial is on {partial.device}, and route on {route.device}")
    if route.shape[0] * ranks > partial.shape[0]:
        raise InputError(
            f"route is of {route.shape[0]} tokens, and partial has {partial.shape[0] // ranks} rows for each rank: it "
            "belongs to another dispatch"
        )


def check_out(out: Tensor, partial: Tensor, route: Tensor) -> None:
    """Raises :class:`InputError`."""
    wanted = [route.shape[0], partial.shape[1]]
    if list(out.shape) != wanted or out.dtype != partial.dtype or out.device != partial.device:
        raise InputError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; it is {partial.dtype} {wanted} on {partial.device}"
        )


def check_buffer(route: Tensor, rows: int, hidden: int, dtype: torch.dtype, ranks: int) -> None:
    """Of what experts would write into; see :func:`.moe.combine_buffer`."""
    check_combine(torch.empty(0, max(hidden, 1), dtype=dtype, device=route.device), route[:0], ranks)
    if hidden < 1 or rows < ranks or rows % ranks or route.shape[0] * ranks > rows:
        raise InputError(
            f"a buffer of [{rows}, {hidden}] for {route.shape[0]} tokens; it is [{ranks} * capacity, hidden], of the "
            "dispatch that it answers"
        )
