"""Runner: where inputs and outputs live."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from replay.programs import (
    HIDDEN,
    ROWS,
    RecordingGraphs,
    assert_close,
    attend,
    both_backends,
    layer,
    layer_program,
    project,
    rows,
    single,
    weights,
)
from torch import Tensor

from ringfence.runtime.replay.capture import GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.program import Padding, Program, Step
from ringfence.runtime.replay.runner import PiecewiseRunner


def test_runner_pieces_read_static_buffers_and_not_the_callers_tensors() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    first, w = rows(4), weights()
    runner(first, w)
    scale_x, scale_w = graphs.pieces[0].args
    assert scale_x.data_ptr() != first.data_ptr()
    assert scale_w.data_ptr() == w.data_ptr()
    assert graphs.pieces[1].args[1].data_ptr() == scale_x.data_ptr()
    first.fill_(float("nan"))
    second = rows(4)
    assert_close(runner(second, w), layer(second, w))
    assert torch.equal(scale_x, second)


def test_runner_each_dynamic_input_is_loaded_at_each_call() -> None:
    runner = PiecewiseRunner(single(lambda a, b, c: (a * b - c,), ["a", "b", "c"]), ROWS, RecordingGraphs(), [4])
    for _ in range(3):
        a, b, c = rows(4), rows(4), rows(4)
        assert_close(runner(a, b, c), [a * b - c])


@both_backends
def test_runner_outputs_are_the_callers_own(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, make_graphs(), [4])
    w = weights()
    results = []
    for _ in range(3):
        x = rows(4)
        out = runner(x, w)
        results.append((out, layer(x, w)))
    for out, expected in results:
        assert_close(out, expected)
    for out, _ in results:
        for value in out:
            value.fill_(float("nan"))
    x = rows(4)
    assert_close(runner(x, w), layer(x, w))


def test_runner_static_outputs_alias_the_static_buffers() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4], static_outputs=True)
    w = weights()
    first = runner(rows(4), w)
    assert first[0] is graphs.pieces[2].outputs[0] and first[1] is graphs.pieces[1].outputs[1]
    x = rows(4)
    second = runner(x, w)
    assert [o.data_ptr() for o in first] == [o.data_ptr() for o in second]
    assert_close(first, layer(x, w))


def test_runner_island_outputs_land_at_stable_addresses() -> None:
    fresh: list[Tensor] = []
    read_from: list[int] = []

    def island(h: Tensor) -> tuple[Tensor, ...]:
        fresh.append(h.sin() * 3)  # kept alive, so the allocator cannot hand one address out twice
        return (fresh[-1],)

    def reads(h: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        read_from.append(h.data_ptr())
        return project(h, x)

    program = layer_program(island)
    steps = (*program.steps[:2], Step("project", reads, (3, 0), (4, 5), island=False, frees=(3,)), program.steps[3])
    program = Program(steps, program.inputs, program.outputs, program.slots, (), program.static_inputs)
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(program, ROWS, graphs, [4])
    w = weights()
    runner(rows(4), w)
    read_from.clear()
    for _ in range(3):
        x = rows(4)
        assert_close(runner(x, w), layer(x, w))
    assert len(set(read_from)) == 1 and len(read_from) == 3
    assert read_from[0] not in {t.data_ptr() for t in fresh}
    assert len({t.data_ptr() for t in fresh}) == len(fresh) > 3


def test_runner_island_runs_once_for_each_replay() -> None:
    calls: list[int] = []

    def island(h: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return attend(h)

    runner = PiecewiseRunner(layer_program(island), ROWS, RecordingGraphs(), [4])
    w = weights()
    for expected in (1, 2, 3):
        runner(rows(4), w)
        assert len(calls) == expected


@both_backends
def test_runner_island_may_return_a_view_of_its_input(make_graphs: Callable[[], GraphBackend]) -> None:
    program = Program(
        steps=(
            Step("piece", lambda x: (x * 2,), (0,), (1,), island=False),
            Step("view", lambda h: (h[1:], h[:1].expand(5, HIDDEN), h.t()), (1,), (2, 3, 4), island=True, frees=(1,)),
            Step("last", lambda a, b, c: (a.sum(0) + b, c + 1), (2, 3, 4), (5, 6), island=False),
        ),
        inputs=("x",),
        outputs=(5, 6, 3),
        slots=7,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, make_graphs(), [4])
    for _ in range(3):
        x = rows(4)
        h = x * 2
        assert_close(runner(x), [h[1:].sum(0) + h[:1].expand(5, HIDDEN), h.t() + 1, h[:1].expand(5, HIDDEN)])


def test_runner_piece_may_return_an_expanded_view() -> None:
    """As a rotary table that a piece broadcasts over the batch; a real capture has no trouble with it."""
    program = Program(
        steps=(
            Step("piece", lambda x: (x * 2, x[:1].expand(4, HIDDEN)), (0,), (1, 2), island=False),
            Step("island", lambda h, e: (h + e,), (1, 2), (3,), island=True),
        ),
        inputs=("x",),
        outputs=(3,),
        slots=4,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [4])
    for _ in range(2):
        x = rows(4)
        assert_close(runner(x), [x * 2 + x[:1]])


@both_backends
def test_runner_constants_reach_steps_and_outputs(make_graphs: Callable[[], GraphBackend]) -> None:
    table = rows(1)
    program = Program(
        steps=(Step("piece", lambda x, t: (x * t,), (0, 1), (2,), island=False, frees=()),),
        inputs=("x",),
        outputs=(2, 3, 1),
        slots=4,
        constants=((1, table), (3, None)),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, make_graphs(), [4])
    for n in (4, 4, 3):
        x = rows(n)
        product, nothing, returned = runner(x)
        torch.testing.assert_close(product, x * table)
        assert nothing is None
        assert torch.equal(returned, table)


@both_backends
@pytest.mark.parametrize("static_outputs", [False, True])
@pytest.mark.parametrize("n", [3, 4, 6], ids=["padded", "captured", "uncaptured"])
def test_runner_returned_inputs_are_the_callers_objects(
    make_graphs: Callable[[], GraphBackend], static_outputs: bool, n: int
) -> None:
    program = Program(
        steps=(Step("piece", lambda x, w: (x * w,), (0, 1), (3,), island=False),),
        inputs=("x", "weight", "n"),
        outputs=(0, 3, 1, 2, 0),
        slots=4,
        constants=(),
        static_inputs=frozenset({1}),
    )
    pads = Padding(inputs={0: (0,)}, outputs={0: (0,), 1: (0,), 4: (0,)})
    runner = PiecewiseRunner(program, ROWS, make_graphs(), [4], padding=pads, static_outputs=static_outputs)
    w = weights()
    for _ in range(2):
        x = rows(n)
        out = runner(x, w, n)
        assert out[0] is x and out[4] is x and out[2] is w and out[3] == n
        torch.testing.assert_close(out[1], x * w)


@both_backends
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, HIDDEN).expand(4, HIDDEN),
        lambda: torch.randn(4, 1).expand(4, HIDDEN),
        lambda: torch.randn(1, 1).expand(4, HIDDEN),
        lambda: torch.randn(HIDDEN, 4).t(),
        lambda: torch.randn(4, 3 * HIDDEN)[:, HIDDEN : 2 * HIDDEN],
        lambda: torch.randn(8, HIDDEN)[::2],
    ],
    ids=["rows_expanded", "columns_expanded", "both_expanded", "transposed", "columns_sliced", "rows_sliced"],
)
def test_runner_inputs_may_have_any_strides(
    make_graphs: Callable[[], GraphBackend], make: Callable[[], Tensor]
) -> None:
    strides: list[tuple[int, ...]] = []

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        strides.append(x.stride())
        return x * 2 + 1, x.sum(0)

    runner = PiecewiseRunner(single(call, ["x"], 2), ROWS, make_graphs(), [4])
    for _ in range(3):
        x = make()
        assert_close(runner(x), [x * 2 + 1, x.sum(0)])
        assert set(strides) == {x.stride()}  # a compiled piece relies on them


def test_runner_captures_an_input_whose_rows_overlap() -> None:
    """A sliding window repeats elements without a stride of 0."""
    runner = PiecewiseRunner(single(lambda x: (x * 2,), ["x"]), ROWS, SimulatedGraphs(), [4])
    for _ in range(2):
        x = torch.randn(7).unfold(0, 4, 1)
        assert_close(runner(x), [x * 2])


@both_backends
def test_runner_scalar_and_integer_tensors_are_loaded(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(single(lambda x, i, s: (x[i] * s,), ["x", "i", "s"]), ROWS, make_graphs(), [4])
    for _ in range(3):
        x, i, s = rows(4), torch.randint(4, (5,)), torch.randn(())
        assert_close(runner(x, i, s), [x[i] * s])
