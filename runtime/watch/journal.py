"""Journal: what this rank submitted, and how far it came.

A ring of steps and a ring of pieces, preallocated: entering and leaving a piece are two
timestamps. Everything else (names, call numbers, sizes) is written once per step or is
known per program, and is put together only when somebody looks.

Collective calls are counted per process group, from 0. Ranks whose counts differ are out of
step, whatever their code says; that is what :mod:`.culprit` reads.

Completion: a CPU piece is complete when its call returns. On a device the host runs ahead, so
an event is recorded after each step (recording one after each piece costs more than the rest
of the journal), and is asked only by who looks. Until it has happened, no piece of the step
counts as complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

#: Version of the file that :meth:`Journal.dump` writes (docs/report.md).
FORMAT = 1

#: cudaStreamCaptureModeThreadLocal
_THREAD_LOCAL = 1

#: How a step ran.
UNCAPTURED, CAPTURE, REPLAY = "uncaptured", "capture", "replay"


def sizes_text(sizes: Sequence[int]) -> str:
    """``sizes (8,)``; a graph without a dynamic size has none: ``fixed sizes``."""
    return f"sizes {tuple(sizes)}" if sizes else "fixed sizes"


@dataclass(frozen=True)
class PieceNote:
    """What the journal knows of a piece: ``calls`` are the groups of its collectives, in order."""

    name: str
    island: bool
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProgramNote:
    """A program as it is written down. ``strategy`` says how its collectives are carried out."""

    pieces: tuple[PieceNote, ...]
    strategy: str = ""


@dataclass(frozen=True)
class Calls:
    """Collective calls of one group, from number ``first`` to number ``last``."""

    group: str
    first: int
    last: int

    def __str__(self) -> str:
        numbers = f"call {self.first}" if self.first == self.last else f"calls {self.first} to {self.last}"
        return f"{numbers} of group '{self.group}'"


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    phase: ``"step"``, ``"warm-up"`` (a capture, or the first step of a program), ``"compile"``, or ``"idle"``: outside.
    step, piece, name, kind, sizes: of the oldest piece that is not complete; of the last one when idle.
    calls: the collective calls in that piece (where only whole steps are marked, in that step).
    submitted, completed: how many collective calls of each group the host has entered, and how many are done.
    exchange: the topic of the exchange in which this rank waits for the others, beside steps; empty where it does not.
    still: seconds since anything moved.
    moved: pieces entered and left, ever: it changes when anything moves.
    """

    rank: int
    phase: str
    step: int
    sizes: tuple[int, ...] = ()
    piece: int | None = None
    name: str = ""
    kind: str = ""
    strategy: str = ""
    calls: tuple[Calls, ...] = ()
    submitted: Mapping[str, int] = field(default_factory=dict)
    completed: Mapping[str, int] = field(default_factory=dict)
    exchange: str = ""
    still: float = 0.0
    moved: int = 0

    @property
    def stuck_in_piece(self) -> bool:
        """Whether a piece has been submitted that is not complete."""
        return self.phase in ("step", "warm-up") and self.piece is not None

    @property
    def waits(self) -> bool:
        """Whether this rank may be waiting for another one: in a piece, or in an exchange."""
        return self.stuck_in_piece or bool(self.exchange)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Position:
        """Raises KeyError, TypeError or ValueError for what :meth:`to_dict` did not write."""
        fields = dict(value)
        fields["sizes"] = tuple(fields["sizes"])
        fields["calls"] = tuple(Calls(**c) for c in fields["calls"])
        position = cls(**fields)
        if not isinstance(position.rank, int) or not isinstance(position.still, float | int):
            raise TypeError(f"rank {position.rank!r}, still {position.still!r}")
        return position


class DeviceMarks(Protocol):
    """Tells whether work that was submitted to a device is done, without waiting for it."""

    def record(self, slot: int) -> bool:
        """Mark what this thread has submitted so far; False where that is not possible now."""

    def done(self, slot: int) -> bool:
        """Whether what was submitted before the mark is complete. Asked from any thread."""

    def watch_from_here(self) -> None:
        """Called once by each thread that will go on asking."""


class CudaMarks:
    """CUDA events, made once and recorded again and again."""

    def __init__(self, device: Any, slots: int) -> None:
        import torch

        self._device = torch.device(device)
        self._is_capturing = torch.cuda.is_current_stream_capturing
        self._stream = torch.cuda.current_stream
        self._events = [torch.cuda.Event() for _ in range(slots)]

    def record(self, slot: int) -> bool:
        if self._is_capturing():  # the caller captures the whole step: there, the event would be a node of its graph
            return False
        self._events[slot].record(self._stream(self._device))
        return True

    def done(self, slot: int) -> bool:
        try:
            return bool(self._events[slot].query())
        except RuntimeError:  # an error of the device is the main thread's to raise; nothing gets on any more
            return False

    def watch_from_here(self) -> None:
        """Let this thread's queries neither fail for nor break a capture that another thread makes.

        torch.cuda.graph captures in the mode "global" by default, which forbids queries to all
        threads that have not left it. torch has no function for that.
        """
        import torch

        major = (torch.version.cuda or "").split(".")[0]
        try:
            runtime = ctypes.CDLL(f"libcudart.so.{major}")  # loaded already: torch's own
            runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))
        except (OSError, AttributeError):
            log.warning("ringfence: libcudart.so.%s cannot be asked to leave captures of other threads alone", major)


class Marks:
    """What a runner calls around each piece. This one writes nothing down."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...

    def end(self) -> None: ...

    def fail(self) -> None: ...


_UNMARKED = Marks()


class Journal(Marks):
    """The journal of one rank: one step at a time, in the order in which they were submitted.

    A step that begins while another is open (from a second thread, or inside an island) is
    counted in ``missed`` and not written down.
    """

    def __init__(self, rank: int = 0, *, pieces: int = 8192, steps: int = 512) -> None:
        if pieces & (pieces - 1) or steps & (steps - 1):
            raise ValueError(f"a ring has a power of two of places, not {pieces} and {steps}")
        self.rank = rank
        self.missed = 0
        self._clock = time.monotonic_ns
        self._marks: DeviceMarks | None = None
        self._programs: list[ProgramNote] = []
        self._runs: list[int] = []  # how often each program has run
        self._calls: list[tuple[tuple[int, int], ...]] = []  # (group, calls) of a whole run of each program
        self._groups: list[str] = []
        self._ranks_of: dict[str, tuple[int, ...]] = {}
        self._totals: list[int] = []  # calls of each group in all steps that have ended
        self._compiling = 0
        self._exchange = ""
        self._changed_at = 0
        self._changes = 0
        # pieces
        self._entered, self._left = (array("q", bytes(8 * pieces)) for _ in range(2))
        self._piece_mask = pieces - 1
        self._submitted = self._returned = 0
        # steps
        self._first, self._count, self._program, self._began, self._ended = (
            array("q", bytes(8 * steps)) for _ in range(5)
        )
        self._how: list[str] = [""] * steps
        self._sizes: list[tuple[int, ...]] = [()] * steps
        self._before: list[array[int]] = []  # calls of each group before each step
        self._step_mask = steps - 1
        self._steps = 0
        self._open = False
        self._phase = "idle"
        self._marked: array[int] = array("b", bytes(steps))
        self._oldest_unmarked = 0  # no step before this one is outstanding

    # -- what the runner calls -----------------------------------------------------------

    def register(self, note: ProgramNote) -> int:
        """The number under which a program's steps are begun."""
        for group in (g for piece in note.pieces for g in piece.calls):
            if group not in self._groups:
                self._before.append(array("q", bytes(8 * (self._step_mask + 1))))
                self._totals.append(0)
                self._groups.append(group)
        self._calls.append(tuple((self._groups.index(g), n) for g, n in _count_calls(note.pieces).items()))
        self._runs.append(0)
        self._programs.append(note)
        return len(self._programs) - 1

    def name_group(self, name: str, ranks: Sequence[int]) -> None:
        """The global ranks of a group, so that who is missing can be told."""
        self._ranks_of[name] = tuple(ranks)

    def use(self, marks: DeviceMarks) -> None:
        """Completion is the device's from now on."""
        self._marks = marks

    def watch_from_here(self) -> None:
        """Called once by each thread that will go on asking for the position."""
        if self._marks is not None:
            self._marks.watch_from_here()

    @property
    def slots(self) -> int:
        """How many marks of a device are kept."""
        return self._step_mask + 1

    def begin(self, program: int, sizes: tuple[int, ...], how: str) -> Marks:
        """A step begins; enter and leave each of its pieces on what is returned, then end it."""
        if self._open:
            self.missed += 1
            return _UNMARKED
        self._open = True
        slot = self._steps & self._step_mask
        self._first[slot] = self._submitted
        self._program[slot] = program
        self._began[slot] = self._clock()
        self._ended[slot] = 0
        self._marked[slot] = 0
        self._how[slot] = how
        self._sizes[slot] = sizes
        for group, before in enumerate(self._before):
            before[slot] = self._totals[group]
        self._phase = "step" if self._runs[program] and how != CAPTURE else "warm-up"
        self._steps += 1
        return self

    def enter(self) -> None:
        at = self._submitted
        self._entered[at & self._piece_mask] = self._clock()
        self._submitted = at + 1

    def leave(self) -> None:
        at = self._submitted
        self._left[(at - 1) & self._piece_mask] = self._clock()
        self._returned = at

    def end(self) -> None:
        step = self._steps - 1
        slot = step & self._step_mask
        if self._marks is not None:
            self._marked[slot] = self._marks.record(slot)
        self._close(slot)
        self._ended[slot] = self._clock()
        self._runs[self._program[slot]] += 1

    def fail(self) -> None:
        """The step ends with an exception."""
        if self._returned < self._submitted:
            self._left[(self._submitted - 1) & self._piece_mask] = 0
        self._close((self._steps - 1) & self._step_mask)

    def _close(self, slot: int) -> None:
        program = self._program[slot]
        pieces = self._programs[program].pieces
        entered = self._count[slot] = self._submitted - self._first[slot]
        if entered == len(pieces):
            for group, calls in self._calls[program]:
                self._totals[group] += calls
        else:
            for name, calls in _count_calls(pieces[:entered]).items():
                self._totals[self._groups.index(name)] += calls
        self._phase = "idle"
        self._open = False

    def compiling(self, begins: bool) -> None:
        """A compilation begins, or ends; they may be nested."""
        self._compiling += 1 if begins else -1
        self._change()

    def _change(self) -> None:
        self._changed_at = self._clock()
        self._changes += 1

    @contextlib.contextmanager
    def waiting(self, topic: str) -> Iterator[None]:
        """This rank waits for the others, beside steps."""
        before, self._exchange = self._exchange, topic
        self._change()
        try:
            yield
        finally:
            self._exchange = before
            self._change()

    # -- where is this rank? ---------------------------------------------------------------

    def position(self) -> Position:
        """Where this rank is now. May be asked from any thread; waits for nothing."""
        for _ in range(10):  # the runner's thread may be writing; a rank that never stops is not looked at closely
            before = self._submitted, self._returned, self._steps, self._open
            position = self._position()
            if before == (self._submitted, self._returned, self._steps, self._open):
                break
        return position

    def _position(self) -> Position:
        now = self._clock()
        step = self._outstanding()
        last = self._steps - 1
        submitted = self._calls_submitted()
        if step is None:
            phase = "compile" if self._compiling else "idle"
            slot = last & self._step_mask
            ended = (self._ended[slot] or self._began[slot]) if last >= 0 else 0
            last_move = max(ended, self._changed_at)
            still = (now - last_move) / 1e9 if last_move else 0.0
            sizes = self._sizes[last & self._step_mask] if last >= 0 else ()
            return Position(
                self.rank,
                phase,
                last,
                sizes,
                submitted=submitted,
                completed=dict(submitted),
                exchange=self._exchange,
                still=still,
                moved=self._moved(),
            )
        slot = step & self._step_mask
        note = self._programs[self._program[slot]]
        host_is_here = self._open and step == last
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
            "compile" if self._compiling else self._phase if host_is_here else "step",
            step,
            self._sizes[slot],
            at,
            note.pieces[at].name if note.pieces else "",
            _kind(note.pieces[at], self._how[slot]) if note.pieces else self._how[slot],
            note.strategy,
            waits,
            submitted,
            completed,
            self._exchange,
            (now - moved_at) / 1e9,
            self._moved(),
        )

    def _moved(self) -> int:
        return self._submitted + self._returned + 2 * self._steps + self._changes + self._oldest_unmarked

    def _outstanding(self) -> int | None:
        """The oldest step that is not complete; None where all are."""
        steps = self._steps
        last = steps - 1
        ended = steps - 1 if self._open else steps  # one that begins from here on is looked at the next time
        if self._marks is not None:
            step = max(self._oldest_unmarked, steps - self.slots)
            while step < ended:
                slot = step & self._step_mask
                if self._marked[slot] and not self._marks.done(slot):
                    self._oldest_unmarked = step
                    return step
                step += 1
            self._oldest_unmarked = step
        return last if self._open and last >= 0 else None

    def _calls_submitted(self) -> dict[str, int]:
        totals = dict(zip(self._groups, self._totals, strict=False))
        if self._open:
            slot = (self._steps - 1) & self._step_mask
            pieces = self._programs[self._program[slot]].pieces[: self._submitted - self._first[slot]]
            for group, calls in _count_calls(pieces).items():
                totals[group] += calls
        return totals

    def _calls_before(self, step: int, piece: int) -> dict[str, int]:
        """How many calls of each group come before a piece of a step."""
        slot = step & self._step_mask
        earlier = _count_calls(self._programs[self._program[slot]].pieces[:piece])
        return {g: self._before[i][slot] + earlier.get(g, 0) for i, g in enumerate(self._groups)}

    def _calls_in(self, step: int, start: int, stop: int) -> tuple[Calls, ...]:
        """The collective calls from one piece of a step to before another."""
        before = self._calls_before(step, start)
        pieces = self._programs[self._program[step & self._step_mask]].pieces[start:stop]
        return tuple(Calls(g, before[g], before[g] + n - 1) for g, n in _count_calls(pieces).items())

    # -- writing it down ---------------------------------------------------------------------

    def to_dict(self, reason: str = "", **more: Any) -> dict[str, Any]:
        """Everything that is still in the rings, as JSON-ready values; the schema is docs/report.md."""
        return {
            "format": FORMAT,
            "rank": self.rank,
            "reason": reason,
            "pid": os.getpid(),
            "time": time.time(),
            "clock_ns": self._clock(),
            "groups": {
                name: list(self._ranks_of.get(name, ())) for name in dict.fromkeys([*self._groups, *self._ranks_of])
            },
            "programs": [asdict(p) for p in self._programs],
            "steps": list(self._written_steps()),
            "missed": self.missed,
            "position": self.position().to_dict(),
            "stacks": stacks(),
            **more,
        }

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

    def dump(self, folder: str | os.PathLike[str], reason: str = "asked for", **more: Any) -> Path:
        """Write ``journal-rankN.json`` into a folder, replacing an older one whole; the path of the file."""
        path = Path(folder) / f"journal-rank{self.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        scratch.write_text(json.dumps(self.to_dict(reason, **more), default=str))
        scratch.replace(path)
        return path

    def try_dump(self, folder: str | os.PathLike[str] | None, reason: str, **more: Any) -> None:
        """The same where a folder was asked for. An error is logged: what led here matters more."""
        if folder is None:
            return
        try:
            self.dump(folder, reason, **more)
        except OSError as error:
            log.error("ringfence: the journal of rank %d cannot be written: %s", self.rank, error)

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


def _count_calls(pieces: Sequence[PieceNote]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for piece in pieces:
        for group in piece.calls:
            counts[group] = counts.get(group, 0) + 1
    return counts


def _kind(piece: PieceNote, how: str) -> str:
    return "island" if piece.island else "graph" if how == REPLAY else how


def stacks() -> dict[str, list[str]]:
    """The Python stack of every thread, innermost call last."""
    names = {t.ident: t.name for t in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": [line.rstrip() for line in traceback.format_stack(frame)]
        for ident, frame in sys._current_frames().items()
    }
