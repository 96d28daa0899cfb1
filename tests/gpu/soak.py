"""A hundred thousand calls of two emulated ranks, eager and replayed, checked on the device.

:func:`run` is called in a child (:mod:`.children`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu import emulate
from gpu.cases import BOUND, NEVER, RETURNED

SIZES = (1, 16, 64)
HIDDEN = 1024
DTYPE = torch.bfloat16
CALLS = 25  # of a block: one replay of a graph, or as many eager calls
SETS = 7  # of inputs; not a multiple of the three buffers, so that stale data shows
EAGER = 0.1  # of all blocks
_BETWEEN_LOOKS = 200  # blocks
_DEADLINE = 20.0


@dataclass(frozen=True)
class Block:
    """``size``: which of :data:`SIZES`; ``data``: which set of inputs."""

    size: int
    data: int
    eager: bool


def blocks(calls: int, seed: int = 5) -> list[Block]:
    """What both ranks do."""
    choose = random.Random(seed)
    return [
        Block(choose.randrange(len(SIZES)), choose.randrange(SETS), choose.random() < EAGER)
        for _ in range(calls // CALLS)
    ]


def two_shot(collective: str, size: int) -> bool:
    """The largest size, where it can be."""
    return collective == "trtllm" and SIZES[size] == max(SIZES)


class _Lane:
    """All that one size needs: tensors of (rank, call, token, hidden), and the two ways to launch."""

    def __init__(self, workspace: emulate.Emulation, tokens: int, two_shot: bool, generator: torch.Generator) -> None:
        shape = (CALLS, tokens, HIDDEN)
        pool = emulate.ordinary(generator, SETS, emulate.RANKS, *shape).to(DTYPE)
        residual = emulate.ordinary(generator, *shape).to(DTYPE)
        self.pool, self.residual = pool.cuda(), residual.cuda()
        total = self.pool.float().sum(1)
        self.wanted = emulate.reference(total, self.residual, workspace.weight)[0]
        self.inputs = [torch.zeros(shape, dtype=DTYPE, device="cuda") for _ in range(emulate.RANKS)]
        self.outputs = [torch.empty(2, *shape, dtype=DTYPE, device="cuda") for _ in range(emulate.RANKS)]
        self.steps = [
            [
                emulate.Step(
                    two_shot, self.inputs[rank][i], self.residual[i], self.outputs[rank][0, i], self.outputs[rank][1, i]
                )
                for i in range(CALLS)
            ]
            for rank in range(emulate.RANKS)
        ]
        self._workspace = workspace

    def capture(self) -> None:
        self._replay = emulate.capture(self._workspace, self.steps)

    def launch(self, block: Block) -> None:
        for rank, stream in enumerate(emulate.streams()):
            with torch.cuda.stream(stream):
                self.inputs[rank].copy_(self.pool[block.data, rank])
                self.outputs[rank].fill_(torch.nan)
        if block.eager:
            emulate.eager(self._workspace, self.steps)
        else:
            self._replay()

    def count(self, data: int, mismatches: list[Tensor]) -> None:
        """Add to ``mismatches`` of each rank how many elements are not those of this set of inputs."""
        for rank, stream in enumerate(emulate.streams()):
            with torch.cuda.stream(stream):
                close = torch.isclose(
                    self.outputs[rank][0].float(), self.wanted[data], rtol=BOUND[DTYPE], atol=BOUND[DTYPE]
                )
                mismatches[rank].add_(close.logical_not().sum())


def run(fields: dict[str, Any]) -> dict[str, Any]:
    """``mismatches`` and ``words``, by rank. ``noticed``: mismatches against a wrong reference, of one block."""
    collective, release = fields["collective"], fields["release"]
    plan = blocks(fields["calls"])
    generator = torch.Generator().manual_seed(11)
    weight = (1 + emulate.ordinary(generator, HIDDEN) / 4).to("cuda", DTYPE)
    workspace = emulate.make(collective, release, weight, max(SIZES))
    lanes = [_Lane(workspace, tokens, two_shot(collective, size), generator) for size, tokens in enumerate(SIZES)]
    mismatches, noticed = ([torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2)] for _ in range(2))
    # Load every kernel first, on a workspace of its own: a load waits for the device.
    scratch = emulate.make(collective, release, weight, max(SIZES))
    torch.cuda.synchronize()
    for lane in lanes:
        emulate.eager(scratch, [steps[:1] for steps in lane.steps])
        lane.count(0, noticed)
        if not all(emulate.returned(_DEADLINE)):
            return {"kind": NEVER, "note": "the warm-up", "stuck": True}
    for lane in lanes:
        lane.capture()
    for count in noticed:
        count.zero_()
    torch.cuda.synchronize()
    for number, block in enumerate(plan):
        lane = lanes[block.size]
        lane.launch(block)
        lane.count(block.data, mismatches)
        if number == 0:
            lane.count((block.data + 1) % SETS, noticed)
        if (number + 1) % _BETWEEN_LOOKS == 0 and not all(emulate.returned(_DEADLINE)):
            return {"kind": NEVER, "note": f"by block {number}", "stuck": True}
    if not all(emulate.returned(_DEADLINE)):
        return {"kind": NEVER, "note": "the last blocks", "stuck": True}
    return {
        "kind": RETURNED,
        "mismatches": [int(count) for count in mismatches],
        "noticed": [int(count) for count in noticed],
        "words": [words.tolist() for words in workspace.control],
        "buffer_bytes": workspace.buffer_bytes,
    }
