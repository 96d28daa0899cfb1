"""Buffer dump: what the memory of a workspace says about a call that does not return. Pure: words in, values out.

Every kernel here waits in the same way: the peers store their parts into this rank's *Lamport buffer*,
and this rank polls until no element holds the sentinel -0.0 any more. Where a row of one token is in a buffer is the
collective's :class:`.kernels.Layout`.

The block that is first to finish turns to the next buffer once all blocks have *begun*. So a call of which something
has arrived may wait in the buffer before the current one, whose extent is in the control words then.

The number of tokens of a call that has not come so far is on no device and, in a replay, on no host. But a graph
can hold only calls that the host has launched or captured before (``KernelMemory.calls``), and this rank's own part is
in its buffer whole. So a *reading* is a shape that was launched and that what is there fits; there may be several.

Source: trtllm_mnnvl_allreduce.cuh and trtllm_allreduce_fusion.cuh of FlashInfer 0.6.18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hazards.situation import Strategy
from ..spelling import ranks_text
from .kernels import BUFFERS, KernelMemory

#: Rows are whole multiples of it (the requirement "warp"), so a buffer is looked at in cells of this many bytes.
CELL = 512

#: Barrier flags of each source (kBarrierFlagCount).
FLAGS = 256

_SENTINEL = {2: (torch.int16, -(2**15)), 4: (torch.int32, -(2**31))}
_MOST_READINGS = 4
_MOST_RUNS = 4


class Cells:
    """A part of a buffer in cells of 512 bytes: how many elements of each were written, and which is the first not."""

    def __init__(self, element: int) -> None:
        self._dtype, self._sentinel = _SENTINEL[element]
        self._each = CELL // element
        self._per_word = 4 // element
        self._written: list[Tensor] = []
        self._first: list[Tensor] = []

    def add(self, words: Tensor) -> None:
        """The next words, int32 on the host; whole cells."""
        waits = words.view(self._dtype).view(-1, self._each) == self._sentinel
        self._written.append(self._each - waits.sum(1))
        self._first.append(waits.to(torch.uint8).argmax(1) // self._per_word)

    def rows(self, row_bytes: int) -> Rows:
        """The whole rows among them."""
        per_row = row_bytes // CELL
        written = torch.cat(self._written) if self._written else torch.zeros(0, dtype=torch.int64)
        first = torch.cat(self._first) if self._first else torch.zeros(0, dtype=torch.int64)
        rows = written.numel() // per_row
        full = written[: rows * per_row].view(rows, per_row) == self._each
        cell = full.to(torch.uint8).argmin(1)  # the first cell that is not full
        place = first[: rows * per_row].view(rows, per_row).gather(1, cell[:, None])[:, 0] + cell * (CELL // 4)
        some = written[: rows * per_row].view(rows, per_row).any(1)
        return Rows(row_bytes, full.all(1).tolist(), some.tolist(), place.tolist())

    def runs(self) -> list[list[int]]:
        """The first stretches in which something was written: [from, to) in bytes, to the cell."""
        found: list[list[int]] = []
        written = torch.cat(self._written).ne(0) if self._written else torch.zeros(0, dtype=torch.bool)
        edges = torch.diff(written.to(torch.int8), prepend=torch.zeros(1, dtype=torch.int8)).nonzero()[:, 0].tolist()
        for start, stop in zip(edges[::2], [*edges[1::2], written.numel()], strict=False):
            found.append([start * CELL, stop * CELL])
        return found[:_MOST_RUNS]


@dataclass(frozen=True)
class Rows:
    """whole: no element of a row waits. some: one was written. place: the first word of the row that waits."""

    row_bytes: int
    whole: list[bool]
    some: list[bool]
    place: list[int]

    def part(self, indices: Sequence[int], offset: int = 0) -> Part:
        """What has arrived of the rows with these indices, those of tokens 0, 1, ... of one source."""
        asked, indices = len(indices), [i for i in indices if i < len(self.whole)]
        whole = [self.whole[i] for i in indices]
        up_to = next((t for t, done in enumerate(whole) if not done), len(whole))
        word = None
        if up_to < len(indices):
            at = indices[up_to]
            word = (offset + at * self.row_bytes) // 4 + self.place[at]
        some = [t for t, i in enumerate(indices) if self.some[i]]
        return Part(sum(whole), up_to, word, some[-1] + 1 if some else 0, 0 < asked == len(indices))


@dataclass(frozen=True)
class Part:
    """What has arrived from one source. rows: whole ones. up_to: of tokens 0, 1, ... without a gap.

    word: the first one that holds the sentinel, counted from the start of the buffer; None where
    none does. extent: behind the last token of which something has arrived. seen: all of it was read.
    """

    rows: int
    up_to: int
    word: int | None
    extent: int
    seen: bool


@dataclass(frozen=True)
class Reading:
    """What a buffer says if the running call has this strategy, row size and, where it is not None, token count.

    parts: by source. sums: of two-shot, by the rank that owns them. silent: from whom nothing has arrived.
    """

    strategy: Strategy
    row_bytes: int
    tokens: int | None
    parts: tuple[Part, ...]
    sums: tuple[Part, ...] = ()

    def misses(self, me: int) -> bool:
        """Whether something of another rank has not arrived."""
        return any(p.word is not None for r, p in enumerate(self.parts) if r != me) or any(
            p.word is not None for p in self.sums
        )

    @property
    def silent(self) -> set[int]:
        summed = {r for r, part in enumerate(self.sums) if part.extent}
        return {r for r, part in enumerate(self.parts) if part.seen and not part.extent} - summed

    def to_dict(self, ranks: Sequence[int]) -> dict[str, Any]:
        def by_rank(parts: Sequence[Part]) -> dict[str, Any]:
            return {
                str(ranks[r]): {"rows": p.rows, "up_to": p.up_to, "first_sentinel_word": p.word}
                for r, p in enumerate(parts)
            }

        value = {
            "strategy": str(self.strategy),
            "row_bytes": self.row_bytes,
            "tokens": self.tokens,
            "from": by_rank(self.parts),
        }
        return value | ({"sums_from": by_rank(self.sums)} if self.sums else {})


def readings(memory: KernelMemory, front: Cells, back: Cells) -> list[Reading]:
    """The shapes that were launched and that the current buffer fits, at most four."""
    found: list[Reading] = memory.layout.readings(memory, front, back)
    return found[:_MOST_READINGS]


def _unfinished(memory: KernelMemory, words: Mapping[str, int], previous: tuple[Cells, Cells]) -> list[Reading]:
    """What the previous buffer says, where the call that used it is not complete in any reading."""
    strategy = memory.layout.strategy_before(words)
    found = [r for r in readings(memory, *previous) if strategy in (None, r.strategy)]
    return found if all(r.misses(memory.rank) for r in found) else []


def describe(
    memory: KernelMemory,
    words: Sequence[int],
    front: Cells,
    back: Cells,
    flags: Tensor | None,
    ranks: Sequence[int],
    previous: tuple[Cells, Cells] | None = None,
) -> dict[str, Any]:
    """What a person is shown of one workspace; the schema is docs/report.md.

    words: the control words. front, back: :meth:`.KernelMemory.parts` of the current buffer. previous: those
    of its layout's `previous`; needed where no block has arrived at the current one.
    flags: int32 ``[256 * world_size]``, where there are any. ranks: the global rank of each rank of the group.
    """
    named = dict(zip(memory.layout.words, words, strict=True))
    value: dict[str, Any] = {"words": named}
    if not 0 <= named["buffer"] < BUFFERS:
        says = f"the word 'buffer' is {named['buffer']}, which no kernel writes: something else did (hazard M9)"
        return value | {"silent": [], "says": says}
    found = readings(memory, front, back)
    before = _unfinished(memory, named, previous) if previous is not None else []
    if before:
        found = before
    value["waits_in"] = "previous" if before else "current"
    value["written"] = (previous[0] if before and previous is not None else front).runs()
    value["readings"] = [r.to_dict(ranks) for r in found]
    passed = _barriers(flags, named["two_shot_flag"], memory.world_size) if flags is not None else None
    if passed is not None:
        value["barriers"] = {str(ranks[r]): steps for r, steps in enumerate(passed)}
    running = named["arrived_blocks"] > 0 or bool(before)
    silent, says = _sentence(memory, running, found, passed, bool(value["written"]), ranks)
    return value | {"silent": [ranks[r] for r in sorted(silent)], "says": says}


def _barriers(flags: Tensor, value: int, world_size: int) -> list[list[int]]:
    """By source: how many barriers of the call it has come to, 0 to 2; several where its blocks differ."""
    steps = (flags.view(FLAGS, world_size) - value) % 3
    return [sorted(set(steps[:, r].tolist())) for r in range(world_size)]


def _sentence(
    memory: KernelMemory,
    running: bool,
    found: Sequence[Reading],
    passed: Sequence[Sequence[int]] | None,
    written: bool,
    ranks: Sequence[int],
) -> tuple[set[int], str]:
    """From whom nothing has arrived for the running call, and that for people."""
    me, others = memory.rank, {r for r in range(memory.world_size) if r != memory.rank}

    def named(some: set[int]) -> str:
        return ranks_text(tuple(ranks[r] for r in sorted(some)))

    mine = [r for r in found if r.parts[me].extent or not memory.keeps_own]
    if not (running or (memory.keeps_own and mine)):
        ahead = {r for r in others if any(reading.parts[r].extent for reading in found)}
        if passed is not None:
            ahead |= {r for r in others if any(passed[r])}
        who = named(ahead or others) if ahead or len(others) == 1 else "another rank"
        what = f"; what {who} sent for the next one is here" if ahead or written else ""
        return set(), f"no call of this rank waits in it{what}"
    if passed is not None and not mine and any(passed[me]):
        silent = {r for r in others if not any(passed[r])}
        if silent:
            return silent, f"a two-shot call waits: {named(silent)} has not come to its first barrier"
        behind = {r for r in others if min(passed[r]) < max(passed[me])}
        return set(), "a two-shot call waits" + (f" for {named(behind)} in its second barrier" if behind else "")
    if not mine:
        return set(), "a call of this rank runs in it, and what has arrived fits no shape that was launched"
    silent = set.intersection(*(r.silent for r in mine)) & others
    if silent:
        return silent, f"a call waits: nothing has arrived from {named(silent)}"
    return set(), "a call waits: " + ", or ".join(_arrived(r, sorted(others), ranks) for r in mine)


def _arrived(reading: Reading, others: Sequence[int], ranks: Sequence[int]) -> str:
    count = f" of {reading.tokens}" if reading.tokens is not None else ""
    parts = (f"{reading.parts[r].up_to}{count} tokens of rank {ranks[r]}" for r in others)
    kind = "" if reading.strategy is Strategy.ONE_SHOT else "parts for two-shot: "
    return f"{kind}the first {', '.join(parts)} have arrived"
