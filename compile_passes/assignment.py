"""Assignment: who carries out what of a graph, by the group over which it runs.

Made once, before the graph is fused, and read by every stage after that: the judge asks it about a site's collective,
the model about the calls of each group, ranks compare it, the report prints it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..runtime.collectives.kernels import KernelCall
from ..runtime.collectives.moe_ready import MoeReady
from ..runtime.collectives.ready import ReadyCollective
from ..runtime.collectives.workspace import Workspace, workspaces_of
from ..runtime.groups import Group
from ..runtime.hazards.situation import Collective, Fact, Situation, Strategy


@dataclass(frozen=True)
class Limit:
    """At which token counts kernels win at a sum. why: what says so."""

    counts: tuple[range, ...]
    why: str

    @property
    def most(self) -> int:
        """The largest of them; 0: there is none."""
        return self.counts[-1][-1] if self.counts else 0

    @staticmethod
    def of(counts: Sequence[range], collective: str, shape: str) -> Limit:
        """Of kernels that win somewhere."""
        texts = [f"up to {c[-1]}" if c.start == 1 else f"from {c.start} to {c[-1]}" for c in counts]
        return Limit(tuple(counts), f"{collective} wins {' and '.join(texts)} tokens of {shape}")


@dataclass(frozen=True)
class Assignment:
    """From a process group to the collective that carries out its fused sites.

    groups: those of all collectives of the graph, by first use, an order that all ranks have. ready: who carries out
    the fused sites of a group that has some. planned: what they are judged as, where the plan is for another machine
    than this one. nccl: what the hazard table is asked about a collective that NCCL carries out in a piece. moe: who
    carries out the dispatches and combines of a group that has some. left: groups whose sites are no faster by the
    reference than left alone, as no kernel was to be had; why.
    """

    groups: Mapping[str, Group] = field(default_factory=dict)
    ready: Mapping[str, ReadyCollective] = field(default_factory=dict)
    planned: Situation | None = None
    nccl: Situation | None = None
    moe: Mapping[str, MoeReady] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def limit(self, group: str | None, hidden: int, dtype: torch.dtype, *, alone: bool = False) -> Limit | None:
        """At which token counts kernels win at sums of this shape; None: whoever carries them out does at any size.

        alone: an all-reduce without a norm.
        """
        if group is not None and group in self.left:
            return Limit((), self.left[group])
        workspace = self.ready[group].workspace if group is not None and group in self.ready else None
        if workspace is None:
            return None
        shape = f"{hidden} {str(dtype).removeprefix('torch.')}"
        if counts := workspace.served(hidden, dtype, alone=alone):
            return Limit.of(counts, workspace.collective, shape)
        call = KernelCall(1, hidden, dtype, workspace.world_size, Strategy.ONE_SHOT)
        unmet = workspace.implementation.unmet(call)
        why = f": {unmet.message}" if unmet is not None else ""
        return Limit((), f"{workspace.collective} does not serve {shape} here{why}")

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
        words = [workspaces_of(g).control_words() for g, r in self.ready.items() if r.workspace is not None]
        return (*words, *(r.workspace.kernels.control_words() for r in self.moe.values() if r.workspace is not None))

    @property
    def workspaces(self) -> list[Workspace]:
        return [ready.workspace for ready in self.ready.values() if ready.workspace is not None]

    @property
    def closed(self) -> bool:
        """Whether a workspace was closed since."""
        of_moe = [ready.workspace for ready in self.moe.values() if ready.workspace is not None]
        return any(w.closed for w in self.workspaces) or any(w.closed for w in of_moe)

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

    def of(self, groups: Collection[str]) -> Assignment:
        """Without the workspaces of other groups than these, in which the graph has no call of theirs."""
        return replace(self, ready={g: r for g, r in self.ready.items() if g in groups or r.workspace is None})

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
