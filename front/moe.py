"""MoE all-to-all as functions: tokens go to the ranks of their experts, and what became of them comes back.

    sent = ringfence.moe.dispatch([x, weights], topk_ids, capacity=128, num_experts=64, group=ep_group)
    x, weights = sent.payloads
    partial = experts(x, sent.ids, weights)  # row by row, weighted and summed over this rank's experts
    y = ringfence.moe.combine(partial, sent.route, group=ep_group)

They run eagerly and may be traced (``torch.compile`` with any backend). Every rank of the group makes both calls, in
the same order, with the same capacity; a rank without tokens makes them with none.

    ringfence.moe.prepare(ep_group, capacity=128, top_k=8, hidden=4096, dtype=torch.bfloat16)

before the first of them, on every rank, lets kernels carry them out that know no count and no copy by the host.

Where experts go by counts and write where they are told, a captured pair is the library's kernels and nothing else:

    sent = ringfence.moe.dispatch([x], topk_ids, capacity=128, num_experts=64, empty_id=None, known_ids=True)
    buffer = ringfence.moe.combine_buffer(sent, 4096, torch.bfloat16)
    experts(*sent.payloads, sent.ids, sent.counts, out=buffer)
    y = ringfence.moe.combine(buffer, sent.route)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .callable import begin_anew, is_traced
from .compile_passes.op_options import positive
from .moe_assign import ready_pair
from .options import Options
from .runtime.capturing import is_capturing
from .runtime.channel import Channel
from .runtime.collectives import moe
from .runtime.collectives.epilogue import DTYPES
from .runtime.collectives.moe_checks import check_num_experts
from .runtime.collectives.moe_ready import DEFAULT_BYTES, MoeReady, MoeWanted, needed
from .runtime.collectives.moe_reference import first_expert
from .runtime.collectives.ops import PREPARED
from .runtime.collectives.workspace import workspaces_of
from .runtime.errors import InputError, OptionsError, RankMismatch, WorkspaceError
from .runtime.groups import Group, describe_group, device_for, name_of_group, resolve_group
from .runtime.spelling import first_difference, group_word
from .runtime.watch.agree import PlanDigest, agree
from .runtime.watch.refusal import refused_by_all
from .runtime.watch.supervision import Asked
from .runtime.watch.supervisor import supervisor_for


class Dispatched(NamedTuple):
    """What a rank received, from all ranks.

    payloads: ``[R * capacity, width]`` each. ids: ``[R * capacity, top_k]``; of a row that nobody sent, ``empty_id``,
    and its payloads are undefined. route: opaque, for the combine. counts: ``[R]`` int32, how many rows each rank sent:
    the first of its ``capacity``. Rows are in no order that may be relied on. They and the counts are read before the
    combine, and nothing may be written into them.
    """

    payloads: list[Tensor]
    ids: Tensor
    route: Tensor
    counts: Tensor


def dispatch(
    payloads: Sequence[Tensor],
    topk_ids: Tensor,
    *,
    capacity: int,
    num_experts: int,
    empty_id: int | None = -1,
    known_ids: bool = False,
    group: dist.ProcessGroup | str | None = None,
) -> Dispatched:
    """Send each token's row of every payload once to each rank that owns one of its experts.

    payloads: one to five tensors ``[T, width]`` of any dtype: hidden states, router weights, scales. topk_ids:
    ``[T, top_k]``, int32 or int64, numbers among the ``num_experts`` of all ranks, which lie on the ranks in contiguous
    blocks (:func:`local_experts`). A row that is only padding has an expert of this rank and a weight of 0.
    T: this rank's tokens, 0 to ``capacity``. capacity: **the same on all ranks**, from 1 on; no number of a rank's own.
    In an eager call nobody compares it without :func:`prepare` and ``check_every_call``, nor in another compiler's
    graph: ranks that differ get garbage, or wait for ever. In a graph of ringfence's, ranks compare a constant when
    they agree on the graph, and an int among the inputs before each capture and, with ``check_every_step``, before each
    step (hazard M62).
    empty_id: what the ids of a row that nobody sent are; -1, or an expert of another rank where experts mask theirs.
    None: whatever lies there, any number, which spares kernels a launch. That is for readers that look at no row from
    ``counts`` on, and for those that take any number for an id and look at each row by itself: what they make of an
    empty row is not combined, because a combine reads the rows that were sent and no other.
    known_ids: by the caller's word each id is an expert's, as top-k over ``num_experts`` scores gives them; kernels are
    then given the ids as they are, and one of no expert writes beyond their counters (hazard M65). Without it ids are
    clamped for them, by a launch more. On the CPU ids are looked at in either case. In a graph of ringfence's, ids
    that come from such a top-k are known without being told.
    group: a process group, or its name; None is the default group.

    Raises :class:`InputError`, :class:`GroupError`, :class:`GradModeError`, and in a capture that may not hold the call
    :class:`CaptureError`.
    """
    name = name_of_group(group)
    if payloads is None:
        raise InputError("a dispatch takes a list of payloads, and was given None")
    given = list(payloads)
    tensors = len(given) > 0 and all(isinstance(one, Tensor) for one in (*given, topk_ids))  # else it is refused there
    call = torch.ops.ringfence.moe_dispatch if tensors and is_traced(topk_ids) else moe.dispatched
    collective = PREPARED + moe.KNOWN_IDS if known_ids else PREPARED
    received, ids, route, counts = call(given, topk_ids, capacity, num_experts, empty_id, name, collective)
    return Dispatched(list(received), ids, route, counts)


def combine_buffer(
    sent: Dispatched, hidden: int, dtype: torch.dtype, *, group: dist.ProcessGroup | str | None = None
) -> Tensor:
    """``[R * capacity, hidden]`` for what experts make of the rows of a dispatch, to be given to its combine.

    Where kernels carry the pair out it is the memory that the other ranks combine from, and a combine that is given it,
    whole, copies nothing; elsewhere it is memory of the caller's. It is undefined until it is written, and rows that
    nobody sent may stay so. Write it **after the dispatch and before the combine**, on the same stream, and at no other
    time: before, other ranks may still read what they combined last, and afterwards they read this.

    hidden, dtype: of the combined rows; float16, bfloat16 or float32. Raises what :func:`combine` raises.
    """
    if not isinstance(getattr(sent, "route", None), Tensor):
        raise InputError("a buffer is for what a dispatch returned: combine_buffer(sent, hidden, dtype)")
    name = name_of_group(group)
    traced = is_traced(sent.route)
    call = torch.ops.ringfence.moe_combine_buffer if traced else moe.combine_buffer
    result: Tensor = call(sent.route, sent.ids.shape[0], hidden, dtype, name, PREPARED)
    return result


def combine(
    partial: Tensor, route: Tensor, *, out: Tensor | None = None, group: dist.ProcessGroup | str | None = None
) -> Tensor:
    """``[T, H]``: the sum over the ranks of what became of each token, taken in float32 and rounded once.

    partial: ``[R * capacity, H]``, float16, bfloat16 or float32: of each received row, the weighted sum over this
    rank's experts; rows that nobody sent may hold anything. It may be a :func:`combine_buffer`. route: of the dispatch
    that it answers. out: where the result is written and what is returned, if given. Raises what :func:`dispatch`
    raises.
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


@dataclass(frozen=True)
class MoePrepared:
    """What :func:`prepare` returns. Equal on all ranks of the group.

    collective: who carries out the calls. why: what was considered, with the reason. capacity: the largest that it
    takes; calls of a larger one go to the reference, as all do where it is 0. nbytes: of each rank's memory.
    capture_failure: why its calls may not be captured; None where they may.
    """

    group: str
    collective: str
    why: tuple[str, ...]
    capacity: int
    nbytes: int
    capture_failure: str | None

    def __str__(self) -> str:
        """A line for a log, and one for each candidate."""
        serves = f"capacities up to {self.capacity}, {self.nbytes / 2**20:.1f} MiB" if self.capacity else "all calls"
        first = f"ringfence: group '{group_word(self.group)}': dispatch and combine by {self.collective}, {serves}"
        return "\n".join((first, *(f"collective {why}" for why in self.why)))


_CALL = "ringfence.moe.prepare"


def prepare(
    group: dist.ProcessGroup | str | None = None,
    *,
    capacity: int,
    top_k: int,
    hidden: int,
    dtype: torch.dtype,
    payload_bytes: int | None = None,
    collective: Literal["auto", "reference", "moe_all_to_all"] = "auto",
    workspace_bytes: int = DEFAULT_BYTES,
    device: torch.device | str | None = None,
    check_every_call: bool = False,
    agree_seconds: float = 600.0,
) -> MoePrepared:
    """Choose who carries out the dispatches and combines of a group, make its workspace by vote and test it.

    Every rank must call, before captures, with the same arguments. capacity, top_k: the largest of a call. hidden,
    dtype: of the rows that are combined. payload_bytes: of one token in all payloads, the ids not among them; None is a
    row of ``hidden`` and ``top_k`` weights of four bytes. collective: FlashInfer's one-sided kernels are
    ``"moe_all_to_all"``; ``"auto"`` takes them where they were measured to be faster than NCCL's way.
    workspace_bytes: of each rank at most; it may lower the capacity. device: of the tensors; the current CUDA device
    where the group serves one. check_every_call: ranks compare the capacity, payloads and experts of each eager
    dispatch, and whether one refuses it, before anything is sent, and raise :class:`RankMismatch` where they differ
    (hazard M62): slow, and a rank that does not come is waited for. ``ringfence.close_workspaces(group)`` undoes it.

    Raises :class:`OptionsError`, :class:`GroupError`, :class:`CollectiveUnavailableError`, :class:`RankMismatch` where
    ranks ask for different things, and :class:`WorkspaceError` inside a capture.
    """
    with refused_by_all(group, _CALL, agree_seconds):
        numbers = {"capacity": capacity, "top_k": top_k, "hidden": hidden, "workspace_bytes": workspace_bytes}
        numbers |= {"payload_bytes": payload_bytes} if payload_bytes is not None else {}
        for name, value in numbers.items():
            positive(name, value)
        if dtype not in DTYPES:
            raise OptionsError(f"dtype={dtype!r} is none of {', '.join(map(str, DTYPES))}")
        Options.parse(
            {"moe_collective": collective, "agree_seconds": agree_seconds, "check_every_step": check_every_call}
        )
        name = name_of_group(group)
        on = device_for(name, device)
        if is_capturing(on):
            raise WorkspaceError("prepare was called inside a capture, where nothing may be made; call it before")
        described = describe_group(name, on)
    row = payload_bytes if payload_bytes is not None else hidden * dtype.itemsize + 4 * top_k
    wanted = MoeWanted(collective, needed(row, top_k, hidden * dtype.itemsize, capacity), workspace_bytes)
    ready, channel = _ready(wanted, described, on, agree_seconds, check_every_call)
    workspace, found = ready.workspace, workspaces_of(name)
    found.moe_prepared = workspace
    found.moe_compared = partial(_compared, channel) if check_every_call and channel is not None else None
    return MoePrepared(
        name,
        ready.collective,
        tuple(map(str, ready.candidates)),
        workspace.sizes.capacity if workspace is not None else 0,
        workspace.kernels.nbytes if workspace is not None else 0,
        ready.capture_failure,
    )


def _compared(channel: Channel, call: tuple[tuple[str, str], ...]) -> None:
    calls = channel.exchange("a MoE dispatch", call)
    if len(set(calls)) > 1:
        raise RankMismatch(
            f"the ranks call a dispatch differently: {first_difference(calls, channel.ranks)}; nothing was sent"
        )


def _ready(
    wanted: MoeWanted, described: Group, device: torch.device, agree_seconds: float, check_every_call: bool
) -> tuple[MoeReady, Channel | None]:
    asked = Asked({}, agree_seconds=agree_seconds)
    supervisor = supervisor_for(asked)
    with supervisor.compiling(asked, f"call {_CALL}"), supervisor.compilation():
        channel = supervisor.open([described], device).get(described.name)
        if channel is not None:
            parts = (*wanted.parts, ("check_every_call", str(check_every_call)))
            agree(channel, supervisor.compared(PlanDigest(parts, what=f"arguments of {_CALL}", arguments=True)))
        begin_anew(channel, workspaces_of(described.name))
        return ready_pair(wanted, described, channel, device, supervisor), channel


def local_experts(num_experts: int, group: dist.ProcessGroup | str | None = None) -> range:
    """The numbers of this rank's experts: contiguous blocks, the first ranks' larger by one where there is a rest."""
    positive("num_experts", num_experts)
    found = resolve_group(name_of_group(group))
    ranks, rank = found.size(), found.rank()
    check_num_experts(num_experts, ranks)
    return range(first_expert(rank, num_experts, ranks), first_expert(rank + 1, num_experts, ranks))
