"""MoE all-to-all as functions: tokens go to the ranks of their experts, and what became of them comes back.

    sent = ringfence.moe.dispatch([x, weights], topk_ids, capacity=128, num_experts=64, group=ep_group)
    x, weights = sent.payloads
    partial = experts(x, sent.ids, weights)  # row by row, weighted and summed over this rank's experts
    y = ringfence.moe.combine(partial, sent.route, group=ep_group)

They run eagerly and may be traced (``torch.compile`` with any backend). Every rank of the group makes both calls, in
the same order, with the same capacity; a rank without tokens makes them with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .callable import is_traced
from .runtime.collectives import moe
from .runtime.collectives.moe_reference import first_expert
from .runtime.collectives.ops import PREPARED
from .runtime.errors import InputError
from .runtime.groups import name_of_group, resolve_group


class Dispatched(NamedTuple):
    """What a rank received, from all ranks.

    payloads: ``[R * capacity, width]`` each. ids: ``[R * capacity, top_k]``; of a row that nobody sent, ``empty_id``,
    and its payloads are undefined. route: opaque, for the combine. Rows are in no order that may be relied on, and
    nothing may be written into them.
    """

    payloads: list[Tensor]
    ids: Tensor
    route: Tensor


def dispatch(
    payloads: Sequence[Tensor],
    topk_ids: Tensor,
    *,
    capacity: int,
    num_experts: int,
    empty_id: int = -1,
    group: dist.ProcessGroup | str | None = None,
) -> Dispatched:
    """Send each token's row of every payload once to each rank that owns one of its experts.

    payloads: one to five tensors ``[T, width]`` of any dtype: hidden states, router weights, scales. topk_ids:
    ``[T, top_k]``, int32 or int64, numbers among the ``num_experts`` of all ranks, which lie on the ranks in contiguous
    blocks (:func:`local_experts`). A row that is only padding has an expert of this rank and a weight of 0.
    T: this rank's tokens, 0 to ``capacity``. capacity: **the same on all ranks**, from 1 on; no number of a rank's own.
    Nobody compares it in an eager call, or in another compiler's graph: ranks that differ get garbage, or wait for
    ever. In a graph of ringfence's, ranks compare a constant when they agree on the graph, and an int among the inputs
    before each capture and, with ``check_every_step``, before each step (hazard M62).
    empty_id: what the ids of a row that nobody sent are; -1, or an expert of another rank where experts mask theirs.
    group: a process group, or its name; None is the default group.

    Raises :class:`InputError`, :class:`GroupError`, :class:`GradModeError`, and in a capture that may not hold the call
    :class:`CaptureError`.
    """
    name = name_of_group(group)
    given = list(payloads)
    if not given or not all(isinstance(one, Tensor) for one in (*given, topk_ids)):
        raise InputError("a dispatch takes a list of payloads, and topk_ids, all of them tensors")
    call = torch.ops.ringfence.moe_dispatch if is_traced(topk_ids) else moe.dispatched
    received, ids, route = call(given, topk_ids, capacity, num_experts, empty_id, name, PREPARED)
    return Dispatched(list(received), ids, route)


def combine(
    partial: Tensor, route: Tensor, *, out: Tensor | None = None, group: dist.ProcessGroup | str | None = None
) -> Tensor:
    """``[T, H]``: the sum over the ranks of what became of each token, taken in float32 and rounded once.

    partial: ``[R * capacity, H]``, float16, bfloat16 or float32: of each received row, the weighted sum over this
    rank's experts; rows that nobody sent may hold anything. route: of the dispatch that it answers. out: where the
    result is written and what is returned, if given. Raises what :func:`dispatch` raises.
    """
    name = name_of_group(group)
    traced = is_traced(partial)
    if out is None:
        call = torch.ops.ringfence.moe_combine if traced else moe.combined
        result: Tensor = call(partial, route, name, PREPARED)
        return result
    into = torch.ops.ringfence.moe_combine_into if traced else moe.combined_into
    into(out, partial, route, name, PREPARED)
    return out


def local_experts(num_experts: int, group: dist.ProcessGroup | str | None = None) -> range:
    """The numbers of this rank's experts: contiguous blocks, the first ranks' larger by one where there is a rest."""
    found = resolve_group(name_of_group(group))
    ranks, rank = found.size(), found.rank()
    if num_experts < ranks:
        raise InputError(f"{num_experts} experts on {ranks} ranks; every rank has at least one")
    return range(first_expert(rank, num_experts, ranks), first_expert(rank + 1, num_experts, ranks))
