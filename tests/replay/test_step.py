"""A step runs on slots: what it is given, where its outputs go, and what is dead by then."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from ringfence.runtime.errors import ArgumentError
from ringfence.runtime.replay.program import Step, taker


class Value:
    """Something whose death can be seen."""


class Boxed:
    """A call that lets go of its arguments as it goes."""

    def __init__(self) -> None:
        self.alive: list[bool] = []
        self.watched: list[weakref.ref[Value]] = []

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self.boxed(list(args))

    def boxed(self, args: list[Any]) -> Sequence[Any]:
        args.clear()
        self.alive = [ref() is not None for ref in self.watched]
        return "made", Value()


@pytest.mark.parametrize("indices", [(), (2,), (0,), (3, 1), (1, 1, 0), tuple(range(4))])
@pytest.mark.parametrize("kind", [list, tuple])
def test_items_are_taken_in_order(indices: tuple[int, ...], kind: type[Any]) -> None:
    assert list(taker(indices)(kind("abcd"))) == ["abcd"[i] for i in indices]


@pytest.mark.parametrize("inputs", [(), (1,), (2, 0, 1)])
def test_a_step_is_given_its_slots_and_fills_its_own(inputs: tuple[int, ...]) -> None:
    slots = ["a", "b", "c", None, None, "f"]
    Step("s", lambda *args: ("".join(args), len(args)), inputs, (3, 4), False, frees=(0, 4)).run(slots)
    assert slots == [None, "b", "c", "".join("abc"[i] for i in inputs), None, "f"]


def test_nothing_is_returned_where_there_are_no_outputs() -> None:
    slots = ["a", "b"]
    Step("s", lambda a: (), (0,), (), True).run(slots)
    assert slots == ["a", "b"]


def test_boxed_arguments_are_dead_in_the_call_and_outputs_that_nobody_reads_after_it() -> None:
    call, slots = Boxed(), [Value(), Value(), None, None]
    call.watched = [weakref.ref(slots[0]), weakref.ref(slots[1])]
    Step("s", call, (0, 1), (2, 3), False, frees=(0, 3)).run(slots)
    assert call.alive == [False, True]
    assert slots[0] is None and isinstance(slots[1], Value) and slots[2:] == ["made", None]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_values_fills_no_slot(count: int) -> None:
    slots = ["a", None, None, "next"]
    with pytest.raises(ValueError, match=f"step 's' returned {count} values, and has 2 outputs"):
        Step("s", lambda a: "xyz"[:count], (0,), (1, 2), False).run(slots)
    assert slots == ["a", None, None, "next"]


@pytest.mark.parametrize("outputs", [(3, 1), (1, 3), (2, 2)])
def test_outputs_follow_each_other(outputs: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="not one after another"):
        Step("s", lambda: "xy", (), outputs, False)
