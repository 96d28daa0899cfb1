"""Bounded waits: kernels that end a wait by themselves, what they say then, and how long they may wait now.

A kernel that has given up writes a report into pinned memory and NaN into its outputs. Nobody waits for a device to
read it: it is looked at before and after each step, and at each beat of the watchdog.

A rank that compiles, captures or runs a graph for the first time is late by minutes and lost by no means. So while this
rank does, or another that is heard of, kernels wait as long as the watch would. A wait counts from its own beginning.
So patience with another rank ends a bound after the last that was heard of its warm-up: a kernel that has waited for a
compilation gives that rank as much time to come as any other.

To a device a call is complete whose kernel has given up, and the host goes on. Where the rank waited is what was seen
last before that: a look is at most a beat old, and each wait has lasted longer.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import HangError
from .position import Position

#: Why kernels are patient.
_OWN, _PEER, _PREPARED = "a first step of this rank", "a first step of another rank", "what an engine does first"


class Bounded(Protocol):
    """Kernels of a process group."""

    def check_kernels(self) -> None:
        """Raises :class:`HangError` where one has given up waiting for a peer. Waits for nothing."""

    def wait_for(self, seconds: float, /) -> None:
        """How long each waits for a peer from now on, also one that waits already."""


@dataclass
class _Kernels:
    of: weakref.ref[Any]
    seconds: float


class BoundedWaits:
    """Those of a process, by the name of their group. May be asked from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard = 0.0  # when another rank was last heard to warm up
        self._kernels: dict[str, _Kernels] = {}
        self._timer: threading.Timer | None = None  # of the patience after a preparation
        self._reasons: dict[str, float] = {}  # why there is more patience, and how many seconds
        self._one = threading.Lock()
        self._seen: tuple[float, Position | None] = (0.0, None)  # when no kernel had given up, and where this rank was
        self._gave_up: tuple[float, Position | None] | None = None  # the same of the wait that a kernel has given up

    def add(self, name: str, kernels: Bounded, seconds: float) -> None:
        """Kernels of a group wait ``seconds``, or the least that was asked for of it."""
        with self._one:
            before = self._kernels.get(name)
            same = before is not None and before.of() is kernels
            least = min(seconds, before.seconds) if same and before is not None else seconds
            self._kernels[name] = _Kernels(weakref.ref(kernels), least)
            self._apply()

    def lost(self) -> HangError | None:
        """What a kernel says that has given up."""
        for entry in tuple(self._kernels.values()):
            kernels = entry.of()
            try:
                if kernels is not None:
                    kernels.check_kernels()
            except HangError as error:
                return error
        return None

    def stands(self, read: Callable[[], Position]) -> Position:
        """Where this rank is: where its kernels waited, once one has given up. read: where the journal says it is."""
        at, position = self._clock(), read()
        lost = self.lost()
        if lost is None:  # so none had when the position was read
            self._seen, self._gave_up = (at, position), None
            return position
        if self._gave_up is None:
            self._gave_up = self._seen if self._in_a_wait(lost) else (at, None)
        since, there = self._gave_up
        if there is None or position.exchange or position.compiles:
            return position
        return replace(there, still=there.still + at - since, moved=position.moved)

    def _in_a_wait(self, lost: HangError) -> bool:
        """Whether this rank was last seen in the wait that a kernel has given up, which has lasted for a bound."""
        at, position = self._seen
        waited = position is not None and position.stuck_in_piece and not lost.told
        least = min((entry.seconds for entry in tuple(self._kernels.values()) if entry.of() is not None), default=0.0)
        return waited and self._clock() - at < least

    def patient(self, why: str, seconds: float) -> None:
        """Wait at least ``seconds`` until :meth:`steady` is called with the same reason."""
        if self._kernels and self._reasons.get(why) != seconds:
            with self._one:
                self._reasons[why] = seconds
                self._apply()

    def begins(self, first: bool, warm_up: float, busy: Callable[[], bool]) -> None:
        """A step of this rank begins; first: of its kind. busy: whether an earlier one still runs on the device."""
        if first:
            self.patient(_OWN, warm_up)
        elif not self._reasons.keys().isdisjoint((_OWN, _PREPARED)) and not busy():
            self.steady(_OWN)
            self._end_prepared()

    def prepared(self, warm_up: float) -> None:
        """An engine compiles and captures from here on, which may take one rank minutes longer than another.

        Patience ends with the first step of its that is heard of; or in time, for replays of its graphs tell nobody.
        """
        if not self._kernels:
            return
        self._end_prepared()
        self.patient(_PREPARED, warm_up)
        steady, waits = BoundedWaits.steady, weakref.ref(self)
        timer = threading.Timer(warm_up, lambda: steady(found, _PREPARED) if (found := waits()) is not None else None)
        timer.name, timer.daemon, self._timer = "patience of ringfence", True, timer
        weakref.finalize(self, timer.cancel).atexit = False
        timer.start()

    def _end_prepared(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self.steady(_PREPARED)

    def hears(self, others: Iterable[Position], warm_up: float) -> None:
        """Where the other ranks are that live; told at each beat."""
        if any(other.phase in ("compile", "warm-up") for other in others):
            self._heard = self._clock()
            self.patient(_PEER, warm_up)
        elif _PEER in self._reasons and self._clock() - self._heard >= self._longest():
            self.steady(_PEER)

    def steady(self, why: str) -> None:
        if why in self._reasons:
            with self._one:
                self._reasons.pop(why, None)
                self._apply()

    def _longest(self) -> float:
        """The longest bound of kernels that still are."""
        return max((entry.seconds for entry in tuple(self._kernels.values()) if entry.of() is not None), default=0.0)

    def _apply(self) -> None:
        least = max(self._reasons.values(), default=0.0)
        for entry in self._kernels.values():
            kernels = entry.of()
            if kernels is not None:
                kernels.wait_for(max(entry.seconds, least))
