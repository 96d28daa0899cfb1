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
                f"payload {i} must be [{tokens}, width], as topk_ids is {list(topk_ids.shape)}, but it is "
                f"{list(payload.shape)}"
            )
        if payload.device != topk_ids.device:
            raise InputError(f"payload {i} must be on {topk_ids.device}, as topk_ids is, but it is on {payload.device}")
    if capacity < 1:
        raise InputError(f"capacity must be at least 1, also where no rank has a token, but it is {capacity}")
    if tokens > capacity:
        raise InputError(
            f"capacity must be the largest number of tokens that any rank has in this call, but it is {capacity} and "
            f"this rank has {tokens}: the rest would lie over another rank's rows"
        )


def check_num_experts(num_experts: int, ranks: int) -> None:
    """Every rank has one. Raises :class:`InputError`."""
    if num_experts < ranks:
        raise InputError(f"num_experts must be at least {ranks}, one for each rank, but it is {num_experts}")


def _check_ids(topk_ids: Tensor, num_experts: int, empty_id: int | None, ranks: int) -> None:
    if topk_ids.ndim != 2 or topk_ids.shape[1] < 1 or topk_ids.dtype not in _IDS:
        raise InputError(
            "topk_ids must be [tokens, top_k] of torch.int32 or torch.int64, but it is "
            f"{topk_ids.dtype} {list(topk_ids.shape)}"
        )
    check_num_experts(num_experts, ranks)
    if topk_ids.shape[1] > num_experts:
        raise InputError(f"top_k must be at most {num_experts}, the number of experts, but it is {topk_ids.shape[1]}")
    if empty_id is not None and not -(2**31) <= empty_id < 2**31:
        raise InputError(f"empty_id must be within int32, but it is {empty_id}")
    if topk_ids.device.type == "cpu" and topk_ids.numel() and not is_capturing(topk_ids.device):  # no wait for a device
        low, high = (int(bound) for bound in topk_ids.aminmax())
        if low < 0 or high >= num_experts:
            raise InputError(
                f"topk_ids must be numbers of experts, 0 to {num_experts - 1}, but it holds "
                f"{low if low < 0 else high}; give a row that is only padding an expert of this rank, and a weight of 0"
            )


def check_combine(partial: Tensor, route: Tensor, ranks: int) -> None:
    """Raises :class:`InputError`."""
    if not isinstance(partial, Tensor) or not isinstance(route, Tensor):
        raise InputError("a combine takes two tensors: what became of the rows, and the route of their dispatch")
    if route.ndim != 2 or route.dtype != torch.int32 or route.shape[1] != ranks:
        raise InputError(
            f"route must be the one that the dispatch over these {ranks} ranks returned, torch.int32 "
            f"[tokens, {ranks}], but it is {route.dtype} {list(route.shape)}"
        )
    if partial.dtype not in DTYPES:
        raise InputError(f"partial must be of {', '.join(map(str, DTYPES))}, but it is {partial.dtype}")
    if partial.ndim != 2 or partial.shape[0] % ranks or partial.shape[1] < 1:
        raise InputError(
            f"partial must be [{ranks} * capacity, hidden], as what was received, but it is {list(partial.shape)}"
        )
    if partial.device != route.device:
        raise InputError(f"partial must be on {route.device}, as route is, but it is on {partial.device}")
    if route.shape[0] * ranks > partial.shape[0]:
        raise InputError(
            f"route must be of the dispatch that partial answers, which has {partial.shape[0] // ranks} rows for each "
            f"rank, but it is of {route.shape[0]} tokens"
        )


def check_out(out: Tensor, partial: Tensor, route: Tensor) -> None:
    """Raises :class:`InputError`."""
    wanted = [route.shape[0], partial.shape[1]]
    if list(out.shape) != wanted or out.dtype != partial.dtype or out.device != partial.device:
        raise InputError(
            f"out must be {partial.dtype} {wanted} on {partial.device}, but it is "
            f"{out.dtype} {list(out.shape)} on {out.device}"
        )


def check_buffer(route: Tensor, rows: int, hidden: int, dtype: torch.dtype, ranks: int) -> None:
    """Of what experts would write into; see :func:`.moe.combine_buffer`."""
    check_combine(torch.empty(0, max(hidden, 1), dtype=dtype, device=route.device), route[:0], ranks)
    if hidden < 1 or rows < ranks or rows % ranks or route.shape[0] * ranks > rows:
        raise InputError(
            f"a buffer must be [{ranks} * capacity, hidden], of the dispatch that it answers, but it is "
            f"[{rows}, {hidden}] for {route.shape[0]} tokens"
        )
