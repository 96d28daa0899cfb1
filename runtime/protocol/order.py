"""Order: what must have happened before what, in every order of a run.

Exploring every order of 160 calls on 8 ranks is out of reach, and needless. Ranks never
choose: each makes its launches one after another, and all that a poll does is wait. So the
order of steps can change a result only where two steps touch one word and nothing in the
protocol orders them. This module watches *one* order and looks for such pairs. If there are
none, every order makes the same steps with the same results, and the one that was watched
speaks for all.

What must have happened before a step, in every order, is the smallest transitive relation with

1. the launches of a rank one after another, and ``after`` inside a launch;
2. the end of a poll after the first write to its cell with which it can have been content.

It is kept as a vector: for each rank, how many launches are complete, and which ops of the
next one are done (a bit mask). A poll looks at its cell again and again from the moment at
which it may begin. Of the writes to the cell it *can see* all but two kinds: those that another
write overwrote before the poll could begin, and those that come after its end. Checked is:

A. Any two writes to a cell are ordered.
B. What a poll can see, in the order of the writes, is first words that it rejects and then
   words that it accepts, all of them right. (Two, where a 3-valued flag may have moved on.)
   A word consumed untested must be right in all that can be seen.
C. A poll that consumes its word is ordered with every later push to the cell, which would
   lose the word unread, and with every other poll that would take it.

Why that is enough. Let some order differ, and take its first step s whose outcome is not that
of the watched run, or that the run does not make. All steps before it are steps of the run
with the same outcomes, so by 1 and 2 whatever must precede s has been made. If s is a write,
1 alone enables it; it loses an unread word only if the poll that reads that word does not come
before it, which C excludes. If
s is a poll, the word it found is, writes being ordered by A, one that it can see; by B it is
right, and the first that it accepts had been written, as 2 says. So s has the run's outcome
after all. Nor can an order get stuck where the run goes on: take the first step of the run that
it has not made. All that comes before it in the run has been made, so a poll among these finds
the word that the run's poll found, or a later one that it can see, which B has it accept. And
if the run itself gets stuck, where no poll that waits could have seen a word that it accepts,
every order gets stuck after the same steps.

Between two calls all that later steps can ask of the past is little: what every rank knows of
needs no place any more, and of the writes to a cell only those count that a later poll can see.
:class:`Past` is that remainder, told from the call that comes next; so it is the same again and
again in a plan whose layers repeat, and :mod:`.walk` makes each different call once.

The converse does not hold: a pair out of order is a suspicion, for :mod:`.decide` to look into.
tests/hangs compares the answers with those of the unreduced search.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .machine import EMPTY, Machine, Op, OpKind


@dataclass(frozen=True)
class OpPlace:
    """An op by its place: the ``op``-th of the ``at``-th launch of ``rank``."""

    rank: int
    at: int
    op: int


@dataclass(frozen=True)
class Suspicion:
    """``first`` came before ``second`` in the run, and need not have."""

    first: OpPlace
    second: OpPlace


@dataclass(frozen=True)
class _Write:
    step: OpPlace
    value: int
    knows: tuple[int, ...]


@dataclass
class _Cell:
    is_flag: bool
    writes: list[_Write] = field(default_factory=list)
    polls: list[tuple[OpPlace, OpKind, int]] = field(default_factory=list)
    taken: dict[int, OpPlace] = field(default_factory=dict)


#: A vector as pairs (launches that are complete, ops of the next), of launches counted from the next call.
Vector: TypeAlias = tuple[tuple[int, int], ...]

#: The place of a step that comes before whatever is still to be judged.
LONG_AGO = OpPlace(0, -(1 << 40), 0)


@dataclass(frozen=True)
class PastOfCell:
    """What may still matter of a cell: the writes that can be seen, and the steps that some rank need not know of."""

    cell: int
    is_flag: bool
    writes: tuple[tuple[OpPlace, int, Vector], ...]
    polls: tuple[tuple[OpPlace, OpKind, int], ...]
    taken: tuple[OpPlace, ...]


@dataclass(frozen=True)
class Past:
    """What an order may still be asked for between two calls. ``starts``: what each rank knows."""

    starts: tuple[Vector, ...]
    cells: tuple[PastOfCell, ...] = ()

    @staticmethod
    def nothing(ranks: int) -> Past:
        return Past((((0, 0),) * ranks,) * ranks)

    @property
    def reach(self) -> int:
        """How many calls back the oldest step lies that has not been forgotten."""
        places = [-at for vector in self.starts for at, _ in vector]
        for cell in self.cells:
            places += [-place.at for place, _, _ in cell.writes if place is not LONG_AGO]
            places += [-place.at for place in (*(p for p, _, _ in cell.polls), *cell.taken)]
        return max(places)


class Order:
    """What must have happened before what, and whether that settles every word (A and B above).

    A vector has one number per rank: complete launches << width | ops done in the next one.
    """

    def __init__(self, width: int, ranks: int) -> None:
        """``width``: how many ops the largest launch has."""
        self._width = width
        self._start: list[tuple[int, ...]] = [(0,) * ranks] * ranks
        self._ends: list[dict[int, tuple[int, ...]]] = [{} for _ in range(ranks)]
        self._cells: dict[int, _Cell] = {}

    @staticmethod
    def after(past: Past, width: int, at: int = 0) -> Order:
        """The order of a run that goes on with launch ``at`` of each rank. Values are those of ``past``."""
        known = [done.bit_length() for vector in past.starts for _, done in vector]
        known += [d.bit_length() for cell in past.cells for _, _, knows in cell.writes for _, d in knows]
        for cell in past.cells:  # steps too of which nobody knows: of a launch that had more ops than any to come
            places = (*(p for p, _, _ in cell.writes), *(p for p, _, _ in cell.polls), *cell.taken)
            known += [place.op + 1 for place in places]
        order = Order(max(width, *known), len(past.starts))

        def there(place: OpPlace) -> OpPlace:
            return place if place is LONG_AGO else OpPlace(place.rank, place.at + at, place.op)

        @functools.cache
        def packed(vector: Vector) -> tuple[int, ...]:
            return tuple([n + at << order._width | done for n, done in vector])

        order._start = [packed(vector) for vector in past.starts]
        nothing = packed(((LONG_AGO.at, 0),) * len(past.starts))
        for cell in past.cells:
            writes = [_Write(there(p), value, packed(k) if k else nothing) for p, value, k in cell.writes]
            polls = [(there(p), kind, value) for p, kind, value in cell.polls]
            taken = {p.rank: there(p) for p in cell.taken}
            order._cells[cell.cell] = _Cell(cell.is_flag, writes, polls, taken)
        return order

    def past(self, at: int, moved: Callable[[int, bool], int]) -> Past:
        """What may still matter once every rank has completed the launches before ``at``.

        moved: a value of a cell, and whether that holds flags, to the value as it is told from the next call.
        """
        width, mask = self._width, (1 << self._width) - 1
        common = self._start[0]
        for vector in self._start[1:]:
            common = self._meet(common, vector)

        def told(place: OpPlace) -> OpPlace:
            return OpPlace(place.rank, place.at - at, place.op)

        @functools.cache  # many words are written by one step
        def pairs(vector: tuple[int, ...]) -> Vector:
            return tuple([((v >> width) - at, v & mask) for v in vector])

        @functools.cache
        def common_knowledge(vector: tuple[int, ...]) -> bool:
            return self._meet(vector, common) == vector

        cells = []
        for number, cell in sorted(self._cells.items()):
            seen = next((i for i in reversed(range(len(cell.writes))) if self._before(cell.writes[i].step, common)), 0)
            writes: list[tuple[OpPlace, int, Vector]] = []
            for write in cell.writes[seen:]:
                value = moved(write.value, cell.is_flag)
                if self._before(write.step, common) and common_knowledge(write.knows):
                    writes.append((LONG_AGO, value, ()))
                else:
                    writes.append((told(write.step), value, pairs(write.knows)))
            if writes and writes[0] == (LONG_AGO, EMPTY, ()):
                del writes[0]  # the cell is as it was in the beginning
            polls = tuple((told(p), k, moved(v, cell.is_flag)) for p, k, v in cell.polls if not self._before(p, common))
            taken = tuple(told(p) for _, p in sorted(cell.taken.items()) if not self._before(p, common))
            if writes or polls or taken:
                cells.append(PastOfCell(number, cell.is_flag, tuple(writes), polls, taken))
        return Past(tuple(pairs(vector) for vector in self._start), tuple(cells))

    def judge(self, step: OpPlace, op: Op) -> Suspicion | None:
        """Take the step into the order, or say which pair is not in order."""
        knows = self._start[step.rank]
        ends = self._ends[step.rank]
        if op.after:
            for i, end in ends.items():
                if op.after >> i & 1:
                    knows = self._join(knows, end)
            knows = self._with(knows, step.rank, step.at, op.after)
        after = knows
        written = self._with(knows, step.rank, step.at, op.after | 1 << step.op)
        for i, (cell, value) in enumerate(zip(op.cells, op.values, strict=True)):
            history = self._cells.get(cell)
            if history is None:
                history = self._cells[cell] = _Cell(op.kind.is_flag)
            if not op.kind.waits:
                write = _Write(step, value, written)
                suspicion = self._unordered(history, write, op, knows)
                history.writes.append(write)
            elif i < op.tested:
                first, suspicion = self._seen(history, step, op, value, knows)
                suspicion = suspicion or self._twice(history, step, op, knows)
                after = self._join(after, first.knows) if first is not None else after
                history.polls.append((step, op.kind, value))
            else:
                suspicion = self._untested(history, step, op, value, after)
                history.polls.append((step, op.kind, value))
            if suspicion is not None:
                return suspicion
        if after is not self._start[step.rank]:
            ends[step.op] = after
        return None

    def judge_stuck(self, machine: Machine, progress: Sequence[Sequence[int]]) -> Suspicion | None:
        """A poll that waits in vain at the end of the run, and in another order might have passed."""
        for rank, (at, done) in enumerate(progress):
            ops = machine.programs[rank][at].ops if at < len(machine.programs[rank]) else ()
            for i, op in enumerate(ops):
                if op.kind.waits and not done >> i & 1 and not op.after & ~done:
                    suspicion = self.judge(OpPlace(rank, at, i), op)
                    if suspicion is not None:
                        return suspicion
        return None

    def complete(self, rank: int, at: int) -> None:
        knows = self._start[rank]
        for end in self._ends[rank].values():
            knows = self._join(knows, end)
        self._ends[rank].clear()
        self._start[rank] = self._with(knows, rank, at + 1, 0)

    def _unordered(self, history: _Cell, write: _Write, op: Op, knows: tuple[int, ...]) -> Suspicion | None:
        """A, and B and C for the polls before this write that need not have ended before it."""
        if history.writes and not self._before(history.writes[-1].step, knows):
            return Suspicion(history.writes[-1].step, write.step)
        # What comes before this write comes before all later ones, and is settled.
        history.polls = [poll for poll in history.polls if not self._before(poll[0], knows)]
        for step, poll, value in history.polls:
            consumed = op.kind is OpKind.PUSH and poll is OpKind.POLL
            if consumed or not (poll.passes(write.value, value) and poll.right(write.value, value)):
                return Suspicion(step, write.step)
        return None

    def _twice(self, history: _Cell, step: OpPlace, op: Op, knows: tuple[int, ...]) -> Suspicion | None:
        """C for two polls of one word, of which each would take it."""
        if op.kind is not OpKind.POLL:
            return None
        others = [other for other in history.taken.values() if not self._before(other, knows)]
        history.taken[step.rank] = step  # what comes after it comes after this rank's earlier ones
        return Suspicion(others[0], step) if others else None

    def _seen(
        self, history: _Cell, step: OpPlace, op: Op, value: int, knows: tuple[int, ...]
    ) -> tuple[_Write | None, Suspicion | None]:
        """B. The first write that can have ended the poll; None for the word of the beginning."""
        first: _Write | None = None
        accepted = False
        sight = self._sight(history, knows)
        for i, write in enumerate(sight):
            found = EMPTY if write is None else write.value
            accepts = op.kind.passes(found, value)
            if (accepts and not op.kind.right(found, value)) or (accepted and not accepts):
                return None, _held(sight, i, accepted, step)
            if accepts and not accepted:
                first, accepted = write, True
        return first, None

    def _untested(self, history: _Cell, step: OpPlace, op: Op, value: int, knows: tuple[int, ...]) -> Suspicion | None:
        sight = self._sight(history, knows)
        for i, write in enumerate(sight):
            if write is None or not op.kind.right(write.value, value):
                return _held(sight, i, False, step)
        return None

    def _sight(self, history: _Cell, knows: tuple[int, ...]) -> list[_Write | None]:
        """The writes that a poll which begins knowing this can see; None stands for the beginning."""
        sight: list[_Write | None] = []
        for write in reversed(history.writes):
            sight.append(write)
            if self._before(write.step, knows):
                return sight[::-1]
        return [None, *sight[::-1]]

    def _before(self, step: OpPlace, knows: tuple[int, ...]) -> bool:
        at, done = knows[step.rank] >> self._width, knows[step.rank]
        return at > step.at or (at == step.at and bool(done >> step.op & 1))

    def _with(self, knows: tuple[int, ...], rank: int, at: int, done: int) -> tuple[int, ...]:
        return (*knows[:rank], at << self._width | done, *knows[rank + 1 :])

    def _meet(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        width = self._width
        return tuple([x & y if x >> width == y >> width else min(x, y) for x, y in zip(a, b, strict=True)])

    def _join(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        if a == b:
            return a
        width = self._width
        return tuple([x | y if x >> width == y >> width else max(x, y) for x, y in zip(a, b, strict=True)])


def _held(sight: Sequence[_Write | None], wrong: int, accepted: bool, poll: OpPlace) -> Suspicion:
    """The write that hides the wrong word from the poll in the run, and that another order brings later."""
    after = sight[wrong + 1] if wrong + 1 < len(sight) and not accepted else sight[wrong]
    return Suspicion(after.step if after is not None else poll, poll)
