"""M15, M19, M27, M39, M45 in the one-sided MoE all-to-all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.runtime.protocol.calls import Calls, changed, rounds, until, without
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.moe_a2a import moe_a2a
from ringfence.runtime.protocol.rules import moe_rules

RULES = moe_rules("0.6.13")


@pytest.mark.parametrize("ranks", [2, 3])
def test_alternating_rounds_are_safe(ranks: int) -> None:
    assert explore(moe_a2a([rounds(3)] * ranks, RULES)).safe


def test_eight_ranks_and_sixty_rounds_are_safe() -> None:
    assert decide(moe_a2a([rounds(60)] * 8, RULES)).safe


def test_m19_a_rank_one_round_behind_is_two_flags_behind() -> None:
    """TRT#14066: the peers read R-2 where they wait for R, until the kernel's own timeout."""
    result = explore(moe_a2a([rounds(3), until(rounds(3), 4)], RULES))
    assert result.failure is ModelFailure.DEADLOCK
    assert "polls flag of rank 1 for 5" in result.waiting[0]
    assert "holds 3, raised in call 2" in result.waiting[0]


def test_m25_a_rank_that_skips_a_round_is_taken_for_one_that_did_not() -> None:
    result = explore(moe_a2a([rounds(3), without(rounds(3), 2, 3)], RULES))
    assert result.failure is ModelFailure.STALE_READ
    assert "takes 3, raised in call" in result.trace[-1].detail


def test_m27_an_idle_rank_takes_part_or_everybody_waits() -> None:
    idle = without(rounds(2), 2)
    assert explore(moe_a2a([rounds(2), idle], RULES)).failure is ModelFailure.DEADLOCK
    no_tokens = changed(rounds(2), 2, tokens=0)
    assert explore(moe_a2a([rounds(2), no_tokens], RULES)).safe


def test_m39_equality_misses_a_flag_that_moved_on() -> None:
    """With one array of flags, the next phase overwrites what a slow rank has not looked at."""
    result = explore(moe_a2a([rounds(2)] * 2, replace(RULES, separate_flags=False)))
    assert result.failure is ModelFailure.DEADLOCK
    assert "holds 2, raised in call 1" in result.waiting[1]
    assert explore(moe_a2a([rounds(2)] * 2, RULES)).safe


def test_m39_dispatch_without_combine_misses_a_flag() -> None:
    """The alternation is a protection too."""
    dispatches = without(rounds(3), 1, 3, 5)
    assert explore(moe_a2a([dispatches] * 2, RULES)).failure is ModelFailure.DEADLOCK


def test_m45_flags_in_private_memory_are_seen_by_nobody() -> None:
    """FI#3210."""
    result = explore(moe_a2a([rounds(1)] * 2, replace(RULES, shared_memory=False)))
    assert result.failure is ModelFailure.DEADLOCK
    assert explore(moe_a2a([rounds(1)] * 2, RULES)).safe


def masked(baked: bool) -> list[Calls]:
    """Rank 2 dies after the first round; the others replay with the mask of the capture, or today's."""
    survivors = rounds(2) if baked else changed(rounds(2), 2, 3, active=(0, 1))
    return [survivors, survivors, until(rounds(2), 2)]


def test_m15_a_mask_baked_into_the_graph_waits_for_a_dead_rank() -> None:
    """TRT#16200."""
    result = explore(moe_a2a(masked(baked=True), RULES))
    assert result.failure is ModelFailure.DEADLOCK
    assert "polls flag of rank 2 for 3" in result.waiting[0]
    assert explore(moe_a2a(masked(baked=False), RULES)).safe
