"""Journal: what this rank submitted, and how far it came.

One per process, whatever number of graphs, models and backends it holds: collective calls are
counted per process group over all of them. Ranks whose counts differ are out of step, whatever
their code says; that is what :mod:`.culprit` reads.

Completion: a CPU piece is complete when its call returns. On a device the host runs ahead, so
an event is recorded after each step (recording one after each piece costs more than the rest
of the journal), and is asked only by who looks. Until it has happened, no piece of the step
counts as complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import JournalError
from . import user_code
from .bounded import BoundedWaits
from .folder import BEGUN, Origin, file_of, make_last_level, put_away
from .marks import CudaMarks
from .position import CAPTURE, COMPILES, REPLAY, UNCAPTURED, CallSpan, PieceNote, Position, ProgramNote, sizes_text
from .record import Record
from .report import Report
from .rings import Marks, Rings

#: All that who keeps a journal needs.
__all__ = [
    "CAPTURE",
    "FORMAT",
    "REPLAY",
    "UNCAPTURED",
    "CallSpan",
    "CudaMarks",
    "Journal",
    "Marks",
    "PieceNote",
    "Position",
    "ProgramNote",
    "sizes_text",
]

log = logging.getLogger(__name__)

#: Version of the file that :meth:`Journal.dump` writes (docs/report.md).
FORMAT = 1


class Journal(Rings):
    """The journal of one rank: its rings of steps and pieces, and what it does beside them."""

    def __init__(self, rank: int = 0, *, pieces: int = 8192, steps: int = 512) -> None:
        super().__init__(pieces, steps)
        self.rank = rank
        #: What its file says.
        self.record = Record()
        #: Which process writes it.
        self.origin = Origin()
        self._file_begun = False
        #: Kernels of this rank that end their waits by themselves.
        self.waits: BoundedWaits | None = None
        self._ranks_of: dict[str, tuple[int, ...]] = {}
        self._compiling: list[str] = []
        self._exchanges: list[tuple[str, tuple[int, ...]]] = []  # of several threads, perhaps
        self._changed_at = 0
        self._changes = 0
        self._told_where = False

    def name_group(self, name: str, ranks: Sequence[int]) -> None:
        """The global ranks of a group, so that who is missing can be told."""
        self._ranks_of[name] = tuple(ranks)

    def compiling(self, begins: bool, what: str = COMPILES) -> None:
        """A compilation begins, or ends; they may be nested. what: this rank does then, for those that wait for it."""
        if begins:
            self._compiling.append(what)
        else:
            self._compiling.pop()
        self._change()

    @contextlib.contextmanager
    def waiting(self, topic: str, among: Sequence[int] = ()) -> Iterator[None]:
        """This rank waits for the others, beside steps; ``among`` are those of the exchange."""
        exchange = topic, tuple(among)
        self._exchanges.append(exchange)
        self._change()
        try:
            yield
        finally:
            self._exchanges.remove(exchange)
            self._change()

    @property
    def changes(self) -> int:
        """How often a compilation or an exchange has begun or ended."""
        return self._changes

    def _change(self) -> None:
        self._changed_at = self._clock()
        self._changes += 1

    # -- where is this rank? ---------------------------------------------------------------

    def position(self) -> Position:
        """Where this rank is now, or where it waited if a kernel has given up.

        May be asked from any thread; waits for nothing.
        """
        return self._settled() if self.waits is None else self.waits.stands(self._settled)

    def _settled(self) -> Position:
        for _ in range(10):  # the runner's thread may be writing; a rank that never stops is not looked at closely
            before = self._submitted, self._returned, self._steps, self._open
            position = self._position()
            if before == (self._submitted, self._returned, self._steps, self._open):
                break
        return position

    def _position(self) -> Position:
        step = self._outstanding()
        exchange, among = next(reversed(self._exchanges[:]), ("", ()))
        beside = {
            "exchange": exchange,
            "among": among,
            "compiles": next(reversed(self._compiling[:]), ""),
            "moved": self._submitted + self._returned + 2 * self._steps + self._changes + self._oldest_unmarked,
        }
        return self._between_steps(beside) if step is None else self._in_step(step, beside)

    def _between_steps(self, beside: dict[str, Any]) -> Position:
        last = self._steps - 1
        slot = last & self._step_mask
        ended = (self._ended[slot] or self._began[slot]) if last >= 0 else 0
        last_move = max(ended, self._changed_at, self._refused_at if self._refused else 0)
        submitted = self._calls_submitted()
        return Position(
            self.rank,
            "compile" if beside["compiles"] else "idle",
            last,
            self._sizes[slot] if last >= 0 else (),
            submitted=submitted,
            completed=dict(submitted),
            still=(self._clock() - last_move) / 1e9 if last_move else 0.0,
            graph=self._graph_of(last) if last >= 0 else "",
            refused=self._refused,
            refusal=self._refusal,
            **beside,
        )

    def _in_step(self, step: int, beside: dict[str, Any]) -> Position:
        slot = step & self._step_mask
        note = self.programs[self._program[slot]]
        host_is_here = self._open and step == self._steps - 1
        entered = min(self._submitted - self._first[slot], len(note.pieces)) if host_is_here else len(note.pieces)
        if self._marks is None:
            at = max(entered - 1, 0)
            waits = self._calls_in(step, at, at + 1) if self._submitted > self._returned else ()
            completed = self._calls_before(step, self._returned - self._first[slot])
        else:  # of a device only whole steps are known
            at = max(entered - 1, 0) if host_is_here else 0
            waits = self._calls_in(step, 0, entered)
            completed = self._calls_before(step, 0)
        moved_at = max(self._entered[(self._submitted - 1) & self._piece_mask], self._began[slot])
        if self._returned == self._submitted:
            moved_at = max(moved_at, self._left[(self._submitted - 1) & self._piece_mask])
        return Position(
            self.rank,
            "compile" if beside["compiles"] else self._phase if host_is_here else "step",
            step,
            self._sizes[slot],
            at,
            note.pieces[at].name if note.pieces else "",
            _kind(note.pieces[at], self._how[slot]) if note.pieces else self._how[slot],
            note.collective,
            waits,
            self._calls_submitted(),
            completed,
            still=(self._clock() - moved_at) / 1e9,
            graph=self._graph_of(step),
            refused=self._refused_before[slot],
            **beside,
        )

    def _graph_of(self, step: int) -> str:
        """Which graph a step runs, where there are several to be told apart."""
        several = len({note.name for note in self.programs}) > 1
        return self.programs[self._program[step & self._step_mask]].name if several else ""

    # -- writing it down ---------------------------------------------------------------------

    def to_dict(self, reason: str = "", **more: Any) -> dict[str, Any]:
        """Everything that is still in the rings, as JSON-ready values; the schema is docs/report.md."""
        return {
            "format": FORMAT,
            "rank": self.rank,
            "reason": reason,
            "pid": os.getpid(),
            "origin": self.origin.to_dict(),
            "time": time.time(),
            "clock_ns": self._clock(),
            "groups": {
                name: list(self._ranks_of.get(name, ())) for name in dict.fromkeys([*self._groups, *self._ranks_of])
            },
            "programs": [asdict(p) for p in self.programs],
            "steps": list(self._written_steps()),
            "missed": self.missed,
            "position": self.position().to_dict(),
            "code": self._code(),
            "stacks": stacks(),
            **more,
        }

    def _code(self) -> dict[str, Any] | None:
        place = user_code.of_thread(self._caller)  # of the thread that calls the model
        return asdict(place) if place is not None else None

    def _written_steps(self) -> Iterator[dict[str, Any]]:
        oldest_piece = self._submitted - self._piece_mask - 1
        for step in range(max(0, self._steps - self.slots), self._steps):
            slot = step & self._step_mask
            first = self._first[slot]
            if first < oldest_piece:
                continue
            is_open = self._open and step == self._steps - 1
            count = self._submitted - first if is_open else self._count[slot]
            places = [(first + i) & self._piece_mask for i in range(count)]
            returned = [first + i < self._returned for i in range(count)]
            yield {
                "step": step,
                "program": self._program[slot],
                "sizes": list(self._sizes[slot]),
                "how": self._how[slot],
                "began_ns": self._began[slot],
                "ended_ns": self._ended[slot] or None,
                "calls_before": {g: self._before[i][slot] for i, g in enumerate(self._groups)},
                "pieces": [
                    [self._entered[p], (self._left[p] or None) if done else None]
                    for p, done in zip(places, returned, strict=True)
                ],
            }

    def dump(
        self,
        folder: str | os.PathLike[str],
        reason: str = "asked for",
        *,
        report: Report | None = None,
        **more: Any,
    ) -> Path:
        """Write ``journal-rankN.json`` into a folder, replacing an older one whole; the path of the file.

        What was written with the first ``report`` stays: afterwards a reason is added to it. Raises
        :class:`JournalError` where more than the last level of the folder's path would have to be made, and OSError.
        """
        if self.record.holds(report):
            return self._write(folder, self.record.add(reason, report, **more))
        return self._write(folder, self.record.begin(self.to_dict(reason, **more), report))

    def begin_file(self, folder: str | os.PathLike[str] | None, origin: Origin) -> None:
        """Put away what an earlier start has left, and say that this one has begun; once."""
        if folder is None or self._file_begun:
            self.origin = replace(origin, before=self.origin.before)
            return

        def begin() -> None:
            self.origin = replace(origin, before=put_away(Path(folder), self.rank))
            self._write(folder, {**self.to_dict(BEGUN), "steps": [], "programs": [], "stacks": {}})

        self.origin, self._file_begun = origin, True
        self._try(begin)

    def withdraw(self, folder: str | os.PathLike[str] | None, why: str) -> None:
        """The ranks went on after a report."""
        if self.record.report is not None:
            value = self.record.withdraw(why)
            self._try(lambda: None if folder is None else self._write(folder, value))

    def try_dump(self, folder: str | os.PathLike[str] | None, reason: str, **more: Any) -> None:
        """:meth:`dump` where a folder was asked for. An error is logged: what led here matters more."""
        self._try(lambda: None if folder is None else self.dump(folder, reason, **more))

    def _try(self, body: Callable[[], object]) -> None:
        try:
            body()
        except (OSError, JournalError) as error:
            log.error("ringfence: the journal of rank %d cannot be written: %s", self.rank, error)

    def _write(self, folder: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
        path = file_of(Path(folder), self.rank)
        made = make_last_level(path.parent)
        if not self._told_where:
            self._told_where = True
            level = logging.WARNING if made else logging.INFO  # whoever mistyped it looks for its files elsewhere
            new = ", a folder that was not there" if made else ""
            log.log(level, "ringfence: the journal of rank %d is %s%s", self.rank, path.absolute(), new)
        scratch = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        try:
            scratch.write_text(json.dumps(value, default=str))
            scratch.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        return path

    def dump_on_signal(self, number: int, folder: str | os.PathLike[str]) -> Callable[[], None]:
        """Dump whenever this process gets a signal, say ``signal.SIGUSR2``; returns what undoes it.

        Python runs the handler between two steps of the main thread's code: while that thread
        sits in a call of the device, only the watchdog can write.
        """
        name = signal.Signals(number).name
        previous = signal.signal(number, lambda *_: self.dump(folder, f"signal {name}"))

        def undo() -> None:
            signal.signal(number, previous)

        return undo


def _kind(piece: PieceNote, how: str) -> str:
    return "island" if piece.island else "graph" if how == REPLAY else how


def stacks() -> dict[str, list[str]]:
    """The Python stack of every thread, innermost call last."""
    names = {t.ident: t.name for t in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": [line.rstrip() for line in traceback.format_stack(frame)]
        for ident, frame in sys._current_frames().items()
    }
