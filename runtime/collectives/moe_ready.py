"""MoeReady: who carries out the dispatches and combines of a group, made ready by vote before the first of them.

facts of all ranks -> fits, is worth it -> workspace by vote -> self-test by vote; the reference where one says no.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..channel import Channel
from ..errors import CollectiveUnavailableError, PeerFailedError
from ..groups import Group
from ..hazards.catalogue import applicable
from ..hazards.hazard import Action
from ..hazards.situation import Collective, Situation
from ..spelling import group_word
from . import flashinfer, moe_one_sided
from .choice import Considered
from .group_facts import facts_of_all, with_copies
from .moe_one_sided import MoeSizes, compiled_top_k, id_bytes, within
from .moe_self_test import self_test
from .rank_facts import RankFacts, facts_of_group, linked, numbered, topology_of
from .size_table import MOE_TABLE, MoeRow, find_moe_row
from .workspace import MOE_WAY, MoeWorkspace, Workspaces, workspaces_of

MOE, REFERENCE = str(Collective.MOE_ALL_TO_ALL), str(Collective.REFERENCE)
DEFAULT_BYTES = 512 << 20


@dataclass(frozen=True)
class MoeWanted:
    """What the user and the graph ask for. Equal on all ranks, or the channel says that it is not.

    collective: "auto", or who is insisted on. sizes: the largest calls. limit: bytes of each rank's memory.
    capture: whether calls will be captured. table: where kernels are worth it, for "auto".
    """

    collective: str
    sizes: MoeSizes
    limit: int = DEFAULT_BYTES
    capture: bool = True
    table: tuple[MoeRow, ...] = MOE_TABLE

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """What must be equal on all ranks, for people."""
        rows = hashlib.sha256(repr(self.table).encode()).hexdigest()[:8]
        asked = {"moe_collective": self.collective, "moe_workspace_bytes": self.limit, "captured": self.capture}
        asked |= {"size_table": rows}
        return (*((name, str(value)) for name, value in asked.items()), *self.sizes.parts)


@dataclass(frozen=True)
class MoeReady:
    """Who carries dispatch and combine out, with what the hazard table is asked. ``workspace``: None for the reference.

    candidates: what was considered. capture_failure: why calls must not be captured, though they run eagerly.
    """

    collective: str
    situation: Situation
    candidates: tuple[Considered, ...] = ()
    workspace: MoeWorkspace | None = None
    capture_failure: str | None = None


def needed(payload_bytes: int, top_k: int, combine_bytes: int, capacity: int) -> MoeSizes:
    """What a pair needs. payload_bytes: of a token in all payloads, its ids not among them."""
    row_bytes = max(payload_bytes, 16) + id_bytes(top_k)  # the self-test sends numbers, however narrow the rows are
    return MoeSizes(max(capacity, 1), row_bytes, combine_bytes, top_k)


def reference_pair(world_size: int, why_no_other: str | None = None) -> MoeReady:
    """The reference, which needs nothing. why_no_other: why the kernels do not."""
    others = (Considered(*MOE_WAY, why_no_other),) if why_no_other is not None else ()
    situation = Situation(Collective.REFERENCE, world_size=world_size)
    return MoeReady(REFERENCE, situation, (*others, Considered(REFERENCE, None, None)))


def prepare_moe(channel: Channel, group: Group, device: torch.device, wanted: MoeWanted) -> MoeReady:
    """Decide, create and test for a group of CUDA devices. Every rank must call, outside of captures.

    Raises :class:`CollectiveUnavailableError` where the user insists on kernels that cannot be had,
    :class:`RankMismatch` where the ranks want different things (hazard M62 among them), and :class:`WorkspaceError`
    where what a failure left behind cannot be given back.
    """
    workspaces = workspaces_of(group.name)
    try:
        ranks = facts_of_all(channel, device, wanted, workspaces)
    except PeerFailedError as error:
        return without_kernels(wanted.collective, group, str(error))
    ranks, _ = with_copies(channel, device, ranks, wanted, workspaces)
    ranks = numbered(ranks, channel.ranks)
    row = find_moe_row(wanted.table, ranks[0].capability, len(ranks), topology_of(ranks))
    if why := workspaces.failed.get(MOE_WAY) or _why_not(ranks, wanted, row):
        return without_kernels(wanted.collective, group, why)
    sizes = wanted.sizes
    if row is not None and wanted.collective == "auto":
        sizes = dataclasses.replace(sizes, capacity=min(sizes.capacity, row.most))
    for earlier in workspaces.moe:  # a call takes the last workspace, so that serves what any of them does
        sizes |= earlier.sizes
    fitting = within(sizes, len(ranks), wanted.limit)
    if fitting is None:
        return without_kernels(
            wanted.collective, group, f"moe_workspace_bytes={wanted.limit} does not hold the rows of one token"
        )
    workspace = workspaces.moe[-1] if workspaces.moe and workspaces.moe[-1].device == device else None
    if workspace is None or not workspace.sizes.covers(fitting):
        situation = situation_of(ranks, part_of_world=group.size < torch.distributed.get_world_size())
        made = workspaces.create(channel, lambda: _make(channel, device, fitting, situation), *MOE_WAY)
        if made.workspace is None:
            return without_kernels(wanted.collective, group, str(made.failure))
        workspace = made.workspace
    if not workspace.tested or (wanted.capture and not workspace.captures_tested):
        why = _tested(workspaces, workspace, channel, wanted)
        if why is not None:
            return without_kernels(wanted.collective, group, why)
    return ready_by(workspace)


def ready_by(workspace: MoeWorkspace) -> MoeReady:
    """That a workspace's kernels do it."""
    chosen = (Considered(*MOE_WAY, None),)
    return MoeReady(MOE, workspace.situation, chosen, workspace, workspace.capture_failure)


def without_kernels(wanted: str, group: Group, why: str | None) -> MoeReady:
    """The reference, and why. wanted: the collective that was asked for; raises where that was the kernels'."""
    if wanted == MOE and why is not None and group.size > 1:
        raise CollectiveUnavailableError(
            f"moe_collective='{MOE}' cannot be had over group '{group_word(group.name)}': {why}; leave it 'auto' to "
            "fall back"
        )
    return reference_pair(group.size, why)


def _why_not(ranks: Sequence[RankFacts], wanted: MoeWanted, row: MoeRow | None) -> str | None:
    if wanted.collective == REFERENCE:
        return "moe_collective='reference'"
    if unfit := moe_one_sided.unfit(ranks):
        return unfit
    if compiled_top_k(wanted.sizes.top_k) is None:
        return f"{wanted.sizes.top_k} experts of a token are more than any kernel was compiled for (hazard M66)"
    if wanted.collective == "auto":
        major, minor = ranks[0].capability
        gpus = f"{len(ranks)} GPUs of SM{major}{minor}"
        if row is None:
            return (
                f"not measured on {gpus} linked by {linked(ranks)}: measure with `ringfence bench --moe`, or force it "
                f"by moe_collective='{MOE}'"
            )
        if not row.most:
            return f"slower on {gpus} at every size ({row.source})"
    for hazard in applicable(situation_of(ranks)):
        if hazard.decides is Action.REFUSE:
            return f"{hazard.id}, {hazard.title.lower()}: {hazard.remedy}"
    return None


def _make(channel: Channel, device: torch.device, sizes: MoeSizes, situation: Situation) -> MoeWorkspace:
    return MoeWorkspace(moe_one_sided.create(flashinfer.installed(), channel, sizes), device, situation)


def _tested(workspaces: Workspaces, workspace: MoeWorkspace, channel: Channel, wanted: MoeWanted) -> str | None:
    """Why it is retired; None where it stays."""
    result = self_test(workspace, channel, capture=wanted.capture)
    if result.eager is not None:
        workspaces.retire(workspace, channel, f"its self-test failed: {result.eager}")
        return f"its self-test failed: {result.eager}"
    workspace.tested, workspace.captures_tested = True, workspace.captures_tested or wanted.capture
    if result.captured is not None:
        workspace.capture_failure = f"its self-test failed: {result.captured}"
    return None


def situation_of(ranks: Sequence[RankFacts], *, part_of_world: bool = False) -> Situation:
    """The calls in the words of the hazard table. PDL is off, ranks agree on the capacity, and the memory is ours."""
    return Situation(
        Collective.MOE_ALL_TO_ALL,
        ranks[0].flashinfer,
        len(ranks),
        nodes=len({facts.host for facts in ranks}),
        capability=ranks[0].capability,
        facts=facts_of_group(ranks, part_of_world),
    )
