"""Told: whether a signal told this process to end where its main thread cannot hear of it.

Python runs a signal's handler in the main thread, between two of its steps. One that waits for a device or in a
collective comes to none until the wait is over; and for a rank that was told the same, and has ended, it never is. The
number of a signal is written to a pipe at once (:func:`signal.set_wakeup_fd`), and that the watch can read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref

_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Told:
    """Listens for signals that have handlers, unless somebody else does already: an event loop, say."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None
        self.number: int | None = None
        #: What the journal's counter was when it came; where it has moved since, the main thread has heard of it.
        self.moved = -1

    def listen(self) -> None:
        """Nothing where this is not the main thread."""
        if self._ends is not None or threading.current_thread() is not threading.main_thread():
            return
        ends = os.pipe()
        for end in ends:
            os.set_blocking(end, False)
        before = signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
        if before == -1:
            self._ends = ends
            weakref.finalize(self, _take_back, ends)  # of who drops it; nobody reads then
            return
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        for end in ends:
            os.close(end)

    def close(self) -> None:
        """The pipe stays open as long as somebody may read it."""
        if self._ends is not None and _is_given_up(self._ends):
            self._ends = None

    def look(self, moved: int) -> signal.Signals | None:
        """The signal that told this process to end, while its main thread has not moved since.

        moved: the journal's counter now.
        """
        came, ends = b"", self._ends
        with contextlib.suppress(OSError):  # nothing to read
            came = bytes(n for n in os.read(ends[0], 4096) if n in _TO_END) if ends is not None else b""
        if came:
            self.number, self.moved = came[-1], moved
        elif self.number is not None and moved != self.moved:
            self.number = None
        return signal.Signals(self.number) if self.number is not None else None


def _is_given_up(ends: tuple[int, int]) -> bool:
    """Whether no handler writes into the pipe any more; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        return False
    before = signal.set_wakeup_fd(-1)
    if before not in (-1, ends[1]):
        signal.set_wakeup_fd(before)
    return True


def _take_back(ends: tuple[int, int]) -> None:
    if _is_given_up(ends):  # else a handler would write into what has the number of a closed pipe next
        for end in ends:
            os.close(end)
