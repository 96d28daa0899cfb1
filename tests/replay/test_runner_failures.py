"""Runner: captures that throw are undone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from replay.programs import (
    PIECES,
    ROWS,
    RecordingGraphs,
    assert_close,
    attend,
    layer,
    layer_program,
    rows,
    single,
    weights,
)
from torch import Tensor

from ringfence.runtime.errors import (
    CaptureFailedWarning,
)
from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.replay.runner import PiecewiseRunner


@pytest.mark.parametrize("k", range(PIECES))
def test_runner_failed_capture_is_undone(k: int) -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4, 2])
    w = weights()
    x2 = rows(2)
    assert_close(runner(x2, w), layer(x2, w))
    calls: list[str] = []
    program = layer_program()
    steps = [replace(s, call=lambda *a, s=s: calls.append(s.name) or s.call(*a)) for s in program.steps]
    runner = PiecewiseRunner(replace(program, steps=tuple(steps)), ROWS, graphs, [4, 2])
    assert_close(runner(x2, w), layer(x2, w))
    graphs.throw_on_capture.add(2 * PIECES + k)
    calls.clear()
    x = rows(4)
    with pytest.warns(CaptureFailedWarning, match=("scale", "project", "finish")[k]) as caught:
        assert_close(runner(x, w), layer(x, w))
    assert "was told to throw" in str(caught[0].message)
    # A capture calls a piece once more, and the failed one is not called by the backend that throws.
    ran = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert ran == [s.name for s in program.steps], "every step of the call is made, once"
    failed = graphs.pieces[2 * PIECES :]
    assert len(failed) == k and all(p.released for p in failed)
    assert runner.captured_sizes == [(2,)]
    asked = len(graphs.events)
    for _ in range(2):
        x = rows(4)
        assert_close(runner(x, w), layer(x, w))
    assert len(graphs.events) == asked, "a size whose capture failed stays uncaptured"
    x2 = rows(2)
    assert_close(runner(x2, w), layer(x2, w))


def test_runner_failed_island_undoes_the_capture() -> None:
    def island(h: Tensor) -> tuple[Tensor, ...]:
        if graphs.events == ["make room", "warm up", "capture 0"]:
            raise ValueError("the island gave up")
        return attend(h)

    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(island), ROWS, graphs, [4])
    w = weights()
    with pytest.raises(ValueError, match="the island gave up"):
        runner(rows(4), w)
    assert [p.released for p in graphs.pieces] == [True] and runner.captured_sizes == []
    x = rows(4)
    assert_close(runner(x, w), layer(x, w))
    assert runner.captured_sizes == [(4,)]


def test_runner_failed_warm_up_captures_nothing() -> None:
    graphs = RecordingGraphs()
    graphs.throw_on_warm_up = True
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    w = weights()
    with pytest.raises(RuntimeError, match="the warm-up was told to throw"):
        runner(rows(4), w)
    assert graphs.pieces == [] and runner.captured_sizes == []
    graphs.throw_on_warm_up = False
    x = rows(4)
    assert_close(runner(x, w), layer(x, w))


def test_runner_host_sync_in_a_piece_is_undone_and_named() -> None:
    def piece(x: Tensor) -> tuple[Tensor]:
        return (x * x.sum().item(),)

    runner = PiecewiseRunner(single(piece, ["x"]), ROWS, SimulatedGraphs(), [4])
    x = rows(4)
    with pytest.warns(CaptureFailedWarning, match=r"'only'.*split_ops"):
        assert_close(runner(x), [x * x.sum()])
    assert runner.captured_sizes == []
    x = rows(3)
    assert_close(runner(x), [x * x.sum()])
