"""ReadyCollective: who carries out the fused sites of a graph, made ready before the graph is fused.

probe -> choose -> create the workspace by vote -> self-test by vote

A candidate that fails is passed over for the next, on every rank, and is not tried again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..channel import Channel, failures_text, first_difference
from ..errors import CollectiveUnavailableError, PeerFailedError, RankMismatch
from ..groups import Group, resolve_group
from ..hazards.situation import Fact, Situation, Strategy
from . import table as collectives
from .choice import Choice, Considered, choose
from .kernels import Implementation, KernelCall
from .links import FULL
from .peer_copy import CudaMemory, try_copies
from .rank_facts import RankFacts, facts_of_group, peers_out_of_reach, probe, topology_of
from .reference import IMPLEMENTATION as REFERENCE
from .self_test import self_test
from .size_table import TABLE, SizeRow
from .workspace import FORMS, Form, SelfTest, Tested, Workspace, Workspaces, workspaces_of

#: Token counts of the self-test, beside those that will be captured.
_TESTED_TOKENS = (1, 4, 32)
_MOST_TESTED = 8


class WantedOfAll(Protocol):
    """What a collective is wanted for: by what name, and what must be equal on all ranks."""

    @property
    def collective(self) -> str: ...
    @property
    def parts(self) -> tuple[tuple[str, str], ...]: ...


@dataclass(frozen=True)
class Wanted:
    """What the user and the graph ask for. Equal on all ranks but for ``wait_seconds``, or the channel says so.

    hidden: the largest hidden size of the sites. dtype: that of most sites. sizes: the token counts that will be
    captured. other_dtypes: what else is summed in the group; served where the same memory can and a self-test passes.
    max_tokens: the largest token count to serve; None leaves it to the size table. wait_seconds: how long a kernel
    waits for a peer, where its waits have an end. forms: of the sites of all ranks; every one, where none is known.
    alone: also for all-reduces that nothing follows.
    """

    collective: str
    transport: str
    hidden: int
    dtype: torch.dtype
    sizes: tuple[int, ...] = ()
    max_tokens: int | None = None
    deterministic: bool = False
    table: tuple[SizeRow, ...] = TABLE
    other_dtypes: tuple[torch.dtype, ...] = ()
    wait_seconds: float = 30.0
    forms: tuple[Form, ...] = FORMS
    alone: bool = True

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """What must be equal on all ranks, for people."""
        rows = hashlib.sha256(repr(self.table).encode()).hexdigest()[:8]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"table": rows}
        del fields["wait_seconds"]  # how long a rank waits is its own affair
        return tuple((name, str(value)) for name, value in fields.items())


@dataclass(frozen=True)
class ReadyCollective:
    """A collective that is ready. ``workspace`` is None for the reference.

    situation: what the hazard table is asked about. capture_failure: why its calls must not be
    captured, though they run eagerly. candidates: everything that was considered. notes: what the user should know.
    """

    collective: str
    situation: Situation
    candidates: tuple[Considered, ...] = ()
    workspace: Workspace | None = None
    capture_failure: str | None = None
    notes: tuple[str, ...] = ()


def reference_collective(
    world_size: int, why_no_other: str | None = None, wanted: Wanted | None = None
) -> ReadyCollective:
    """The reference collective, which needs nothing. wanted: what was asked for, of which some means nothing here."""
    others = {one.name: None for one in collectives.ALL if one.make is not None} if why_no_other is not None else {}
    candidates = (*(Considered(c, None, why_no_other) for c in others), Considered(REFERENCE.name, None, None))
    situation = Situation(REFERENCE.name, world_size=world_size)
    notes = _meaningless(wanted) if wanted is not None else ()
    return ReadyCollective(REFERENCE.name, situation, candidates, notes=notes)


def _meaningless(wanted: Wanted) -> tuple[str, ...]:
    """Which options of a workspace were given, where there is none."""
    given = {
        "max_tokens": wanted.max_tokens is not None,
        "transport": wanted.transport != "auto",
        "size_table": wanted.table != TABLE,
    }
    named = [name for name, is_given in given.items() if is_given]
    if not named:
        return ()
    return (f"{' and '.join(named)} mean{'s' if len(named) == 1 else ''} nothing to the reference collective",)


def why_reference_only(group: Group, device: torch.device) -> str | None:
    """Why no fused kernel could serve this group, whatever is installed."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the fused kernels run on CUDA"
    if group.backend != "nccl":
        return f"the group's backend is {group.backend}, and the fused kernels are for groups of CUDA devices (nccl)"
    return f"the group has {group.size} rank" if group.size < 2 else None


def prepare(
    channel: Channel,
    group: Group,
    device: torch.device,
    wanted: Wanted,
    among: Sequence[Implementation] | None = None,
) -> ReadyCollective:
    """Choose, create and test a collective for a group of CUDA devices. Every rank must call.

    channel: among the ranks of the group. among: in place of all collectives, in order of preference.
    Raises :class:`CollectiveUnavailableError` where the user
    insists on one that cannot be had, :class:`RankMismatch` where the ranks want different things,
    and :class:`WorkspaceError` where workspaces that a failure left behind cannot be given back.
    """
    workspaces = workspaces_of(group.name)
    try:
        ranks = facts_of_all(channel, device, wanted, workspaces)
    except PeerFailedError as error:
        if wanted.collective != "auto" or wanted.deterministic:
            raise CollectiveUnavailableError(f"collective='{wanted.collective}' cannot be had: {error}") from error
        return reference_collective(group.size, str(error), wanted)
    ranks, notes = with_copies(channel, device, ranks, wanted, workspaces)
    dtype = str(wanted.dtype).removeprefix("torch.")
    unfit: dict[tuple[str, str | None], str] = {}  # of these sites, and not of the group
    while True:
        choice = choose(
            ranks,
            wanted=wanted.collective,
            transport=wanted.transport,
            deterministic=wanted.deterministic,
            dtype=dtype,
            table=wanted.table,
            failed=unfit | workspaces.failed,
            numbers=channel.ranks,
            among=among,
        )
        if choice.row is None:
            situation = situation_of(choice, ranks, dtype=dtype)
            return ReadyCollective(
                choice.collective, situation, choice.candidates, notes=(*notes, *_meaningless(wanted))
            )
        way = (choice.collective, choice.transport)
        limit = capacity(choice.row, wanted)
        call = KernelCall(1, wanted.hidden, wanted.dtype, group.size, Strategy.ONE_SHOT)
        if requirement := choice.implementation.unmet(call):
            unfit[way] = f"hidden size {wanted.hidden} of {wanted.dtype}: {requirement.message} ({requirement.source})"
            continue
        _check_alone(workspaces, choice, group)
        workspace = workspaces.find(choice.collective, device, wanted.dtype, limit)
        shared = workspace is not None
        if workspace is None:
            made = workspaces.create(
                channel,
                lambda choice=choice, limit=limit: _make(group, channel, device, choice, wanted, limit),  # type: ignore[misc]
                *way,
            )
            if made.workspace is None:
                continue
            workspace = made.workspace
        result = _tested(workspace, channel, wanted, wanted.dtype, limit)
        if result.eager is not None:
            why_not = f"its self-test failed: {result.eager}"
            if shared:  # with graphs that were captured over it, and for whose calls it passed
                unfit[way] = why_not
            else:
                workspaces.retire(workspace, channel, why_not)
            continue
        others = _others_tested(workspace, channel, wanted, limit)
        captured = next((r.captured for r in (result, *others.values()) if r.captured), None)
        part_of_world = group.size < torch.distributed.get_world_size()
        return ReadyCollective(
            choice.collective,
            situation_of(
                choice,
                ranks,
                dtype=dtype,
                sizes=wanted.sizes,
                part_of_world=part_of_world,
                largest=workspace.largest,
            ),
            choice.candidates,
            workspace,
            f"its self-test failed: {captured}" if captured else None,
            (
                *notes,
                *(
                    f"calls of {dtype} are carried out by the reference: {r.eager}"
                    for dtype, r in others.items()
                    if r.eager
                ),
            ),
        )


def facts_of_all(
    channel: Channel, device: torch.device, wanted: WantedOfAll | None = None, workspaces: Workspaces | None = None
) -> list[RankFacts]:
    """What every rank knows of itself, by rank; invalid workspaces of the group are given back on the way.

    wanted: what has to be the same on all. Every rank must call. Raises :class:`PeerFailedError` where one cannot
    tell, :class:`RankMismatch` where they want different things.
    """
    facts: RankFacts | str
    try:
        facts = probe(device)
    except Exception as error:  # the others are told, instead of left waiting
        facts = f"{type(error).__name__}: {error}"
    mine = wanted.parts if wanted is not None else ()
    answers = channel.exchange("facts of each rank", (facts, mine, workspaces.invalid if workspaces else None))
    asked = [parts for _, parts, _ in answers]
    if len(set(asked)) > 1:
        raise RankMismatch(f"the ranks want different collectives: {first_difference(asked, channel.ranks)}")
    if workspaces is not None and (invalid := next((why for _, _, why in answers if why is not None), None)):
        workspaces.discard(channel, invalid)
    failures = tuple(
        (rank, why) for rank, (why, _, _) in zip(channel.ranks, answers, strict=True) if isinstance(why, str)
    )
    if failures:
        raise PeerFailedError(failures_text(failures), failures)
    return [facts for facts, _, _ in answers]


def with_copies(
    channel: Channel, device: torch.device, ranks: Sequence[RankFacts], wanted: WantedOfAll, workspaces: Workspaces
) -> tuple[list[RankFacts], tuple[str, ...]]:
    """The facts with what copies between all pairs brought, and notes. Tried once for each group.

    Not where NCCL was told to keep off peer memory and no kernel would use it either: a copy may hang the device.
    """
    linked = topology_of(ranks) in FULL or wanted.collective not in ("auto", "reference")
    told_off = any(facts.nccl_p2p_off for facts in ranks) and not linked
    if device.type != "cuda" or told_off or peers_out_of_reach(ranks) is not None:
        return list(ranks), ()
    if workspaces.copies is None:
        workspaces.copies = try_copies(channel, CudaMemory)
    copies = workspaces.copies
    if copies.untried is not None:
        return list(ranks), (f"copies between the ranks' memories could not be tried: {copies.untried}",)
    if not copies.lost:
        return list(ranks), ()
    note = (
        f"peer memory does not work here: {copies.lost[0]}. NCCL uses it too and may hang or corrupt: set "
        "NCCL_P2P_DISABLE=1, or turn PCIe access control (ACS) off (hazard M51)"
    )
    return [dataclasses.replace(facts, lost=copies.lost) for facts in ranks], (note,)


def _check_alone(workspaces: Workspaces, choice: Choice, group: Group) -> None:
    """A graph names the collective, not how it travels and up to which size: a group has one way for each."""
    for other in workspaces.open:
        if other.collective == choice.collective and other.row != choice.row:
            raise CollectiveUnavailableError(
                f"{choice.collective} over {choice.transport} was asked for, and the group uses it over "
                f"{other.transport}{', by another size table' if other.transport == choice.transport else ''}; "
                f"close that first: ringfence.close_workspaces('{group.name}')"
            )


def _tested(workspace: Workspace, channel: Channel, wanted: Wanted, dtype: torch.dtype, limit: int) -> SelfTest:
    """The result of the self-test, which graphs that want the same of a workspace share."""
    most = max(limit // (wanted.hidden * dtype.itemsize), 1)
    fewest = sorted({*wanted.sizes, *_TESTED_TOKENS})[: _MOST_TESTED - 1]
    changes = (n for n in workspace.implementation.changes_at if n <= most)
    chosen = sorted({*fewest, *changes, most})
    key = Tested(wanted.hidden, dtype, tuple(chosen), bool(wanted.sizes), wanted.forms, wanted.alone)
    if key not in workspace.tested:
        result = self_test(workspace, channel, *key[:3], capture=key.capture, forms=key.forms, alone=key.alone)
        workspace.tested[key] = result
        if result.eager is None:
            workspace.passed.add(dtype)
    return workspace.tested[key]


def _others_tested(workspace: Workspace, channel: Channel, wanted: Wanted, limit: int) -> dict[torch.dtype, SelfTest]:
    """The results for the other dtypes; one that fails is left to the reference, on every rank."""
    found = {}
    for dtype in wanted.other_dtypes:
        call = KernelCall(1, wanted.hidden, dtype, workspace.world_size, Strategy.ONE_SHOT)
        if dtype not in workspace.dtypes:
            found[dtype] = SelfTest(f"the workspace of {workspace.collective} is for {wanted.dtype}", None, 0)
        elif requirement := workspace.implementation.unmet(call):
            found[dtype] = SelfTest(f"{requirement.message} ({requirement.source})", None, 0)
        else:
            found[dtype] = _tested(workspace, channel, wanted, dtype, limit)
    return found


def capacity(row: SizeRow, wanted: Wanted) -> int:
    """Bytes of the largest call to serve: what the table says is worth it, within what the user allows."""
    row_bytes = wanted.hidden * wanted.dtype.itemsize
    limit = row.one_shot if wanted.deterministic else row.fused
    if wanted.max_tokens is not None:
        if wanted.deterministic and wanted.max_tokens * row_bytes > limit:
            raise CollectiveUnavailableError(
                f"deterministic=True: max_tokens={wanted.max_tokens} is beyond the {limit // row_bytes} tokens that "
                f"one strategy of {row.collective} serves here, and another would not return the same bits"
            )
        limit = min(limit, wanted.max_tokens * row_bytes)
    return max(limit // row_bytes, 1) * row_bytes


def _make(
    group: Group, channel: Channel, device: torch.device, choice: Choice, wanted: Wanted, limit: int
) -> Workspace:
    one = choice.implementation
    assert choice.row is not None and one.make is not None
    tokens = limit // (wanted.hidden * wanted.dtype.itemsize)
    kernels = one.make(channel, resolve_group(group.name, device), tokens, wanted.hidden, wanted.dtype)
    dtypes = one.dtypes(wanted.dtype)
    workspace = Workspace(one, choice.row, kernels, device, group.size, limit, dtypes)
    workspace.wait_for(wanted.wait_seconds)
    return workspace


def situation_of(
    choice: Choice,
    ranks: Sequence[RankFacts],
    *,
    dtype: str,
    sizes: Sequence[int] = (),
    part_of_world: bool = False,
    largest: int | None = None,
) -> Situation:
    """The plan in the words of the hazard table.

    sizes: those to capture. part_of_world: there are other ranks. largest: bytes of the largest call that its
    workspace serves; None is what the size table says.
    """
    nodes = len({facts.host for facts in ranks})
    if choice.row is None:
        return Situation(
            choice.collective,
            world_size=len(ranks),
            nodes=nodes,
            capability=ranks[0].capability,
        )
    one_strategy = choice.row.one_shot >= (choice.row.fused if largest is None else largest)
    facts = choice.implementation.facts | facts_of_group(ranks, part_of_world)
    if not one_strategy:
        facts |= {Fact.STRATEGIES_SHARE_WORKSPACE}
    if len(sizes) > 1:
        facts |= {Fact.GRAPHS_DIFFER_IN_SIZE}
    return Situation(
        choice.collective,
        ranks[0].flashinfer,
        len(ranks),
        nodes=nodes,
        capability=ranks[0].capability,
        # The peer transport uses no multicast, so whether there is any does not matter.
        multicast=True if choice.transport == "multicast" else None,
        strategy=Strategy.ONE_SHOT if one_strategy else None,
        dtype=dtype,
        facts=frozenset(facts),
    )
