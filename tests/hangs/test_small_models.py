"""What small models show: two ranks, a few calls, every order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ringfence.runtime.errors import TooManyStatesError
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol.calls import Call, Calls, changed, program, swapped, without
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.machine import Machine
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.rules import Clear, LamportRules, mnnvl_rules, trtllm_rules
from ringfence.runtime.protocol.trtllm import trtllm

UP_AND_DOWN = program([1, 2, 1, 2, 2, 1, 1])
SHRINKING = program([2, 1, 1, 1, 1, 2, 2, 2])

LAMPORT = [
    pytest.param(mnnvl, mnnvl_rules("0.6.4"), id="mnnvl-0.6.4"),
    pytest.param(mnnvl, mnnvl_rules("0.6.12"), id="mnnvl-0.6.12"),
    pytest.param(mnnvl, mnnvl_rules("0.6.13"), id="mnnvl-0.6.13"),
    pytest.param(trtllm, trtllm_rules("0.6.13"), id="trtllm"),
]
Protocol = Callable[[list[Calls], LamportRules], Machine]


@pytest.mark.parametrize(("protocol", "rules"), LAMPORT)
def test_three_buffers_and_equal_programs_are_safe(protocol: Protocol, rules: LamportRules) -> None:
    result = explore(protocol([UP_AND_DOWN] * 2, rules))
    assert result.safe
    assert result.states > 200


@pytest.mark.parametrize(("protocol", "rules"), LAMPORT)
def test_two_buffers_deadlock_because_a_late_clear_wipes_a_push(protocol: Protocol, rules: LamportRules) -> None:
    result = explore(protocol([UP_AND_DOWN] * 2, replace(rules, buffers=2)))
    assert result.failure is ModelFailure.DEADLOCK
    assert any("wipes rank" in event.detail for event in result.trace)
    assert sum("holds the sentinel" in sentence for sentence in result.waiting) == 2


@pytest.mark.parametrize(("protocol", "rules"), LAMPORT)
def test_clearing_by_the_current_size_reads_stale_at_the_third_reuse_after_shrinking(
    protocol: Protocol, rules: LamportRules
) -> None:
    result = explore(protocol([SHRINKING] * 2, replace(rules, clear=Clear.CURRENT)))
    assert result.failure is ModelFailure.STALE_READ
    assert result.trace[-1].call == 6
    assert "in call 0 (read before) for rank" in result.trace[-1].detail


@pytest.mark.parametrize(("protocol", "rules"), LAMPORT)
def test_without_a_clear_reads_are_stale_from_call_3(protocol: Protocol, rules: LamportRules) -> None:
    result = explore(protocol([UP_AND_DOWN] * 2, replace(rules, clear=Clear.NONE)))
    assert result.failure is ModelFailure.STALE_READ
    assert result.trace[-1].call == 3
    assert explore(protocol([UP_AND_DOWN[:3]] * 2, replace(rules, clear=Clear.NONE))).safe


@pytest.mark.parametrize(("protocol", "rules"), LAMPORT)
def test_a_skipped_call_reads_stale_before_anything_hangs(protocol: Protocol, rules: LamportRules) -> None:
    result = explore(protocol([UP_AND_DOWN, without(UP_AND_DOWN, 2)], rules))
    assert result.failure is ModelFailure.STALE_READ
    assert {result.trace[-1].call} <= {2, 3}


@pytest.mark.parametrize(("protocol", "rules"), LAMPORT)
def test_skipping_the_last_call_deadlocks(protocol: Protocol, rules: LamportRules) -> None:
    result = explore(protocol([UP_AND_DOWN, without(UP_AND_DOWN, 6)], rules))
    assert result.failure is ModelFailure.DEADLOCK
    assert result.waiting[1] == "rank 1 waits for nothing: its program has ended"


@pytest.mark.parametrize("version", ["0.6.4", "0.6.13"])
def test_fewer_tokens_on_one_rank_deadlock_in_that_call(version: str) -> None:
    result = explore(mnnvl([UP_AND_DOWN, changed(UP_AND_DOWN, 3, tokens=1)], mnnvl_rules(version)))
    assert result.failure is ModelFailure.DEADLOCK
    assert result.waiting[0].startswith("rank 0 in call 3 (one-shot, 2 tokens) polls token 1")


def test_fewer_tokens_on_one_rank_of_trtllm_overwrite_rows_of_another() -> None:
    """Its slots are [rank][token], so rank 1's only row lies where rank 0 has its second."""
    result = explore(trtllm([UP_AND_DOWN, changed(UP_AND_DOWN, 3, tokens=1)], trtllm_rules("0.6.13")))
    assert result.failure is ModelFailure.LOST_WRITE
    assert result.trace[-1].call == 3


def barriers(*grids: int, calls: int = 3) -> Machine:
    programs = [tuple(Call(i, Strategy.TWO_SHOT, ctas=grid) for i in range(calls)) for grid in grids]
    return trtllm(programs, trtllm_rules("0.6.13"))


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_barriers_of_equal_grids_are_live(grid: int) -> None:
    assert explore(barriers(grid, grid)).safe
    assert decide(barriers(grid, grid, grid, grid, calls=40)).safe


@pytest.mark.parametrize("grids", [(2, 1), (3, 2), (4, 2)])
def test_barriers_of_unequal_grids_deadlock(grids: tuple[int, int]) -> None:
    """M22: a late block sees a flag that three barriers took back to where it was."""
    result = explore(barriers(*grids))
    assert result.failure is ModelFailure.DEADLOCK
    assert "for 1; flag" in result.waiting[0]
    assert "holds 0 (barrier 3, raised in call 1)" in result.waiting[0]


def test_a_skipped_call_passes_the_barrier_with_data_of_another_call() -> None:
    """The flags only count; that rank 1 is in another call, nobody sees until the programs end."""
    calls = program([1] * 4, Strategy.TWO_SHOT)
    result = explore(trtllm([calls, without(calls, 1)], trtllm_rules("0.6.13")))
    assert result.failure is ModelFailure.STALE_READ
    assert {result.trace[-1].call} <= {1, 2}
    swap = explore(trtllm([calls, swapped(calls, 1, 2)], trtllm_rules("0.6.13")))
    assert swap.failure is ModelFailure.STALE_READ


def test_the_state_counts_are_what_they_were() -> None:
    """A change here changes what the models allow; look at why before changing the numbers."""
    counts = [
        explore(mnnvl([UP_AND_DOWN] * 2, mnnvl_rules("0.6.4"))).states,
        explore(mnnvl([UP_AND_DOWN] * 2, mnnvl_rules("0.6.13"))).states,
        explore(mnnvl([program([2] * 3, Strategy.TWO_SHOT)] * 2, mnnvl_rules("0.6.13"))).states,
        explore(barriers(3, 3)).states,
    ]
    assert counts == [1453, 579, 6415, 10319]


def test_too_many_states_says_so() -> None:
    with pytest.raises(TooManyStatesError, match="more than 100 states"):
        explore(mnnvl([UP_AND_DOWN] * 2, mnnvl_rules("0.6.4")), limit=100)
