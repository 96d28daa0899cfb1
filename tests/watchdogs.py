"""Time that a test makes pass; and watchdogs of several ranks in one process, whose threads a test stands for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

from ringfence.runtime import channel, meeting
from ringfence.runtime.collectives import probe
from ringfence.runtime.watch import bounded, cause, heartbeat, in_vain, page, rings, watchdog
from ringfence.runtime.watch.deadlines import Deadlines
from ringfence.runtime.watch.journal import REPLAY, Journal, PieceNote, ProgramNote
from ringfence.runtime.watch.watchdog import Reaction, Watchdog
from support import HARD_END

T = TypeVar("T")

NOTE = ProgramNote((PieceNote("submod_0", False), PieceNote("submod_1", True, ("tp",))))
SHORT = Deadlines(steady=0.15, warm_up=0.6, beat=0.02, silence=0.1, grace=0.05)


class Clock:
    """Stands for the module ``time``: time passes only when all threads that take part sleep.

    So no rank is late because the machine is busy. Those are the thread that makes it and what it :meth:`spawn`\\ s.
    """

    def __init__(self) -> None:
        self._now = 1000.0
        self._one = threading.Condition()
        self._awake = 1
        self._asleep: dict[int, float] = {}  # until when each thread sleeps

    def monotonic(self) -> float:
        return self._now

    def monotonic_ns(self) -> int:
        return int(self._now * 1e9)

    def sleep(self, seconds: float) -> None:
        me = threading.get_ident()
        with self._one:
            self._asleep[me] = self._now + seconds
            self._rests()
            ends = time.monotonic() + HARD_END
            while me in self._asleep:
                self._one.wait(5)
                assert time.monotonic() < ends, "a thread of the test waits for something else than time"

    def _rests(self) -> None:
        """A thread sleeps or ends; with the last one time goes on to where the first wakes."""
        self._awake -= 1
        if self._awake or not self._asleep:
            return
        self._now = min(self._asleep.values())
        for thread in [t for t, until in self._asleep.items() if until <= self._now]:
            del self._asleep[thread]
            self._awake += 1
        self._one.notify_all()

    def spawn(self, body: Callable[[], object]) -> Spawned:
        """A thread that takes part. Join it before the test ends."""

        def run() -> None:
            try:
                body()
            finally:
                with self._one:
                    self._rests()

        with self._one:
            self._awake += 1
        return Spawned(run, self)

    def run(self, count: int, body: Callable[[int], T]) -> list[T]:
        """``body(rank)`` on so many threads that take part; what each returns, or what one raises."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                results[rank] = body(rank)
            except BaseException as error:
                errors.append(error)

        for thread in [self.spawn(lambda rank=rank: one(rank)) for rank in range(count)]:  # type: ignore[misc]
            thread.join()
        for error in errors:
            raise error
        return [results[rank] for rank in range(count)]


class Spawned:
    def __init__(self, body: Callable[[], None], clock: Clock) -> None:
        self._clock, self._thread = clock, threading.Thread(target=body, daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        while not self.ended():
            self._clock.sleep(SHORT.beat / 4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """What the watch asks for the time. What it gives a moment to be done is done."""
    made = Clock()
    for module in (cause, channel, heartbeat, in_vain, meeting, page, probe, rings, watchdog):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(watchdog, "bounded", _done)
    monkeypatch.setattr(bounded.BoundedWaits.__init__, "__defaults__", (made.monotonic,))
    yield made


def _done(body: Callable[[], object], seconds: float) -> None:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(60)


class Rank:
    """A journal, a watchdog that is never started, and what the end of its process would have been."""

    def __init__(
        self,
        rank: int,
        store: Any,
        ranks: int = 2,
        on_hang: str = "raise",
        deadlines: Deadlines = SHORT,
        **reaction: Any,
    ) -> None:
        self.ended: list[int] = []
        self.journal = Journal(rank)
        self.journal.register(NOTE)
        self.watchdog = Watchdog(
            self.journal, lambda: store, Reaction(on_hang, end=self.ended.append, **reaction), deadlines, host=None
        )
        self.watchdog.others.join_group("tp", tuple(range(ranks)))

    def step(self, enter: int = 2, leave: int = 2, how: str = REPLAY) -> None:
        marks = self.journal.begin(0, (4,), how)
        for i in range(enter):
            marks.enter()
            if i < leave:
                marks.leave()
        if leave == 2:
            marks.end()


def ranks(count: int = 2, *, begun: bool = True, **options: Any) -> list[Rank]:
    store = dist.HashStore()
    made = [Rank(rank, store, count, **options) for rank in range(count)]
    for rank in made if begun else ():
        rank.step()  # so that the next one is no warm-up
    return made


def look(clock: Clock, some: list[Rank], seconds: float, between: Callable[[], object] = lambda: None) -> None:
    """What the threads would do for a while."""
    until = clock.monotonic() + seconds

    def talk() -> None:
        clock.sleep(SHORT.beat / 2)  # between two looks, so that the order is one
        while clock.monotonic() < until:
            for rank in some:
                rank.watchdog.talk()
            clock.sleep(SHORT.beat)

    talker = clock.spawn(talk)
    while clock.monotonic() < until:
        for rank in some:
            rank.watchdog.watch()
        between()
        clock.sleep(SHORT.beat)
    talker.join()
