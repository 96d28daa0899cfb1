"""Machine: ranks that write words into each other's memory, poll their own, and clear it.

Every protocol here is compiled into the few ops of this module, so that one set of rules
says what a run does, and what it means for it to fail.

A rank's program is a sequence of launches. A launch is complete when all its ops are done,
and the next one begins only then: stream order, and the end of a kernel, which flushes its
writes. Inside a launch ops come in any order that ``after`` allows: threads of a grid run
in any order, and a store is performed when the fabric pleases. That is the most that the
hardware may do, so what is safe here is safe there.

A *cell* is one word of one rank's memory. Two kinds are in use:

- data (PUSH, POLL, READ, CLEAR): empty while it holds the sentinel. A word that the receiver
  mistakes for the sentinel is there and is not seen: see :data:`UNSEEN`.
- flags (RAISE, AWAIT_CHANGE, AWAIT_EQUAL, AWAIT_COUNT): a number that meets the peers' number, whatever
  they are doing. The model keeps with it the call that it was raised in, which no kernel sees:
  see :func:`flag`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from .explore import Event, ModelFailure

#: A data cell that holds the sentinel. Other data is a tag while unread, and its negative afterwards.
EMPTY = 0
#: Added to the tag of a word that its receiver takes for the sentinel.
UNSEEN = 1 << 60

_WORDS_OF_A_CALL = 1 << 24
_FLAGS_OF_A_CALL = 3 << 24  # a multiple of 3, so that a 3-valued flag shows the number modulo 3
_WORDS_OF_A_TOKEN = 1 << 6

State = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]


def tag(call: int, token: int, rank: int | None = None) -> int:
    """The word that stands for this token in this call: the part of a rank, or the sum over all."""
    return 1 + call * _WORDS_OF_A_CALL + token * _WORDS_OF_A_TOKEN + (0 if rank is None else 1 + rank)


def flag(number: int, call: int | None = None) -> int:
    """A flag of this number raised in this call; or, of a poll, one that may be of any call."""
    return number + (0 if call is None else (call + 1) * _FLAGS_OF_A_CALL)


def call_of(word: int, is_flag: bool) -> int | None:
    """The call that a word was sent in; None where there is none."""
    if word == EMPTY:
        return None
    if is_flag:
        return word // _FLAGS_OF_A_CALL - 1 if word >= _FLAGS_OF_A_CALL else None
    return (abs(word) % UNSEEN - 1) // _WORDS_OF_A_CALL


def renumbered(word: int, is_flag: bool, number_of: Callable[[int], int], numbers: int) -> int:
    """The same word where calls have other numbers, and flags have moved on by ``numbers``, a multiple of 3.

    A flag that would fall below 1 keeps its remainder by 3 only: all that may be asked of one so far behind.
    """
    if word == EMPTY:
        return EMPTY
    if is_flag:
        call, number = divmod(word, _FLAGS_OF_A_CALL)
        number = number + numbers if number + numbers > 0 else (number + numbers) % 3 + 3
        return number + (0 if call == 0 else (number_of(call - 1) + 1) * _FLAGS_OF_A_CALL)
    unseen, rest = divmod(abs(word), UNSEEN)
    call, rest = divmod(rest - 1, _WORDS_OF_A_CALL)
    moved = 1 + number_of(call) * _WORDS_OF_A_CALL + rest + unseen * UNSEEN
    return moved if word > 0 else -moved


class OpKind(Enum):
    PUSH = "push"
    READ = "read"
    POLL = "poll"
    CLEAR = "clear"
    RAISE = "raise"
    AWAIT_CHANGE = "await change"
    AWAIT_EQUAL = "await equal"
    AWAIT_COUNT = "await count"

    @property
    def waits(self) -> bool:
        return self in (OpKind.POLL, OpKind.AWAIT_CHANGE, OpKind.AWAIT_EQUAL, OpKind.AWAIT_COUNT)

    @property
    def is_flag(self) -> bool:
        return self in (OpKind.RAISE, OpKind.AWAIT_CHANGE, OpKind.AWAIT_EQUAL, OpKind.AWAIT_COUNT)

    def passes(self, found: int, value: int) -> bool:
        """Whether a poll is content with this word where it waits for ``value``."""
        match self:
            case OpKind.POLL:
                return found != EMPTY and abs(found) < UNSEEN
            case OpKind.AWAIT_CHANGE:
                return found % 3 != (value - 1) % 3
            case OpKind.AWAIT_COUNT:
                return found % _FLAGS_OF_A_CALL >= value % _FLAGS_OF_A_CALL
            case _:
                return found % _FLAGS_OF_A_CALL == value % _FLAGS_OF_A_CALL

    def right(self, found: int, value: int) -> bool:
        """Whether it is the word that was meant, unread; or a flag of that barrier or a later one, and of that call."""
        if self not in (OpKind.AWAIT_CHANGE, OpKind.AWAIT_COUNT):
            return found == value
        call, number = divmod(value, _FLAGS_OF_A_CALL)
        return found % _FLAGS_OF_A_CALL >= number and call in (0, found // _FLAGS_OF_A_CALL)


@dataclass(frozen=True)
class Op:
    """One step of a launch, over all ``cells`` at once.

    values: for each cell, what is written; or, of a poll, what it ought to find.
    after: the ops of this launch that come before, transitively, as a bit mask.
    trusted: the last so many cells are consumed without having been looked at.
    """

    kind: OpKind
    cells: tuple[int, ...]
    values: tuple[int, ...]
    after: int = 0
    trusted: int = 0
    detail: str = ""

    @property
    def tested(self) -> int:
        return len(self.cells) - self.trusted


@dataclass(frozen=True)
class Launch:
    """The ops of one call of one rank. A launch without ops does nothing and holds up nobody."""

    call: int
    title: str
    ops: tuple[Op, ...]


@dataclass
class CellTable:
    """Numbers the cells in the order in which they are first named."""

    names: list[str] = field(default_factory=list)
    _numbers: dict[tuple[int, str], int] = field(default_factory=dict)

    def cell(self, rank: int, name: str) -> int:
        key = (rank, name)
        if key not in self._numbers:
            self._numbers[key] = len(self.names)
            self.names.append(f"{name} in rank {rank}'s memory")
        return self._numbers[key]


class Machine:
    """A :class:`~.explore.Model` of ranks that run launches."""

    def __init__(self, programs: Sequence[Sequence[Launch]], names: Sequence[str]) -> None:
        self._programs = tuple(tuple(launch for launch in launches if launch.ops) for launches in programs)
        self._names = names
        self._events: dict[tuple[int, int, int], Event] = {}

    @property
    def programs(self) -> Sequence[Sequence[Launch]]:
        return self._programs

    @property
    def names(self) -> Sequence[str]:
        return self._names

    @property
    def width(self) -> int:
        """How many ops the largest launch has."""
        return max((len(launch.ops) for launches in self.programs for launch in launches), default=0)

    def initial(self) -> State:
        return ((0, 0),) * len(self.programs), (EMPTY,) * len(self.names)

    def finished(self, state: State) -> bool:
        return all(at == len(launches) for (at, _), launches in zip(state[0], self.programs, strict=True))

    def steps(self, state: State) -> Iterator[tuple[Event, State]]:
        progress, memory = state
        for rank, (at, done) in enumerate(progress):
            if at == len(self.programs[rank]):
                continue
            ops = self.programs[rank][at].ops
            for i, op in enumerate(ops):
                if done >> i & 1 or op.after & ~done:
                    continue
                if op.kind.waits and not ready(op, memory):
                    continue
                cells = list(memory)
                failure, note = perform(op, cells)
                event = self.event(rank, at, i, failure, note)
                now = done | 1 << i
                here = (at + 1, 0) if now == (1 << len(ops)) - 1 else (at, now)
                yield event, ((*progress[:rank], here, *progress[rank + 1 :]), tuple(cells))

    def event(self, rank: int, at: int, op: int, failure: ModelFailure | None = None, note: str = "") -> Event:
        event = self._events.get((rank, at, op))
        if event is None:
            launch = self.programs[rank][at]
            event = Event(rank, launch.call, launch.ops[op].kind.value, launch.ops[op].detail)
            self._events[rank, at, op] = event
        if not note:
            return event
        return Event(rank, event.call, event.action, f"{event.detail}: {note}" if event.detail else note, failure)

    def waiting(self, state: State) -> tuple[str, ...]:
        return tuple(self._waits_for(rank, state) for rank in range(len(self.programs)))

    def _waits_for(self, rank: int, state: State) -> str:
        (at, done), memory = state[0][rank], state[1]
        if at == len(self.programs[rank]):
            return f"rank {rank} waits for nothing: its program has ended"
        launch = self.programs[rank][at]
        here = f"rank {rank} in call {launch.call} ({launch.title})"
        for i, op in enumerate(launch.ops):
            if done >> i & 1 or op.after & ~done:
                continue
            for cell, value in zip(op.cells[: op.tested], op.values, strict=False) if op.kind.waits else ():
                if not op.kind.passes(memory[cell], value):
                    return f"{here} polls {op.detail}; {self.names[cell]} holds {describe(op, memory[cell], value)}"
        return f"{here} can go on"


def ready(op: Op, memory: Sequence[int]) -> bool:
    passes = op.kind.passes
    return all([passes(memory[op.cells[i]], op.values[i]) for i in range(op.tested)])


def perform(op: Op, memory: list[int]) -> tuple[ModelFailure | None, str]:
    """Carry out an op that is ready. Returns how it failed, if it did, and what is worth telling about it."""
    match op.kind:
        case OpKind.PUSH:
            lost = [memory[cell] for cell in op.cells if 0 < memory[cell] < UNSEEN]
            for cell, value in zip(op.cells, op.values, strict=True):
                memory[cell] = value
            return (ModelFailure.LOST_WRITE, f"overwrites {describe(op, lost[0])}, unread") if lost else (None, "")
        case OpKind.CLEAR:
            wiped = [memory[cell] for cell in op.cells if memory[cell] > 0]
            for cell in op.cells:
                memory[cell] = EMPTY
            return None, f"wipes {describe(op, wiped[0])}, unread" if wiped else ""
        case OpKind.RAISE:
            for cell, value in zip(op.cells, op.values, strict=True):
                memory[cell] = value
            return None, ""
    for cell, value in zip(op.cells, op.values, strict=True):
        if not op.kind.right(memory[cell], value):
            return (
                ModelFailure.STALE_READ,
                f"takes {describe(op, memory[cell], value)} for {describe(op, value, value)}",
            )
        if op.kind in (OpKind.POLL, OpKind.READ):
            memory[cell] = -memory[cell]
    return None, ""


def describe(op: Op, found: int, value: int = EMPTY) -> str:
    """A word as a person would call it; ``value`` is what a poll waits for."""
    if op.kind.waits and op.kind.is_flag:
        call, number = divmod(found, _FLAGS_OF_A_CALL)
        raised = f", raised in call {call - 1}" if call else ""
        if op.kind is not OpKind.AWAIT_CHANGE:
            return f"{number}{raised}"
        return f"{number % 3} (barrier {number}{raised})"
    if found == EMPTY:
        return "what nobody wrote" if op.kind is OpKind.READ else "the sentinel"
    call, rest = divmod(abs(found) % UNSEEN - 1, _WORDS_OF_A_CALL)
    token, rank = divmod(rest, _WORDS_OF_A_TOKEN)
    what = f"rank {rank - 1}'s part" if rank else "the sum"
    word = f"{what} of token {token} in call {call}"
    if abs(found) >= UNSEEN:
        return f"{word} (a word that looks like the sentinel)"
    return f"{word} (read before)" if found < 0 else word
