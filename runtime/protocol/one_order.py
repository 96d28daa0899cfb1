"""One order: decide a long program from a single run.

Exploring every order of 160 calls on 8 ranks is out of reach, and needless. Ranks never
choose: each runs its launches one after another, and what a poll does is wait. So the order
of steps can change a result only where two steps touch one word and nothing in the protocol
orders them. This module runs *one* order, keeps with each step what must have happened
before it in *every* order, and looks for such pairs. If it finds none, every order makes the
same steps with the same results, and the one that was run speaks for all.

What must have happened before a step, in every order, is the smallest transitive relation with

1. the launches of a rank one after another, and ``after`` inside a launch;
2. the end of a poll after the first write to its cell with which it can have been content.

It is kept as a vector: for each rank, how many launches are complete, and which ops of the
next one are done (a bit mask). A poll looks at its cell again and again from the moment at
which it may begin. Of the writes to the cell it *can see* those that do not come before it
and overwritten by one that also does, and that do not come after its end. Checked is:

A. Any two writes to a cell are ordered.
B. What a poll can see, in the order of the writes, is first words that it rejects and then
   words that it accepts, all of them right. (Two, where a 3-valued flag may have moved on.)
   A word consumed untested must be right in all that can be seen.

Why that is enough. Let some order differ, and take its first step s whose outcome differs
from that in the run, or that the run does not make. All steps before it are steps of the run
with the same outcomes, and by 1 and 2 whatever must precede s has been made: a write needs
only 1, and a poll that passes has seen a word which, all writes to the cell being ordered
by A, is one of those it can see; by B it is right, and the first such word had been written
as 2 says. So s has the run's outcome after all: for a poll that is B; a write loses an unread
word only if the poll that reads it does not come before, and then that poll can see this
write, which B excludes unless it too is right. Nor can an order get stuck where the run goes
on: take a first step of the run, in the run's order, that it has not made; everything before
it in the run has been made, a poll among it can see only its accepted words then, so the step
can be made. If the run itself gets stuck or fails, so does every order that gets that far.

The converse does not hold: a pair out of order is a suspicion. :func:`decide` then looks for
the failure itself, from the last point at which all ranks were between calls: exhaustively,
which gives a shortest trace, as far as ``limit`` states; beyond, in the one order that
holds up the first step of the pair. tests/hangs compares its answers with the unreduced search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import TooManyStatesError
from .explore import Event, Failure, Result, explore
from .machine import EMPTY, Machine, Op, State, perform, ready


@dataclass(frozen=True)
class Step:
    """An op by its place: the ``op``-th of the ``at``-th launch of ``rank``."""

    rank: int
    at: int
    op: int


@dataclass(frozen=True)
class Suspicion:
    """``first`` came before ``second`` in the run, and need not have."""

    first: Step
    second: Step


@dataclass(frozen=True)
class _Run:
    """One order. ``quiet`` has the latest states in which all ranks were between calls, oldest first."""

    trace: tuple[Step, ...]
    end: State
    quiet: tuple[State, ...]
    failure: Failure | None = None
    note: str = ""
    suspicion: Suspicion | None = None


def decide(machine: Machine, *, limit: int = 40_000) -> Result[State]:
    """Whether some order of the machine fails. ``states`` counts those visited.

    ``limit``, in states times ranks, bounds each exhaustive search for a shortest trace; a
    failure found beyond it has ``shortest`` False, and unless it is a deadlock a trace in which
    no single step can be left out.
    """
    run = _run(machine, machine.initial(), order=_Order(machine))
    visited = len(run.trace) + 1
    if run.failure is None and run.suspicion is None:
        return Result(None, visited)
    if run.failure is Failure.DEADLOCK:  # nothing was out of order, so every order gets stuck after these steps
        stuck = _run(machine, run.quiet[-1])
        return replace(_report(machine, run.quiet[-1], stuck, visited), shortest=True)
    for quiet in dict.fromkeys((run.quiet[0], run.quiet[-1])):
        try:
            found = explore(machine, start=quiet, limit=limit // len(machine.programs))
        except TooManyStatesError as error:
            visited += error.states
            continue
        visited += found.states
        if found.failure is not None:
            return replace(found, states=visited, skipped=_complete(quiet))
    for quiet in reversed(run.quiet):
        held = _run(machine, quiet, hold=run.suspicion)
        visited += len(held.trace) + 1
        if held.failure is not None:
            return _report(machine, quiet, held, visited)
    return explore(machine, limit=10 * limit)


def _complete(state: State) -> int:
    return min(at for at, _ in state[0])


def _run(
    machine: Machine,
    start: State,
    *,
    order: _Order | None = None,
    hold: Suspicion | None = None,
) -> _Run:
    """One order from ``start``: call by call where ranks agree, and otherwise whoever can.

    order: judges each step; the run ends at the first suspicion.
    hold: its first step is made only after the second, or when nothing else can be made.
    """
    progress, memory = [list(p) for p in start[0]], list(start[1])
    trace: list[Step] = []
    quiet = [start]
    held = hold.first if hold is not None else None
    bound = _complete(start) if hold is None else len(max(machine.programs, key=len))

    def state() -> State:
        return tuple((at, done) for at, done in progress), tuple(memory)

    while True:
        moved = False
        for rank, launches in enumerate(machine.programs):
            at, done = progress[rank]
            if at == len(launches) or at > bound:
                continue
            ops = launches[at].ops
            again = True
            while again:
                again = False
                for i, op in enumerate(ops):
                    if done >> i & 1 or op.after & ~done or (op.action.waits and not ready(op, memory)):
                        continue
                    step = Step(rank, at, i)
                    if step == held:
                        continue
                    trace.append(step)
                    failure, note = perform(op, memory)
                    if failure is not None:
                        return _Run(tuple(trace), state(), tuple(quiet), failure, note)
                    suspicion = order.judge(step, op) if order is not None else None
                    if suspicion is not None:
                        return _Run(tuple(trace), state(), tuple(quiet), suspicion=suspicion)
                    done |= 1 << i
                    moved = again = True
                    if hold is not None and step == hold.second:
                        held = None
            progress[rank] = [at + 1, 0] if done == (1 << len(ops)) - 1 else [at, done]
            if order is not None and progress[rank][1] == 0:
                order.complete(rank, at)
        if moved:
            continue
        if machine.finished(state()):
            return _Run(tuple(trace), state(), tuple(quiet))
        if held is not None:
            held = None
        elif bound <= max(at for at, _ in progress):
            if all(done == 0 for _, done in progress):
                quiet = [*quiet[-2:], state()]
            bound += 1
        else:
            return _Run(tuple(trace), state(), tuple(quiet), Failure.DEADLOCK)


@dataclass(frozen=True)
class _Write:
    step: Step
    value: int
    knows: tuple[int, ...]


@dataclass
class _Cell:
    writes: list[_Write] = field(default_factory=list)
    polls: list[tuple[Step, Op, int]] = field(default_factory=list)


class _Order:
    """What must have happened before what, and whether that settles every word (A and B above).

    A vector has one number per rank: complete launches << width | ops done in the next one.
    """

    def __init__(self, machine: Machine) -> None:
        self._width = max((len(m.ops) for launches in machine.programs for m in launches), default=0)
        ranks = len(machine.programs)
        self._start: list[tuple[int, ...]] = [(0,) * ranks] * ranks
        self._ends: list[dict[int, tuple[int, ...]]] = [{} for _ in range(ranks)]
        self._cells: dict[int, _Cell] = {}

    def judge(self, step: Step, op: Op) -> Suspicion | None:
        """Take the step into the order, or say which pair is not in order."""
        knows = self._start[step.rank]
        ends = self._ends[step.rank]
        if op.after:
            for i, end in ends.items():
                if op.after >> i & 1:
                    knows = self._join(knows, end)
            knows = self._with(knows, step.rank, step.at, op.after)
        after = knows
        for i, (cell, value) in enumerate(zip(op.cells, op.values, strict=True)):
            history = self._cells.setdefault(cell, _Cell())
            if not op.action.waits:
                write = _Write(step, value, self._with(knows, step.rank, step.at, op.after | 1 << step.op))
                suspicion = self._unordered(history, write, knows)
                history.writes.append(write)
            elif i < op.tested:
                first, suspicion = self._seen(history, step, op, value, knows)
                after = self._join(after, first.knows) if first is not None else after
                history.polls.append((step, op, value))
            else:
                suspicion = self._untested(history, step, op, value, after)
                history.polls.append((step, op, value))
            if suspicion is not None:
                return suspicion
        if after is not self._start[step.rank]:
            ends[step.op] = after
        return None

    def complete(self, rank: int, at: int) -> None:
        knows = self._start[rank]
        for end in self._ends[rank].values():
            knows = self._join(knows, end)
        self._ends[rank].clear()
        self._start[rank] = self._with(knows, rank, at + 1, 0)

    def _unordered(self, history: _Cell, write: _Write, knows: tuple[int, ...]) -> Suspicion | None:
        """A, and B for the polls before this write that need not have ended before it."""
        if history.writes and not self._before(history.writes[-1].step, knows):
            return Suspicion(history.writes[-1].step, write.step)
        # What comes before this write comes before all later ones, and is settled.
        history.polls = [poll for poll in history.polls if not self._before(poll[0], knows)]
        for step, op, value in history.polls:
            if not (op.passes(write.value, value) and op.right(write.value, value)):
                return Suspicion(step, write.step)
        return None

    def _seen(
        self, history: _Cell, step: Step, op: Op, value: int, knows: tuple[int, ...]
    ) -> tuple[_Write | None, Suspicion | None]:
        """B. The first write that can have ended the poll; None for the word of the beginning."""
        first: _Write | None = None
        accepted = False
        sight = self._sight(history, knows)
        for i, write in enumerate(sight):
            found = EMPTY if write is None else write.value
            accepts = op.passes(found, value)
            if (accepts and not op.right(found, value)) or (accepted and not accepts):
                return None, _held(sight, i, accepted, step)
            if accepts and not accepted:
                first, accepted = write, True
        return first, None

    def _untested(self, history: _Cell, step: Step, op: Op, value: int, knows: tuple[int, ...]) -> Suspicion | None:
        sight = self._sight(history, knows)
        for i, write in enumerate(sight):
            if write is None or not op.right(write.value, value):
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

    def _before(self, step: Step, knows: tuple[int, ...]) -> bool:
        at, done = knows[step.rank] >> self._width, knows[step.rank]
        return at > step.at or (at == step.at and bool(done >> step.op & 1))

    def _with(self, knows: tuple[int, ...], rank: int, at: int, done: int) -> tuple[int, ...]:
        return (*knows[:rank], at << self._width | done, *knows[rank + 1 :])

    def _join(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        if a == b:
            return a
        width = self._width
        return tuple([x | y if x >> width == y >> width else max(x, y) for x, y in zip(a, b, strict=True)])


def _held(sight: Sequence[_Write | None], wrong: int, accepted: bool, poll: Step) -> Suspicion:
    """The write that hides the wrong word from the poll in the run, and that another order brings later."""
    after = sight[wrong + 1] if wrong + 1 < len(sight) and not accepted else sight[wrong]
    return Suspicion(after.step if after is not None else poll, poll)


def _report(machine: Machine, start: State, run: _Run, visited: int) -> Result[State]:
    """The failure of a run as a result, less the steps that it does not need."""
    assert run.failure is not None
    steps = run.trace if run.failure is Failure.DEADLOCK else _slice(machine, start, run)
    events = [machine.event(s.rank, s.at, s.op) for s in steps]
    waiting: tuple[str, ...] = ()
    if run.failure is Failure.DEADLOCK:
        waiting = machine.waiting(run.end)
    else:
        last = steps[-1]
        events[-1] = machine.event(last.rank, last.at, last.op, run.failure, run.note)
    trace: tuple[Event, ...] = tuple(events)
    return Result(run.failure, visited, trace, waiting, run.end, shortest=False, skipped=_complete(start))


def _slice(machine: Machine, start: State, run: _Run) -> tuple[Step, ...]:
    """The run without the steps that its failure does not need, later ones first."""
    steps = list(run.trace)
    for i in reversed(range(len(steps) - 1)):
        fewer = steps[:i] + steps[i + 1 :]
        if _ends_in(machine, start, fewer) is run.failure:
            steps = fewer
    return tuple(steps)


def _ends_in(machine: Machine, start: State, steps: Sequence[Step]) -> Failure | None:
    """How the last of these steps fails; None where it does not, or they cannot be made in this order."""
    progress, memory = [list(p) for p in start[0]], list(start[1])
    failure = None
    for step in steps:
        at, done = progress[step.rank]
        ops = machine.programs[step.rank][step.at].ops
        op = ops[step.op]
        if failure is not None or at != step.at or op.after & ~done or (op.action.waits and not ready(op, memory)):
            return None
        failure, _ = perform(op, memory)
        done |= 1 << step.op
        progress[step.rank] = [at + 1, 0] if done == (1 << len(ops)) - 1 else [at, done]
    return failure
