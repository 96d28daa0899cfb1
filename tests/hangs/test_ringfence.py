"""The protocol of ringfence's own kernels: every order of small programs, long ones, and what could be otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ringfence.runtime.errors import PlanError
from ringfence.runtime.hazards.situation import Collective, Situation, Strategy
from ringfence.runtime.protocol.answer import ask
from ringfence.runtime.protocol.calls import Call, Calls, changed, program, without
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.plan import even_pieces, exercise, machine_for, programs
from ringfence.runtime.protocol.ringfence import RULES, Begin, ringfence
from ringfence.runtime.protocol.rules import Epoch

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
UP_AND_DOWN = program([1, 2, 1, 2, 2, 1])


def alternating(sizes: list[int]) -> Calls:
    """One-shot and two-shot in turn, whose lines lie where the other's lie."""
    calls = program(sizes)
    return changed(calls, *range(1, len(sizes), 2), strategy=TWO)


SMALL = {
    "one-shot": (2, UP_AND_DOWN),
    "two-shot": (2, program([1, 2, 1, 1], TWO)),
    "both": (2, alternating([1, 2, 2, 1])),
    "three ranks": (3, program([1, 1, 1, 1])),
    "three ranks, both": (3, alternating([1, 1, 1])),
    "four ranks": (4, program([1, 1])),
}


@pytest.mark.parametrize("name", SMALL)
def test_no_order_of_equal_programs_fails(name: str) -> None:
    world_size, calls = SMALL[name]
    result = explore(ringfence([calls] * world_size))
    assert result.safe and result.states > 100


#: Calls of another grid each: a block counts for blocks that are not there.
GRIDS = tuple(replace(call, ctas=min(call.tokens, 1 + call.id % 2)) for call in program([2, 2, 1]))
OVERLAPPED = {
    "one-shot": (2, UP_AND_DOWN),
    "both": (2, alternating([1, 2, 1])),
    "other grids": (2, GRIDS),
    "three ranks, both": (3, alternating([1, 1])),
}


@pytest.mark.parametrize("name", OVERLAPPED)
def test_a_call_may_begin_once_the_one_before_has_counted(name: str) -> None:
    """Programmatic dependent launch behind a kernel that waits for nothing: the calls before must have received all."""
    world_size, calls = OVERLAPPED[name]
    result = explore(ringfence([calls] * world_size, replace(RULES, begin=Begin.RECEIVED)))
    assert result.safe and result.states > 1000


def test_no_order_of_long_programs_fails() -> None:
    sizes = [1, 3, 2, 2, 1, 3] * 20
    for world_size, calls in ((2, alternating(sizes)), (4, alternating(sizes)), (8, program(sizes, TWO))):
        assert decide(ringfence([calls] * world_size)).safe
        grids = tuple(replace(call, ctas=1 + call.id % 3) for call in calls)
        assert decide(ringfence([calls, grids] * (world_size // 2))).safe, "no rank depends on the grid of another"


def test_captured_and_replayed_steps_of_mixed_sizes_are_safe() -> None:
    rank = exercise(even_pieces(2, 2, 2), (1, 8), 4)
    assert {c.strategy for c in programs([rank])[0]} == {ONE, TWO}
    assert ask(Situation(Collective.RINGFENCE, world_size=4), programs([rank] * 4)).safe


# -- what could be otherwise


def test_with_one_buffer_a_line_is_written_over_before_it_is_read() -> None:
    result = explore(ringfence([UP_AND_DOWN] * 2, replace(RULES, buffers=1)))
    assert result.failure is ModelFailure.DEADLOCK
    assert not decide(ringfence([UP_AND_DOWN] * 2, replace(RULES, buffers=1))).safe


def test_a_number_that_a_capture_bakes_in_takes_old_lines_for_new() -> None:
    calls = tuple(Call(i, epoch=i % 2) for i in range(6))  # two calls, captured, replayed three times
    assert explore(ringfence([calls] * 2, replace(RULES, epoch=Epoch.HOST))).failure is ModelFailure.STALE_READ
    assert explore(ringfence([calls] * 2)).safe


def test_without_the_wait_for_the_calls_before_a_line_is_written_over() -> None:
    result = explore(ringfence([program([1] * 3)] * 2, replace(RULES, begin=Begin.COUNTED)))
    assert result.failure is ModelFailure.DEADLOCK


def test_a_count_that_is_read_before_the_call_before_has_counted_is_an_old_one() -> None:
    result = explore(ringfence([UP_AND_DOWN] * 2, replace(RULES, begin=Begin.AT_ONCE)))
    assert result.failure is ModelFailure.STALE_READ and "its number" in result.trace[-1].detail


@pytest.mark.parametrize(
    ("calls", "wrong"),
    [(program([1] * 3), {"buffers": 1}), (GRIDS, {"every_share_counts": False})],
    ids=["one buffer", "shares of its own grid"],
)
def test_what_is_wrong_is_found_among_calls_that_overlap_too(calls: Calls, wrong: dict[str, Any]) -> None:
    assert not explore(ringfence([calls] * 2, replace(RULES, begin=Begin.RECEIVED, **wrong))).safe


def test_to_count_the_blocks_that_took_part_depends_on_the_grid() -> None:
    calls = (Call(0, tokens=2, ctas=2), Call(1, tokens=2, ctas=1), Call(2, tokens=2, ctas=2))
    rules = replace(RULES, every_share_counts=False)
    assert explore(ringfence([calls] * 2, rules)).failure is ModelFailure.STALE_READ
    assert explore(ringfence([calls] * 2)).safe


def test_a_number_that_arrives_before_its_data_is_believed() -> None:
    result = explore(ringfence([program([1, 1])] * 2, replace(RULES, flag_with_data=False)))
    assert result.failure is ModelFailure.STALE_READ


# -- ranks that differ


def test_a_skipped_call_is_taken_for_the_next_and_the_last_one_waits() -> None:
    """Numbers count calls: that a peer means another one, none of these kernels can see. The ranks compare calls."""
    calls = program([1] * 4)
    assert explore(ringfence([calls, without(calls, 2)])).failure is ModelFailure.STALE_READ
    assert explore(ringfence([calls, without(calls, 3)])).failure is ModelFailure.DEADLOCK


def test_fewer_tokens_on_one_rank_wait() -> None:
    result = explore(ringfence([UP_AND_DOWN, changed(UP_AND_DOWN, 3, tokens=1)]))
    assert result.failure is ModelFailure.DEADLOCK
    assert "polls token 1" in result.waiting[0] or "waits for" in result.waiting[0]


def test_more_than_eight_ranks_have_no_model() -> None:
    with pytest.raises(PlanError, match="2 to 8"):
        machine_for(Collective.RINGFENCE, "", [program([1])] * 16)
