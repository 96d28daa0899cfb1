"""Answer: can a plan hang on these ranks, and which row of the hazard table explains it?

The models (:mod:`.plan`) say whether some order of the ranks' steps fails; the table says
what the failure is called, which invariant is broken, and what to do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..hazards.catalogue import applicable
from ..hazards.situation import Collective, Fact, Payload, Situation, Strategy
from ..hazards.table import Action, Hazard
from .bound import Bound
from .calls import Calls, distinct, each
from .explore import ModelFailure, Result
from .machine import State
from .plan import OWN, check, unseen

#: Rows whose failure is a wrong number; the others' is a wait that never ends.
_WRONG_NUMBERS = frozenset({"M3", "M5", "M58"})
#: Rows about arithmetic, which no model has: they explain no failure of one.
_ARITHMETIC = frozenset({"M49"})


@dataclass(frozen=True)
class Answer:
    """``result`` is that of the model, for the ``payload`` that fails or, when none does, the last one tried.

    ``hazard`` is the row that explains a failure; None for a safe plan, and for a failure that no row explains.
    ``also`` are other rows that apply to the situation: what they describe is not in the model.
    """

    result: Result[State]
    payload: Payload
    hazard: Hazard | None = None
    also: tuple[Hazard, ...] = ()

    @property
    def safe(self) -> bool:
        return self.result.safe

    @property
    def remedy(self) -> str | None:
        if self.safe:
            return None
        return self.hazard.remedy if self.hazard is not None else "no row of the hazard table explains this; report it"


def ask(situation: Situation, ranks: Sequence[Calls], bound: Bound | None = None) -> Answer:
    """Run the protocol of the situation's collective and version with these programs, one per rank.

    A payload of ANY stands for each kind of word in turn, the plainest first; one whose words the receivers of this
    release take as they take those before it has been asked about. Raises :class:`~.plan.PlanError`,
    :class:`~ringfence.runtime.errors.VersionError`, and what ``bound`` raises.
    """
    version = "" if situation.collective in OWN else situation.flashinfer
    if version is None:
        raise PlanError("the protocols differ between FlashInfer releases; say which one")
    states = 0
    taken: dict[tuple[bool, bool], Result[State]] = {}
    for payload in _payloads(situation):
        words = unseen(situation.collective, version, payload)
        if words not in taken:
            programs = each(ranks, functools.partial(_sending, payload))
            taken[words] = check(situation.collective, version, programs, bound)
            states += taken[words].states
        result = taken[words]
        if not result.safe:
            break
    result = replace(result, states=states)
    row = None if result.safe else _explanation(replace(situation, payload=payload), result, programs, bound)
    also = tuple(other for other in applicable(situation) if result.safe and other.decides is not Action.CAPTURE)
    return Answer(result, payload, row, also)


def _payloads(situation: Situation) -> Iterator[Payload]:
    """Each kind of word, the plainest first; flags of an all-to-all are numbers, whatever is sent beside them."""
    if situation.payload is not Payload.ANY:
        yield situation.payload
    elif situation.collective is Collective.MOE_ALL_TO_ALL:
        yield Payload.ORDINARY
    else:
        yield from (Payload.ORDINARY, Payload.NEGATIVE_ZERO, Payload.SUBNORMAL)


def _explanation(
    situation: Situation, result: Result[State], ranks: Sequence[Calls], bound: Bound | None
) -> Hazard | None:
    """The first row that applies and fails in this way; None where no row does."""
    version = situation.flashinfer or ""
    diverge = any(_shape(calls) != _shape(ranks[0]) for calls in distinct(ranks))
    # Where the ranks would fail whichever program all of them ran, their difference is not the cause.
    if diverge and any(
        check(situation.collective, version, [calls] * len(ranks), bound).safe for calls in distinct(ranks)
    ):
        two_shot = any(call.strategy is Strategy.TWO_SHOT for calls in ranks for call in calls)
        same_calls = len({tuple(c.id for c in calls) for calls in ranks}) == 1
        facts = {Fact.DIVERGENT_GEOMETRY} if two_shot and same_calls else {Fact.DIVERGENT_SEQUENCE}
        if not applicable(replace(situation, payload=Payload.ORDINARY, facts=frozenset(facts))):
            facts = {Fact.DIVERGENT_SEQUENCE}
        situation = replace(situation, facts=frozenset(facts))
        return next((row for row in applicable(situation) if any(when.facts for when in row.when)), None)
    if len({call.tokens for calls in distinct(ranks) for call in calls if call.strategy is Strategy.TWO_SHOT}) > 1:
        situation = replace(situation, facts=situation.facts | {Fact.GRIDS_TAKE_TURNS})
    wrong = result.failure is not ModelFailure.DEADLOCK
    rows = (row for row in applicable(situation) if row.id not in _ARITHMETIC)
    return next((row for row in rows if (row.id in _WRONG_NUMBERS) == wrong), None)


def _shape(calls: Calls) -> list[tuple[object, ...]]:
    return [(c.id, c.strategy, c.tokens, c.workspace) for c in calls]


def _sending(payload: Payload, calls: Calls) -> Calls:
    if all(call.payload is payload for call in calls):
        return calls
    return tuple(replace(call, payload=payload) for call in calls)
