"""M9, M12, M37, M39: flags and counters that somebody else moved."""

from __future__ import annotations

import pytest

from hangs.models.arrival import Arrival
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol.calls import program
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.machine import Launch, Machine, Op, OpKind, flag
from ringfence.runtime.protocol.rules import trtllm_rules
from ringfence.runtime.protocol.trtllm import trtllm


@pytest.mark.parametrize(("after", "failure"), [(0, ModelFailure.STALE_READ), (0b11, ModelFailure.DEADLOCK)])
def test_m9_a_foreign_write_into_a_flag_opens_a_barrier_or_shuts_it(after: int, failure: ModelFailure) -> None:
    """TRT#5698: during a call some other kernel writes past its output, over the flag of the peer.

    Before the first barrier (number 3) it looks like the peer's arrival; after it, it hides the
    peer's arrival at the second.
    """
    sound = trtllm([program([1, 1], Strategy.TWO_SHOT)] * 2, trtllm_rules("0.6.13"))
    cell = sound.names.index("flag 0 of rank 1 in rank 0's memory")
    foreign = Op(OpKind.RAISE, (cell,), (flag(3),), after, detail="out of bounds, over flag 0 of rank 1")
    first, second = sound.programs[0]
    hit = Launch(second.call, second.title, (*second.ops, foreign))
    result = explore(Machine([[first, hit], sound.programs[1]], sound.names))
    assert result.failure is failure
    assert explore(sound).safe


def test_m12_two_launches_that_share_an_exact_counter_hang() -> None:
    """TS#351: one-shot and two-shot of the trtllm backend count in one word."""
    result = explore(Arrival((2, 3), overlap=True))
    assert result.failure is ModelFailure.DEADLOCK
    assert "polls the counter for == 2, and it holds 5" in result.waiting[0]


def test_m12_one_after_another_the_counter_may_be_shared() -> None:
    assert explore(Arrival((2, 3, 2, 4))).safe


def test_m12_what_an_aborted_launch_left_hangs_the_next() -> None:
    assert explore(Arrival((3,), left_over=1)).failure is ModelFailure.DEADLOCK
    assert explore(Arrival((3,), left_over=0)).safe


def test_m37_an_overlap_lets_mnnvl_rotate_too_early() -> None:
    result = explore(Arrival((2, 3), overlap=True, exact=False))
    assert result.failure is ModelFailure.STALE_READ
    assert "before every block has arrived" in result.trace[-1].detail


def test_m37_one_stream_is_safe() -> None:
    assert explore(Arrival((2, 3), exact=False)).safe


def test_m39_a_reset_before_the_last_block_has_looked_hangs_it() -> None:
    """FI#3615."""
    result = explore(Arrival((3, 3), all_wait=True))
    assert result.failure is ModelFailure.DEADLOCK
    assert "polls the counter for == 3, and it holds 0" in result.waiting[0]


def test_m39_is_avoided_where_one_thread_waits() -> None:
    assert explore(Arrival((3, 3), all_wait=False)).safe
