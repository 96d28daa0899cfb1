"""Bound: what a search may cost, in states and in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import NotDecidedError


class Bound:
    """Counts the states that a search visits, and ends it with :class:`NotDecidedError` beyond a limit.

    states: how many may be visited; the same on every rank, however fast it is. seconds: of the clock. told: is
    given the number of visited states now and then. shortest: in states times ranks, what each search for a shortest
    trace may cost; a failure found beyond it has another trace.
    """

    def __init__(
        self,
        states: int | None = None,
        seconds: float | None = None,
        told: Callable[[int], None] | None = None,
        shortest: int = 40_000,
    ) -> None:
        self.visited, self.shortest = 0, shortest
        self._states, self._seconds, self._told = states, seconds, told
        self._began = time.monotonic()

    def visit(self, states: int = 1) -> None:
        self.visited += states
        if self._states is not None and self.visited > self._states:
            raise NotDecidedError(self.visited, f"{self._states} states of the model")
        if self._seconds is not None and time.monotonic() - self._began > self._seconds:
            raise NotDecidedError(self.visited, f"{self._seconds:g} seconds")
        if self._told is not None:
            self._told(self.visited)
