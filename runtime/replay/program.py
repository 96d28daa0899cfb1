"""What the runner runs: a straight line of calls over numbered slots."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from ..errors import ArgumentError, InputError


def taker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...] | list[Any]]:
    """A function that takes these items of a list or tuple, without a loop in Python."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return itemgetter(slice(indices[0], indices[0] + 1) if indices else slice(0))


@dataclass(frozen=True)
class Step:
    """Call ``call(*slots[inputs])`` and put what it returns into ``slots[outputs]``, which follow each other.

    A ``call`` may have a method ``boxed``, which is given its arguments in a list that it empties, so that they die as
    it goes. ``island`` steps run eagerly, always. A step may write into arguments of the program only, and what it
    returns is no alias of another argument: AOT traces graphs so, and captures rely on it.
    ``frees`` are the slots that nothing reads after this step; ``calls`` the process groups
    of the collectives in it, in order. ``op_by_op``: why it is not compiled, or not for every call.
    """

    name: str
    call: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    island: bool
    frees: tuple[int, ...] = ()
    calls: tuple[str, ...] = ()
    op_by_op: str | None = None

    def __post_init__(self) -> None:
        if self.outputs != tuple(range(self.into.start, self.into.stop)):
            raise ArgumentError(
                f"the outputs of step '{self.name}' go into slots {self.outputs}, not one after another"
            )

    @functools.cached_property
    def into(self) -> slice:
        """Where its outputs go."""
        first = self.outputs[0] if self.outputs else 0
        return slice(first, first + len(self.outputs))

    @functools.cached_property
    def run(self) -> Callable[[list[Any]], None]:
        """Runs it on slots and frees some; before, where the call lets go of its arguments as it goes.

        A function that was made once: it runs for every piece of every call, and decides nothing there.
        """
        call, take, into, count, frees = self.call, taker(self.inputs), self.into, len(self.outputs), self.frees
        boxed: Callable[[list[Any]], Sequence[Any]] | None = getattr(call, "boxed", None)
        unread = tuple(slot for slot in frees if slot in self.outputs)

        def run(slots: list[Any]) -> None:
            values = call(*take(slots))
            if len(values) != count:
                raise self.returned(len(values))
            slots[into] = values
            for slot in frees:
                slots[slot] = None

        def run_boxed(slots: list[Any]) -> None:
            given = list(take(slots))
            for slot in frees:
                slots[slot] = None
            assert boxed is not None
            values = boxed(given)
            if len(values) != count:
                raise self.returned(len(values))
            slots[into] = values
            for slot in unread:
                slots[slot] = None

        return run if boxed is None else run_boxed

    def returned(self, count: int) -> ValueError:
        """What is raised where a call returns another number of values than it has outputs."""
        return ValueError(f"step '{self.name}' returned {count} values, and has {len(self.outputs)} outputs")


def last_reads(steps: Sequence[Step], stay: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """For each step the slots that nothing reads after it, in order, but for those that ``stay``."""
    last = {slot: i for i, step in enumerate(steps) for slot in (*step.outputs, *step.inputs)}
    return tuple(
        tuple(sorted(s for s in {*step.inputs, *step.outputs} if last[s] == i and s not in stay))
        for i, step in enumerate(steps)
    )


@dataclass(frozen=True)
class ReturnedView:
    """A view that the program returns: ``call`` of the arguments ``inputs`` of each call.

    of: the output that it looks at, by its position, which is given first; None for a view of an argument.
    """

    call: Callable[..., Any]
    inputs: tuple[int, ...]
    of: int | None = None


@dataclass(frozen=True)
class Program:
    """A split graph as a straight line.

    The first ``len(inputs)`` slots are the arguments, named by ``inputs``; ``constants``
    are put into their slots before the first step. ``static_inputs`` are the arguments
    that stay where they are between calls: parameters and buffers. ``written`` are those that the program
    writes into, or looks at by the place in their storage (``as_strided``).
    ``views`` are taken of the caller's arguments, or of an output, by position among the outputs: what ``outputs``
    says there is seen by views alone. ``marked``: those of ``written`` of which the caller says that they stay.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[int, ...]
    slots: int
    constants: tuple[tuple[int, Any], ...]
    static_inputs: frozenset[int]
    written: frozenset[int] = frozenset()
    views: Mapping[int, ReturnedView] = field(default_factory=dict)
    marked: frozenset[int] = frozenset()

    @property
    def unseen(self) -> frozenset[int]:
        """The outputs, by position, that a view is given for and that no view looks at."""
        return frozenset(self.views.keys() - {view.of for view in self.views.values()})

    def slots_of(self, args: Sequence[Any]) -> list[Any]:
        """The slots of a call before its first step: its arguments, the constants, and None where steps write."""
        slots = [*args, *[None] * (self.slots - len(args))]
        for slot, value in self.constants:
            slots[slot] = value
        return slots

    @functools.cached_property
    def viewed(self) -> frozenset[int]:
        """The arguments that views are taken with, when all steps have run."""
        return frozenset(i for view in self.views.values() for i in view.inputs)

    def with_views(self, outputs: Sequence[Any], args: Sequence[Any] | Mapping[int, Any]) -> list[Any]:
        """What the caller is given of the outputs, which are the caller's own already.

        args: the arguments of the call, of which :attr:`viewed` are enough.
        """
        given = list(outputs)
        for position, view in self.views.items():
            of = () if view.of is None else (outputs[view.of],)
            given[position] = view.call(*of, *[args[i] for i in view.inputs])
        return given


@dataclass(frozen=True)
class SizeRule:
    """How the sizes of a call are read from its arguments.

    Each binding is one size symbol of the graph: argument ``i`` itself (an int), or
    dimension ``d`` of argument ``i``. The tuple of their values is a call's *sizes*;
    every shape in the graph is a function of it. ``tokens`` computes the token count,
    the number of rows that the first all-reduce sums; it is None where the arguments do
    not tell that number. ``leading`` is the argument whose first dimension it is, where no all-reduce tells it.
    ``shared`` are the bindings that collectives depend on, so that all ranks
    have them, in an order that all ranks have; None stands for all of them.
    """

    bindings: tuple[tuple[int, int | None], ...]
    tokens: Callable[[tuple[int, ...]], int] | None
    shared: tuple[int, ...] | None = None
    leading: int | None = None

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple([args[i] if d is None else args[i].shape[d] for i, d in self.bindings]) if self.bindings else ()

    def met(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Those of these token counts that a call may have: a graph without dynamic sizes has one."""
        if self.tokens is None:
            return ()
        return tuple(counts) if self.bindings else tuple(n for n in counts if n == self.tokens(()))

    def check(self, args: Sequence[Any], most: int) -> None:
        """Raises :class:`InputError` for a call of more tokens."""
        assert self.tokens is not None
        tokens = self.tokens(self.sizes(args))
        if tokens > most:
            raise InputError(
                f"a call of {tokens} tokens, and deterministic=True serves at most max_tokens={most}: another kernel "
                "would not return the same bits"
            )

    def of_all_ranks(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a call's sizes that are the same on all ranks."""
        return sizes if self.shared is None else tuple(sizes[i] for i in self.shared)


@dataclass(frozen=True)
class Padding:
    """Which dimensions grow with the one size of the graph, by argument and by output.

    Only graphs with one size symbol can be padded: then each dynamic dimension is
    that symbol, and a call of ``n`` rows is a call of ``N >= n`` rows whose last
    ``N - n`` are zero.
    """

    inputs: dict[int, tuple[int, ...]]
    outputs: dict[int, tuple[int, ...]]

    def size_for(self, tokens: int, rule: SizeRule, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
        """The sizes that have ``tokens`` tokens; None where the count is not in proportion to the size."""
        (size,) = sizes
        if rule.tokens is None or not rule.tokens(sizes):
            return None
        padded = (math.ceil(tokens * size / rule.tokens(sizes)),)
        return padded if rule.tokens(padded) == tokens else None
