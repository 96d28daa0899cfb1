"""MoE dispatch and combine, as ops that a graph may hold.

    ringfence::moe_dispatch(payloads, topk_ids, capacity, num_experts, empty_id, group, collective)
        -> (received, ids, route, counts)
    ringfence::moe_combine_buffer(route, rows, hidden, dtype, group, collective)
        -> buffer
    ringfence::moe_combine(partial, route, group, collective)
        -> result
    ringfence::moe_combine_into(out, partial, route, group, collective)
        -> nothing; ``out`` is written

payloads: one to five of ``[T, c]``, any dtype; quantised ones travel with their scales, as bytes that nobody reads.
topk_ids: ``[T, k]``, int32 or int64, numbers of experts among ``num_experts`` of all ranks. ``T`` may differ between
ranks, and may be 0. capacity: how many tokens a rank may have at most, from 1 on, and **the same on all ranks in every
call**: it decides where each rank's rows lie in every other's memory.

received: ``[R * capacity, c]`` each, the rows of source rank after source rank, in no order that may be relied on.
ids: ``[R * capacity, k]``; a row that nobody sent has ``empty_id`` in all places, and undefined payloads. So what
reads the rows must look at each by itself. counts: ``[R]`` int32, the rows that each rank sent, which are the first of
its block. With ``empty_id=None`` nobody writes the ids of empty rows, which costs a kernel: they are undefined, for
readers that go by counts or by none. route: ``[T, R]`` int32, opaque: it ties a combine to its dispatch.

partial: ``[R * capacity, H]``, float16, bfloat16 or float32: of each row, the weighted sum over the experts of this
rank; rows that nobody sent are not read. result: ``[T, H]``, the sum over the ranks a token went to, taken in float32
and rounded once. buffer: ``[R * capacity, H]``, undefined, to be written and given as ``partial``; of kernels it is the
memory that peers combine from, so that nothing is copied there.

A dispatch is answered by one combine before the next dispatch of the group, on every rank. All readers of ``received``
and ``counts`` come before that combine, and nothing may be written into them: they may be memory of a workspace. A
buffer is written between the two and at no other time: before this dispatch has ended peers may still read what they
combined last (``protocol/moe_planes.py``). That it is made of the route keeps whoever writes it behind the dispatch.

``collective`` says who carries the pair out: "reference"; "moe_all_to_all", kernels over the group's workspace; or, in
a call that a person wrote, "prepared": the kernels where :func:`ringfence.moe.prepare` has made them ready. A pair
whose capacity is beyond the workspace's is the reference's: that is one number on all ranks, and of both halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capturing import is_capturing
from ..errors import CaptureError, CollectiveUnavailableError, InputError, PoisonedError, RingfenceError
from ..groups import HOST_BACKENDS, describe_group, resolve_group
from ..hazards.situation import Collective
from ..seams import run_between
from ..spelling import group_word
from . import moe_reference as reference
from .moe_checks import check_buffer, check_combine, check_dispatch, check_out
from .moe_one_sided import MoeSizes, id_bytes, unserved
from .no_backward import check_no_grad, without_backward
from .ops import PREPARED
from .workspace import MoeWorkspace, workspaces_of

#: Behind the name of a dispatch's collective: each id is an expert's, as the graph shows or the caller knows, so nobody
#: need clamp it.
KNOWN_IDS = ", known ids"
_WHAT = "a MoE dispatch or combine"


def _ranks(group: str) -> int:
    return int(resolve_group(group).size())


# -- who carries it out ---------------------------------------------------------------------


def _captured(ids: object) -> bool:
    return is_capturing(ids.device if isinstance(ids, Tensor) else torch.device("cpu"))


def _serving(group: str, collective: str, call: MoeSizes, device: torch.device) -> MoeWorkspace | None:
    """The workspace whose kernels carry a call out; None: the reference does. By what all ranks share.

    Raises :class:`InputError` for a call that the workspace was not made for: its other half cannot know of that.
    """
    named = collective.removesuffix(KNOWN_IDS)
    if named == Collective.REFERENCE:
        return None
    workspaces = workspaces_of(group)
    if named == PREPARED:
        found = workspaces.moe_prepared
        if found is not None and workspaces.invalid is not None:
            raise PoisonedError(f"{workspaces.invalid}; call ringfence.moe.prepare on every rank, which begins anew")
    elif named == Collective.MOE_ALL_TO_ALL and workspaces.moe:
        found = workspaces.moe[-1]
    else:
        raise CollectiveUnavailableError(
            f"collective '{named}' cannot carry out a MoE dispatch or combine in this process; use 'reference', on any "
            "process group"
        )
    if found is None or call.capacity > found.sizes.capacity:
        return None
    if device != found.device:
        raise InputError(
            f"the tensors must be on {found.device}, as the workspace of group '{group_word(group)}' is, but "
            f"they are on {device}"
        )
    if why := unserved(found.sizes, call):
        raise InputError(f"{why}; prepare group '{group_word(group)}' for the largest call (ringfence.moe.prepare)")
    return found


# -- the ops -----------------------------------------------------------------------------


def dispatched(
    payloads: Sequence[Tensor],
    topk_ids: Tensor,
    capacity: int,
    num_experts: int,
    empty_id: int | None,
    group: str,
    collective: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """``(received, ids, route, counts)``; see above."""
    payloads = list(payloads)
    ranks, known = _ranks(group), collective.endswith(KNOWN_IDS)
    compared = workspaces_of(group).moe_compared if collective.removesuffix(KNOWN_IDS) == PREPARED else None
    told: tuple[tuple[str, str], ...] = (("refused", "no"),)
    try:
        check_dispatch(payloads, topk_ids, capacity, num_experts, empty_id, ranks)
        row_bytes = sum(p.shape[1] * p.element_size() for p in payloads) + id_bytes(topk_ids.shape[1])
        call = MoeSizes(capacity, row_bytes, 0, topk_ids.shape[1])
        rows = ", ".join(f"{str(p.dtype).removeprefix('torch.')} [{p.shape[1]}]" for p in payloads)
        told += (*call.parts, ("payloads", rows), ("num_experts", str(num_experts)))
        check_no_grad(_WHAT, *payloads)
        workspace = _serving(group, collective, call, topk_ids.device)
    except RingfenceError as error:  # told before it is raised, or the other ranks wait for this one
        why = f"{type(error).__name__}: {error}"
        told = (*told, ("not served", why)) if len(told) > 1 else (("refused", why),)
        raise
    finally:
        if compared is not None and not _captured(topk_ids):
            compared(told)

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        given, asked = operands[:-1], operands[-1]
        if workspace is not None:
            rows, ids, counts = workspace.in_order().dispatch(
                given, asked, capacity, num_experts, empty_id, known=known
            )
            return (*rows, ids, ids.new_empty(asked.shape[0], ranks, dtype=torch.int32), counts)  # kernels keep it
        received, *others = reference.dispatch(given, asked, capacity, num_experts, empty_id, group, ranks)
        return (*received, *others)

    *received, ids, route, counts = _carried(run, "dispatch", group, collective, workspace, *payloads, topk_ids)
    return received, ids, route, counts


def combine_buffer(route: Tensor, rows: int, hidden: int, dtype: torch.dtype, group: str, collective: str) -> Tensor:
    """``[rows, hidden]`` that experts may write for the combine of ``route``, with nothing launched; see above."""
    ranks = _ranks(group)
    check_buffer(route, rows, hidden, dtype, ranks)
    call = MoeSizes(rows // ranks, 0, hidden * dtype.itemsize, 1)
    workspace = _serving(group, collective, call, route.device)
    if workspace is None:
        return route.new_empty(rows, hidden, dtype=dtype)
    return workspace.kernels.combine_rows(rows, hidden, dtype)


def combined(partial: Tensor, route: Tensor, group: str, collective: str) -> Tensor:
    """``[T, H]``; see above."""
    workspace = _answering(partial, route, group, collective)
    check_no_grad(_WHAT, partial)

    def run(partial: Tensor, route: Tensor) -> tuple[Tensor, ...]:
        if workspace is None:
            return (reference.combine(partial, route, group),)
        out = partial.new_empty(route.shape[0], partial.shape[1])
        workspace.in_order().combine(partial, out)
        return (out,)

    result: Tensor = _carried(run, "combine", group, collective, workspace, partial, route)[0]
    return result


def combined_into(out: Tensor, partial: Tensor, route: Tensor, group: str, collective: str) -> None:
    """:func:`combined`, into memory of the caller's ``[T, H]``."""
    workspace = _answering(partial, route, group, collective)
    check_out(out, partial, route)
    check_no_grad(_WHAT, out, partial)

    def run(out: Tensor, partial: Tensor, route: Tensor) -> tuple[Tensor, ...]:
        if workspace is None:
            out.copy_(reference.combine(partial, route, group))
        else:
            workspace.in_order().combine(partial, out)
        return ()

    _carried(run, "combine", group, collective, workspace, out, partial, route)


def _answering(partial: Tensor, route: Tensor, group: str, collective: str) -> MoeWorkspace | None:
    """Who has the other half of a combine, once its arguments are found to be right."""
    ranks = _ranks(group)
    check_combine(partial, route, ranks)
    call = MoeSizes(partial.shape[0] // ranks, 0, partial.shape[1] * partial.element_size(), 1)
    return _serving(group, collective, call, partial.device)


def _carried(
    run: Callable[..., tuple[Tensor, ...]],
    what: str,
    group: str,
    collective: str,
    workspace: MoeWorkspace | None,
    *operands: Tensor,
) -> tuple[Any, ...]:
    """``run(*operands)``, as a capture that somebody else makes allows it.

    Kernels keep their epoch on the device, and NCCL's is stream work of equal parts: both are captured. What the host
    carries out, and kernels that failed when captured, runs between two segments of the capture, else it is refused.
    """
    device = operands[-1].device
    spoken = collective.removesuffix(KNOWN_IDS) in (Collective.REFERENCE, Collective.MOE_ALL_TO_ALL)  # its judge has
    if spoken or not is_capturing(device):
        return run(*operands)
    why = workspace.capture_failure if workspace is not None else None
    if workspace is None and (backend := describe_group(group, device).backend) in HOST_BACKENDS:
        why = (
            f"the collectives of group '{group_word(group)}' run on the host over {backend}, and a replay would not "
            "run them again"
        )
    if why is None:
        return run(*operands)
    between = run_between(functools.partial(run), operands, device)
    if between is not None:
        return between
    raise CaptureError(
        f"a MoE {what} was called inside a capture that must not hold it: {why}. Capture without it, or in segments "
        "between which it runs (vLLM's and SGLang's breakable graphs)"
    )


# -- registration ---------------------------------------------------------------------------


def _fake_dispatch(
    payloads: Sequence[Tensor],
    topk_ids: Tensor,
    capacity: int,
    num_experts: int,
    empty_id: int | None,
    group: str,
    collective: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    ranks = _ranks(group)
    rows = ranks * capacity
    received = [payload.new_empty(rows, payload.shape[1]) for payload in payloads]
    route = topk_ids.new_empty(topk_ids.shape[0], ranks, dtype=torch.int32)
    return received, topk_ids.new_empty(rows, topk_ids.shape[1]), route, reference.counts_like(route)


def _fake_combine(partial: Tensor, route: Tensor, group: str, collective: str) -> Tensor:
    return partial.new_empty(route.shape[0], partial.shape[1])


def _register(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], schema: str, writes: tuple[str, ...] = ()
) -> Any:
    op = torch.library.custom_op(f"ringfence::{name}", run, mutates_args=writes, schema=schema)
    op.register_fake(fake)
    if not writes:
        without_backward(op, _WHAT)
    return getattr(torch.ops.ringfence, name).default


moe_dispatch = _register(
    "moe_dispatch",
    dispatched,
    _fake_dispatch,
    "(Tensor[] payloads, Tensor topk_ids, SymInt capacity, int num_experts, int? empty_id, str group, str collective) "
    "-> (Tensor[] received, Tensor ids, Tensor route, Tensor counts)",
)
moe_combine_buffer = _register(
    "moe_combine_buffer",
    combine_buffer,
    lambda route, rows, hidden, dtype, group, collective: route.new_empty(rows, hidden, dtype=dtype),
    "(Tensor route, SymInt rows, int hidden, ScalarType dtype, str group, str collective) -> Tensor",
)
moe_combine = _register(
    "moe_combine",
    combined,
    _fake_combine,
    "(Tensor partial, Tensor route, str group, str collective) -> Tensor",
)
moe_combine_into = _register(
    "moe_combine_into",
    combined_into,
    lambda out, partial, route, group, collective: None,
    "(Tensor(a!) out, Tensor partial, Tensor route, str group, str collective) -> ()",
    ("out",),
)

#: The two halves of an all-to-all, the second in its two forms.
COMBINES = (moe_combine, moe_combine_into)
MOE_OPS = (moe_dispatch, *COMBINES)
