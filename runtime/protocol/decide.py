"""Decide: whether a machine can fail, for programs of any length.

One run, watched by :mod:`.order`, decides most machines: if nothing in it is out of order, it
speaks for every order. Otherwise the failure is looked for from the last points at which all
ranks were between calls: exhaustively, which gives a shortest trace, as far as ``limit``
states; and beyond, in the watched order and in one that holds up the first step of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import TooManyStatesError
from .bound import Bound
from .explore import ModelFailure, Result, explore
from .machine import Machine, State, perform, ready
from .order import OpPlace
from .run import Run, calls_made, run_order
from .walk import Walk, begin


def decide(
    machine: Machine, *, limit: int | None = None, walk: Walk | None = None, bound: Bound | None = None
) -> Result[State]:
    """Whether some order of the machine fails. ``states`` counts those visited.

    ``limit``, in states times ranks, bounds each exhaustive search for a shortest trace (``bound.shortest`` else); a
    failure found beyond it has ``shortest`` False, and unless it is a deadlock a trace in which
    no single step can be left out. ``walk`` may know some of the machine's calls already; ``bound`` raises
    :class:`~ringfence.runtime.errors.NotDecidedError`.
    """
    bound = bound or Bound()
    limit = bound.shortest if limit is None else limit
    begun = begin(machine, walk, bound)
    if begun.finished:
        return Result(None, begun.steps + 1)
    run = run_order(machine, begun.states[-1], quiet=begun.states[:-1], order=begun.order, bound=bound)
    visited = begun.steps + len(run.trace) + 1
    if run.failure is None and run.suspicion is None:
        return Result(None, visited)
    if run.failure is ModelFailure.DEADLOCK and run.suspicion is None:  # every order gets stuck after the same steps
        stuck = run_order(machine, run.quiet[-1], bound=bound)
        return replace(_report(machine, run.quiet[-1], stuck, visited), shortest=True)
    for quiet in dict.fromkeys((run.quiet[0], run.quiet[-1])):
        try:
            found = explore(machine, start=quiet, limit=limit // len(machine.programs), bound=bound)
        except TooManyStatesError as error:
            visited += error.states
            continue
        visited += found.states
        if found.failure is not None:
            return replace(found, states=visited, skipped=calls_made(quiet))
    for quiet in reversed(run.quiet):
        for hold in (None, run.suspicion):  # the pair as it came, and the other way round
            held = run_order(machine, quiet, hold=hold, bound=bound)
            visited += len(held.trace) + 1
            if held.failure is not None:
                return _report(machine, quiet, held, visited)
    return explore(machine, limit=10 * limit, bound=bound)


def _report(machine: Machine, start: State, run: Run, visited: int) -> Result[State]:
    """The failure of a run as a result, less the steps that it does not need."""
    deadlock = run.failure is ModelFailure.DEADLOCK
    memory, events = list(start[1]), []
    for step in run.trace if deadlock else _slice(machine, start, run):
        failure, note = perform(machine.programs[step.rank][step.at].ops[step.op], memory)
        events.append(machine.event(step.rank, step.at, step.op, failure, note))
    waiting = machine.waiting(run.end) if deadlock else ()
    return Result(run.failure, visited, tuple(events), waiting, run.end, shortest=False, skipped=calls_made(start))


def _slice(machine: Machine, start: State, run: Run) -> tuple[OpPlace, ...]:
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
