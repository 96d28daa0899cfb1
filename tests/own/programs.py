"""Programs of all ranks, for the kernels on the CPU."""

from __future__ import annotations

import torch
from own.cpu import BARE, GEMMA, NORM, ONE, SUM, TWO, Outcome, Ranks, Step, make_inputs

from ringfence.runtime.collectives.ringfence import MOST_BLOCKS

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


def after_many_calls(ranks: Ranks, seed: int, calls: int = 1 << 32) -> Outcome:
    """The program, so many calls, and the program again with other inputs: what the first left is still there."""
    first = ranks.run(seed)
    assert first.fault is None and ranks.wrong(first) is None
    for counted in (*ranks.begun, *ranks.received):
        counted += (calls - len(ranks.steps)) * MOST_BLOCKS
    ranks.inputs = [make_inputs(step, ranks.world_size, 50 + i) for i, step in enumerate(ranks.steps)]
    return ranks.run(seed + 1)
