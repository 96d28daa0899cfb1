"""Rows of the hazard table in the MNNVL model: the releases that have the fault, and those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.runtime.protocol.calls import Payload, Program, Strategy, changed, program, until, without
from ringfence.runtime.protocol.explore import Failure, explore
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.rules import Clear, LamportRules, mnnvl_rules

NEWEST = mnnvl_rules("0.7.2.post1")
TWO_SHOT = Strategy.TWO_SHOT


def outcome(rules: LamportRules, *programs: Program, torn: bool = False) -> Failure | None:
    return explore(mnnvl(programs, rules, torn=torn)).failure


@pytest.mark.parametrize(
    ("version", "payload", "failure"),
    [
        ("0.6.10", Payload.SUBNORMAL, Failure.DEADLOCK),
        ("0.6.11.post3", Payload.SUBNORMAL, Failure.DEADLOCK),
        ("0.6.11.post3", Payload.ORDINARY, None),
        ("0.6.12", Payload.SUBNORMAL, None),
    ],
)
def test_m1_a_subnormal_word_is_not_seen(version: str, payload: Payload, failure: Failure | None) -> None:
    """A single call is enough, so no split and no graph matters."""
    plan = program([1], payload=payload)
    assert outcome(mnnvl_rules(version), plan, plan) == failure


@pytest.mark.parametrize(("version", "failure"), [("0.6.12", Failure.DEADLOCK), ("0.6.13", None)])
def test_m2_a_sum_becomes_the_sentinel(version: str, failure: Failure | None) -> None:
    plan = program([1], TWO_SHOT, Payload.SUBNORMAL)
    assert outcome(mnnvl_rules(version), plan, plan) == failure
    one_shot = program([1], payload=Payload.SUBNORMAL)
    assert outcome(mnnvl_rules(version), one_shot, one_shot) is None


@pytest.mark.parametrize(("version", "failure"), [("0.6.12", Failure.STALE_READ), ("0.6.13", None)])
def test_m3_a_torn_pack_is_taken_by_its_first_word(version: str, failure: Failure | None) -> None:
    plan = program([1], TWO_SHOT)
    assert outcome(mnnvl_rules(version), plan, plan, torn=True) == failure
    assert outcome(mnnvl_rules(version), plan, plan) is None


@pytest.mark.parametrize(("sanitises", "failure"), [(False, Failure.DEADLOCK), (True, None)])
def test_m4_an_unsanitised_negative_zero_is_not_seen(sanitises: bool, failure: Failure | None) -> None:
    plan = program([1], payload=Payload.NEGATIVE_ZERO)
    assert outcome(replace(NEWEST, sanitises_input=sanitises), plan, plan) == failure


@pytest.mark.parametrize(
    ("clear", "failure"),
    [(Clear.CURRENT, Failure.STALE_READ), (Clear.NONE, Failure.STALE_READ), (Clear.RECORDED, None)],
)
def test_m5_words_that_were_not_cleared_are_read_again(clear: Clear, failure: Failure | None) -> None:
    plan = program([2, 1, 1, 2, 2])
    assert outcome(replace(NEWEST, clear=clear), plan, plan) == failure


@pytest.mark.parametrize("strategy", [Strategy.ONE_SHOT, TWO_SHOT])
def test_m25_a_skipped_call_is_read_as_another(strategy: Strategy) -> None:
    plan = program([1, 1, 1], strategy)
    assert outcome(NEWEST, plan, without(plan, 1)) in (Failure.STALE_READ, Failure.DEADLOCK)
    assert outcome(NEWEST, plan, plan) is None


def test_m25_fewer_tokens_on_one_rank_deadlock() -> None:
    assert outcome(NEWEST, program([2]), program([1])) == Failure.DEADLOCK


@pytest.mark.parametrize("strategy", [Strategy.ONE_SHOT, TWO_SHOT])
def test_m28_a_rank_that_stops_leaves_its_peer_in_the_call(strategy: Strategy) -> None:
    plan = program([1, 1], strategy)
    result = explore(mnnvl([plan, until(plan, 1)], NEWEST))
    assert result.failure == Failure.DEADLOCK
    assert "rank 0 in call 1" in result.waiting[0] and "has ended" in result.waiting[1]


def test_m44_sizes_may_differ_from_graph_to_graph() -> None:
    plan = program([1, 2, 1, 2, 2, 1])
    assert outcome(NEWEST, plan, plan) is None
    mixed = changed(program([1, 2, 1, 2]), 1, 3, strategy=TWO_SHOT)
    assert outcome(NEWEST, mixed, mixed) is None
