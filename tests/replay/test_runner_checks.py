"""Runner: what is checked, and what follows when parameters move."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replay.programs import (
    HIDDEN,
    PIECES,
    ROWS,
    NotesIn,
    RecordingGraphs,
    assert_close,
    both_backends,
    layer,
    layer_program,
    rows,
    two_weights,
    weights,
)
from torch import Tensor

from ringfence.runtime.errors import (
    DataDependentValueError,
    GradModeError,
    MovedInputWarning,
    NestedCaptureError,
)
from ringfence.runtime.replay import addresses
from ringfence.runtime.replay.capture import GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.pending import Pending
from ringfence.runtime.replay.program import Program, Step
from ringfence.runtime.replay.runner import PiecewiseRunner


def are_at(tensors: list[Any], places: list[int], indices: list[int]) -> bool:
    """What torch for CUDA has in C++."""
    assert type(tensors) is list and type(places) is list and type(indices) is list
    return all(tensors[i].data_ptr() == places[i] for i in indices)


@pytest.fixture(autouse=True, params=["one by one", "in one go"])
def addresses_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test here with both ways to see where arguments are."""
    of_torch = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", are_at)
    monkeypatch.setattr(addresses, "_are_at", of_torch if request.param == "in one go" else None)


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
    runner = PiecewiseRunner(two_weights(), ROWS, make_graphs(), [4], remarks=NotesIn(notes))
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


def test_what_nobody_has_waited_for_is_waited_for_where_torch_does_not_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A release without the private counter would else copy what a collective still writes into."""
    counters = torch._C._distributed_c10d
    assert Pending().any is counters._get_work_registry_size, "it is there today"
    monkeypatch.delattr(counters, "_get_work_registry_size")
    waited: list[Tensor] = []
    monkeypatch.setattr(torch.ops._c10d_functional, "wait_tensor", waited.append)
    x = rows(4)
    Pending().wait([3, x, None])
    assert [t is x for t in waited] == [True]
