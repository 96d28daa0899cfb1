"""Graph backends that keep books, and small programs for the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ringfence.runtime.replay.buffers import static_like, weak_memory
from ringfence.runtime.replay.capture import CapturedPiece, GraphBackend, SimulatedGraphs
from ringfence.runtime.replay.program import Padding, Program, SizeRule, Step
from ringfence.runtime.replay.remarks import Remarks

HIDDEN = 8

#: Rows of the first argument are the one size, and the token count.
ROWS = SizeRule(bindings=((0, 0),), tokens=lambda sizes: sizes[0])


class NotesIn(Remarks):
    """Notes, in a list."""

    def __init__(self, notes: list[str]) -> None:
        self.note = notes.append  # type: ignore[method-assign]


class RecordedPiece(CapturedPiece):
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


class RecordingGraphs(GraphBackend):
    """A GraphBackend that writes down what it is asked, and throws where it is told to."""

    name = "recording"

    def __init__(self) -> None:
        self.pieces: list[RecordedPiece] = []
        self.events: list[str] = []
        self.throw_on_capture: set[int] = set()
        self.throw_on_warm_up = False
        self.capturing = False
        self._asked = 0

    def make_room(self) -> None:
        self.events.append("make room")

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


class UntouchableGraphs(GraphBackend):
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


def two_weights() -> Program:
    step = Step("piece", lambda x, a, b: (x * a + b,), (0, 1, 2), (3,), island=False)
    return Program((step,), ("x", "first_weight", "second_weight"), (3,), 4, (), frozenset({1, 2}))


def weights() -> Tensor:
    return torch.randn(HIDDEN)


def rows(n: int) -> Tensor:
    return torch.randn(n, HIDDEN)


def assert_close(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
