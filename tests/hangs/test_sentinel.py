"""M1 to M5: words that are taken for the sentinel, and words that stay behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.runtime.hazards.situation import Payload, Strategy
from ringfence.runtime.protocol.calls import Calls, changed, program
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.rules import Clear, Sentinel, Words, mnnvl_rules, trtllm_rules
from ringfence.runtime.protocol.trtllm import trtllm

BOTH = [Strategy.ONE_SHOT, Strategy.TWO_SHOT]


def two(strategy: Strategy, payload: Payload = Payload.ORDINARY) -> list[Calls]:
    return [program([2, 2, 2], strategy, payload)] * 2


@pytest.mark.parametrize("strategy", BOTH)
@pytest.mark.parametrize("version", ["0.6.0", "0.6.4", "0.6.10.post1", "0.6.11.post3"])
def test_m1_a_negative_subnormal_is_never_seen_before_0_6_12(version: str, strategy: Strategy) -> None:
    """FI#3053. Eager programs: no graph is needed for it, and no split helps."""
    result = explore(mnnvl(two(strategy, Payload.SUBNORMAL), mnnvl_rules(version)))
    assert result.failure is ModelFailure.DEADLOCK
    assert any("in call 0 (a word that looks like the sentinel)" in sentence for sentence in result.waiting)
    one_bad_call = changed(program([2, 2, 2], strategy), 1, payload=Payload.SUBNORMAL)
    assert explore(mnnvl([one_bad_call] * 2, mnnvl_rules(version))).failure is ModelFailure.DEADLOCK


@pytest.mark.parametrize("strategy", BOTH)
def test_m1_is_avoided_by_the_upgrade_and_by_a_clean_payload(strategy: Strategy) -> None:
    """FI#3304 compares bitwise (two-shot needs FI#3385 as well: M2)."""
    fixed = "0.6.12" if strategy is Strategy.ONE_SHOT else "0.6.13"
    assert explore(mnnvl(two(strategy, Payload.SUBNORMAL), mnnvl_rules(fixed))).safe
    assert explore(mnnvl(two(strategy), mnnvl_rules("0.6.4"))).safe


def test_m1_one_rank_is_enough() -> None:
    programs = two(Strategy.ONE_SHOT)
    programs[1] = changed(programs[1], 1, payload=Payload.SUBNORMAL)
    result = explore(mnnvl(programs, mnnvl_rules("0.6.4")))
    assert result.failure is ModelFailure.DEADLOCK
    assert "call 1" in result.waiting[0]


def test_m1_never_touched_trtllm() -> None:
    """Bitwise per element since FI#1136."""
    assert explore(trtllm(two(Strategy.ONE_SHOT, Payload.SUBNORMAL), trtllm_rules("0.6.4"))).safe


def test_m2_a_sum_that_rounds_to_the_sentinel_is_never_seen_in_0_6_12() -> None:
    result = explore(mnnvl(two(Strategy.TWO_SHOT, Payload.SUBNORMAL), mnnvl_rules("0.6.12")))
    assert result.failure is ModelFailure.DEADLOCK
    assert all("polls sum of token" in sentence for sentence in result.waiting)


def test_m2_is_avoided_by_sanitising_the_sum() -> None:
    """FI#3385."""
    assert explore(mnnvl(two(Strategy.TWO_SHOT, Payload.SUBNORMAL), mnnvl_rules("0.6.13"))).safe
    broken = replace(mnnvl_rules("0.6.13"), sanitises_sum=False)
    assert explore(mnnvl(two(Strategy.TWO_SHOT, Payload.SUBNORMAL), broken)).failure is ModelFailure.DEADLOCK


def test_m3_a_torn_pack_is_taken_when_only_its_first_word_is_checked() -> None:
    result = explore(mnnvl(two(Strategy.TWO_SHOT), mnnvl_rules("0.6.12"), torn=True))
    assert result.failure is ModelFailure.STALE_READ
    assert "takes the sentinel for the sum of token" in result.trace[-1].detail


def test_m3_is_avoided_by_checking_all_words() -> None:
    one_token = [program([1, 1, 1], Strategy.TWO_SHOT)] * 2
    assert explore(mnnvl(one_token, mnnvl_rules("0.6.13"), torn=True)).safe
    first = replace(mnnvl_rules("0.6.13"), words=Words.FIRST)
    assert explore(mnnvl(one_token, first, torn=True)).failure is ModelFailure.STALE_READ
    assert explore(mnnvl(one_token, first)).safe, "only torn packs show it"


@pytest.mark.parametrize("strategy", BOTH)
@pytest.mark.parametrize("version", ["0.6.4", "0.6.13"])
def test_m4_negative_zero_is_never_seen_unless_the_input_is_sanitised(version: str, strategy: Strategy) -> None:
    rules = mnnvl_rules(version)
    programs = two(strategy, Payload.NEGATIVE_ZERO)
    assert explore(mnnvl(programs, rules)).safe
    assert explore(mnnvl(programs, replace(rules, sanitises_input=False))).failure is ModelFailure.DEADLOCK


def test_m4_in_trtllm() -> None:
    rules = trtllm_rules("0.6.13")
    programs = two(Strategy.ONE_SHOT, Payload.NEGATIVE_ZERO)
    assert explore(trtllm(programs, rules)).safe
    assert explore(trtllm(programs, replace(rules, sanitises_input=False))).failure is ModelFailure.DEADLOCK


def test_m5_a_clear_of_the_wrong_size_leaves_old_words() -> None:
    """TRT#6237, and what fixed it: the size is recorded on the device."""
    sizes = [program([2, 1, 1, 1, 1, 2, 2])] * 2
    wrong = replace(mnnvl_rules("0.6.13"), clear=Clear.CURRENT)
    result = explore(mnnvl(sizes, wrong))
    assert result.failure is ModelFailure.STALE_READ
    assert "token 1" in result.trace[-1].detail, "only the rows beyond the small calls are old"
    assert explore(mnnvl(sizes, mnnvl_rules("0.6.13"))).safe


@pytest.mark.parametrize(
    ("protection", "strategy", "payload", "failure"),
    [
        ({"sentinel": Sentinel.FLOAT}, Strategy.ONE_SHOT, Payload.SUBNORMAL, ModelFailure.DEADLOCK),
        ({"sanitises_input": False}, Strategy.ONE_SHOT, Payload.NEGATIVE_ZERO, ModelFailure.DEADLOCK),
        ({"sanitises_sum": False}, Strategy.TWO_SHOT, Payload.SUBNORMAL, ModelFailure.DEADLOCK),
        ({"buffers": 2}, Strategy.ONE_SHOT, Payload.ORDINARY, ModelFailure.DEADLOCK),
        ({"buffers": 2}, Strategy.TWO_SHOT, Payload.ORDINARY, ModelFailure.DEADLOCK),
        ({"clear": Clear.NONE}, Strategy.ONE_SHOT, Payload.ORDINARY, ModelFailure.STALE_READ),
        ({"clear": Clear.NONE}, Strategy.TWO_SHOT, Payload.ORDINARY, ModelFailure.STALE_READ),
    ],
)
def test_each_protection_is_needed(
    protection: dict[str, object], strategy: Strategy, payload: Payload, failure: ModelFailure
) -> None:
    rules = mnnvl_rules("0.6.13")
    programs = [program([1] * 5, strategy, payload)] * 2
    assert explore(mnnvl(programs, rules)).safe
    assert explore(mnnvl(programs, replace(rules, **protection))).failure is failure  # type: ignore[arg-type]
