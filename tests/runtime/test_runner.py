from __future__ import annotations

import math
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ringfence.runtime.errors import (
    AddressChangedError,
    CaptureFailedWarning,
    ConcurrentCallError,
    DataDependentValueError,
    GradModeError,
    MovedInputWarning,
    NestedCaptureError,
)
from ringfence.runtime.replay.buffers import static_like, weak_memory
from ringfence.runtime.replay.capture import GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.program import Padding, Program, SizeRule, Step
from ringfence.runtime.replay.runner import PiecewiseRunner
from ringfence.runtime.watch.supervision import Supervision
from support import run_ranks

HIDDEN = 8

#: Rows of the first argument are the one size, and the token count.
ROWS = SizeRule(bindings=((0, 0),), tokens=lambda sizes: sizes[0])


# -- a graph backend that keeps books, and a small program -------------------------------


class RecordedPiece:
    """Outputs are NaN until a replay; a replay reads the arguments seen at capture, and refuses after a release.

    Like a real graph it keeps none of its arguments alive: whoever baked an address in must.
    """

    def __init__(self, owner: RecordingGraphs, index: int, call: Callable[..., Sequence[Any]], args: Sequence[Any]):
        self.index, self.replays, self.released = index, 0, False
        self._owner, self._call = owner, call
        self._args = [weak_memory(a) if isinstance(a, Tensor) else (lambda a=a: a) for a in args]
        self._are_tensors = [isinstance(a, Tensor) for a in args]
        self.outputs: tuple[Any, ...] = tuple(
            static_like(o).fill_(float("nan")) if isinstance(o, Tensor) else o for o in call(*args)
        )

    @property
    def args(self) -> list[Any]:
        args = [a() for a in self._args]
        freed = [i for i, (a, t) in enumerate(zip(args, self._are_tensors, strict=True)) if t and a is None]
        assert not freed, f"arguments {freed} were baked in and have been freed"
        return args

    def replay(self) -> None:
        assert not self.released, "replay of a released piece"
        self._owner.events.append(f"replay {self.index}")
        self.replays += 1
        for landing, value in zip(self.outputs, self._call(*self.args), strict=True):
            if isinstance(landing, Tensor):
                landing.copy_(value)

    def release(self) -> None:
        self.released = True


class RecordingGraphs:
    """A GraphBackend that writes down what it is asked, and throws where it is told to."""

    name = "recording"

    def __init__(self) -> None:
        self.pieces: list[RecordedPiece] = []
        self.events: list[str] = []
        self.throw_on_capture: set[int] = set()
        self.throw_on_warm_up = False
        self.capturing = False
        self._asked = 0

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        self.events.append("warm up")
        if self.throw_on_warm_up:
            raise RuntimeError("the warm-up was told to throw")
        return call(*args)

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> RecordedPiece:
        index, self._asked = self._asked, self._asked + 1
        self.events.append(f"capture {index}")
        if index in self.throw_on_capture:
            raise RuntimeError(f"capture {index} was told to throw")
        piece = RecordedPiece(self, index, call, args)
        self.pieces.append(piece)
        return piece

    def is_capturing(self) -> bool:
        return self.capturing


class UntouchableGraphs:
    """A GraphBackend that nobody may talk to."""

    name = "untouchable"

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        raise AssertionError("warmed up")

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Any:
        raise AssertionError("captured")

    def is_capturing(self) -> bool:
        raise AssertionError("asked")


class UncapturedGraphs(UntouchableGraphs):
    """May be asked whether it captures; may not capture."""

    def is_capturing(self) -> bool:
        return False


both_backends = pytest.mark.parametrize("make_graphs", [SimulatedGraphs, RecordingGraphs])


def scale(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (x * weight + 1,)


def attend(h: Tensor) -> tuple[Tensor, ...]:
    return (h.sin() * 3,)


def project(h: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (h + x, h.sum(-1))


def finish(h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (h.tanh() * weight,)


def layer(x: Tensor, weight: Tensor) -> list[Tensor]:
    """What ``layer_program`` computes."""
    h = (x * weight + 1).sin() * 3
    return [(h + x).tanh() * weight, h.sum(-1)]


def layer_program(island: Callable[..., Sequence[Any]] = attend) -> Program:
    """x (0), weight (1, static); a piece, an island, and two pieces one after the other."""
    return Program(
        steps=(
            Step("scale", scale, (0, 1), (2,), island=False),
            Step("attend", island, (2,), (3,), island=True, frees=(2,)),
            Step("project", project, (3, 0), (4, 5), island=False, frees=(0, 3)),
            Step("finish", finish, (4, 1), (6,), island=False, frees=(1, 4)),
        ),
        inputs=("x", "weight"),
        outputs=(6, 5),
        slots=7,
        constants=(),
        static_inputs=frozenset({1}),
    )


PIECES = 3  # of layer_program
LAYER_PADDING = Padding(inputs={0: (0,)}, outputs={0: (0,), 1: (0,)})


def single(
    call: Callable[..., Sequence[Any]], inputs: Sequence[str], outputs: int = 1, *, island: bool = False
) -> Program:
    """A program of one step that returns all that the step returns."""
    slots = tuple(range(len(inputs), len(inputs) + outputs))
    step = Step("only", call, tuple(range(len(inputs))), slots, island)
    return Program((step,), tuple(inputs), slots, len(inputs) + outputs, (), frozenset())


def weights() -> Tensor:
    return torch.randn(HIDDEN)


def rows(n: int) -> Tensor:
    return torch.randn(n, HIDDEN)


def assert_close(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


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
    assert graphs.events == [event for i in range(PIECES) for event in ("warm up", f"capture {i}")]


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


def test_runner_refuses_a_second_call_at_once() -> None:
    """From inside the model or from another thread: the static buffers hold one call's values."""
    caught: list[BaseException] = []

    def island(h: Tensor) -> tuple[Tensor, ...]:
        def again() -> None:
            with pytest.raises(ConcurrentCallError, match="one call at a time") as error:
                runner(rows(4), w)
            caught.append(error.value)

        again()
        thread = threading.Thread(target=again)
        thread.start()
        thread.join(30)
        return attend(h)

    runner = PiecewiseRunner(layer_program(island), ROWS, SimulatedGraphs(), [4])
    w = weights()
    for calls in (1, 2):
        x = rows(4)
        assert_close(runner(x, w), layer(x, w))
        assert len(caught) == 2 * calls


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


# -- where inputs and outputs live --------------------------------------------------------


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


# -- what is checked ----------------------------------------------------------------------


def two_weights() -> Program:
    step = Step("piece", lambda x, a, b: (x * a + b,), (0, 1, 2), (3,), island=False)
    return Program((step,), ("x", "first_weight", "second_weight"), (3,), 4, (), frozenset({1, 2}))


@both_backends
@pytest.mark.parametrize("moved", [1, 2])
def test_runner_moved_parameter_is_captured_anew(make_graphs: Callable[[], GraphBackend], moved: int) -> None:
    """As when weights are loaded after a warm-up: what was captured would go on reading the old memory."""
    runner = PiecewiseRunner(two_weights(), ROWS, make_graphs(), [4, 2])
    args = [rows(4), weights(), weights()]
    runner(*args)
    before = args[moved].data
    for data in (weights(), before):
        args[moved].data = data
        for n in (4, 3, 2, 4):
            args[0] = rows(n)
            assert_close(runner(*args), [args[0] * args[1] + args[2]])
    assert sorted(runner.captured_sizes) == [(2,), (4,)]


def test_runner_moved_parameter_gives_its_captures_back() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    w = weights()
    runner(rows(4), w)
    w.data = w.data.clone()
    runner(rows(4), w)
    assert [p.released for p in graphs.pieces] == [True] * PIECES + [False] * PIECES


@both_backends
def test_runner_parameters_that_move_by_design_run_uncaptured_with_one_warning(
    make_graphs: Callable[[], GraphBackend],
) -> None:
    """FSDP2 gathers them anew for every call; the allocator may give out an address again."""
    notes: list[str] = []
    runner = PiecewiseRunner(two_weights(), ROWS, make_graphs(), [4], note=notes.append)
    w, b = weights(), weights()
    gathered = [w.data.clone() for _ in range(5)]
    with pytest.warns(MovedInputWarning, match=r"'first_weight'.*reshard_after_forward=False") as caught:
        for call in range(12):
            w.data = gathered[(0, 1, 2, 0, 3, 1, 4)[call % 7]].copy_(weights())
            x = rows(4)
            assert_close(runner(x, w, b), [x * w + b])
    assert len(caught) == 1 and len(notes) == 1
    assert runner.captured_sizes == []


@pytest.mark.parametrize("replaced", [1, 2])
def test_runner_replaced_parameter_is_captured_anew(replaced: int) -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(two_weights(), ROWS, graphs, [4])
    args = [rows(4), weights(), weights()]
    runner(*args)
    args[replaced] = weights()
    for _ in range(2):
        args[0] = rows(4)
        assert_close(runner(*args), [args[0] * args[1] + args[2]])
    assert [p.released for p in graphs.pieces] == [True, False]


def test_runner_shared_parameter_outlives_a_module_that_is_gone() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(two_weights(), ROWS, graphs, [4])
    shared, own = weights(), [weights(), weights()]
    runner(rows(4), shared, own[0])
    own[0] = None
    x = rows(4)
    assert_close(runner(x, shared, own[1]), [x * shared + own[1]])
    assert [p.released for p in graphs.pieces] == [True, False]


@both_backends
def test_runner_serves_several_modules_with_parameters_of_their_own(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(two_weights(), ROWS, make_graphs(), [4, 2])
    modules = [(weights(), weights()) for _ in range(3)]
    for _ in range(2):
        for n in (4, 2, 3):
            for a, b in modules:
                x = rows(n)
                assert_close(runner(x, a, b), [x * a + b])
    assert runner.captured_sizes == [(4,), (2,)]
    modules[1][0].data = weights()
    for a, b in [*modules, *modules]:
        x = rows(4)
        assert_close(runner(x, a, b), [x * a + b])


def test_runner_captures_once_for_each_module() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(two_weights(), ROWS, graphs, [4])
    modules = [(weights(), weights()) for _ in range(3)]
    for _ in range(3):
        for a, b in modules:
            runner(rows(4), a, b)
    assert [p.replays for p in graphs.pieces] == [2, 2, 2]


def test_runner_releases_the_captures_of_a_module_that_is_gone() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(two_weights(), ROWS, graphs, [4])
    first, second, third = ([weights(), weights()] for _ in range(3))
    runner(rows(4), *first)
    runner(rows(4), *second)
    gone = [weakref.ref(p) for p in first]
    first.clear()
    assert [ref() for ref in gone] == [None, None]
    x = rows(4)
    assert_close(runner(x, *third), [x * third[0] + third[1]])
    assert [p.released for p in graphs.pieces] == [True, False, False]
    assert_close(runner(x, *second), [x * second[0] + second[1]])


@both_backends
def test_runner_sees_parameters_updated_in_place(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(two_weights(), ROWS, make_graphs(), [4])
    a, b = weights(), weights()
    for _ in range(3):
        x = rows(4)
        assert_close(runner(x, a, b), [x * a + b])
        a.copy_(weights())
        b.mul_(2).add_(1)


@both_backends
def test_runner_another_number_from_an_island_is_refused(make_graphs: Callable[[], GraphBackend]) -> None:
    program = Program(
        steps=(
            Step("count", lambda x: (int((x > 0).sum()), x.exp()), (0,), (1, 2), island=True),
            Step("use", lambda k, h: (h * k,), (1, 2), (3,), island=False, frees=(1, 2)),
        ),
        inputs=("x",),
        outputs=(3,),
        slots=4,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, make_graphs(), [4])
    positive = [rows(4).abs() + 0.1 for _ in range(3)]
    for x in positive:
        assert_close(runner(x), [x.exp() * (4 * HIDDEN)])
    fewer = positive[0].clone()
    fewer[0, :3] *= -1
    with pytest.raises(DataDependentValueError, match=rf"'count'.*\b{4 * HIDDEN - 3}\b.*\b{4 * HIDDEN}\b"):
        runner(fewer)
    assert_close(runner(positive[1]), [positive[1].exp() * (4 * HIDDEN)])


def test_runner_another_shape_from_an_island_is_refused() -> None:
    """One selected row would broadcast over a landing of three, and give wrong rows silently."""
    program = Program(
        steps=(
            Step("select", lambda x: (x[x[:, 0] > 0],), (0,), (1,), island=True),
            Step("use", lambda h: (h * 2,), (1,), (2,), island=False, frees=(1,)),
        ),
        inputs=("x",),
        outputs=(2,),
        slots=3,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [4])
    x = rows(4)
    x[:, 0] = torch.tensor([1.0, 2.0, -1.0, 3.0])
    assert_close(runner(x), [x[[0, 1, 3]] * 2])
    x[:, 0] = torch.tensor([-1.0, 2.0, -1.0, -3.0])
    with pytest.raises(DataDependentValueError, match="select"):
        runner(x)


@both_backends
def test_runner_islands_hand_varying_sizes_on_to_islands_and_the_caller(
    make_graphs: Callable[[], GraphBackend],
) -> None:
    def select(h: Tensor) -> tuple[Tensor, Tensor, int]:
        index = (h[:, 0] > 0).nonzero()[:, 0]
        return h[index], index, len(index)

    def scatter(selected: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(4, HIDDEN).index_copy(0, index, selected.exp()), selected * count

    program = Program(
        steps=(
            Step("first", lambda x: (x * 2,), (0,), (1,), island=False),
            Step("select", select, (1,), (2, 3, 4), island=True, frees=(1,)),
            Step("scatter", scatter, (2, 3, 4), (5, 6), island=True, frees=(2, 3)),
            Step("last", lambda h, x: (h + x,), (5, 0), (7,), island=False, frees=(5,)),
        ),
        inputs=("x",),
        outputs=(7, 6, 4),
        slots=8,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, make_graphs(), [4])
    kept = []
    for count in (3, 1, 4, 0, 2, 3):
        x = rows(4)
        x[:, 0] = x[:, 0].abs() * torch.tensor([1.0 if i < count else -1.0 for i in (2, 0, 3, 1)])
        out = runner(x)
        selected, index, number = select(x * 2)
        expected = [scatter(selected, index, number)[0] + x, selected * number, number]
        assert number == count
        kept.append((out, expected))
    for out, expected in kept:
        assert_close(out, expected)


@pytest.mark.parametrize("static_outputs", [False, True])
def test_runner_island_view_of_a_captured_buffer_is_the_callers_own_unless_static(static_outputs: bool) -> None:
    program = Program(
        steps=(
            Step("piece", lambda x: (x * 2,), (0,), (1,), island=False),
            Step("view", lambda h: (h[1:3],), (1,), (2,), island=True, frees=(1,)),
        ),
        inputs=("x",),
        outputs=(2,),
        slots=3,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, RecordingGraphs(), [4], static_outputs=static_outputs)
    first, second = rows(4), rows(4)
    (before,) = runner(first)
    torch.testing.assert_close(before, first[1:3] * 2)
    (after,) = runner(second)
    torch.testing.assert_close(after, second[1:3] * 2)
    torch.testing.assert_close(before, (second if static_outputs else first)[1:3] * 2)


@both_backends
@pytest.mark.parametrize("n", [4, 3], ids=["captured", "uncaptured"])
def test_runner_refuses_grad_mode_with_inputs_that_need_grad(make_graphs: Callable[[], GraphBackend], n: int) -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, make_graphs(), [4])
    x, w = rows(n), weights().requires_grad_()
    with pytest.raises(GradModeError):
        runner(x, w)
    assert runner.captured_sizes == []
    assert_close(runner(x, w.detach()), layer(x, w.detach()))
    with torch.no_grad():
        assert_close(runner(x, w), layer(x, w))
    with pytest.raises(GradModeError):
        runner(x, w)


@both_backends
@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_runner_serves_both_no_grad_and_inference_mode(make_graphs: Callable[[], GraphBackend], first: str) -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, make_graphs(), [4])
    w = weights()
    modes = (
        [torch.inference_mode, torch.no_grad] if first == "inference_mode" else [torch.no_grad, torch.inference_mode]
    )
    for mode in [*modes, *modes]:
        x = rows(4)
        with mode():
            out = runner(x, w)
        assert_close(out, layer(x, w))


def test_runner_refuses_a_call_inside_a_capture() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    w = weights()
    graphs.capturing = True
    for n in (4, 3):
        with pytest.raises(NestedCaptureError):
            runner(rows(n), w)
    assert graphs.events == [] and runner.captured_sizes == []
    graphs.capturing = False
    x = rows(4)
    assert_close(runner(x, w), layer(x, w))
    graphs.capturing = True
    with pytest.raises(NestedCaptureError):
        runner(x, w)


def test_runner_refuses_a_call_inside_a_simulated_capture() -> None:
    inner = PiecewiseRunner(layer_program(), ROWS, SimulatedGraphs(), [4])
    w = weights()
    with pytest.raises(NestedCaptureError):
        SimulatedGraphs().capture(inner, [rows(4), w])
    assert inner.captured_sizes == []


def test_runner_that_captures_nothing_may_be_captured_from_outside() -> None:
    inner = PiecewiseRunner(layer_program(), ROWS, SimulatedGraphs())
    x, w = rows(4), weights()
    piece = SimulatedGraphs().capture(inner, [x, w])
    x.copy_(rows(4))
    piece.replay()
    assert_close(piece.outputs, layer(x, w))


# -- captures that throw -------------------------------------------------------------------


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
        if graphs.events == ["warm up", "capture 0"]:
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


# -- padding -------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("static_outputs", [False, True])
def test_runner_padded_results_equal_unpadded_ones(
    make_graphs: Callable[[], GraphBackend], static_outputs: bool
) -> None:
    runner = PiecewiseRunner(
        layer_program(), ROWS, make_graphs(), [8, 4], padding=LAYER_PADDING, static_outputs=static_outputs
    )
    w = weights()
    for n in (3, 8, 5, 4, 1, 7, 8, 2, 9, 6, 4):
        x = rows(n)
        out = runner(x, w)
        assert [o.shape[0] for o in out] == [n, n]
        assert_close(out, layer(x, w))
    assert sorted(runner.captured_sizes) == [(4,), (8,)]


def test_runner_padding_picks_the_smallest_captured_size_that_fits() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [8, 2, 4], padding=LAYER_PADDING)
    w = weights()
    for n, expected in ((3, (4,)), (1, (2,)), (5, (8,))):
        runner(rows(n), w)
        assert runner.captured_sizes[-1] == expected
    assert len(graphs.pieces) == 3 * PIECES
    runner(rows(4), w)
    assert len(graphs.pieces) == 3 * PIECES


def test_runner_without_padding_does_not_pad() -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, UncapturedGraphs(), [8])
    x, w = rows(7), weights()
    assert_close(runner(x, w), layer(x, w))


def test_runner_sizes_above_the_largest_capture_run_uncaptured() -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, UncapturedGraphs(), [4, 8], padding=LAYER_PADDING)
    w = weights()
    for n in (9, 16):
        x = rows(n)
        assert_close(runner(x, w), layer(x, w))
    assert runner.captured_sizes == []


@both_backends
def test_runner_padded_rows_are_zero_after_a_larger_call(make_graphs: Callable[[], GraphBackend]) -> None:
    seen: list[Tensor] = []

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.clone())
        return x + 1, x.abs().sum(0)  # the sum mixes rows: what padding leaves in them shows

    pads = Padding(inputs={0: (0,)}, outputs={0: (0,)})
    runner = PiecewiseRunner(single(call, ["x"], 2), ROWS, make_graphs(), [8], padding=pads)
    for n in (5, 8, 3, 7, 1, 8, 6):
        x = rows(n) + 10
        assert_close(runner(x), [x + 1, x.abs().sum(0)])
        if make_graphs is RecordingGraphs:  # the simulation does not run the piece's Python again
            assert seen[-1].shape == (8, HIDDEN)
            assert torch.equal(seen[-1][:n], x)
            assert not seen[-1][n:].any()


@both_backends
@pytest.mark.parametrize("first", [8, 5], ids=["exact_first", "padded_first"])
def test_runner_pads_each_dimension_of_each_input(make_graphs: Callable[[], GraphBackend], first: int) -> None:
    seen: list[Tensor] = []

    def call(mask: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(mask.clone())
        return mask @ x.t() + bias, mask + 1

    rule = SizeRule(bindings=((0, 0),), tokens=lambda sizes: sizes[0])
    pads = Padding(inputs={0: (0, 1), 1: (1,)}, outputs={0: (0,), 1: (0, 1)})
    runner = PiecewiseRunner(single(call, ["mask", "x", "bias"], 2), rule, make_graphs(), [8], padding=pads)
    for n in (first, 8, 5, 7, 2):
        mask, x, bias = torch.randn(n, n), torch.randn(HIDDEN, n), weights()
        out = runner(mask, x, bias)
        assert_close(out, [mask @ x.t() + bias, mask + 1])
        if make_graphs is RecordingGraphs:
            assert not seen[-1][n:].any() and not seen[-1][:, n:].any()
            assert torch.equal(seen[-1][:n, :n], mask)


@both_backends
def test_runner_padded_outputs_are_the_callers_own(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, make_graphs(), [8], padding=LAYER_PADDING)
    w = weights()
    calls = [(x, runner(x, w)) for x in (rows(5), rows(5), rows(7))]
    for x, out in calls:
        assert_close(out, layer(x, w))
        assert all(o.untyped_storage().nbytes() == o.numel() * o.element_size() for o in out)


@pytest.mark.parametrize("first", [8, 5], ids=["exact_first", "padded_first"])
def test_runner_padded_call_sees_the_padded_size_as_a_number(first: int) -> None:
    rule = SizeRule(bindings=((0, None),), tokens=lambda sizes: sizes[0])
    numbers: list[int] = []

    def call(n: int, x: Tensor) -> tuple[Tensor]:
        numbers.append(n)
        return (x.view(n, 2, HIDDEN // 2) * 2,)

    pads = Padding(inputs={1: (0,)}, outputs={0: (0,)})
    runner = PiecewiseRunner(single(call, ["n", "x"]), rule, SimulatedGraphs(), [8], padding=pads)
    for n in (first, 5, 8, 3):
        x = rows(n)
        assert_close(runner(n, x), [x.view(n, 2, HIDDEN // 2) * 2])
    assert set(numbers) == {8}


def test_runner_pads_a_graph_whose_only_size_is_a_number() -> None:
    """No input grows then, only the number and what is made of it."""
    rule = SizeRule(bindings=((0, None),), tokens=lambda sizes: sizes[0])

    def call(n: int, scale: Tensor) -> tuple[Tensor]:
        return (torch.arange(1, n + 1)[:, None] * scale,)

    pads = Padding(inputs={}, outputs={0: (0,)})
    runner = PiecewiseRunner(single(call, ["n", "scale"]), rule, SimulatedGraphs(), [8], padding=pads)
    for n in (5, 8, 3, 7):
        scale = weights()
        assert_close(runner(n, scale), call(n, scale))


@both_backends
@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.randn(1, HIDDEN).expand(n, HIDDEN),
        lambda n: torch.randn(n, 1).expand(n, HIDDEN),
        lambda n: torch.randn(1, 1).expand(n, HIDDEN),
        lambda n: torch.randn(HIDDEN, n).t(),
        lambda n: torch.randn(n, 2 * HIDDEN)[:, :HIDDEN],
    ],
    ids=["rows_expanded", "columns_expanded", "both_expanded", "transposed", "columns_sliced"],
)
def test_runner_padded_inputs_may_have_any_strides(
    make_graphs: Callable[[], GraphBackend], make: Callable[[int], Tensor]
) -> None:
    pads = Padding(inputs={0: (0,)}, outputs={0: (0,)})
    program = single(lambda x: (x * 2 + 1, x.sum(0)), ["x"], 2)
    runner = PiecewiseRunner(program, ROWS, make_graphs(), [8], padding=pads)
    for n in (5, 8, 3, 7):
        x = make(n)
        assert_close(runner(x), [x * 2 + 1, x.sum(0)])


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.randn(n, 2 * HIDDEN)[:, :HIDDEN],
        lambda n: torch.randn(HIDDEN, n).t(),
        lambda n: torch.randn(n, 1).expand(n, HIDDEN),
    ],
    ids=["columns_sliced", "transposed", "columns_expanded"],
)
def test_runner_does_not_pad_another_layout(make: Callable[[int], Tensor]) -> None:
    """A compiled piece computes addresses from the strides of its example, grown to the size."""
    seen: set[tuple[int, ...]] = set()

    def call(x: Tensor) -> tuple[Tensor]:
        seen.add(x.stride())
        return (x * 2,)

    pads = Padding(inputs={0: (0,)}, outputs={0: (0,)})
    runner = PiecewiseRunner(single(call, ["x"]), ROWS, SimulatedGraphs(), [8], padding=pads)
    x = make(5)
    assert_close(runner(x), [x * 2])
    assert seen == {x.stride()} and not runner.captured_sizes


def test_runner_pads_when_tokens_are_a_multiple_of_the_size() -> None:
    rule = SizeRule(bindings=((0, 1),), tokens=lambda sizes: 2 * sizes[0])
    pads = Padding(inputs={0: (1,)}, outputs={0: (1,)})
    runner = PiecewiseRunner(single(lambda x: (x * 2 + 1,), ["x"]), rule, RecordingGraphs(), [5, 8], padding=pads)
    for n in (2, 4, 3, 1):
        x = torch.randn(2, n, HIDDEN)
        assert_close(runner(x), [x * 2 + 1])
    assert runner.captured_sizes == [(4,)]  # no whole size has five tokens


def test_runner_padding_lets_an_empty_call_run_uncaptured() -> None:
    pads = Padding(inputs={0: (0,)}, outputs={0: (0,)})
    runner = PiecewiseRunner(single(lambda x: (x * 2 + 1,), ["x"]), ROWS, RecordingGraphs(), [4], padding=pads)
    (out,) = runner(rows(0))
    assert out.shape == (0, HIDDEN)


@both_backends
def test_runner_padded_capture_checks_addresses_too(make_graphs: Callable[[], GraphBackend]) -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, make_graphs(), [8], padding=LAYER_PADDING)
    w = weights()
    runner(rows(5), w)
    w.data = weights()
    for n in (6, 5):
        x = rows(n)
        assert_close(runner(x, w), layer(x, w))


def test_runner_that_runs_a_padded_size_uncaptured_pads_it_too() -> None:
    """Other ranks may replay it: their collectives, which are islands here, are of as many rows."""
    seen: list[int] = []

    def island(h: Tensor) -> tuple[Tensor, ...]:
        seen.append(h.shape[0])
        return attend(h)

    runner = PiecewiseRunner(layer_program(island), ROWS, SimulatedGraphs(), [8], padding=LAYER_PADDING)
    w = weights()
    with pytest.warns(MovedInputWarning):
        for n in (5, 8, 5, 7, 3, 8):
            x = rows(n)
            assert_close(runner(x, w), layer(x, w))
            w.data = w.data.clone()
    assert runner.captured_sizes == [] and set(seen) == {8}


@pytest.mark.parametrize(
    ("tokens_of", "size", "tokens", "expected"),
    [
        (lambda s: s[0], 3, 8, (8,)),
        (lambda s: 4 * s[0], 3, 16, (4,)),
        (lambda s: 4 * s[0], 3, 18, None),
        (lambda s: 3 * s[0], 7, 30, (10,)),
        (lambda s: s[0] + 1, 3, 8, None),
        (lambda s: s[0] - 1, 5, 8, None),
    ],
    ids=["rows", "times_4", "no_whole_size", "times_3", "plus_1", "minus_1"],
)
def test_padding_size_for_inverts_the_token_count(
    tokens_of: Callable[[tuple[int, ...]], int], size: int, tokens: int, expected: tuple[int, ...] | None
) -> None:
    rule = SizeRule(bindings=((0, 0),), tokens=tokens_of)
    assert Padding({}, {}).size_for(tokens, rule, (size,)) == expected


def test_size_rule_reads_dimensions_and_numbers() -> None:
    rule = SizeRule(bindings=((1, 0), (0, None), (2, 2)), tokens=lambda sizes: sizes[0])
    assert rule.sizes([5, torch.empty(3, 4), torch.empty(1, 2, 7)]) == (3, 5, 7)


# -- inputs that the program writes into -----------------------------------------------------


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
    assert len(runner._entries) == 3


def test_runner_written_input_that_is_always_new_is_captured_a_bounded_number_of_times() -> None:
    graphs = SimulatedGraphs()
    notes: list[str] = []
    runner = PiecewiseRunner(cached_program(True), ROWS, graphs, [4], note=notes.append)
    kept = []
    with pytest.warns(MovedInputWarning, match=r"'cache'.*mark_static_address") as caught:
        for _ in range(12):
            kept.append(rows(16))
            check_cached(runner, rows(4), kept[-1])
    assert len(caught) == 1 and len(notes) == 2 and all("mark_static_address" in note for note in notes)
    assert len(runner._entries) == 8
    check_cached(runner, rows(4), kept[0])


def test_runner_releases_the_captures_of_a_cache_that_is_gone() -> None:
    runner = PiecewiseRunner(cached_program(True), ROWS, SimulatedGraphs(), [4])
    first = rows(16)
    check_cached(runner, rows(4), first)
    ref = weakref.ref(first)
    first = rows(32)  # of another size, so at another address
    assert ref() is None
    check_cached(runner, rows(4), first)
    assert len(runner._entries) == 1


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
    assert len(runner._entries) == 2


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
        single(lambda x, cache: (x + cache[0, 0],), ["x", "cache"]), ROWS, SimulatedGraphs(), [4], note=notes.append
    )
    cache = torch.randn(1 << 20, 8)
    for _ in range(3):
        x = rows(4)
        assert_close(runner(x, cache), [x + cache[0, 0]])
    assert len(notes) == 1 and "'cache' (32.0 MiB)" in notes[0] and "mark_static_address" in notes[0]


# -- ranks whose captures hold collectives ---------------------------------------------------


class Peers(Supervision):
    """Other ranks, which say of their parameters what they are told to."""

    peers = True

    def __init__(self, *said: str | None) -> None:
        self.said, self.asked, self.captures = said, 0, 0

    def moved(self, sizes: tuple[int, ...], name: str | None) -> tuple[str | None, ...]:
        self.asked += 1
        return (name, *self.said)

    def before_capture(self, sizes: tuple[int, ...]) -> None:
        self.captures += 1


def collective_program() -> Program:
    (step,) = two_weights().steps
    return replace(two_weights(), steps=(replace(step, calls=("tp",)),))


def test_runner_ranks_compare_their_parameters_in_the_calls_after_a_capture() -> None:
    peers = Peers(None)
    runner = PiecewiseRunner(collective_program(), ROWS, SimulatedGraphs(), [4], supervision=peers)
    a, b = weights(), weights()
    for _ in range(5):
        x = rows(4)
        assert_close(runner(x, a, b), [x * a + b])
    assert (peers.captures, peers.asked) == (1, 2)
    a.data = weights()
    with pytest.raises(AddressChangedError, match=r"'first_weight'.*all ranks"):
        runner(rows(4), a, b)


@pytest.mark.parametrize("mine", [True, False])
def test_runner_captures_no_more_where_the_parameters_of_some_ranks_move(mine: bool) -> None:
    """Nobody may wait for a capture that the others do not make, nor replay what they do not."""
    peers = Peers(None if mine else "second_weight")
    runner = PiecewiseRunner(collective_program(), ROWS, SimulatedGraphs(), [4], supervision=peers)
    a, b = weights(), weights()
    with pytest.warns(MovedInputWarning, match="first_weight" if mine else "second_weight") as caught:
        for call in range(4):
            x = rows(4)
            assert_close(runner(x, a, b), [x * a + b])
            if mine and not call:
                a.data = weights()
    assert (len(caught), peers.captures, peers.asked) == (1, 1, 1)


def test_runner_captures_anew_where_the_parameters_of_all_ranks_move() -> None:
    peers = Peers("second_weight")
    runner = PiecewiseRunner(collective_program(), ROWS, SimulatedGraphs(), [4], supervision=peers)
    w, b = weights(), weights()
    with pytest.warns(MovedInputWarning, match="first_weight") as caught:
        for _ in range(6):
            w.data = w.data.clone()
            x = rows(4)
            assert_close(runner(x, w, b), [x * w + b])
    assert (len(caught), peers.captures) == (1, 3)


def test_runner_captures_alone_where_collectives_are_islands() -> None:
    """Addresses are luck: a rank that is given the old one back captures nothing, and waits for nobody."""
    peers = Peers("unheard")
    program = layer_program()
    steps = (program.steps[0], replace(program.steps[1], calls=("tp",)), *program.steps[2:])
    runner = PiecewiseRunner(replace(program, steps=steps), ROWS, SimulatedGraphs(), [4], supervision=peers)
    w = weights()
    for _ in range(3):
        x = rows(4)
        assert_close(runner(x, w), layer(x, w))
        w.data = w.data.clone()
    assert (peers.captures, peers.asked) == (1, 0)


# -- unwaited collectives --------------------------------------------------------------------


def unwaited(rank: int) -> list[bool]:
    """An island that issues a collective and does not wait; an input that is still on its way."""
    pending = torch.ops._c10d_functional

    def issue(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(pending.all_reduce(x * i, "sum", "0") for i in (1, 2))

    program = Program(
        steps=(
            Step("double", lambda x: (x * 2,), (0,), (1,), island=False),
            Step("issue", issue, (1,), (2, 3), island=True, calls=("0", "0")),
            Step("add", lambda h: (h + 1,), (2,), (4,), island=False),
        ),
        inputs=("x",),
        outputs=(4, 3),
        slots=5,
        constants=(),
        static_inputs=frozenset(),
    )
    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [512])
    right = []
    for step in range(4):
        parts = [torch.randn(512, 512, generator=torch.Generator().manual_seed(10 * step + r)) for r in (0, 1)]
        added, returned = runner(pending.all_reduce(parts[rank] @ parts[rank], "sum", "0"))
        total = sum(p @ p for p in parts) * 4
        right += [torch.allclose(added, total + 1, atol=1e-2)]
        right += [torch.allclose(pending.wait_tensor(returned), total * 2, atol=1e-2)]
    return right


def test_runner_waits_for_a_collective_before_it_copies() -> None:
    assert run_ranks(2, unwaited) == [[True] * 8] * 2


# -- memory ----------------------------------------------------------------------------------


def deep_program(layers: int) -> Program:
    """x (0): for each layer a piece, an island, and a piece that adds the residual. Returns the last and the first."""
    steps: list[Step] = []
    residual, slots = 0, 1
    for i in range(layers):
        h, attended, out = slots, slots + 1, slots + 2
        slots += 3
        steps += [
            Step(f"norm {i}", lambda r: (r.sin() + 1,), (residual,), (h,), island=False),
            Step(f"attend {i}", attend, (h,), (attended,), island=True, frees=(h,)),
            Step(
                f"add {i}",
                lambda r, a: (r + (a * 1.5).tanh(),),
                (residual, attended),
                (out,),
                island=False,
                frees=(attended, residual) if i > 1 else (attended,),
            ),
        ]
        residual = out
    return Program(tuple(steps), ("x",), (residual, 3), slots, (), frozenset())


def deep(x: Tensor, layers: int) -> list[Tensor]:
    kept = None
    for _ in range(layers):
        x = x + (attend(x.sin() + 1)[0] * 1.5).tanh()
        kept = x if kept is None else kept
    return [x, kept]


@pytest.mark.parametrize("static_outputs", [False, True])
def test_runner_holds_what_is_live_and_not_what_was(static_outputs: bool) -> None:
    layers, sizes = 16, (64, 32, 8)
    runner = PiecewiseRunner(deep_program(layers), ROWS, SimulatedGraphs(), sizes, static_outputs=static_outputs)

    def serve() -> None:
        for _ in range(3):
            for n in sizes:
                x = torch.randn(n, 64)
                assert_close(runner(x), deep(x, layers))

    with ThreadPoolExecutor(1) as thread:  # of which nobody has captured anything
        thread.submit(serve).result()
    for (n,), nbytes in runner.bytes_held.items():
        assert nbytes <= 7 * n * 64 * 4, "about 3 are live at once, and two outputs"
    assert runner._pool is not None
    assert runner._pool.nbytes <= (9 if not static_outputs else 12) * 64 * 64 * 4


def test_runner_keeps_what_it_captured_in_any_order_of_replays() -> None:
    """Sizes share memory, and so do the graphs of a process: whatever is replayed, nothing live is written over."""
    first, second = (PiecewiseRunner(deep_program(n), ROWS, SimulatedGraphs(), [2, 4, 6]) for n in (3, 5))
    order = random.Random(11)
    results = []
    for _ in range(40):
        runner, layers = order.choice([(first, 3), (second, 5)])
        x = rows(order.choice([2, 4, 6, 3]))
        results.append((runner(x), deep(x, layers)))
    assert first._pool is second._pool
    for out, expected in results:
        assert_close(out, expected)


def test_runner_keeps_the_memory_behind_a_view_that_an_island_returns() -> None:
    def view(h: Tensor) -> tuple[Tensor, ...]:
        return (h[1:],)

    steps = [Step("first", lambda x: (x * 2,), (0,), (1,), island=False)]
    steps += [Step("attend", attend, (1,), (2,), island=True, frees=(1,))]
    steps += [Step("read", lambda h: (h + 1,), (2,), (3,), island=False)]
    steps += [Step("view", view, (2,), (4,), island=True, frees=(2,))]  # of the memory in which an island landed
    for i in range(5, 15, 2):
        steps += [Step(f"island {i}", attend, (i - 2,), (i,), island=True, frees=(i - 2,))]
        steps += [Step(f"piece {i}", lambda h: (h.cos(),), (i,), (i + 1,), island=False, frees=(i,))]
        steps[-2] = replace(steps[-2], inputs=(3 if i == 5 else i - 1,), frees=())
    steps += [Step("last", lambda v: (v * 3,), (4,), (15,), island=True)]
    program = Program(tuple(steps), ("x",), (15, 4, 14), 16, (), frozenset())

    def eager(x: Tensor) -> list[Tensor]:
        (h,) = attend(x * 2)
        v, y = h[1:], h + 1
        for _ in range(5, 15, 2):
            y = attend(y)[0].cos()
        return [v * 3, v, y]

    runner = PiecewiseRunner(program, ROWS, SimulatedGraphs(), [4, 8])
    for n in (4, 8, 4, 8):
        x = rows(n)
        assert_close(runner(x), eager(x))


def test_runner_static_outputs_outlive_what_other_graphs_do() -> None:
    graphs = [PiecewiseRunner(deep_program(2), ROWS, SimulatedGraphs(), [4]) for _ in range(2)]
    static = PiecewiseRunner(deep_program(2), ROWS, SimulatedGraphs(), [4], static_outputs=True)
    for _ in range(2):
        x = rows(4)
        graphs[0](rows(4))
        out = static(x)
        graphs[1](rows(4)), graphs[0](rows(4))
        assert_close(out, deep(x, 2))


@pytest.mark.parametrize("inner_first", [True, False])
def test_runner_called_from_an_island_of_another_is_right(inner_first: bool) -> None:
    """It replays in the midst of the other's step, so it may not use the other's memory."""
    inner = PiecewiseRunner(deep_program(3), ROWS, SimulatedGraphs(), [4])

    def island(h: Tensor) -> tuple[Tensor, ...]:
        return (inner(h)[0],)

    outer = PiecewiseRunner(layer_program(island), ROWS, SimulatedGraphs(), [4])
    w = weights()
    if inner_first:
        inner(rows(4))
    for _ in range(3):
        x = rows(4)
        h = deep(x * w + 1, 3)[0]
        assert_close(outer(x, w), [(h + x).tanh() * w, h.sum(-1)])
        y = rows(4)
        assert_close(inner(y), deep(y, 3))


def test_runners_of_two_threads_do_not_share_memory() -> None:
    barrier = threading.Barrier(2)
    wrong: list[int] = []

    def serve(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def island(h: Tensor) -> tuple[Tensor, ...]:
            barrier.wait(30)  # both are in the midst of a step
            return attend(h)

        runner = PiecewiseRunner(layer_program(island), ROWS, SimulatedGraphs(), [4])
        w = torch.randn(HIDDEN, generator=generator)
        for call in range(5):
            x = torch.randn(4, HIDDEN, generator=generator)
            if not all(map(torch.allclose, runner(x, w), layer(x, w))):
                wrong.append(call)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads) and not wrong


def test_runner_releases_every_piece_behind_one_whose_release_fails() -> None:
    graphs = RecordingGraphs()
    runner = PiecewiseRunner(layer_program(), ROWS, graphs, [4])
    runner(rows(4), weights())

    def fail() -> None:
        raise RuntimeError("reset failed")

    graphs.pieces[0].release = fail
    x, w = rows(4), weights()
    with pytest.warns(RuntimeWarning, match="reset failed"):
        assert_close(runner(x, w), layer(x, w))
    assert [p.released for p in graphs.pieces[: 2 * PIECES]] == [False, True, True, False, False, False]
    (entry,) = runner._entries.values()
    entry.pieces[0].release = fail
    with pytest.raises(RuntimeError, match="reset failed"):
        entry.release()
    assert [p.released for p in graphs.pieces[PIECES:]] == [False, True, True]


def test_runner_frees_slots_after_their_last_use_when_uncaptured() -> None:
    alive: dict[str, list[bool]] = {}
    made: dict[str, weakref.ref[Tensor]] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        alive[name] = [ref() is not None for ref in made.values()]
        made[name] = weakref.ref(value)
        return value

    def step(name: str) -> Callable[..., Sequence[Any]]:
        return lambda x: (keep(name, x + 1),)

    program = Program(
        steps=(
            Step("a", step("a"), (0,), (1,), island=False),
            Step("b", step("b"), (1,), (2,), island=False, frees=(1,)),
            Step("c", step("c"), (2,), (3,), island=True),
            Step("d", step("d"), (3,), (4,), island=False, frees=(3,)),
            Step("e", step("e"), (4,), (5,), island=False, frees=(4,)),
        ),
        inputs=("x",),
        outputs=(5, 2),
        slots=6,
        constants=(),
        static_inputs=frozenset(),
    )
    x = rows(3)
    out = PiecewiseRunner(program, ROWS, None)(x)
    assert_close(out, [x + 5, x + 2])
    assert alive == {
        "a": [],
        "b": [True],  # its input
        "c": [False, True],
        "d": [False, True, True],  # b is returned
        "e": [False, True, False, True],
    }


def test_runner_drops_an_unused_output_before_the_next_step() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        unused = x * 3
        made.append(weakref.ref(unused))
        return x + 1, unused

    def second(h: Tensor) -> tuple[Tensor]:
        alive.append(made[0]() is not None)
        return (h * 2,)

    program = Program(
        steps=(
            Step("first", first, (0,), (1, 2), island=False, frees=(2,)),
            Step("second", second, (1,), (3,), island=False, frees=(1,)),
        ),
        inputs=("x",),
        outputs=(3,),
        slots=4,
        constants=(),
        static_inputs=frozenset(),
    )
    x = rows(3)
    assert_close(PiecewiseRunner(program, ROWS, None)(x), [(x + 1) * 2])
    assert alive == [False]


def test_runner_keeps_no_input_of_a_captured_call_alive() -> None:
    runner = PiecewiseRunner(layer_program(), ROWS, RecordingGraphs(), [4])
    w = weights()
    for _ in range(2):
        x = rows(4)
        runner(x, w)
        ref = weakref.ref(x)
        del x
        assert ref() is None


def test_runner_leaves_the_callers_inputs_alone_when_a_piece_writes_into_its_own() -> None:
    def call(x: Tensor) -> tuple[Tensor]:
        out = x * 2
        x.fill_(float("nan"))
        return (out,)

    runner = PiecewiseRunner(single(call, ["x"]), ROWS, RecordingGraphs(), [4])
    for _ in range(3):
        x = rows(4)
        kept = x.clone()
        (out,) = runner(x)
        assert torch.equal(x, kept)
    torch.testing.assert_close(out, x * 2)
