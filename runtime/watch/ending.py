"""Ending: a rank that is told to end has not failed, and one that is interrupted where it waits is no culprit.

Ctrl-C goes to every process of a terminal, a rolling update to every rank: whoever it meets in a collective waits there
for somebody else. What is the rank's own is an exception of its own code, also one that it throws between two calls
of the model: that one ends the process, and is told before.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..errors import HangError
from .culprit import Failure, place_of, where
from .position import Position
from .report import Report, ended, failed, lost_wait


def how_it_ends(error: BaseException, *, waits: bool) -> str | None:
    """``was interrupted (KeyboardInterrupt)``; None for an exception that is a failure of this rank.

    waits: the rank waits for another one, so that no exit is its own.
    """
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted (KeyboardInterrupt)"
    is_exit = isinstance(error, SystemExit)
    if is_exit and (waits or error.code in (None, 0)):  # type: ignore[attr-defined]
        return f"was told to end (SystemExit: {error.code or 0})"  # type: ignore[attr-defined]
    if name := _signal_of(error):
        return f"was ended by {name} ({type(error).__name__}: {error})"
    return None


def is_in_order(how: str) -> bool:
    """Of what a rank said of its end: whether its process ends with 0."""
    return "(SystemExit: 0)" in how


def broken_off(error: BaseException, position: Position, place: str | None, *, victim: bool) -> Report:
    """What there is to say of an exception on this rank; place: where, if not in a step. victim: it looks like one."""
    rank, waits = position.rank, bool(position.calls or position.exchange)
    if how := how_it_ends(error, waits=waits):
        return ended(rank, how, place_of(position))
    if isinstance(error, HangError):
        return lost_wait(rank, error)
    where_ = place if place is not None else where(position)
    text = f"{type(error).__name__}: {error}"
    return failed(Failure(rank, where_, text, victim and place is None and bool(position.calls)))


def _signal_of(error: BaseException) -> str | None:
    """The signal in whose handler an exception was raised, as far as the handler is still installed."""
    codes = {}
    for number in signal.valid_signals():
        code = getattr(signal.getsignal(number), "__code__", None)
        if code is not None:
            codes[code] = signal.Signals(number).name if number in signal.Signals._value2member_map_ else str(number)
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return codes[trace.tb_frame.f_code]
        trace = trace.tb_next
    return None


def on_uncaught(died: Callable[[BaseException], None]) -> Callable[[], None]:
    """Call ``died`` with an exception that ends this process, after it was printed; returns what undoes it."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        previous(kind, error, trace)
        died(error)

    def undo() -> None:
        if sys.excepthook is hook:
            sys.excepthook = previous

    sys.excepthook = hook
    return undo
