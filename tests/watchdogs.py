"""Watchdogs of several ranks in one process, whose threads a test stands for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ringfence.runtime.watch.deadlines import Deadlines
from ringfence.runtime.watch.journal import REPLAY, Journal, PieceNote, ProgramNote
from ringfence.runtime.watch.watchdog import Reaction, Watchdog

NOTE = ProgramNote((PieceNote("submod_0", False), PieceNote("submod_1", True, ("tp",))))
SHORT = Deadlines(steady=0.15, warm_up=0.6, beat=0.02, silence=0.1, grace=0.05)


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


def look(some: list[Rank], seconds: float, between: Callable[[], object] = lambda: None) -> None:
    """What the threads would do for a while."""
    done = threading.Event()

    def talk() -> None:
        while not done.wait(SHORT.beat):
            for rank in some:
                rank.watchdog.talk()

    talker = threading.Thread(target=talk)
    talker.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for rank in some:
            rank.watchdog.watch()
        between()
        time.sleep(SHORT.beat)
    done.set()
    talker.join()
