"""What a workspace's memory says, on buffers made as the kernels of each layout leave them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from fake_flashinfer import memory as make_memory
from torch import Tensor

from ringfence.runtime.collectives.buffer_dump import CELL, FLAGS, Cells, describe
from ringfence.runtime.collectives.kernels import BufferParts, KernelMemory, Launched
from ringfence.runtime.hazards.situation import Collective, Strategy

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
TRTLLM, MNNVL = Collective.TRTLLM, Collective.MNNVL
ROW = 2 * CELL
SENTINEL = {2: (torch.int16, -(2**15)), 4: (torch.int32, -(2**31))}


class Buffer:
    """A Lamport buffer, all sentinel at first. Payloads hold what looks like the sentinel and is not."""

    def __init__(self, memory: KernelMemory, seed: int = 0) -> None:
        self.memory = memory
        self.dtype, self.sentinel = SENTINEL[memory.element]
        self.elements = torch.full((memory.buffer_bytes // memory.element,), self.sentinel, dtype=self.dtype)
        self.generator = torch.Generator().manual_seed(seed)

    def write(self, row: int, offset: int = 0, start: int = 0, stop: int = ROW) -> None:
        """A row, or its bytes from start to stop; ``offset`` in bytes."""
        each = self.memory.element
        place = slice((offset + row * ROW + start) // each, (offset + row * ROW + stop) // each)
        count = place.stop - place.start
        payload = torch.randint(-(2**15) + 1, 2**15, (count,), generator=self.generator).to(self.dtype)
        payload[::3] = 0 if each == 2 else self.sentinel + 1  # 0x80000001: a subnormal
        payload[1::3] = self.sentinel + 5
        self.elements[place] = payload

    def cells(self, parts: BufferParts | None = None) -> tuple[Cells, Cells]:
        words = self.elements.view(torch.int32)
        found = []
        for offset, size in parts if parts is not None else self.memory.parts():
            found.append(Cells(self.memory.element))
            for at in range(offset, offset + size, 3 * CELL):  # in pieces, as it is read
                found[-1].add(words[at // 4 : min(at + 3 * CELL, offset + size) // 4])
        return found[0], found[1]

    def describe(
        self,
        words: list[int],
        flags: Tensor | None = None,
        ranks: Iterable[int] = (),
        previous: Buffer | None = None,
    ) -> dict[str, Any]:
        memory = self.memory
        before = None
        if previous is not None:
            named = dict(zip(memory.layout.words, words, strict=True))
            before = previous.cells(memory.layout.previous(memory, named)[1])
        ranks = tuple(ranks) or tuple(range(memory.world_size))
        return describe(memory, words, *self.cells(), flags, ranks, before)


def mnnvl_words(arrived: int = 1, buffer: int = 0) -> list[int]:
    return [buffer, (buffer + 2) % 3, 1 << 20, 1, 4096, 0, 0, 0, arrived]


def trtllm_words(arrived: int = 1, two_shot: int = 0) -> list[int]:
    return [arrived, two_shot, 0, 1 << 20, 0]


def one_shot(*tokens: int) -> set[Launched]:
    return {Launched(ONE, n, ROW) for n in tokens}


def memory(collective: Collective, calls: set[Launched], **other: Any) -> KernelMemory:
    return make_memory(collective, calls=calls, **other)


# -- mnnvl, one-shot: [token][source]


@pytest.mark.parametrize("keeps_own", [True, False])
def test_mnnvl_nothing_from_one_rank(keeps_own: bool) -> None:
    buffer = Buffer(memory(MNNVL, one_shot(1, 4), world_size=4, rank=2, keeps_own=keeps_own))
    for token in range(4):
        for source in (0, 2, 3) if keeps_own else (0, 3):
            buffer.write(token * 4 + source)
    value = buffer.describe(mnnvl_words(arrived=9))
    assert value["silent"] == [1] and value["says"] == "a call waits: nothing has arrived from rank 1"
    (reading,) = value["readings"]
    assert (reading["strategy"], reading["tokens"], reading["row_bytes"]) == ("one-shot", None, ROW)
    assert reading["from"]["1"] == {"rows": 0, "up_to": 0, "first_sentinel_word": ROW // 4}
    assert reading["from"]["0"] == {"rows": 4, "up_to": 4, "first_sentinel_word": None}
    assert value["words"]["arrived_blocks"] == 9 and value["words"]["clear_bytes_0"] == 4096
    assert value["written"][0] == [0, ROW]


def test_mnnvl_one_rank_up_to_a_token() -> None:
    buffer = Buffer(memory(MNNVL, one_shot(8), keeps_own=False))
    for token in (0, 1, 2, 5):
        buffer.write(token * 2 + 1)
    buffer.write(3 * 2 + 1, stop=ROW - 4)  # all but one word
    value = buffer.describe(mnnvl_words())
    assert value["silent"] == [] and value["says"] == "a call waits: the first 3 tokens of rank 1 have arrived"
    part = value["readings"][0]["from"]["1"]
    assert part == {"rows": 4, "up_to": 3, "first_sentinel_word": (8 * ROW - 4) // 4}


def test_mnnvl_all_silent_and_ranks_are_global() -> None:
    buffer = Buffer(memory(MNNVL, one_shot(8), keeps_own=False, rank=1))
    value = buffer.describe(mnnvl_words(), ranks=(4, 6))
    assert value["silent"] == [4] and value["says"] == "a call waits: nothing has arrived from rank 4"
    assert value["written"] == []


def test_a_rank_that_is_behind_is_told_from_one_that_waits() -> None:
    buffer = Buffer(memory(MNNVL, one_shot(2), keeps_own=False))
    assert buffer.describe(mnnvl_words(arrived=0))["says"] == "no call of this rank waits in it"
    buffer.write(1)
    value = buffer.describe(mnnvl_words(arrived=0))
    assert value["says"] == "no call of this rank waits in it; what rank 1 sent for the next one is here"
    assert value["silent"] == []


@pytest.mark.parametrize(("ranks", "who"), [(2, "rank 1"), (4, "another rank")])
def test_trtllm_behind(ranks: int, who: str) -> None:
    buffer = Buffer(memory(TRTLLM, one_shot(2), world_size=ranks))
    assert buffer.describe(trtllm_words(arrived=0))["says"] == "no call of this rank waits in it"
    buffer.write(2), buffer.write(3)
    value = buffer.describe(trtllm_words(arrived=0))
    assert value["says"] == f"no call of this rank waits in it; what {who} sent for the next one is here"
    assert value["silent"] == []


@pytest.mark.parametrize("index", [3, -1])
def test_words_that_nobody_writes(index: int) -> None:
    value = Buffer(memory(MNNVL, one_shot(2))).describe(mnnvl_words(buffer=index))
    assert value["says"].startswith(f"the word 'buffer' is {index}, which no kernel writes") and "M9" in value["says"]


def test_a_buffer_that_was_never_used() -> None:
    value = Buffer(memory(MNNVL, set())).describe(mnnvl_words(arrived=0))
    assert value["says"] == "no call of this rank waits in it" and value["readings"] == []


# -- mnnvl, two-shot: [token // ranks][source], and sums [token]


def test_mnnvl_two_shot_waits_for_parts_and_for_sums() -> None:
    made = memory(MNNVL, {Launched(TWO, 8, ROW)}, world_size=4, rank=0, buffer_bytes=64 * ROW)
    buffer, half = Buffer(made), 32 * ROW
    for local in range(2):
        for source in (0, 1, 3):
            buffer.write(local * 4 + source)
    value = buffer.describe(mnnvl_words(arrived=0))  # its first kernel counts no blocks
    assert value["silent"] == [2]
    buffer.write(2), buffer.write(6)
    for token in range(8):
        if token % 4 != 1:
            buffer.write(token, half)
    (reading,) = buffer.describe(mnnvl_words())["readings"]
    assert [reading["from"][str(r)]["rows"] for r in range(4)] == [2] * 4
    assert reading["sums_from"]["1"] == {"rows": 0, "up_to": 0, "first_sentinel_word": (half + ROW) // 4}
    assert reading["sums_from"]["2"] == {"rows": 2, "up_to": 2, "first_sentinel_word": None}


def test_a_silent_rank_is_silent_in_both_strategies_that_were_launched() -> None:
    made = memory(MNNVL, {Launched(TWO, 8, ROW), Launched(ONE, 2, ROW)}, buffer_bytes=64 * ROW)
    buffer = Buffer(made)
    for token in range(2):
        buffer.write(token * 2)
    value = buffer.describe(mnnvl_words())
    assert [r["strategy"] for r in value["readings"]] == ["one-shot", "two-shot"] and value["silent"] == [1]


# -- trtllm, one-shot: [source][token]


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("rank", range(4))
def test_trtllm_nothing_from_one_rank(rank: int, element: int) -> None:
    silent = (rank + 1) % 4
    buffer = Buffer(memory(TRTLLM, one_shot(1, 4, 16), world_size=4, rank=rank, element=element))
    for source in range(4):
        for token in range(4):
            if source != silent:
                buffer.write(source * 4 + token)
    value = buffer.describe(trtllm_words())
    (reading,) = value["readings"]
    assert reading["tokens"] == 4 and value["silent"] == [silent]
    assert reading["from"][str(silent)] == {"rows": 0, "up_to": 0, "first_sentinel_word": silent * 4 * ROW // 4}


def test_trtllm_up_to_a_token() -> None:
    buffer = Buffer(memory(TRTLLM, one_shot(4, 8)))
    for row in (*range(8), 8, 9, 10, 12):
        buffer.write(row)
    buffer.write(11, start=4)  # all but the first two elements
    value = buffer.describe(trtllm_words())
    assert value["says"] == "a call waits: the first 3 of 8 tokens of rank 1 have arrived"
    assert value["readings"][0]["from"]["1"]["first_sentinel_word"] == 11 * ROW // 4


def test_trtllm_several_shapes_fit() -> None:
    buffer = Buffer(memory(TRTLLM, one_shot(3, 4, 16)))
    for row in range(4):  # four of rank 0 and none of rank 1, or three and one
        buffer.write(row)
    value = buffer.describe(trtllm_words())
    assert [r["tokens"] for r in value["readings"]] == [3, 4] and value["silent"] == []
    assert value["says"] == (
        "a call waits: the first 1 of 3 tokens of rank 1 have arrived, "
        "or the first 0 of 4 tokens of rank 1 have arrived"
    )


def test_trtllm_a_shape_that_ends_before_what_is_written_does_not_fit() -> None:
    buffer = Buffer(memory(TRTLLM, one_shot(5, 8)))
    for row in (*range(8), 12):  # the last is token 4 of rank 1; five tokens would end before it
        buffer.write(row)
    assert [r["tokens"] for r in buffer.describe(trtllm_words())["readings"]] == [8]


def test_trtllm_no_shape_fits() -> None:
    buffer = Buffer(memory(TRTLLM, one_shot(4)))
    buffer.write(1)
    value = buffer.describe(trtllm_words())
    assert value["readings"] == [] and "fits no shape" in value["says"] and value["written"] == [[ROW, 2 * ROW]]


@pytest.mark.parametrize("seed", range(20))
def test_trtllm_the_shape_that_was_launched_is_among_the_readings(seed: int) -> None:
    choose = random.Random(seed)
    world, counts = choose.choice([2, 4]), choose.sample(range(1, 12), 4)
    tokens, rank = choose.choice(counts), choose.randrange(world)
    buffer = Buffer(memory(TRTLLM, one_shot(*counts), world_size=world, rank=rank), seed)
    arrived = {s: choose.sample(range(tokens), choose.randrange(tokens)) for s in range(world)}
    arrived[rank] = list(range(tokens))
    for source, some in arrived.items():
        for token in some:
            buffer.write(source * tokens + token)
    value = buffer.describe(trtllm_words())
    assert tokens in [r["tokens"] for r in value["readings"]]
    assert set(value["silent"]) <= {s for s, some in arrived.items() if not some}
    (mine,) = [r for r in value["readings"] if r["tokens"] == tokens]
    assert {int(s): p["rows"] for s, p in mine["from"].items()} == {s: len(some) for s, some in arrived.items()}


def test_what_was_not_read_is_not_silent() -> None:
    made = memory(TRTLLM, one_shot(4))
    buffer, front = Buffer(made), Cells(2)
    for row in range(4):
        buffer.write(row)
    front.add(buffer.elements.view(torch.int32)[: 6 * ROW // 4])  # two rows of rank 1 are missing
    value = describe(made, trtllm_words(), front, Cells(2), None, (0, 1))
    assert value["silent"] == [] and value["readings"][0]["from"]["1"]["rows"] == 0


# -- trtllm, two-shot: flags


def flags(*values: int) -> Tensor:
    """One value for each source."""
    return torch.tensor(values, dtype=torch.int32).repeat(FLAGS)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_trtllm_two_shot_barriers(before: int) -> None:
    buffer = Buffer(memory(TRTLLM, {Launched(TWO, 64, ROW)}, world_size=4, rank=3, flags=1))
    at = [before, (before + 1) % 3, (before + 2) % 3]
    value = buffer.describe(trtllm_words(two_shot=before), flags(at[1], at[0], at[1], at[1]))
    assert value["barriers"] == {"0": [1], "1": [0], "2": [1], "3": [1]} and value["silent"] == [1]
    assert value["says"] == "a two-shot call waits: rank 1 has not come to its first barrier"
    value = buffer.describe(trtllm_words(two_shot=before), flags(at[2], at[1], at[2], at[2]))
    assert value["says"] == "a two-shot call waits for rank 1 in its second barrier" and value["silent"] == []
    value = buffer.describe(trtllm_words(arrived=0, two_shot=before), flags(at[0], at[1], at[0], at[0]))
    assert value["says"] == "no call of this rank waits in it; what rank 1 sent for the next one is here"


def test_blocks_that_differ_are_shown() -> None:
    buffer = Buffer(memory(TRTLLM, {Launched(TWO, 64, ROW)}, flags=1))
    mixed = flags(1, 0)
    mixed[FLAGS + 1] = 1
    assert buffer.describe(trtllm_words(), mixed)["barriers"]["1"] == [0, 1]


# -- the block that is first to finish has turned to the next buffer


@pytest.mark.parametrize("collective", [MNNVL, TRTLLM])
def test_a_call_of_which_something_has_arrived_waits_in_the_previous_buffer(collective: Collective) -> None:
    """Four tokens, of which three of rank 1 are there; the control words speak of the next call already."""
    tokens = 4
    made = memory(collective, one_shot(tokens, 1), keeps_own=collective is TRTLLM)
    current, previous = Buffer(made), Buffer(made, seed=1)
    place = (lambda t, r: t * 2 + r) if collective is MNNVL else (lambda t, r: r * tokens + t)
    for token in range(tokens if collective is TRTLLM else 0):
        previous.write(place(token, 0))
    for token in (0, 1, 3):
        previous.write(place(token, 1))
    size = tokens * 2 * ROW
    words = [1, 0, 1 << 20, 1, size, 0, 0, 0, 0] if collective is MNNVL else [0, 0, 1, 1 << 20, size // made.element]
    value = current.describe(words, previous=previous)
    assert value["waits_in"] == "previous" and value["silent"] == [] and value["written"]
    count = " of 4" if collective is TRTLLM else ""
    assert value["says"] == f"a call waits: the first 2{count} tokens of rank 1 have arrived"
    part = value["readings"][0]["from"]["1"]
    assert (part["rows"], part["up_to"], part["first_sentinel_word"]) == (3, 2, place(2, 1) * ROW // 4)

    previous.write(place(2, 1))  # and when all has arrived, nothing waits
    value = current.describe(words, previous=previous)
    assert value["waits_in"] == "current" and value["says"] == "no call of this rank waits in it"


def test_the_previous_buffer_of_each_kernel() -> None:
    made = memory(MNNVL, one_shot(1))
    words = dict(zip(made.layout.words, [2, 1, 1 << 20, 2, 4096, 2048, 0, 0, 0], strict=True))
    assert made.layout.previous(made, words) == (1, ((0, 4096), (made.buffer_bytes // 2, 2048)))
    assert made.layout.previous(made, words | {"dirty_stages": 1})[1][1][1] == 0
    made = memory(TRTLLM, one_shot(1))
    words = dict(zip(made.layout.words, [0, 0, 0, 1 << 20, 100], strict=True))
    assert made.layout.previous(made, words) == (2, ((0, 100 * made.element), (made.buffer_bytes // 2, 0)))
    assert (
        made.layout.previous(made, words | {"clear_elements": 1 << 40})[1][0][1] == made.buffer_bytes
    )  # garbage reads no further
