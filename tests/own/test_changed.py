"""Changed kernels, from the sources of ringfence's own: some order of a program shows each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from own.cpu import ONE, SUM, TWO, Ranks, Step, missing
from own.programs import CARRIES, IDLE, LATE, PLAIN, H, after_many_calls

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

#: A program and an order that show what a change does, of a seed; None where they show nothing.
Show: TypeAlias = Callable[[Sequence[tuple[str, str]], Path, int], str | None]


def orders(steps: Sequence[Step] = PLAIN, made: int = 0, world_size: int = 3, **how: Any) -> Show:
    """Outputs that are wrong, waits that end in vain, kernels that all wait for their turn, and what no run may do."""

    def show(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
        ranks = Ranks(world_size, steps, folder, changes, bound=60_000, made=made)
        outcome = ranks.run(seed, most=100_000, **how)
        early = None if outcome.early or len(steps) == 1 else "no kernel begins while the one before works"
        lost = next((str(lost) for lost in outcome.lost if lost), None)
        return outcome.fault or ranks.wrong(outcome) or lost or early

    return show


def one_line_late(*steps: Step) -> Show:
    """One line alone is lost, of two granules in a row or more: what is returned, and what its report says."""

    def show(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
        ranks = Ranks(2, steps, folder, changes, bound=3000, made=CARRIES + 3)  # numbers whose low word is small
        outcome = ranks.run(seed, held=(9 * seed + 2, 9000), drowsy=100)
        if found := outcome.fault or ranks.silent(outcome):
            return found
        for lost in outcome.lost:
            if lost is not None and not lost.relayed and outcome.held is not None:
                told = lost.token, lost.sums
                return None if told == ranks.row_of(outcome.held, steps[lost.call - ranks.made - 1]) else str(lost)
        return None

    return show


def one_rank_late(changes: Sequence[tuple[str, str]], folder: Path, seed: int) -> str | None:
    """Rank 2 sleeps through the bound of rank 1 alone. The others hear of it from rank 1, in the next call."""
    ranks = Ranks(3, [Step(1)] * 2, folder, changes)
    ranks.bounds[1][0] = 1
    outcome = ranks.run(seed, asleep=2, most=100_000)
    named = all(lost is not None and lost.missing == (2,) for lost in outcome.lost)
    heard = [lost is not None and lost.relayed and lost.source == 1 and lost.call == 2 for lost in outcome.lost]
    told = None if named and heard == [True, False, True] else "; ".join(map(str, outcome.lost))
    return outcome.fault or ranks.silent(outcome) or told


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
WITH_SLOW_WARPS = orders([Step(4, ONE, H, blocks=2, grid=(1,))], world_size=2, slow=1)
WITH_SLOW_BLOCKS = orders([Step(4, ONE, 1200, blocks=4, grid=(1,))], world_size=2, slow=2)

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
    "a token that takes more of an inbox than it has": (
        orders([Step(3, TWO, H)] * 2, world_size=2),
        [("OF_A_TOKEN = PARTS + F::GRANULES;", "OF_A_TOKEN = PARTS + F::GRANULES + 1;")],
    ),
    # a line
    "lines that arrive in parts": (orders(torn=True), []),
    "lanes that store one after another": (IN_CHAINS, [("__syncwarp();  // the lanes of a line store at once", "")]),
    "lanes that load one after another": (IN_CHAINS, [("__syncwarp();  // the lanes of a line load at once", "")]),
    # waits for what is on this device
    "dependents that are never let begin": (IN_CHAINS, [("        let_dependents_begin();\n", "")]),
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
    "a wait for the call before the last where one for the last is due": (
        BEHIND_OTHERS,
        [("for (bool again = false; received < due;", "for (bool again = false; received + SHARES < due;")],
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
    "warps that carry nothing and ask in each turn": (
        WITH_SLOW_WARPS,
        [("(!F::NORM || place(0).granule < 0)) return;", "!F::NORM) return;")],
    ),
    "blocks that carry nothing and ask in each turn": (
        WITH_SLOW_BLOCKS,
        [("own < F::OF_A_BLOCK && granule < F::GRANULES", "own < F::OF_A_BLOCK")],
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
    "a loss that the next call looked for too early": (
        one_rank_late,
        [("if (again) pause();\n            look(received, broken);", "received = load_word(call.received);")],
    ),
    "a loss that leaves the norms of earlier tokens": (
        one_line_late(*LATE[2:3] * 2),
        [("if (F::NORM) write(call.norm, token, place(i), nan);", "")],
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
    "a loss that the first source alone can relay": (
        one_rank_late,
        [("s < SOURCES; s++) hear(", "s < 1; s++) hear(")],
    ),
    "ranks named by their place": (one_rank_late, [("(sources & ~below) << 1", "(sources & ~below)")]),
    "a source named by its place": (one_rank_late, [("by_rank(1u << s, only));\n", "1u << s);\n")]),
    "a wait that asks the host whenever it looks at the time": (
        one_rank_late,
        [("found == 0 && lasted != asked", "found == 0")],
    ),
    "the bound of a part for a sum": (one_rank_missing, [("BOUNDS_OF_A_SUM = 2", "BOUNDS_OF_A_SUM = 1")]),
    "a report that each writes": (one_rank_missing, [("    if (before != 0) return before;\n", "")]),
    "a report of half a number": (one_line_late(*LATE[:1] * 2), [("to[2] = (u32)(number >> 32);", "to[2] = 0;")]),
    "a report of the first token": (one_line_late(*LATE[:1] * 2), [("to[3] = token;", "to[3] = 0;")]),
    "a sum that is told as a part": (one_line_late(*LATE[2:3] * 2), [("sum ? SUM : PART", "PART")]),
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
