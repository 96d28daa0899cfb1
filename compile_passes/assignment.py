"""Assignment: who carries out what of a graph, by the group over which it runs.

Made once, before the graph is fused, and read by every stage after that: the judge asks it about a site's collective,
the model about the calls of each group, ranks compare it, the report prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..runtime.collectives.moe_ready import MoeReady
from ..runtime.collectives.ready import ReadyCollective
from ..runtime.collectives.workspace import Workspace, workspaces_of
from ..runtime.groups import Group
from ..runtime.hazards.situation import Collective, Fact, Situation


@dataclass(frozen=True)
class Assignment:
    """From a process group to the collective that carries out its fused sites.

    groups: those of all collectives of the graph, by first use, an order that all ranks have. ready: who carries out
    the fused sites of a group that has some. planned: what they are judged as, where the plan is for another machine
    than this one. nccl: what the hazard table is asked about a collective that NCCL carries out in a piece. moe: who
    carries out the dispatches and combines of a group that has some.
    """

    groups: Mapping[str, Group] = field(default_factory=dict)
    ready: Mapping[str, ReadyCollective] = field(default_factory=dict)
    planned: Situation | None = None
    nccl: Situation | None = None
    moe: Mapping[str, MoeReady] = field(default_factory=dict)

    def situation(self, group: str | None) -> Situation | None:
        """What the hazard table is asked about the fused sites of a group; None: nothing, the reference has them."""
        if self.planned is not None:
            return self.planned
        return self.ready[group].situation if group is not None and group in self.ready else None

    def moe_situation(self, group: str | None) -> Situation | None:
        """The same of the dispatches and combines of a group."""
        if self.planned is not None:
            return self.planned if self.planned.collective == Collective.MOE_ALL_TO_ALL else None
        ready = self.moe.get(group) if group is not None else None
        return ready.situation if ready is not None and ready.workspace is not None else None

    def collective(self, group: str | None) -> str:
        """What the fused sites of a group are judged as."""
        situation = self.situation(group)
        return situation.collective if situation is not None else Collective.REFERENCE

    def capture_failure(self, group: str | None, *, moe: bool = False) -> str | None:
        """Why the collective of a group must not be captured, though it runs. moe: that of its dispatches."""
        carrier = (self.moe if moe else self.ready).get(group) if group is not None else None
        return carrier.capture_failure if carrier is not None else None

    def backend(self, group: str | None) -> str | None:
        return self.groups[group].backend if group is not None and group in self.groups else None

    @property
    def names(self) -> dict[str, str]:
        """What fused ops are told about who carries them out, by group."""
        return {group: ready.collective for group, ready in self.ready.items()}

    def words(self) -> tuple[object, ...]:
        """The words that the collectives' protocols keep on this device."""
        return tuple(workspaces_of(g).control_words() for g, r in self.ready.items() if r.workspace is not None)

    @property
    def workspaces(self) -> list[Workspace]:
        return [ready.workspace for ready in self.ready.values() if ready.workspace is not None]

    @property
    def closed(self) -> bool:
        """Whether a workspace was closed since."""
        of_moe = (ready.workspace for ready in self.moe.values() if ready.workspace is not None)
        return any(workspace.closed for workspace in (*self.workspaces, *of_moe))

    def check_kernels(self) -> None:
        """Raises :class:`HangError` where a kernel has given up waiting for a peer. Waits for nothing."""
        for workspace in self.workspaces:
            workspace.kernels.check()

    @property
    def judged_collectives(self) -> tuple[str, ...]:
        """What fused sites are judged as, each once."""
        if self.planned is not None:
            return (str(self.planned.collective),)
        return tuple(dict.fromkeys(str(self.collective(group)) for group in self.ready))

    @property
    def judged(self) -> str:
        """The same, in a word or two."""
        return ", ".join(self.judged_collectives) or "reference"

    def with_facts(
        self, facts: Mapping[str | None, frozenset[Fact]], of_moe: frozenset[Fact] = frozenset()
    ) -> Assignment:
        """With facts that showed in the cut; those of None are about every group. of_moe: about dispatches."""
        everywhere = facts.get(None, frozenset())

        def known(situation: Situation, group: str | None) -> Situation:
            return replace(situation, facts=situation.facts | everywhere | facts.get(group, frozenset()))

        ready = {g: replace(r, situation=known(r.situation, g)) for g, r in self.ready.items()}
        planned = self.planned
        if planned is not None:
            planned = replace(planned, facts=planned.facts.union(of_moe, *facts.values()))
        moe = {
            g: replace(r, situation=replace(r.situation, facts=r.situation.facts | of_moe)) for g, r in self.moe.items()
        }
        return replace(self, ready=ready, planned=planned, moe=moe)
