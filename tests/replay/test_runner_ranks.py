"""Runner: ranks whose captures hold collectives, and collectives that nobody has waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from replay.programs import ROWS, assert_close, layer, layer_program, rows, two_weights, weights
from torch import Tensor

from ringfence.runtime.errors import (
    AddressChangedError,
    MovedInputWarning,
)
from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.replay.program import Program, Step
from ringfence.runtime.replay.runner import PiecewiseRunner
from ringfence.runtime.watch.supervision import Supervision
from support import run_ranks

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
