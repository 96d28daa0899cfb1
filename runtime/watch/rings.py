"""Rings: the steps and pieces that this rank submitted, as cheaply as they can be written down.

A ring of steps and a ring of pieces, preallocated: entering and leaving a piece are two
timestamps. Everything else (names, call numbers, sizes) is written once per step or is
known per program, and is put together only when somebody looks.

Collective calls are counted per process group, from 0, over all programs of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from ..errors import ConcurrentCallError
from ..spelling import group_word
from .marks import DeviceMarks
from .position import CAPTURE, CallSpan, PieceNote, ProgramNote

T = TypeVar("T")


class Marks:
    """What a runner calls around each piece. This one writes nothing down."""

    def each(self, pieces: Iterable[T]) -> Iterator[T]:
        """The same pieces, each entered before it is given and left when the next one is asked for."""
        for piece in pieces:
            self.enter()
            yield piece
            self.leave()

    def enter(self) -> None: ...

    def leave(self) -> None: ...

    def end(self) -> None: ...

    def fail(self) -> None: ...


class _Beside(Marks):
    """A step that begins while another is open, from a second thread or inside an island: its calls are counted."""

    def __init__(self, rings: Rings, program: int) -> None:
        self._rings, self._pieces, self._entered = rings, rings.programs[program].pieces, 0

    def enter(self) -> None:
        self._rings.count_beside(self._pieces[self._entered].calls)
        self._entered += 1


class _Refused(Marks):
    """A step that must not run: its runner hears of it where it tells the other ranks."""

    def __init__(self, why: str) -> None:
        self._why = why

    def enter(self) -> None:
        raise ConcurrentCallError(self._why)


class Rings(Marks):
    """One step at a time, in the order in which they were submitted.

    A step that begins while another is open (from a second thread, or inside an island) is counted in
    ``missed`` and not written down; the calls that it makes are counted.
    """

    def __init__(self, pieces: int = 8192, steps: int = 512) -> None:
        if pieces & (pieces - 1) or steps & (steps - 1):
            raise ValueError(f"a ring has a power of two of places, not {pieces} and {steps}")
        self.missed = 0
        #: Calls of the model that began no step.
        self.refusals = 0
        self.programs: list[ProgramNote] = []
        #: Refuse steps of two threads at once over one group: somebody judges by the order of its calls.
        self.one_caller = False
        self._clock = time.monotonic_ns
        self._marks: DeviceMarks | None = None
        self._runs: list[int] = []  # how often each program has run
        self._calls: list[tuple[tuple[int, int], ...]] = []  # (group, calls) of a whole run of each program
        self._groups: list[str] = []
        self._totals: list[int] = []  # calls of each group in all steps that have ended
        self._beside: list[int] = []  # calls of each group in steps that were not written down
        self._counting = threading.Lock()
        self._shown: dict[int, memoryview[int]] = {}
        # pieces
        self._entered, self._left = [0] * pieces, [0] * pieces  # lists: arrays take twice as long to be written
        self._piece_mask = pieces - 1
        self._submitted = self._returned = 0
        # steps
        self._first, self._count, self._program, self._began, self._ended = ([0] * steps for _ in range(5))
        self._how: list[str] = [""] * steps
        self._sizes: list[tuple[int, ...]] = [()] * steps
        self._before: list[list[int]] = []  # calls of each group before each step
        self._refused: dict[str, int] = {}  # by group: calls of the model that began no step, since the last one began
        self._refused_before: list[dict[str, int]] = [self._refused] * steps
        self._refusal, self._refused_at = "", 0
        self._step_mask = steps - 1
        self._steps = 0
        self._one = threading.Lock()
        self._open = False
        self._caller = 0
        self._phase = "idle"
        self._marked = [False] * steps
        self._oldest_unmarked = 0  # no step before this one is outstanding

    def register(self, note: ProgramNote) -> int:
        """The number under which a program's steps are begun."""
        counts = count_calls(note.pieces)
        self._calls.append(tuple((self.group(name), calls) for name, calls in counts.items()))
        self._runs.append(0)
        self.programs.append(note)
        return len(self.programs) - 1

    @property
    def begun(self) -> int:
        """How many steps have begun: the number of the next one."""
        return self._steps

    def has_run(self, program: int) -> bool:
        """Whether a step of a program has ended."""
        return self._runs[program] > 0

    def group(self, name: str) -> int:
        """The number of a group, whose calls are counted from now on."""
        if name not in self._groups:
            self._before.append([0] * (self._step_mask + 1))
            self._totals.append(0)
            self._beside.append(0)
            self._groups.append(name)
        return self._groups.index(name)

    def show(self, group: str, page: memoryview[int]) -> None:
        """From each step's beginning, ``page[0]`` is how many calls of the group this rank has made when it ends."""
        self._shown[self.group(group)] = page
        page[0] = self.calls(group)

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

    # -- what the runner calls -----------------------------------------------------------

    def begin(self, program: int, sizes: tuple[int, ...], how: str) -> Marks:
        """A step begins; enter and leave each of its pieces on what is returned, then end it."""
        if not self._one.acquire(blocking=False):
            return self._begin_beside(program)
        slot = self._steps & self._step_mask
        self._first[slot] = self._submitted
        self._program[slot] = program
        self._began[slot] = self._clock()
        self._ended[slot] = 0
        self._marked[slot] = False
        self._how[slot] = how
        self._sizes[slot] = sizes
        for group, before in enumerate(self._before):
            before[slot] = self._totals[group] + self._beside[group]
        self._refused_before[slot] = self._refused
        if self._refused:
            self._refused, self._refusal = {}, ""
        if self._shown:
            for group, calls in self._calls[program]:
                if group in self._shown:
                    self._shown[group][0] = self._totals[group] + self._beside[group] + calls
        self._phase = "step" if self._runs[program] and how != CAPTURE else "warm-up"
        self._caller = threading.get_ident()
        self._open = True
        self._steps += 1
        return self

    def refuse(self, groups: Collection[str], why: str) -> None:
        """A call of the model began no step: so many of each group the others may have begun, and wait in now."""
        self.refusals += 1
        if not groups:
            return
        if not self._refused:
            self._refused_at = self._clock()
        self._refused = {**self._refused, **{group: self._refused.get(group, 0) + 1 for group in groups}}
        self._refusal = why

    def _begin_beside(self, program: int) -> Marks:
        self.missed += 1
        other = self.programs[self._program[(self._steps - 1) & self._step_mask]]
        both = sorted(self.programs[program].groups & other.groups)
        if self.one_caller and both and self._caller != threading.get_ident():
            return _Refused(
                f"two threads call models over group '{group_word(both[0])}' at once, so its calls come in no order "
                "that all ranks share; call them from one thread, give each model a group of its own, or leave on_hang "
                "out"
            )
        return _Beside(self, program)

    def enter(self) -> None:
        at = self._submitted
        self._entered[at & self._piece_mask] = self._clock()
        self._submitted = at + 1

    def leave(self) -> None:
        at = self._submitted
        self._left[(at - 1) & self._piece_mask] = self._clock()
        self._returned = at

    def each(self, pieces: Iterable[T]) -> Iterator[T]:
        """:meth:`enter` and :meth:`leave` in one: between two pieces nothing is done, so that is one moment."""
        entered, left, mask, clock = self._entered, self._left, self._piece_mask, self._clock
        at, now = self._submitted, clock()
        for piece in pieces:
            place = at & mask
            entered[place] = now
            self._submitted = at = at + 1
            yield piece
            left[place] = now = clock()
            self._returned = at

    def end(self) -> None:
        step = self._steps - 1
        slot = step & self._step_mask
        if self._marks is not None:
            self._marked[slot] = self._marks.record(slot)
        self._ended[slot] = self._clock()
        self._runs[self._program[slot]] += 1
        self._close(slot)

    def fail(self) -> None:
        """The step ends with an exception."""
        if self._returned < self._submitted:
            self._left[(self._submitted - 1) & self._piece_mask] = 0
        self._close((self._steps - 1) & self._step_mask)
        for group, page in self._shown.items():  # it promised calls that do not come
            page[0] = self._totals[group] + self._beside[group]

    def _close(self, slot: int) -> None:
        program = self._program[slot]
        pieces = self.programs[program].pieces
        entered = self._count[slot] = self._submitted - self._first[slot]
        if entered == len(pieces):
            for group, calls in self._calls[program]:
                self._totals[group] += calls
        else:
            for name, calls in count_calls(pieces[:entered]).items():
                self._totals[self._groups.index(name)] += calls
        self._phase = "idle"
        self._open = False
        self._one.release()

    # -- counting ---------------------------------------------------------------------------

    def count_beside(self, groups: Sequence[str]) -> None:
        """A step that is not written down makes these calls, before those that the open step has still to make."""
        with self._counting:
            for name in groups:
                group = self._groups.index(name)
                self._beside[group] += 1
                if self._open:
                    self._before[group][(self._steps - 1) & self._step_mask] += 1

    def calls(self, group: str) -> int:
        """How many calls of a group this rank has entered."""
        return self._calls_submitted().get(group, 0)

    def count_from(self, group: str, calls: int) -> None:
        """Go on counting from there: the ranks agree, between two steps, where they are."""
        self._totals[self.group(group)] += max(0, calls - self.calls(group))

    def _calls_submitted(self) -> dict[str, int]:
        totals = {g: t + b for g, t, b in zip(self._groups, self._totals, self._beside, strict=False)}
        if self._open:
            slot = (self._steps - 1) & self._step_mask
            pieces = self.programs[self._program[slot]].pieces[: self._submitted - self._first[slot]]
            for group, calls in count_calls(pieces).items():
                totals[group] += calls
        return totals

    def _calls_before(self, step: int, piece: int) -> dict[str, int]:
        """How many calls of each group come before a piece of a step."""
        slot = step & self._step_mask
        earlier = count_calls(self.programs[self._program[slot]].pieces[:piece])
        return {g: self._before[i][slot] + earlier.get(g, 0) for i, g in enumerate(self._groups)}

    def _calls_in(self, step: int, start: int, stop: int) -> tuple[CallSpan, ...]:
        """The collective calls from one piece of a step to before another."""
        before = self._calls_before(step, start)
        pieces = self.programs[self._program[step & self._step_mask]].pieces[start:stop]
        return tuple(CallSpan(g, before[g], before[g] + n - 1) for g, n in count_calls(pieces).items())

    # -- completion -------------------------------------------------------------------------

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


def count_calls(pieces: Sequence[PieceNote]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for piece in pieces:
        for group in piece.calls:
            counts[group] = counts.get(group, 0) + 1
    return counts
