"""Runner: inputs that the program writes into."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from replay.programs import HIDDEN, ROWS, NotesIn, assert_close, rows, single
from torch import Tensor

from ringfence.runtime.errors import (
    MovedInputWarning,
)
from ringfence.runtime.replay.capture import GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.program import Padding, Program, Step
from ringfence.runtime.replay.runner import PiecewiseRunner


def append(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    """Writes rows into a cache and reads all of it, as attention does."""
    cache[: x.shape[0]] += x
    return (cache.sum(0) + x,)


def cached_program(island: bool) -> Program:
    """x (0), cache (1, written): a piece, a step that writes the cache, and a piece that reads it."""
    return Program(
        steps=(
            Step("scale", lambda x: (x * 2,), (0,), (2,), island=False),
            Step("append", append, (2, 1), (3,), island=island, frees=(2,)),
            Step("read", lambda h, cache: (h + cache[0],), (3, 1), (4,), island=False, frees=(3,)),
        ),
        inputs=("x", "cache"),
        outputs=(4, 1),
        slots=5,
        constants=(),
        static_inputs=frozenset(),
        written=frozenset({1}),
    )


def cached(x: Tensor, cache: Tensor) -> list[Tensor]:
    (h,) = append(x * 2, cache)
    return [h + cache[0], cache]


def check_cached(runner: PiecewiseRunner, x: Tensor, cache: Tensor) -> None:
    expected = cached(x, kept := cache.clone())
    out = runner(x, cache)
    assert_close(out, expected)
    torch.testing.assert_close(cache, kept)
    assert out[1] is cache


@pytest.mark.parametrize("island", [False, True])
def test_runner_written_input_is_written_in_place_and_never_copied(island: bool) -> None:
    runner = PiecewiseRunner(cached_program(island), ROWS, SimulatedGraphs(), [4, 2])
    cache = torch.randn(1 << 12, HIDDEN)
    for n in (4, 2, 4, 3, 4, 2):
        check_cached(runner, rows(n), cache)
    x = rows(4)
    with torch.profiler.profile(record_shapes=True) as profile:
        runner(x, cache)
    copies = [e for e in profile.events() if e.name in ("aten::copy_", "aten::clone")]
    assert copies and all(cache.numel() not in [math.prod(s) for s in e.input_shapes] for e in copies)
    assert sorted(runner.captured_sizes) == [(2,), (4,)]


@pytest.mark.parametrize("make_graphs", [SimulatedGraphs])
def test_runner_written_input_at_a_new_address_is_captured_anew(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(cached_program(True), ROWS, make_graphs(), [4])
    caches = [rows(16) for _ in range(3)]
    for _ in range(3):
        for cache in caches:
            check_cached(runner, rows(4), cache)
    assert len(runner._places.entries) == 3


def test_runner_written_input_that_is_always_new_is_captured_a_bounded_number_of_times() -> None:
    graphs = SimulatedGraphs()
    notes: list[str] = []
    runner = PiecewiseRunner(cached_program(True), ROWS, graphs, [4], remarks=NotesIn(notes))
    kept = []
    with pytest.warns(MovedInputWarning, match=r"'cache'.*mark_static_address") as caught:
        for _ in range(12):
            kept.append(rows(16))
            check_cached(runner, rows(4), kept[-1])
    assert len(caught) == 1 and len(notes) == 2 and all("mark_static_address" in note for note in notes)
    assert len(runner._places.entries) == 8
    check_cached(runner, rows(4), kept[0])


def test_runner_releases_the_captures_of_a_cache_that_is_gone() -> None:
    runner = PiecewiseRunner(cached_program(True), ROWS, SimulatedGraphs(), [4])
    first = rows(16)
    check_cached(runner, rows(4), first)
    ref = weakref.ref(first)
    first = rows(32)  # of another size, so at another address
    assert ref() is None
    check_cached(runner, rows(4), first)
    assert len(runner._places.entries) == 1


def test_runner_written_input_with_another_layout_at_the_same_address_is_another_capture() -> None:
    def double(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        cache.mul_(2)
        return (x + cache,)

    program = Program(
        (Step("only", double, (0, 1), (2,), False),), ("x", "c"), (2,), 3, (), frozenset(), frozenset({1})
    )
    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [8])
    memory = rows(8)
    for cache in (memory, memory.t(), memory, memory.t()):
        x, expected = rows(8), cache * 2
        assert_close(runner(x, cache), [x + expected])
        torch.testing.assert_close(cache, expected)
    assert len(runner._places.entries) == 2


@pytest.mark.parametrize("overlaps", [True, False])
def test_runner_input_that_shares_memory_with_a_written_one_is_not_served_from_a_copy(overlaps: bool) -> None:
    """A copy that is made before the step would show the old value."""

    def write_then_read(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        cache.add_(1)
        return (x * 2,)

    program = Program(
        (Step("only", write_then_read, (0, 1), (2,), True), Step("piece", lambda h: (h + 1,), (2,), (3,), False)),
        ("x", "cache"),
        (3,),
        4,
        (),
        frozenset(),
        frozenset({1}),
    )
    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [4])
    memory = rows(12)
    cache, x = memory[:8], memory[6:10] if overlaps else memory[8:]
    for _ in range(3):
        before = memory.clone()
        before[:8] += 1
        (out,) = runner(x, cache)
        torch.testing.assert_close(out, (before[6:10] if overlaps else before[8:]) * 2 + 1)
        torch.testing.assert_close(memory, before)
    assert bool(runner.captured_sizes) is not overlaps


def test_runner_does_not_pad_where_inputs_are_written() -> None:
    runner = PiecewiseRunner(cached_program(False), ROWS, SimulatedGraphs(), [8], padding=Padding({0: (0,)}, {0: (0,)}))
    cache = rows(16)
    for n in (5, 8, 3):
        check_cached(runner, rows(n), cache)
    assert runner.captured_sizes == [(8,)]


def test_runner_notes_a_large_input_that_is_copied_in_every_step() -> None:
    notes: list[str] = []
    runner = PiecewiseRunner(
        single(lambda x, cache: (x + cache[0, 0],), ["x", "cache"]),
        ROWS,
        SimulatedGraphs(),
        [4],
        remarks=NotesIn(notes),
    )
    cache = torch.randn(1 << 20, 8)
    for _ in range(3):
        x = rows(4)
        assert_close(runner(x, cache), [x + cache[0, 0]])
    assert len(notes) == 1 and "'cache' (32.0 MiB)" in notes[0] and "mark_static_address" in notes[0]
