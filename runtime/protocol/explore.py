"""Explore: run a model in every order, and show the shortest way to a failure.

A model is a transition system. Its states are hashable values; a step of one rank
(a push, a clear, a poll that succeeds, ...) leads from one to the next. Waiting is not
a step: a rank that polls in vain has none, so a state in which nobody has a step, and
somebody is not finished, is a deadlock. The search is breadth first and stops at the
first failure, so that its trace is one of the shortest.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from ..errors import TooManyStatesError
from .bound import Bound


class ModelFailure(StrEnum):
    """What can go wrong in a run."""

    DEADLOCK = "deadlock"
    STALE_READ = "stale_read"
    LOST_WRITE = "lost_write"


@dataclass(frozen=True)
class Event:
    """One step of one rank. ``call`` is the plan's collective that it is part of, counted from 0.

    ``failure`` is set where the step itself is the failure: a value consumed that was
    pushed for another call, or one overwritten before it was read.
    """

    rank: int
    call: int | None
    action: str
    detail: str = ""
    failure: ModelFailure | None = None


State = TypeVar("State", bound=Hashable)


class Model(Protocol[State]):
    """A transition system."""

    def initial(self) -> State: ...

    def steps(self, state: State) -> Iterable[tuple[Event, State]]:
        """Every step that some rank can take."""

    def finished(self, state: State) -> bool:
        """Whether every rank has come to the end of its program."""

    def waiting(self, state: State) -> tuple[str, ...]:
        """For each rank that is not finished, a sentence on what it waits for."""


@dataclass(frozen=True)
class Result(Generic[State]):
    """``failure`` is None when no order fails. ``end`` is the state in which the search ended, if it failed.

    skipped: how many calls every rank had made, without trouble, before the trace begins.
    shortest: no shorter trace leads from there to a failure.
    """

    failure: ModelFailure | None
    states: int
    trace: tuple[Event, ...] = ()
    waiting: tuple[str, ...] = ()
    end: State | None = None
    skipped: int = 0
    shortest: bool = True

    @property
    def safe(self) -> bool:
        return self.failure is None


def explore(
    model: Model[State], *, start: State | None = None, limit: int = 2_000_000, bound: Bound | None = None
) -> Result[State]:
    """Visit every state reachable from ``start``, or stop at the first failure.

    Raises :class:`TooManyStatesError` beyond ``limit`` states, and what ``bound`` raises.
    """
    start = model.initial() if start is None else start
    came_from: dict[State, tuple[Event, State] | None] = {start: None}
    frontier = [start]
    while frontier:
        reached: list[State] = []
        for number, state in enumerate(frontier):
            if bound is not None and number % 64 == 0:
                bound.visit(min(64, len(frontier) - number))
            stuck = True
            for event, after in model.steps(state):
                stuck = False
                if event.failure is not None:
                    trace = (*_trace(came_from, state), event)
                    return Result(event.failure, len(came_from), trace, end=after)
                if after not in came_from:
                    came_from[after] = (event, state)
                    reached.append(after)
                    if len(came_from) > limit:
                        raise TooManyStatesError(len(came_from), limit)
            if stuck and not model.finished(state):
                return Result(
                    ModelFailure.DEADLOCK, len(came_from), _trace(came_from, state), model.waiting(state), end=state
                )
        frontier = reached
    return Result(None, len(came_from))


def _trace(came_from: dict[State, tuple[Event, State] | None], state: State) -> tuple[Event, ...]:
    events: list[Event] = []
    step = came_from[state]
    while step is not None:
        event, state = step
        events.append(event)
        step = came_from[state]
    return tuple(reversed(events))
