"""Decide: whether a machine can fail, for programs of any length.

One run, watched by :mod:`.order`, decides most machines: if nothing in it is out of order, it
speaks for every order. Otherwise the failure is looked for from the last points at which all
ranks were between calls: exhaustively, which gives a shortest trace, as far as ``limit``
states; and beyond, in the watched order and in one that holds up the first step of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import TooManyStatesError
from .explore import ModelFailure, Result, explore
from .machine import Machine, State, perform, ready
from .order import OpPlace, Order, Suspicion


@dataclass(frozen=True)
class _Run:
    """One order. ``quiet`` has the latest states in which all ranks were between calls, oldest first."""

    trace: tuple[OpPlace, ...]
    end: State
    quiet: tuple[State, ...]
    failure: ModelFailure | None = None
    suspicion: Suspicion | None = None


def decide(machine: Machine, *, limit: int = 40_000) -> Result[State]:
    """Whether some order of the machine fails. ``states`` counts those visited.

    ``limit``, in states times ranks, bounds each exhaustive search for a shortest trace; a
    failure found beyond it has ``shortest`` False, and unless it is a deadlock a trace in which
    no single step can be left out.
    """
    run = _run(machine, machine.initial(), order=Order(machine))
    visited = len(run.trace) + 1
    if run.failure is None and run.suspicion is None:
        return Result(None, visited)
    if run.failure is ModelFailure.DEADLOCK and run.suspicion is None:  # every order gets stuck after the same steps
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
        for hold in (None, run.suspicion):  # the pair as it came, and the other way round
            held = _run(machine, quiet, hold=hold)
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
    order: Order | None = None,
    hold: Suspicion | None = None,
) -> _Run:
    """One order from ``start``: call by call where ranks agree, and otherwise whoever can.

    order: judges each step; the run ends at the first suspicion.
    hold: its first step is made only after the second, or when nothing else can be made.
    """
    progress, memory = [list(p) for p in start[0]], list(start[1])
    trace: list[OpPlace] = []
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
                    if done >> i & 1 or op.after & ~done or (op.kind.waits and not ready(op, memory)):
                        continue
                    step = OpPlace(rank, at, i)
                    if step == held:
                        continue
                    trace.append(step)
                    failure, _ = perform(op, memory)
                    if failure is not None:
                        return _Run(tuple(trace), state(), tuple(quiet), failure)
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
            suspicion = order.judge_stuck(machine, progress) if order is not None else None
            return _Run(tuple(trace), state(), tuple(quiet), ModelFailure.DEADLOCK, suspicion=suspicion)


def _report(machine: Machine, start: State, run: _Run, visited: int) -> Result[State]:
    """The failure of a run as a result, less the steps that it does not need."""
    deadlock = run.failure is ModelFailure.DEADLOCK
    memory, events = list(start[1]), []
    for step in run.trace if deadlock else _slice(machine, start, run):
        failure, note = perform(machine.programs[step.rank][step.at].ops[step.op], memory)
        events.append(machine.event(step.rank, step.at, step.op, failure, note))
    waiting = machine.waiting(run.end) if deadlock else ()
    return Result(run.failure, visited, tuple(events), waiting, run.end, shortest=False, skipped=_complete(start))


def _slice(machine: Machine, start: State, run: _Run) -> tuple[OpPlace, ...]:
    """The run without the steps that its failure does not need, later ones first."""
    steps = list(run.trace)
    for i in reversed(range(len(steps) - 1)):
        fewer = steps[:i] + steps[i + 1 :]
        if _ends_in(machine, start, fewer) is run.failure:
            steps = fewer
    return tuple(steps)


def _ends_in(machine: Machine, start: State, steps: Sequence[OpPlace]) -> ModelFailure | None:
    """How the last of these steps fails; None where it does not, or they cannot be made in this order."""
    progress, memory = [list(p) for p in start[0]], list(start[1])
    failure = None
    for step in steps:
        at, done = progress[step.rank]
        ops = machine.programs[step.rank][step.at].ops
        op = ops[step.op]
        if failure is not None or at != step.at or op.after & ~done or (op.kind.waits and not ready(op, memory)):
            return None
        failure, _ = perform(op, memory)
        done |= 1 << step.op
        progress[step.rank] = [at + 1, 0] if done == (1 << len(ops)) - 1 else [at, done]
    return failure
