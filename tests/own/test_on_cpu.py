"""ringfence's own kernels from their sources, on the CPU, in many orders; and what becomes of changed ones.

Every run has stores that arrive late and in any order, blocks that begin late, and ranks that stand still for a while.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own.cpu import BARE, FUSED, GEMMA, NORM, ONE, SUM, TWO, Ranks, Step, missing

from ringfence.runtime.collectives.ringfence import MOST_BLOCKS

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

H = 728  # four granules of bfloat16, the last one in part
MIXED = [
    Step(1, ONE, H),
    Step(3, TWO, H, grid=(2, 1)),
    Step(2, ONE, H, blocks=2),
    Step(3, TWO, H, SUM),
    Step(2, TWO, H, BARE, blocks=2, payload="nan"),
    Step(1, TWO, H, GEMMA, payload="0x8005"),
    Step(3, ONE, H, SUM, blocks=2, payload="negative zero"),
    Step(2, ONE, 364, NORM, dtype=torch.float32, payload="numbers"),
    Step(1, ONE, H, payload="infinite"),
    Step(3, TWO, 364, dtype=torch.float32, grid=(1,)),
]
#: Sizes that grow and shrink, with other grids on each rank.
PLAIN = [Step(n, grid=(8, 1, 2)) for n in (1, 3, 1, 2, 3, 3, 1, 1)]
#: Blocks that share several tokens, one after the other.
SHARED = [Step(4, strategy, H, blocks=blocks, grid=(1, 2)) for strategy in (ONE, TWO) for blocks in (2, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.mark.parametrize("world_size", [2, 4])
def test_mixed_calls_are_right_in_every_order(world_size: int, folder: Path) -> None:
    """waits=False: a kernel begins as soon as the one before it lets it, as behind a kernel that waits for nothing."""
    ranks, due = Ranks(world_size, MIXED, folder), 0
    for seed in range(2):
        for how in ({}, {"waits": False}, {"slots": 2}, {"waits": False, "slots": 2}):
            outcome = ranks.run(seed, **how)
            assert outcome.fault is None and outcome.lost == [None] * world_size, (seed, how)
            assert ranks.wrong(outcome) is None, (seed, how)
            due += len(MIXED) * MOST_BLOCKS
            assert outcome.counts == [(due, due)] * world_size, "each call counts all of its shares"


def test_blocks_that_share_tokens_are_right_in_every_order(folder: Path) -> None:
    ranks = Ranks(3, SHARED, folder)
    for seed in range(3):
        outcome = ranks.run(seed, waits=seed % 2 == 0)
        assert outcome.fault is None and outcome.lost == [None] * 3 and ranks.wrong(outcome) is None, seed


def test_eight_ranks_and_rows_of_several_rounds(folder: Path) -> None:
    steps = [Step(1, ONE, 8), Step(2, TWO, 1800, grid=(1,)), Step(1, ONE, 1800, SUM)]
    ranks = Ranks(8, steps, folder)
    outcome = ranks.run(1)
    assert outcome.fault is None and ranks.wrong(outcome) is None
    wide = Ranks(2, [Step(2, ONE, 15000), Step(1, TWO, 15000)], folder)
    assert wide.forms[0].rounds == 3
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
    ranks = Ranks(3, steps, folder, bound=20_000)
    outcome = ranks.run(5)
    assert outcome.fault is None and ranks.wrong(outcome, 0, 1, 2) is None
    for rank in (0, 1):
        lost = outcome.lost[rank]
        assert lost is not None and (lost.call, lost.rank) == (4, rank)
        assert lost.missing == (2,) and (lost.told or lost.source == 2)
        assert f"rank {rank}" in str(lost) and "call 4" in str(lost)
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
            assert lost is not None and lost.missing == (3,) and lost.told != (lost.source == 3)


@pytest.mark.parametrize("calls", [2, 5])
def test_a_rank_that_comes_late_hears_of_it(calls: int, folder: Path) -> None:
    """Rank 1 sleeps through the bound of rank 0. It still gets the first call, if nothing was sent over it since."""
    ranks = Ranks(2, [Step(1)] * calls, folder)
    ranks.bounds[0][0] = 1  # a turn after the first look at the time
    outcome = ranks.run(3, asleep=1)
    assert outcome.fault is None
    first, second = outcome.lost
    assert first is not None and (first.call, first.missing, first.told) == (1, (1,), False)
    assert second is not None and second.told and (second.source, second.missing) == (0, (1,)), "what it did itself"
    if calls == 2:
        assert second.call == 2 and torch.equal(outcome.outputs[1][0][1], outcome.outputs[1][0][1].nan_to_num())
    for norm, out in outcome.outputs[1][1:]:
        assert norm.isnan().all() and out.isnan().all()


def test_a_bound_that_is_not_reached_changes_nothing(folder: Path) -> None:
    ranks = Ranks(2, PLAIN, folder, bound=1_000_000)
    outcome = ranks.run(2)
    assert outcome.lost == [None, None] and ranks.wrong(outcome) is None


# -- changed kernels are found out


MUTANTS = {
    "one buffer": ("(number & 1) * call.buffer_bytes", "0", {"waits": False}),
    "shares of this grid alone": ("return (SHARES - blockIdx.x + gridDim.x - 1) / gridDim.x;", "return 1;", {}),
    "dependents that begin before a block has counted": (
        "        u64 received = 0, due = 0;",
        "        let_dependents_begin();\n        u64 received = 0, due = 0;",
        {"waits": False},
    ),
    "no wait for the blocks of the calls before": (
        "for (bool again = false; received < due; again = true) {",
        "while (false) { bool again = false;",
        {"waits": False},
    ),
    "a flag that any call raises": ("got[s].z == low && got[s].w == high", "got[s].z != 0", {}),
    "squares of an earlier token": ("(words[i] ^ whose) >> 32 == 0", "words[i] >> 32 != 0", SHARED),
    "squares that nobody waits for": ("all = all && (words[i] ^ whose) >> 32 == 0;", "all = true;", SHARED),
    "a sum in the order of arrival": ("r == rank ? own : r < rank", "r == 1 ? own : r < 1", {}),
    "lines that arrive in parts": ("constexpr u32 ALL", "constexpr u32 ALL", {"torn": True}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_kernel_is_found_out(name: str, folder: Path) -> None:
    before, after, how = MUTANTS[name]
    steps, how = (PLAIN, how) if isinstance(how, dict) else (how, {})
    found = None
    for seed in range(40):
        ranks = Ranks(3, steps, folder, changes=[(before, after)], bound=60_000)
        outcome = ranks.run(seed, **how)
        found = outcome.fault or ranks.wrong(outcome) or next((str(lost) for lost in outcome.lost if lost), None)
        if found:
            break
    assert found, "no order shows it"
