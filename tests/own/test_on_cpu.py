"""ringfence's own kernels from their sources, on the CPU, in many orders. Changed ones: test_changed.py.

Every run has stores that arrive late and in any order, blocks that begin late, and ranks that stand still for a while.
Where it is ``drowsy`` a warp, a block or a word between blocks alone does; and one line of all may be ``held``. Always
watched: that lines go where they belong, that a report stays as it was written, and how often the host is asked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own.cpu import FUSED, ONE, SUM, TWO, Ranks, Step, missing
from own.programs import CARRIES, IDLE, LATE, MIXED, PLAIN, SHARED, H, after_many_calls

from ringfence.runtime.collectives.ringfence import MOST_BLOCKS

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("world_size", [2, 4])
def test_mixed_calls_are_right_in_every_order(world_size: int, folder: Path) -> None:
    """waits=False: a kernel begins as soon as the one before it lets it, as behind a kernel that waits for nothing."""
    ranks, due = Ranks(world_size, MIXED, folder), 0
    for seed in range(2):
        for how in ({"drowsy": 300}, {"waits": False, "drowsy": 300}, {"waits": False, "slots": 2}):
            outcome = ranks.run(seed, **how)
            assert outcome.fault is None and outcome.lost == [None] * world_size, (seed, how)
            assert ranks.wrong(outcome) is None, (seed, how)
            assert outcome.early > 0, "dependents begin while the kernel before works"
            due += len(MIXED) * MOST_BLOCKS
            assert outcome.counts == [(due, due)] * world_size, "each call counts all of its shares"


def test_blocks_that_share_tokens_are_right_in_every_order(folder: Path) -> None:
    ranks = Ranks(3, SHARED, folder)
    for seed in range(3):
        outcome = ranks.run(seed, waits=seed % 2 == 0, drowsy=300)
        assert outcome.fault is None and outcome.lost == [None] * 3 and ranks.wrong(outcome) is None, seed


def test_a_block_that_carries_nothing_does_not_end_before_the_words_for_it_have_come(folder: Path) -> None:
    ranks = Ranks(2, IDLE, folder)
    for seed in range(4):
        outcome = ranks.run(seed, drowsy=200)
        assert outcome.fault is None and ranks.wrong(outcome) is None, seed


@pytest.mark.parametrize("made", [CARRIES, 0x3F803F80 - 3])
def test_calls_have_numbers_of_more_than_32_bits_and_none_is_taken_for_data(made: int, folder: Path) -> None:
    """Whichever: 0x3F80 is 1.0."""
    ranks = Ranks(2, PLAIN, folder, made=made)
    outcome = ranks.run(1, drowsy=100)
    assert outcome.fault is None and outcome.lost == [None, None] and ranks.wrong(outcome) is None


def test_a_line_of_four_billion_calls_ago_is_an_old_one(folder: Path) -> None:
    ranks = Ranks(2, PLAIN[:4], folder)
    outcome = after_many_calls(ranks, 1)
    assert outcome.fault is None and ranks.wrong(outcome) is None


def test_eight_ranks_and_rows_of_several_rounds(folder: Path) -> None:
    steps = [Step(1, ONE, 8), Step(2, TWO, 1800, grid=(1,)), Step(1, ONE, 1800, SUM)]
    ranks = Ranks(8, steps, folder)
    outcome = ranks.run(1)
    assert outcome.fault is None and ranks.wrong(outcome) is None
    wide = Ranks(2, [Step(2, ONE, 16000, blocks=2), Step(1, TWO, 15000)], folder)  # the first of more than 256 lines
    assert [form.rounds for form in wide.forms] == [2, 3]
    outcome = wide.run(1)
    assert outcome.fault is None and wide.wrong(outcome) is None


def test_a_row_has_the_same_bits_by_each_strategy_and_number_of_blocks(folder: Path) -> None:
    steps = [Step(2, strategy, H, blocks=blocks) for strategy in (ONE, TWO) for blocks in (1, 2, 4)]
    ranks = Ranks(2, steps, folder)
    ranks.inputs = [ranks.inputs[0]] * len(steps)
    outcome = ranks.run(3)
    assert outcome.fault is None and ranks.wrong(outcome) is None
    for rank in outcome.outputs:
        for norm, out in rank[1:]:
            assert torch.equal(norm, rank[0][0]) and torch.equal(out, rank[0][1])


# -- waits that end


def test_a_rank_that_does_not_come_is_named_and_the_outputs_are_nan(folder: Path) -> None:
    steps = [*PLAIN[:3], replace(PLAIN[1], present=(0, 1)), replace(PLAIN[1], present=(0, 1))]
    ranks = Ranks(3, steps, folder, bound=20_000, made=CARRIES)
    outcome = ranks.run(5)
    assert outcome.fault is None and ranks.wrong(outcome, 0, 1, 2) is None
    for rank in (0, 1):
        lost = outcome.lost[rank]
        assert lost is not None and (lost.call, lost.rank) == (CARRIES + 4, rank)
        assert lost.missing == (2,) and (lost.relayed or lost.source == 2)
        assert f"rank {rank}" in str(lost) and f"call {1 << 32}" in str(lost)
        for norm, out in outcome.outputs[rank][3:]:
            assert norm.isnan().all() and out.isnan().all()
    assert outcome.lost[2] is None


@pytest.mark.parametrize("epilogue", [SUM, FUSED])
def test_two_shot_loses_nothing_silently(epilogue: Any, folder: Path) -> None:
    """A rank that gives up tells so in the place of its sums."""
    steps = [Step(2, TWO, H, epilogue, blocks=2, present=(0, 1, 2))]
    ranks = Ranks(4, steps, folder, bound=20_000)
    for seed in range(3):
        outcome = ranks.run(seed)
        assert outcome.fault is None
        for rank in range(3):
            norm, out = outcome.outputs[rank][0]
            assert out.isnan().all() and (epilogue is SUM or norm.isnan().all())
            lost = outcome.lost[rank]
            assert lost is not None and lost.missing == (3,) and lost.relayed != (lost.source == 3)
        assert outcome.turns < 1.75 * ranks.bound, "once one has given up, nobody waits for the bound of a sum"


@pytest.mark.parametrize("line", range(2, 110, 18))
def test_one_line_alone_that_comes_too_late_is_lost_by_all_of_its_row(line: int, folder: Path) -> None:
    """One warp of one block has waited for it, and says for what. A row is right or NaN, and later calls are NaN."""
    ranks = Ranks(2, LATE, folder, bound=3000)
    outcome = ranks.run(line, held=(line, 9000), drowsy=100)
    assert outcome.fault is None and ranks.silent(outcome) is None
    first, second = outcome.lost
    assert first is not None and second is not None and first.missing == second.missing
    assert first.relayed != second.relayed, "one has waited for it, and the other hears of that"
    waited = second if first.relayed else first
    assert outcome.held is not None
    assert (waited.token, waited.sums) == ranks.row_of(outcome.held, LATE[waited.call - 1])


@pytest.mark.parametrize("calls", [2, 5])
def test_a_rank_that_comes_late_hears_of_it(calls: int, folder: Path) -> None:
    """Rank 1 sleeps through the bound of rank 0. It still gets the first call, if nothing was sent over it since."""
    ranks = Ranks(2, [Step(1)] * calls, folder)
    ranks.bounds[0][0] = 1  # a turn after the first look at the time
    outcome = ranks.run(3, asleep=1)
    assert outcome.fault is None
    first, second = outcome.lost
    assert first is not None and (first.call, first.missing, first.relayed) == (1, (1,), False)
    assert second is not None and second.relayed and (second.source, second.missing) == (0, (1,)), "what it did itself"
    if calls == 2:
        assert second.call == 2 and torch.equal(outcome.outputs[1][0][1], outcome.outputs[1][0][1].nan_to_num())
    for norm, out in outcome.outputs[1][1:]:
        assert norm.isnan().all() and out.isnan().all()


def test_a_bound_that_is_not_reached_changes_nothing(folder: Path) -> None:
    ranks = Ranks(2, PLAIN, folder, bound=1_000_000)
    outcome = ranks.run(2)
    assert outcome.lost == [None, None] and ranks.wrong(outcome) is None
