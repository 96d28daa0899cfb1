"""Run: one order of a machine, watched or not, with one step held up or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bound import Bound
from .explore import ModelFailure
from .machine import Machine, State, perform, ready
from .order import OpPlace, Order, Suspicion


@dataclass(frozen=True)
class Run:
    """One order. ``quiet`` has the latest states in which all ranks were between calls, oldest first."""

    trace: tuple[OpPlace, ...]
    end: State
    quiet: tuple[State, ...]
    failure: ModelFailure | None = None
    suspicion: Suspicion | None = None


def calls_made(state: State) -> int:
    return min(at for at, _ in state[0])


def run_order(
    machine: Machine,
    start: State,
    *,
    quiet: Sequence[State] = (),
    order: Order | None = None,
    hold: Suspicion | None = None,
    bound: Bound | None = None,
) -> Run:
    """One order from ``start``: call by call where ranks agree, and otherwise whoever can.

    quiet: states before ``start`` in which all ranks were between calls.
    order: judges each step; the run ends at the first suspicion.
    bound: what the steps count towards.
    hold: its first step is made only after the second, or when nothing else can be made.
    """
    progress, memory = [list(p) for p in start[0]], list(start[1])
    trace: list[OpPlace] = []
    rests = [*quiet, start]
    held = hold.first if hold is not None else None
    last = calls_made(start) if hold is None else len(max(machine.programs, key=len))

    def state() -> State:
        return tuple((at, done) for at, done in progress), tuple(memory)

    counted = 0
    while True:
        if bound is not None:
            bound.visit(len(trace) - counted)
            counted = len(trace)
        moved = False
        for rank, launches in enumerate(machine.programs):
            at, done = progress[rank]
            if at == len(launches) or at > last:
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
                        return Run(tuple(trace), state(), tuple(rests), failure)
                    suspicion = order.judge(step, op) if order is not None else None
                    if suspicion is not None:
                        return Run(tuple(trace), state(), tuple(rests), suspicion=suspicion)
                    done |= 1 << i
                    moved = again = True
                    if hold is not None and step == hold.second:
                        held = None
            complete = done == (1 << len(ops)) - 1
            progress[rank] = [at + 1, 0] if complete else [at, done]
            if order is not None and complete:
                order.complete(rank, at)
        if moved:
            continue
        if machine.finished(state()):
            return Run(tuple(trace), state(), tuple(rests))
        if held is not None:
            held = None
        elif last <= max(at for at, _ in progress):
            if all(done == 0 for _, done in progress):
                rests = [*rests[-2:], state()]
            last += 1
        else:
            suspicion = order.judge_stuck(machine, progress) if order is not None else None
            return Run(tuple(trace), state(), tuple(rests), ModelFailure.DEADLOCK, suspicion=suspicion)
