"""ReadyCollective: who carries out the fused sites of a graph, made ready before the graph is fused.

probe -> choose -> create the workspace by vote -> self-test by vote

A candidate that fails is passed over for the next, on every rank, and is not tried again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..channel import Channel
from ..errors import CollectiveUnavailableError, PeerFailedError
from ..groups import Group, resolve_group
from ..hazards.situation import Fact, Situation, Strategy
from . import table as collectives
from .choice import Choice, Considered, choose
from .group_facts import facts_of_all, with_copies
from .kernels import Implementation, KernelCall
from .rank_facts import RankFacts, facts_of_group
from .reference import IMPLEMENTATION as REFERENCE
from .self_test import self_test
from .size_table import TABLE, SizeRow
from .tested import EVERY_OPERANDS, Operands, SelfTest, Tested
from .workspace import Workspace, Workspaces, workspaces_of

#: Token counts of the self-test, beside those that will be captured.
_TESTED_TOKENS = (1, 4, 32)
_MOST_TESTED = 8


@dataclass(frozen=True)
class Wanted:
    """What the user and the graph ask for. Equal on all ranks but for ``wait_seconds``, or the channel says so.

    hidden: the largest hidden size of the sites. dtype: that of most sites. sizes: the token counts that will be
    captured. other_dtypes: what else is summed in the group; served where the same memory can and a self-test passes.
    max_tokens: the largest token count to serve; None leaves it to the size table. wait_seconds: how long a kernel
    waits for a peer, where its waits have an end. operands: of the sites of all ranks; every one, where none is known.
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
    operands: tuple[Operands, ...] = EVERY_OPERANDS
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
    request = _Request(channel, group, device, wanted, workspaces_of(group.name))
    try:
        ranks = facts_of_all(channel, device, wanted, request.workspaces)
    except PeerFailedError as error:
        if wanted.collective != "auto" or wanted.deterministic:
            raise CollectiveUnavailableError(f"collective='{wanted.collective}' cannot be had: {error}") from error
        return reference_collective(group.size, str(error), wanted)
    ranks, notes = with_copies(channel, device, ranks, wanted, request.workspaces)
    unfit: dict[tuple[str, str | None], str] = {}  # of these sites, and not of the group
    while True:
        choice = choose(
            ranks,
            wanted=wanted.collective,
            transport=wanted.transport,
            deterministic=wanted.deterministic,
            dtype=_name(wanted.dtype),
            table=wanted.table,
            failed=unfit | request.workspaces.failed,
            numbers=channel.ranks,
            among=among,
        )
        if choice.row is None:
            situation = situation_of(choice, ranks, dtype=_name(wanted.dtype))
            notes = (*notes, *_meaningless(wanted))
            return ReadyCollective(choice.collective, situation, choice.candidates, notes=notes)
        tested = _try(request, choice, unfit)
        if tested is not None:
            return _ready(request, choice, ranks, tested, notes)


@dataclass(frozen=True)
class _Request:
    """workspaces: of the group, with what was made and tried there before."""

    channel: Channel
    group: Group
    device: torch.device
    wanted: Wanted
    workspaces: Workspaces


@dataclass(frozen=True)
class _TestedWorkspace:
    """results: by dtype; the wanted one's calls run, and each other that does not is the reference's."""

    workspace: Workspace
    results: dict[torch.dtype, SelfTest]


def _try(request: _Request, choice: Choice, unfit: dict[tuple[str, str | None], str]) -> _TestedWorkspace | None:
    """The workspace of a candidate, found or made, with its test. None: it is passed over, as ``unfit`` or the group's
    workspaces say from now on. Every rank must call.
    """
    wanted, channel, workspaces = request.wanted, request.channel, request.workspaces
    assert choice.row is not None
    way, limit = (choice.collective, choice.transport), capacity(choice.row, wanted)
    call = KernelCall(1, wanted.hidden, wanted.dtype, request.group.size, Strategy.ONE_SHOT)
    if requirement := choice.implementation.unmet(call):
        unfit[way] = f"hidden size {wanted.hidden} of {wanted.dtype}: {requirement.message} ({requirement.source})"
        return None
    _check_alone(workspaces, choice, request.group)
    found = workspaces.find(choice.collective, request.device, wanted.dtype, limit)
    workspace = found or workspaces.create(channel, lambda: _make(request, choice, limit), *way).workspace
    if workspace is None:
        return None
    result = _tested(workspace, channel, wanted, wanted.dtype, limit)
    if result.eager is None:
        others = _others_tested(workspace, channel, wanted, limit)
        return _TestedWorkspace(workspace, {wanted.dtype: result, **others})
    why_not = f"its self-test failed: {result.eager}"
    if found is not None:  # with graphs that were captured over it, and for whose calls it passed
        unfit[way] = why_not
    else:
        workspaces.retire(workspace, channel, why_not)
    return None


def _ready(
    request: _Request, choice: Choice, ranks: Sequence[RankFacts], tested: _TestedWorkspace, notes: tuple[str, ...]
) -> ReadyCollective:
    results, wanted = tested.results, request.wanted
    captured = next((r.captured for r in results.values() if r.captured), None)
    situation = situation_of(
        choice,
        ranks,
        dtype=_name(wanted.dtype),
        sizes=wanted.sizes,
        part_of_world=request.group.size < torch.distributed.get_world_size(),
        largest=tested.workspace.largest,
    )
    left = (f"calls of {dtype} are carried out by the reference: {r.eager}" for dtype, r in results.items() if r.eager)
    return ReadyCollective(
        choice.collective,
        situation,
        choice.candidates,
        tested.workspace,
        f"its self-test failed: {captured}" if captured else None,
        (*notes, *left),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    key = Tested(wanted.hidden, dtype, tuple(chosen), bool(wanted.sizes), wanted.operands, wanted.alone)
    if key not in workspace.tested:
        result = self_test(workspace, channel, *key[:3], capture=key.capture, operands=key.operands, alone=key.alone)
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


def _make(request: _Request, choice: Choice, limit: int) -> Workspace:
    one, wanted, group, device = choice.implementation, request.wanted, request.group, request.device
    assert choice.row is not None and one.make is not None
    tokens = limit // (wanted.hidden * wanted.dtype.itemsize)
    kernels = one.make(request.channel, resolve_group(group.name, device), tokens, wanted.hidden, wanted.dtype)
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
