"""The answer to a plan: what the model finds, and the row of the hazard table that explains it."""

from __future__ import annotations

import pytest

from ringfence.runtime.errors import PlanError, VersionError
from ringfence.runtime.hazards.situation import Collective, Payload, Situation, Strategy
from ringfence.runtime.protocol.answer import ask
from ringfence.runtime.protocol.calls import Calls, changed, program, swapped, without
from ringfence.runtime.protocol.explore import ModelFailure

MNNVL, TRTLLM = Collective.MNNVL, Collective.TRTLLM
ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
CALLS = program([4, 8, 8, 4, 4])


def answered(collective: Collective, version: str, *ranks: Calls, payload: Payload = Payload.ANY) -> tuple[str, str]:
    """(failure, row) of the answer."""
    answer = ask(Situation(collective, version, world_size=len(ranks), payload=payload), ranks)
    assert answer.safe == (answer.hazard is None) == (answer.remedy is None) == (answer.result.failure is None)
    return str(answer.result.failure or "safe"), answer.hazard.id if answer.hazard is not None else ""


@pytest.mark.parametrize(
    ("version", "strategy", "expected", "payload"),
    [
        ("0.6.10", ONE, ("deadlock", "M1"), Payload.SUBNORMAL),
        ("0.6.11.post3", ONE, ("deadlock", "M1"), Payload.SUBNORMAL),
        ("0.6.12", ONE, ("safe", ""), Payload.SUBNORMAL),
        ("0.6.12", TWO, ("deadlock", "M2"), Payload.SUBNORMAL),
        ("0.6.13", TWO, ("safe", ""), Payload.SUBNORMAL),
        ("0.7.2.post1", ONE, ("safe", ""), Payload.SUBNORMAL),
    ],
)
def test_any_payload_stands_for_each(
    version: str, strategy: Strategy, expected: tuple[str, str], payload: Payload
) -> None:
    calls = changed(CALLS, *range(5), strategy=strategy)
    assert answered(MNNVL, version, calls, calls) == expected
    assert answered(MNNVL, version, calls, calls, payload=payload) == expected
    assert answered(MNNVL, version, calls, calls, payload=Payload.ORDINARY) == ("safe", "")


def test_trtllm_never_mistook_a_word() -> None:
    for version in ("0.6.10", "0.7.0"):
        assert answered(TRTLLM, version, CALLS, CALLS) == ("safe", "")


@pytest.mark.parametrize("collective", [MNNVL, TRTLLM])
@pytest.mark.parametrize(
    ("other", "failure"),
    [
        (without(CALLS, 1), ModelFailure.STALE_READ),
        (without(CALLS, 4), ModelFailure.DEADLOCK),
        (changed(CALLS, 1, tokens=4), None),
        (swapped(CALLS, 0, 1), None),
    ],
    ids=["skipped", "skipped at the end", "another size", "another order"],
)
def test_ranks_that_differ_are_explained_by_their_difference(
    collective: Collective, other: Calls, failure: ModelFailure | None
) -> None:
    kind, row = answered(collective, "0.7.0", CALLS, other)
    assert row == "M25" and kind != "safe"
    assert failure is None or kind == failure


def test_difference_is_not_blamed_for_what_equal_ranks_meet_too() -> None:
    assert answered(MNNVL, "0.6.10", CALLS, without(CALLS, 3), payload=Payload.SUBNORMAL) == ("deadlock", "M1")


def test_unequal_grids_of_two_shot_are_explained_by_geometry() -> None:
    calls = changed(CALLS, *range(5), strategy=TWO)
    _, row = answered(TRTLLM, "0.7.2", calls, changed(calls, 1, tokens=4))
    assert row in ("M22", "M25")
    # Before, equal ranks read stale numbers too, so the difference is not what is to blame.
    assert answered(TRTLLM, "0.7.0", calls, changed(calls, 1, tokens=4)) == ("stale_read", "M58")
    assert answered(TRTLLM, "0.7.0", calls, calls) == ("stale_read", "M58")


def test_what_cannot_be_answered_is_refused() -> None:
    with pytest.raises(PlanError, match="say which"):
        ask(Situation(MNNVL), [CALLS, CALLS])
    with pytest.raises(PlanError, match="a world of 3 ranks"):
        ask(Situation(MNNVL, "0.7.0"), [CALLS] * 3)
    with pytest.raises(PlanError, match="no collective"):
        ask(Situation(MNNVL, "0.7.0"), [(), ()])
    with pytest.raises(PlanError, match="'nccl'"):
        ask(Situation(Collective.NCCL, "0.7.0"), [CALLS, CALLS])
    with pytest.raises(VersionError, match=r"0\.5\.0 are not known"):
        ask(Situation(MNNVL, "0.5.0"), [CALLS, CALLS])


def test_a_stale_flag_of_two_shot_is_explained_by_the_release() -> None:
    calls = changed(changed(CALLS, *range(5), strategy=TWO), 1, 3, tokens=64)
    assert answered(TRTLLM, "0.7.1", calls, calls) == ("stale_read", "M58")
    assert answered(TRTLLM, "0.7.2", calls, calls)[0] == "safe"
