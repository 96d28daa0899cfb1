"""Runner: what captures hold, and when it is given back."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from replay.programs import (
    HIDDEN,
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
from torch.multiprocessing.reductions import StorageWeakRef

from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.replay.program import Program, ReturnedView, SizeRule, Step, last_reads
from ringfence.runtime.replay.runner import PiecewiseRunner


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
            barrier.wait(120)  # both are in the midst of a step
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
    (entry,) = runner._places.entries.values()
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


def test_an_uncaptured_call_holds_an_argument_up_to_its_last_use() -> None:
    """As Inductor does with a list of arguments. What views are taken with when all has run stays as long."""
    alive: list[list[bool]] = []
    given = [rows(3) for _ in range(4)]
    made = [weakref.ref(x) for x in given]

    def step(*args: Tensor) -> tuple[Tensor]:
        alive.append([ref() is not None for ref in made])
        return (args[0] * 2,)

    class Boxed:
        def __call__(self, *args: Tensor) -> Sequence[Tensor]:
            raise AssertionError("it is given a list, where it takes one")

        def boxed(self, args: list[Tensor]) -> Sequence[Tensor]:
            (x,) = args
            args.clear()
            y = x + 1
            del x
            return step(y)

    steps = (
        Step("first", step, (0, 1), (4,), island=False),
        Step("second", step, (4,), (5,), island=True),
        Step("third", Boxed(), (1,), (6,), island=False),  # type: ignore[arg-type]
    )
    program = Program(
        steps=tuple(replace(s, frees=f) for s, f in zip(steps, last_reads(steps, {3, 5, 6}), strict=True)),
        inputs=("x", "y", "looked", "static"),
        outputs=(5, 6, 2),
        slots=7,
        constants=(),
        static_inputs=frozenset({3}),
        views={2: ReturnedView(lambda looked: looked[1:], (2,))},
    )
    right = [given[0] * 4, (given[1] + 1) * 2, given[2][1:].clone()]
    static = given[3]
    out = PiecewiseRunner(program, ROWS, None).boxed(given)
    assert_close(out, right)
    assert not given
    assert static is made[3]()
    assert alive == [[True, True, True, True], [False, True, True, True], [False, False, True, True]]


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


@pytest.mark.parametrize("how", ["replayed", "failed"])
def test_runner_keeps_no_parameter_alive_that_an_island_reads(how: str) -> None:
    def island(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        if x[0, 0].isnan():
            raise ValueError("no number")
        return (x * weight,)

    program = Program(
        steps=(
            Step("double", lambda x: (x * 2,), (1,), (2,), island=False),
            Step("scale", island, (2, 0), (3,), island=True, frees=(2,)),
            Step("add", lambda h, weight: (h + weight,), (3, 0), (4,), island=False, frees=(3,)),
        ),
        inputs=("weight", "x"),
        outputs=(4,),
        slots=5,
        constants=(),
        static_inputs=frozenset({0}),
    )
    runner = PiecewiseRunner(program, SizeRule(((1, 0),), lambda sizes: sizes[0]), SimulatedGraphs(), [4])
    weight, x = torch.randn(HIDDEN), rows(4)
    assert_close(runner(weight, x), [x * 2 * weight + weight])
    assert_close(runner(weight, -x), [-x * 2 * weight + weight])
    if how == "failed":
        with pytest.raises(ValueError, match="no number"):
            runner(weight, x.fill_(float("nan")))
    memory = StorageWeakRef(weight.untyped_storage())
    del weight
    gc.collect()
    assert memory.expired() and runner.counts.replays == 1 + (how == "failed")


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
