"""Prove: can the split plan hang on its ranks?

Verdicts are about one op each. This one is about the plan: the calls that every rank
makes, in every order in which their steps can happen (:mod:`ringfence.runtime.protocol`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime.protocol import plan as model
from ..runtime.protocol.answer import ask
from ..runtime.situation import Collective, Situation
from .judge import Decision
from .split import SplitPlan

#: Collectives that have a model.
_MODELLED = frozenset({Collective.MNNVL, Collective.TRTLLM})


@dataclass(frozen=True)
class PlanVerdict:
    """What was decided for the plan.

    kind: "safe", or the failure of a run ("deadlock", "stale_read", "lost_write"), or "not_modelled".
    states: how many states of the model were visited.
    hazard, invariant, remedy: as in :class:`~.judge.Verdict`; trace: the steps that lead to the failure.
    """

    decision: Decision
    kind: str
    message: str
    states: int = 0
    hazard: str | None = None
    invariant: str | None = None
    remedy: str | None = None
    trace: tuple[str, ...] = ()


def prove(plan: SplitPlan, situation: Situation, capture_sizes: Sequence[int]) -> PlanVerdict:
    """Ask the model of the situation's collective about this plan on equal ranks.

    Each capture size is warmed up, captured and replayed, sizes go up and down, and one step
    is not captured.
    """
    if situation.collective not in _MODELLED or situation.flashinfer is None:
        why = (
            "the version of FlashInfer is not known"
            if situation.collective in _MODELLED
            else f"{situation.collective} polls no words of its own"
        )
        return PlanVerdict(Decision.IN_GRAPH, "not_modelled", f"no protocol was explored: {why}")
    pieces = tuple(
        model.Piece(p.name, p.island, tuple(model.Site(f"site {i}", situation.strategy) for i in p.sites))
        for p in plan.pieces
    )
    if not any(p.sites for p in pieces):
        return PlanVerdict(Decision.IN_GRAPH, "safe", "the plan has no fused collective")
    sizes = tuple(sorted(capture_sizes))
    steps = (*sizes, *reversed(sizes), *sizes, (sizes[-1] if sizes else 1) + 1)
    two_shot_from = max(situation.world_size + 1, steps[-1]) if situation.strategy is None else None
    rank = model.Rank(pieces, steps, sizes, two_shot_from=two_shot_from)
    answer = ask(situation, model.programs([rank] * situation.world_size))
    what = f"{situation.world_size} ranks, {len(rank.steps)} steps"
    if answer.safe:
        return PlanVerdict(Decision.IN_GRAPH, "safe", f"no order of the calls of {what} fails", answer.result.states)
    row = answer.hazard
    return PlanVerdict(
        Decision.REFUSE,
        str(answer.result.failure),
        f"{answer.result.failure} in a run of {what} with payload {answer.payload}: {answer.remedy}",
        answer.result.states,
        row.id if row is not None else None,
        str(row.invariants[0]) if row is not None and row.invariants else None,
        answer.remedy,
        tuple(f"rank {e.rank}: {e.action} {e.detail}".rstrip() for e in answer.result.trace) + answer.result.waiting,
    )
