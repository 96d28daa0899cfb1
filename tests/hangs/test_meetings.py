"""Ranks that do not meet: host-side collectives as meetings that begin when every invited rank is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ringfence.runtime.protocol.explore import Event, Failure, explore


@dataclass(frozen=True)
class Meeting:
    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Meetings:
    """Each rank goes to its meetings in order. A meeting takes place when all of its ranks stand before it."""

    programs: tuple[tuple[Meeting, ...], ...]

    def initial(self) -> tuple[int, ...]:
        return (0,) * len(self.programs)

    def steps(self, state: tuple[int, ...]) -> Iterator[tuple[Event, tuple[int, ...]]]:
        for rank in range(len(self.programs)):
            meeting = self._next(state, rank)
            if meeting and rank == meeting.ranks[0] and all(self._next(state, r) == meeting for r in meeting.ranks):
                after = tuple(position + (r in meeting.ranks) for r, position in enumerate(state))
                yield Event(rank, state[rank], meeting.name), after

    def finished(self, state: tuple[int, ...]) -> bool:
        return all(self._next(state, rank) is None for rank in range(len(self.programs)))

    def waiting(self, state: tuple[int, ...]) -> tuple[str, ...]:
        meetings = (self._next(state, rank) for rank in range(len(self.programs)))
        return tuple(meeting.name for meeting in meetings if meeting)

    def _next(self, state: tuple[int, ...], rank: int) -> Meeting | None:
        program = self.programs[rank]
        return program[state[rank]] if state[rank] < len(program) else None


def outcome(*programs: list[Meeting]) -> Failure | None:
    return explore(Meetings(tuple(map(tuple, programs)))).failure


def both(name: str) -> Meeting:
    return Meeting(name, (0, 1))


@pytest.mark.parametrize(("over", "failure"), [((0, 1, 2, 3), Failure.DEADLOCK), ((0, 1), None)])
def test_m21_a_rendezvous_over_world_waits_for_ranks_that_never_come(
    over: tuple[int, ...], failure: Failure | None
) -> None:
    """Pipeline stage 0 is ranks 0 and 1. Stage 1 first waits for an activation of stage 0."""
    send = [Meeting("activation", (0, 2)), Meeting("activation", (1, 3))]
    rendezvous = Meeting("rendezvous", over)
    stage_0 = [[rendezvous, send[0]], [rendezvous, send[1]]]
    later = rendezvous if over == (0, 1, 2, 3) else Meeting("rendezvous", (2, 3))
    stage_1 = [[send[0], later], [send[1], later]]
    assert outcome(*stage_0, *stage_1) == failure


def test_m23_a_rank_that_falls_back_alone_is_missed() -> None:
    fused, unfused, vote = both("fused all-reduce"), both("all-reduce"), both("vote")
    assert outcome([fused], [unfused]) == Failure.DEADLOCK
    assert outcome([vote, unfused], [vote, unfused]) is None


def test_m26_ranks_that_tuned_differently_register_differently() -> None:
    small, large, tuned = both("register 16 KiB"), both("register 32 KiB"), both("tune together")
    assert outcome([small], [large]) == Failure.DEADLOCK
    assert outcome([tuned, large], [tuned, large]) is None


def test_m29_a_collective_in_a_finally_waits_for_a_rank_that_is_elsewhere() -> None:
    captured, register, abort = both("captured all-reduce"), both("register_graph_buffers"), both("abort?")
    fails = [register]  # rank 0 throws before the all-reduce; its finally registers buffers
    assert outcome(fails, [captured, register]) == Failure.DEADLOCK
    assert outcome([abort], [abort]) is None  # each rank asks the others before it goes on


def test_m33_a_capture_that_begins_while_a_peer_warms_up() -> None:
    """Where registration goes over the group that the warm-up uses, a peer answers another question."""
    warm_up, register, barrier = both("warm-up call"), both("register_graph_buffers"), both("barrier")
    assert outcome([warm_up, register], [warm_up, warm_up, register]) == Failure.DEADLOCK
    assert outcome([warm_up, barrier, register], [warm_up, barrier, register]) is None
