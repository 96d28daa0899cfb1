"""Runner: a size below a captured one is served by that, padded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from replay.programs import (
    HIDDEN,
    LAYER_PADDING,
    PIECES,
    ROWS,
    RecordingGraphs,
    UncapturedGraphs,
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

from ringfence.runtime.errors import (
    MovedInputWarning,
)
from ringfence.runtime.replay.capture import GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.program import Padding, SizeRule
from ringfence.runtime.replay.runner import PiecewiseRunner


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
