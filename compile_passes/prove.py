"""Prove: can the split plan hang on its ranks?

Verdicts are about one op each. This one is about the plan: the calls that every rank
makes, in every order in which their steps can happen (:mod:`ringfence.runtime.protocol`).

Every rank proves it for itself: layers, sizes and ranks are folded, so it takes less than an exchange could save
that every rank would have to wait in. What bounds it is counted and not timed, so all ranks end with one answer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from ..runtime.errors import NotDecidedError, PlanError, VersionError
from ..runtime.hazards.situation import Collective, Payload, Situation, Strategy
from ..runtime.protocol import plan as model
from ..runtime.protocol.answer import ask
from ..runtime.protocol.bound import Bound
from .assignment import Assignment
from .judge import Decision, Verdict
from .split import Piece, SplitPlan

#: What a proof may cost in a compile, for all groups of a graph together: about a second (docs/measurements.md).
MOST_STATES, MOST_CALLS = 15_000, 60_000
_DISPATCH = ("ringfence::moe_dispatch",)
_COMBINES = ("ringfence::moe_combine", "ringfence::moe_combine_into")


@dataclass(frozen=True)
class PlanVerdict:
    """What the model says of the plan. It decides nothing: the verdicts of its sites do.

    kind: "safe", or the failure of a run ("deadlock", "stale_read", "lost_write"), or "not_modelled", or
    "not_decided", of a plan that would cost more than a compile can give; the message says why.
    states: how many states of the model were visited.
    hazard, invariant, remedy: as in :class:`~.judge.Verdict`; trace: the steps that lead to the failure.
    """

    kind: str
    message: str
    states: int = 0
    hazard: str | None = None
    invariant: str | None = None
    remedy: str | None = None
    trace: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.kind not in ("safe", "not_modelled", "not_decided")


def prove(
    plan: SplitPlan, verdicts: Sequence[Verdict], assigned: Assignment, capture_sizes: Sequence[int], *, padding: bool
) -> PlanVerdict:
    """Ask the models of the collectives about the sites that they carry out, on equal ranks.

    Each group is asked about by itself, and about its dispatches and combines by themselves: a workspace is no
    other's. A site that is refused runs on the reference collective and is left out; sites whose payload is cleaned
    send ordinary words. Each capture size is captured and replayed, sizes go up and down, and one step is not
    captured. The first group that can fail speaks for the plan.
    """
    carried: dict[str | None, dict[int, Verdict]] = {}
    for verdict in verdicts:
        if verdict.site is not None and verdict.decision is not Decision.REFUSE:
            carried.setdefault(verdict.group, {})[verdict.site] = verdict
    pairs = _pairs(verdicts, assigned)
    if not carried and not pairs:
        refused = any(verdict.site is not None for verdict in verdicts)
        why = f"no call is left to {assigned.judged}" if refused else "nothing is fused"
        return PlanVerdict("safe", f"{why}, so no call waits in kernels of a collective")
    kernels = [group for group in carried if assigned.collective(group) != Collective.REFERENCE]
    asked = kernels or ([] if pairs else list(carried))
    bound = Bound(MOST_STATES, shortest=MOST_STATES // 6)
    proofs = [_prove_sites(plan, carried[g], assigned.situation(g), capture_sizes, padding, bound) for g in asked]
    proofs += [_prove(halves, s, capture_sizes, padding, bound) for s, halves in pairs]
    order = (lambda p: p.failed, lambda p: p.kind == "not_decided", lambda p: p.kind == "not_modelled")
    worst = next((p for worse in order for p in proofs if worse(p)), None)
    return worst or replace(proofs[0], states=sum(p.states for p in proofs))


def _pairs(verdicts: Sequence[Verdict], assigned: Assignment) -> list[tuple[Situation, tuple[model.PlannedPiece, ...]]]:
    """For each group whose dispatches and combines kernels carry out: what is asked about them, and they, in order.

    Each is a piece by itself: their epoch is on the device, so it is all one what is captured together.
    """
    found: dict[str | None, list[model.PlannedPiece]] = {}
    for verdict in verdicts:
        half = Strategy.DISPATCH if verdict.op in _DISPATCH else Strategy.COMBINE if verdict.op in _COMBINES else None
        if half is None or verdict.decision is Decision.REFUSE or assigned.moe_situation(verdict.group) is None:
            continue
        site = model.PlannedSite(verdict.node, half)
        found.setdefault(verdict.group, []).append(
            model.PlannedPiece(verdict.node, verdict.decision is Decision.SPLIT, (site,))
        )
    situations = {group: assigned.moe_situation(group) for group in found}
    return [(s, tuple(found[group])) for group, s in situations.items() if s is not None]


def _prove_sites(
    plan: SplitPlan,
    carried: Mapping[int, Verdict],
    situation: Situation | None,
    capture_sizes: Sequence[int],
    padding: bool,
    bound: Bound,
) -> PlanVerdict:
    """The same of the sites of one group."""
    situation = situation or Situation(Collective.REFERENCE)
    if all(v.clean for v in carried.values()):
        situation = replace(situation, payload=Payload.ORDINARY)
    pieces = tuple(_planned(part, situation, carried) for part in plan.pieces)
    return _prove(pieces, situation, capture_sizes, padding, bound)


def _prove(
    pieces: tuple[model.PlannedPiece, ...],
    situation: Situation,
    capture_sizes: Sequence[int],
    padding: bool,
    bound: Bound,
) -> PlanVerdict:
    if situation.collective not in model.MODELLED:
        return PlanVerdict("not_modelled", f"no protocol was explored: there is no model of {situation.collective}")
    rank = model.exercise(pieces, tuple(sorted(capture_sizes)), situation.world_size, padding=padding)
    sites = sum(len(piece.sites) for piece in pieces)
    calls = sites * len(rank.steps)
    if calls > MOST_CALLS:
        why = f"{sites} sites in {len(rank.steps)} steps are {calls} calls, and a compile looks at {MOST_CALLS}"
        return PlanVerdict("not_decided", f"{why}; ringfence check has more time")
    try:
        answer = ask(situation, model.programs([rank] * situation.world_size), bound)
    except NotDecidedError as error:
        return PlanVerdict("not_decided", f"{error}; ringfence check has more time", error.states)
    except (PlanError, VersionError) as error:
        return PlanVerdict("not_modelled", f"no protocol was explored: {error}")
    what = f"{situation.world_size} ranks in {len(rank.steps)} steps"
    if answer.safe:
        return PlanVerdict("safe", f"no order of the calls of {what} fails", answer.result.states)
    row = answer.hazard
    return PlanVerdict(
        str(answer.result.failure),
        f"{answer.result.failure} of {what} with payload {answer.payload}: {answer.remedy}",
        answer.result.states,
        row.id if row is not None else None,
        str(row.invariants[0]) if row is not None and row.invariants else None,
        answer.remedy,
        tuple(f"rank {e.rank}: {e.action} {e.detail}".rstrip() for e in answer.result.trace) + answer.result.waiting,
    )


def _planned(part: Piece, situation: Situation, carried: Container[int | None]) -> model.PlannedPiece:
    sites = tuple(model.PlannedSite(f"site {i}", situation.strategy) for i in part.sites if i in carried)
    return model.PlannedPiece(part.name, part.island, sites)
