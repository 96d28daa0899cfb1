"""ringfence's own kernels from their sources, on the CPU, in many orders; and what becomes of changed ones.

Every run has stores that arrive late and in any order, blocks that begin late, and ranks that stand still for a while.
Where it is ``drowsy`` a warp, a block or a word between blocks alone does; and one line of all may be ``held``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from own.cpu import BARE, FUSED, GEMMA, NORM, ONE, SUM, TWO, Outcome, Ranks, Step, make_inputs, missing

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
#: Five granules over four blocks, so the last block carries nothing; it has several turns all the same.
IDLE = [Step(3, strategy, 1200, blocks=4, grid=(1,)) for strategy in (ONE, TWO)]
#: For one line that comes too late: forms with a norm and without, rows of one block and of two, turns.
LATE = [Step(2, ONE, H), Step(2, ONE, H, SUM), Step(3, TWO, H, grid=(1,)), Step(2, ONE, H, blocks=2, grid=(1,))]
#: A number that the next calls carry over into its high word.
CARRIES = (1 << 32) - 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.mark.parametrize("world_size", [2, 4])
def test_mixed_calls_are_right_in_every_order(world_size: int, folder: Path) -> None:
    """waits=False: a kernel begins as soon as the one before it lets it, as behind a kernel that waits for nothing."""
    ranks, due = Ranks(world_size, MIXED, folder), 0
    for seed in range(2):
        for how in ({"drowsy": 300}, {"waits": False, "drowsy": 300}, {"waits": False, "slots": 2}):
            outcome = ranks.run(seed, **how)
            assert outcome.fault is None and outcome.lost == [None] * world_size, (seed, how)
            assert ranks.wrong(outcome) is None, (seed, how)
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


def after_many_calls(ranks: Ranks, seed: int, calls: int = 1 << 32) -> Outcome:
    """The program, so many calls, and the program again with other inputs: what the first left is still there."""
    first = ranks.run(seed)
    assert first.fault is None and ranks.wrong(first) is None
    for counted in (*ranks.begun, *ranks.received):
        counted += (calls - len(ranks.steps)) * MOST_BLOCKS
    ranks.inputs = [make_inputs(step, ranks.world_size, 50 + i) for i, step in enumerate(ranks.steps)]
    return ranks.run(seed + 1)


def test_a_line_of_four_billion_calls_ago_is_an_old_one(folder: Path) -> None:
    ranks = Ranks(2, PLAIN[:4], folder)
    outcome = after_many_calls(ranks, 1)
    assert outcome.fault is None and ranks.wrong(outcome) is None


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
        assert lost.missing == (2,) and (lost.relayed or lost.source == 2)
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
            assert lost is not None and lost.missing == (3,) and lost.relayed != (lost.source == 3)
        assert outcome.turns < 1.75 * ranks.bound, "once one has given up, nobody waits for the bound of a sum"


@pytest.mark.parametrize("line", range(2, 110, 18))
def test_one_line_alone_that_comes_too_late_is_lost_by_all_of_its_row(line: int, folder: Path) -> None:
    """One warp of one block has waited for it. Each row is right or NaN as a whole, and later calls are NaN."""
    ranks = Ranks(2, LATE, folder, bound=3000)
    outcome = ranks.run(line, held=(line, 9000), drowsy=100)
    assert outcome.fault is None and ranks.silent(outcome) is None
    first, second = outcome.lost
    assert first is not None and second is not None and first.missing == second.missing
    assert first.relayed != second.relayed, "one has waited for it, and the other hears of that"


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


# -- changed kernels are found out


#: A program and an order that show what a change does, of a seed; None where they show nothing.
Show: TypeAlias = Callable[[Sequence[tuple[str, str]], Path, int], str | None]


def orders(steps: Sequence[Step] = PLAIN, made: int = 0, world_size: int = 3, **how: Any) -> Show:
    """Outputs that are wrong, waits that end in vain, and what no run may do."""

    def show(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
        ranks = Ranks(world_size, steps, folder, changes, bound=60_000, made=made)
        outcome = ranks.run(seed, most=100_000, **how)
        return outcome.fault or ranks.wrong(outcome) or next((str(lost) for lost in outcome.lost if lost), None)

    return show


def one_line_late(*steps: Step) -> Show:
    """One line alone is lost, of two granules in a row or more."""

    def show(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
        ranks = Ranks(2, steps, folder, changes, bound=3000)
        outcome = ranks.run(seed, held=(9 * seed + 2, 9000), drowsy=100)
        return outcome.fault or ranks.silent(outcome)

    return show


def one_rank_late(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
    ranks = Ranks(2, [Step(1)] * 5, folder, changes)
    ranks.bounds[0][0] = 1
    outcome = ranks.run(seed, asleep=1, most=100_000)
    first, second = outcome.lost
    named = first is not None and first.missing == (1,) and second is not None and second.relayed
    return outcome.fault or ranks.silent(outcome) or (None if named else f"{first}; {second}")


def one_rank_missing(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
    ranks = Ranks(4, [Step(2, TWO, H, blocks=2, present=(0, 1, 2))], folder, changes, bound=20_000)
    outcome = ranks.run(seed)
    named = all(lost is not None and lost.missing == (3,) for lost in outcome.lost[:3])
    slow = f"{outcome.turns} turns" if outcome.turns > 1.75 * ranks.bound else None
    return outcome.fault or slow or (None if named else str(outcome.lost))


def four_billion_calls(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
    ranks = Ranks(2, PLAIN[:4], folder, changes, bound=60_000)
    outcome = after_many_calls(ranks, seed)
    return outcome.fault or ranks.wrong(outcome)


IN_CHAINS = orders(drowsy=300)
BEHIND_OTHERS = orders(waits=False, drowsy=300)  # kernels that wait for nothing
ROWS_IN_TURN = orders([Step(4, ONE, H, grid=(1, 2))] * 2, drowsy=300)
OF_TWO_BLOCKS = orders([Step(4, ONE, H, blocks=2, grid=(1, 2))] * 3, drowsy=300)
OF_TWO_BLOCKS_BEHIND_OTHERS = orders([Step(4, ONE, H, blocks=2, grid=(1, 2))] * 3, waits=False, drowsy=300)
WITHOUT_A_NORM = orders([Step(2, ONE, H, SUM, grid=(1, 2))] * 3, waits=False, drowsy=300)

MUTANTS: dict[str, tuple[Show, list[tuple[str, str]]]] = {
    # numbers, buffers and shares
    "one buffer": (BEHIND_OTHERS, [("(number & 1) * call.buffer_bytes", "0")]),
    "shares of this grid alone": (
        IN_CHAINS,
        [("return (SHARES - blockIdx.x + gridDim.x - 1) / gridDim.x;", "return 1;")],
    ),
    "a flag that any call raises": (IN_CHAINS, [("got[s].z == low && got[s].w == high", "got[s].z != 0")]),
    "a number of 32 bits": (four_billion_calls, [("got[s].z == low && got[s].w == high", "got[s].z == low")]),
    "a flag of 32 bits": (orders(made=CARRIES), [("v.w = (u32)(number >> 32) << 8 | lost", "v.w = lost")]),
    "a number among the data": (orders(made=0x3F803F7F), [("if (p.flag) got[s].z = got[s].w = 0;", "")]),
    "a sum in the order of arrival": (IN_CHAINS, [("r == rank ? own : r < rank", "r == 1 ? own : r < 1")]),
    # a line
    "lines that arrive in parts": (orders(torn=True), []),
    "lanes that store one after another": (IN_CHAINS, [("__syncwarp();  // the lanes of a line store at once", "")]),
    "lanes that load one after another": (IN_CHAINS, [("__syncwarp();  // the lanes of a line load at once", "")]),
    # waits for what is on this device
    "dependents that begin before a block has counted": (
        BEHIND_OTHERS,
        [("        u64 received = 0, due = 0;", "        let_dependents_begin();\n        u64 received = 0, due = 0;")],
    ),
    "dependents that begin before the kernel before has ended": (
        IN_CHAINS,
        [
            (
                "        wait_for_kernel_before();\n",
                "        let_dependents_begin();\n        wait_for_kernel_before();\n",
            )
        ],
    ),
    "inputs that are read before they are there": (
        IN_CHAINS,
        [("        wait_for_kernel_before();\n", "        if (warp == F::WARPS) wait_for_kernel_before();\n")],
    ),
    "no wait for the blocks of the calls before": (
        BEHIND_OTHERS,
        [("for (bool again = false; received < due; again = true) {", "while (false) { bool again = false;")],
    ),
    "no wait for the call before the last": (
        BEHIND_OTHERS,
        [("while (received + SHARES < due) pause(), look(received, broken);", "")],
    ),
    "warps that do not wait for their number": (
        IN_CHAINS,
        [("void know() {\n        __syncthreads();", "void know() {")],
    ),
    "what a call has received, counted too early": (
        OF_TWO_BLOCKS_BEHIND_OTHERS,
        [
            ("        const float total = F", "        COUNTED const float total = F"),
            ("if (last && warp == F::WARPS && lane == 0) atomicAdd(call.received, shares());", ""),
            ("COUNTED", "if (last && warp == F::WARPS && lane == 0) atomicAdd(call.received, shares());"),
        ],
    ),
    "warps that do not meet without a norm": (
        WITHOUT_A_NORM,
        [("if (F::NORM ? !F::CLUSTER : last) __syncthreads();", "if (F::NORM && !F::CLUSTER) __syncthreads();")],
    ),
    # squares
    "squares of an earlier token": (OF_TWO_BLOCKS, [("(words[i] ^ whose) >> 32 == 0", "words[i] >> 32 != 0")]),
    "squares that nobody waits for": (
        OF_TWO_BLOCKS,
        [("all = all && (words[i] ^ whose) >> 32 == 0;", "all = true;")],
    ),
    "squares that an earlier kernel left": (OF_TWO_BLOCKS, [("shared.squares[i & 1][i >> 1] = 0", "(void)0")]),
    "squares of one turn alone": (
        OF_TWO_BLOCKS,
        [
            ("&shared.squares[turn & 1][line];", "&shared.squares[0][line];"),
            ("&shared.squares[turn & 1][line])", "&shared.squares[0][line])"),
        ],
    ),
    "words for blocks that have not begun": (
        OF_TWO_BLOCKS,
        [("if (F::CLUSTER && turn == 0) wait_in_cluster();", "")],
    ),
    "blocks that arrive without what they cleared": (
        OF_TWO_BLOCKS,
        [("warp == F::WARPS ? arrive_in_cluster() : arrive", "arrive")],
    ),
    "words for blocks that have ended": (
        orders(IDLE[1:], world_size=2, drowsy=200),
        [("F::IDLE_BLOCK && last && turn > 0", "false")],
    ),
    # what was lost
    "a square in place of what was lost": (
        one_line_late(*LATE[:1] * 2),
        [("lost ? LOST | lost : __float_as_uint(square)", "__float_as_uint(square)")],
    ),
    "a loss that the other warps do not hear of": (
        one_line_late(*LATE[1:2] * 2),
        [("if (!F::NORM && last && lost && lane == 0) shared.lost = lost;", "")],
    ),
    "a loss of an earlier kernel": (WITHOUT_A_NORM, [("            shared.lost = 0;\n", "")]),
    "a loss that the next call does not know of": (
        one_line_late(LATE[0], *[Step(1)] * 4),
        [("lost = shared.broken;", "lost = 0;")],
    ),
    "a loss that fills one token alone": (
        one_line_late(*LATE[2:3] * 2),
        [("for (u32 token = first; token < call.tokens; token += step)\n#pragma", "u32 token = first;\n#pragma")],
    ),
    "a loss that is not relayed": (one_rank_late, [("(u32)(number >> 32) << 8 | lost;", "(u32)(number >> 32) << 8;")]),
    "a loss that only its own call hears of": (one_rank_late, [(" || (u8)got[s].w != 0;", ";")]),
    "a loss that each waits out by itself": (
        one_rank_missing,
        [("            found = load_word(call.broken);\n", "")],
    ),
    "ranks named by their place": (one_rank_late, [("(sources & ~below) << 1", "(sources & ~below)")]),
    "the bound of a part for a sum": (one_rank_missing, [("BOUNDS_OF_A_SUM = 2", "BOUNDS_OF_A_SUM = 1")]),
    "a report before its words": (
        one_line_late(*LATE[:1] * 2),
        [("    to[7] = what;\n    __threadfence_system();", "    to[7] = what;")],
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_kernel_is_found_out(name: str, folder: Path) -> None:
    show, changes = MUTANTS[name]
    assert any(show(changes, folder, seed) for seed in range(40)), "no order shows it"


@pytest.mark.parametrize("show", dict.fromkeys(show for show, changes in MUTANTS.values() if changes))
def test_the_kernels_as_they_are_show_nothing_of_it(show: Show, folder: Path) -> None:
    assert show([], folder, 0) is None
