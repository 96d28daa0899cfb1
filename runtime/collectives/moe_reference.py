"""What MoE dispatch and combine compute, in plain torch: on any process group and device, without a host read.

A token goes once to each rank that owns one of its experts. Every rank sends every other a block of ``capacity`` rows
of each payload, so all parts are equal and known: nothing is counted, and a capture over NCCL may hold it.

Experts lie on the ranks in contiguous blocks, the first of them larger by one where the division leaves a rest, as
FlashInfer's one-sided kernels have them (``trtllm_moe_alltoall.py`` from 0.6.16 on).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moe_one_sided import counts_offset
from .reference import c10d

#: Dtypes that torch gathers rows of; others travel as bytes, which keeps their bits too.
_GATHERED = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64})


def owner_of(ids: Tensor, num_experts: int, ranks: int) -> Tensor:
    """The rank of each expert, of the shape of ``ids``; ``ranks``, which none is, for an id outside of all experts."""
    base, rest = divmod(num_experts, ranks)
    larger = rest * (base + 1)  # experts of the ranks that have one more
    owner = torch.where(ids < larger, ids // (base + 1), rest + (ids - larger) // max(base, 1))
    return torch.where((ids >= 0) & (ids < num_experts), owner, torch.full_like(owner, ranks))


def first_expert(rank: int, num_experts: int, ranks: int) -> int:
    """The first expert of a rank's block."""
    base, rest = divmod(num_experts, ranks)
    return rank * base + min(rank, rest)


def dispatch(
    payloads: Sequence[Tensor],
    ids: Tensor,
    capacity: int,
    num_experts: int,
    empty_id: int | None,
    group: str,
    ranks: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """``(received, ids, route, counts)``, as :mod:`.moe` describes them."""
    route = route_of(ids, num_experts, ranks)
    source, filled = _sources(route, capacity)
    received = [_exchanged(_rows(payload, source), group, ranks) for payload in payloads]
    sent_ids = _rows(ids, source)
    if empty_id is not None:
        empty = torch.full((), empty_id, dtype=ids.dtype, device=ids.device)
        sent_ids = torch.where(filled[:, None], sent_ids, empty)
    counts = (route >= 0).sum(0, dtype=ids.dtype)
    together = torch.cat((sent_ids.view(ranks, -1), counts[:, None]), 1)  # in the message of the ids
    got = _exchanged(together, group, ranks)
    return received, got[:, :-1].reshape(sent_ids.shape), route, counts_like(route).copy_(got[:, -1])


def counts_like(route: Tensor) -> Tensor:
    """``[ranks]`` to be written, at an offset like that of the kernels' own."""
    ranks, before = route.shape[1], counts_offset(route.shape[1])
    return route.new_empty(before + ranks)[before:]


def route_of(ids: Tensor, num_experts: int, ranks: int) -> Tensor:
    """``[tokens, ranks]`` int32: the token's row in the block that goes to each rank; -1 where it does not go."""
    owners = owner_of(ids.long(), num_experts, ranks)
    goes = torch.zeros(ids.shape[0], ranks + 1, dtype=torch.int32, device=ids.device)
    goes = goes.scatter_(1, owners, 1)[:, :ranks]  # once to a rank, however many of its experts are asked for
    return torch.where(goes > 0, goes.cumsum(0, dtype=torch.int32) - 1, torch.full_like(goes, -1))


def _sources(route: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Of each row of the blocks, which token lies there, and whether one does: ``[ranks * capacity]``."""
    tokens, ranks = route.shape
    block = torch.full((ranks, capacity + 1), tokens, dtype=torch.int64, device=route.device)
    rows = torch.where(route >= 0, route.long(), torch.full_like(route, capacity, dtype=torch.int64))
    numbers = torch.arange(tokens, device=route.device)[None].expand(ranks, tokens)
    block.scatter_(1, rows.t(), numbers)  # what goes nowhere lands behind the block
    source = block[:, :capacity].reshape(-1)
    filled = source < tokens
    return torch.where(filled, source, torch.zeros_like(source)), filled


def _rows(payload: Tensor, source: Tensor) -> Tensor:
    """The rows of the blocks; a rank without tokens has none to send, and sends whatever there is."""
    if payload.shape[0] == 0:
        return payload.new_empty(source.shape[0], payload.shape[1])
    if payload.dtype in _GATHERED:
        return payload.index_select(0, source)
    return payload.contiguous().view(torch.uint8).index_select(0, source).view(payload.dtype)


def _exchanged(blocks: Tensor, group: str, ranks: int) -> Tensor:
    """Block r of every rank, side by side on rank r, by source."""
    sent = blocks.contiguous().view(torch.uint8).view(ranks, -1)
    ones = [1] * ranks
    received: Tensor = c10d.wait_tensor(c10d.all_to_all_single(sent, ones, ones, group))
    return received.view(-1).view(blocks.dtype).view(blocks.shape)


def combine(partial: Tensor, route: Tensor, group: str) -> Tensor:
    """The sum over the ranks of what became of each token, in float32, in the order of the ranks, rounded once."""
    tokens, ranks = route.shape
    back = _exchanged(partial, group, ranks).view(ranks, -1, partial.shape[1])
    total = torch.zeros(tokens, partial.shape[1], dtype=torch.float32, device=partial.device)
    for rank in range(ranks):  # what was not sent is skipped and not multiplied by zero: it may hold anything
        rows = back[rank].index_select(0, route[:, rank].clamp_min(0).long()).float()
        total = torch.where(route[:, rank, None] >= 0, total + rows, total)
    return total.to(partial.dtype)
