"""Runner: which sizes are captured, and arguments that are sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from replay.programs import (
    PIECES,
    ROWS,
    RecordingGraphs,
    UntouchableGraphs,
    assert_close,
    attend,
    both_backends,
    layer,
    layer_program,
    rows,
    single,
    weights,
)
from torch import Tensor

from ringfence.runtime.replay.capture import GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.program import Program, SizeRule, Step
from ringfence.runtime.replay.runner import PiecewiseRunner
from ringfence.runtime.replay.stats import Uncaptured

# -- which sizes are captured --------------------------------------------------------------


def test_runner_without_capture_sizes_never_asks_the_backend() -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, UntouchableGraphs())
    x, w = rows(4), weights()
    assert_close(runner(x, w), layer(x, w))
    assert runner.captured_sizes == []


def test_runner_without_a_backend_runs_captured_sizes_eagerly() -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, None, [4])
    for _ in range(2):
        x, w = rows(4), weights()
        assert_close(runner(x, w), layer(x, w))
    assert runner.captured_sizes == []


def test_runner_leaves_other_sizes_uncaptured() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    w = weights()
    for n in (3, 5, 3):
        x = rows(n)
        assert_close(runner(x, w), layer(x, w))
    assert graphs.events == [] and runner.captured_sizes == []


def test_runner_uncaptured_outputs_are_what_the_steps_returned() -> None:
    made: list[Tensor] = []

    def call(x: Tensor) -> tuple[Tensor]:
        made.append(x + 1)
        return (made[-1],)

    (out,) = PiecewiseRunner(single(call, ["x"]), ROWS, RecordingGraphs(), [4])(rows(3))
    assert out is made[-1]


def test_runner_captures_each_size_once() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4, 2])
    w = weights()
    for call in range(3):
        for n in (4, 2):
            x = rows(n)
            assert_close(runner(x, w), layer(x, w))
        assert len(graphs.pieces) == 2 * PIECES
        assert [p.replays for p in graphs.pieces] == [call] * (2 * PIECES)
    assert runner.captured_sizes == [(4,), (2,)]


def test_runner_runs_and_records_piece_by_piece() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    runner(rows(4), weights())
    pieces = [event for i in range(PIECES) for event in ("warm up", f"capture {i}")]
    assert graphs.events == ["make room", *pieces], "once for all of them"


@pytest.mark.parametrize("where", ["piece", "island"])
def test_runner_effects_happen_once_for_each_call(where: str) -> None:
    """A cache that a step writes, a counter that it advances: the call that captures counts as one."""
    counter = torch.zeros(())

    def count(x: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        total.add_(1)
        return (x * total,)

    step = Step("count", count, (0, 1), (2,), island=where == "island")
    program = Program((step,), ("x", "counter"), (2,), 3, (), frozenset({1}))
    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [4])
    for call in (1, 2, 3):
        x = rows(4)
        assert_close(runner(x, counter), [x * call])
        assert counter.item() == call


def test_runner_bounds_the_captures_of_a_size_that_keeps_growing() -> None:
    graphs = RecordingGraphs()
    rule = SizeRule(bindings=((0, 0), (1, 0)), tokens=lambda sizes: sizes[0])
    runner = PiecewiseRunner(single(lambda x, cache: (x + cache.sum(),), ["x", "cache"]), rule, graphs, [1, 2])
    for _ in range(2):
        for n in (1, 2):
            for length in range(1, 40):
                x, cache = rows(n), rows(length)
                assert_close(runner(x, cache), [x + cache.sum()])
    assert len(graphs.pieces) == 2 * 8 and runner.captured_sizes[:8] == [(1, length) for length in range(1, 9)]


def test_runner_without_a_token_count_captures_nothing() -> None:
    runner = PiecewiseRunner(single(lambda x: (x * 2,), ["x"]), SizeRule(((0, 0),), None), UntouchableGraphs(), [4])
    x = rows(4)
    assert_close(runner(x), [x * 2])


def test_a_second_call_at_once_runs_uncaptured() -> None:
    """From inside the model or from another thread: the static buffers hold the values of the first."""
    inner: list[bool] = []
    again = [True]

    def call() -> None:
        x = rows(4)
        inner.append(all(map(torch.allclose, runner(x, w), layer(x, w))))

    def island(h: Tensor) -> tuple[Tensor, ...]:
        if again[0]:
            again[0] = False
            call()
            thread = threading.Thread(target=call)
            thread.start()
            thread.join(30)
            again[0] = True
        return attend(h)

    runner = PiecewiseRunner(layer_program(island), ROWS, SimulatedGraphs(), [4])
    w = weights()
    for calls in (1, 2, 3):
        x = rows(4)
        assert_close(runner(x, w), layer(x, w))
        assert inner == [True] * 2 * calls
    assert runner.counts.uncaptured == {Uncaptured.BUSY: 6} and (runner.counts.captures, runner.counts.replays) == (
        1,
        2,
    )


def test_runner_captures_by_token_count_and_keys_by_sizes() -> None:
    graphs = RecordingGraphs()
    rule = SizeRule(bindings=((0, 0), (0, 1)), tokens=lambda sizes: sizes[0] * sizes[1])
    runner = PiecewiseRunner(single(lambda x: (x * 2 + 1,), ["x"]), rule, graphs, [12])
    for shape in ((3, 4), (4, 3), (2, 4), (3, 4)):
        x = torch.randn(*shape)
        assert_close(runner(x), [x * 2 + 1])
    assert runner.captured_sizes == [(3, 4), (4, 3)]
    assert len(graphs.pieces) == 2


@both_backends
@pytest.mark.parametrize("static_outputs", [False, True])
def test_runner_alternating_sizes_match_eager(make_graphs: Callable[[], GraphBackend], static_outputs: bool) -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, make_graphs(), [1, 4, 6], static_outputs=static_outputs)
    w = weights()
    for n in (4, 6, 1, 4, 5, 6, 6, 1, 4, 3):
        x = rows(n)
        kept = x.clone()
        assert_close(runner(x, w), layer(kept, w))
        assert torch.equal(x, kept)
    assert sorted(runner.captured_sizes) == [(1,), (4,), (6,)]


# -- arguments that are not tensors -------------------------------------------------------


@both_backends
def test_runner_integer_argument_is_a_size(make_graphs: Callable[[], GraphBackend]) -> None:
    rule = SizeRule(bindings=((0, None), (1, 0)), tokens=lambda sizes: sizes[1])
    runner = PiecewiseRunner(single(lambda k, x: (x * k,), ["k", "x"]), rule, make_graphs(), [4])
    for k in (2, 7, 2, 7):
        x = rows(4)
        assert_close(runner(k, x), [x * k])
    assert runner.captured_sizes == [(2, 4), (7, 4)]


def test_runner_integer_outputs_pass_through() -> None:
    program = single(lambda x: (x * 2, x.shape[0]), ["x"], 2)
    runner = PiecewiseRunner(program, ROWS, RecordingGraphs(), [4, 2])
    for n in (4, 2, 3, 4):
        assert runner(rows(n))[1] == n
