"""Looping: the threads of a watchdog, which do not keep it alive."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from .deadlines import Deadlines
from .journal import Journal
from .line import Line

log = logging.getLogger(__name__)

#: What a verdict may take that is written while the process ends.
_SECONDS_AT_THE_END = 3.0
#: What the host of the store may take for its last answer.
_SECONDS_TO_ANSWER = 1.0


class Looping(Protocol):
    """What threads are started for: a watchdog."""

    journal: Journal
    deadlines: Deadlines


def resting() -> threading.Event:
    """Set, until somebody is :func:`acting`."""
    rests = threading.Event()
    rests.set()
    return rests


@contextlib.contextmanager
def acting(rests: threading.Event) -> Iterator[None]:
    """Around what follows a verdict."""
    rests.clear()
    try:
        yield
    finally:
        rests.set()


def start(
    watchdog: Looping,
    stop: threading.Event,
    rests: threading.Event,
    names: dict[str, Callable[[], None] | None],
    line: Line,
) -> None:
    """A daemon thread for each name, which calls that method at every beat; its value is what is done at the end.

    rests: not set while a verdict is written, which a process that ends would lose. line: on which they may wait.
    """
    threads = [
        threading.Thread(
            target=_loop, args=(weakref.ref(watchdog), stop, name, last), name=f"ringfence-{name}", daemon=True
        )
        for name, last in names.items()
    ]
    weakref.finalize(watchdog, _end, stop, rests, threads, line)  # also when the interpreter exits
    for thread in threads:
        thread.start()


def _end(stop: threading.Event, rests: threading.Event, threads: Sequence[threading.Thread], line: Line) -> None:
    """Stop the threads, and wait for them: one that is inside torch when the interpreter is gone aborts the process.

    One that gets no answer is not waited for: its request is broken off.
    """
    stop.set()
    rests.wait(_SECONDS_AT_THE_END)
    others = [t for t in threads if t.ident is not None and t is not threading.current_thread()]
    if not _ended(others, _SECONDS_TO_ANSWER):
        line.hang_up()
        _ended(others, _SECONDS_AT_THE_END)


def _ended(threads: Sequence[threading.Thread], seconds: float) -> bool:
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _loop(reference: weakref.ref[Looping], stop: threading.Event, name: str, last: Callable[[], None] | None) -> None:
    """Without keeping the watchdog alive: who drops the model drops the threads. last: what is done at the end."""
    beat, told, said = 0.0, False, ""
    while not stop.wait(beat) and (watchdog := reference()) is not None:
        if not told:
            watchdog.journal.watch_from_here()
            told = True
        beat = watchdog.deadlines.beat
        try:
            getattr(watchdog, name)()
        except Exception as error:  # a watchdog that dies of its own mistake would be the silence that it is against
            if repr(error) != said:
                said = repr(error)
                log.exception("ringfence: the watchdog's thread '%s' goes on after an error", name)
        del watchdog
    if last is not None:
        last()
