"""Faults between kernels and between blocks, in models of a few steps: launch, memory order, residency.

Each test shows the mechanism, and that what the table advises is safe in every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pytest

from ringfence.runtime.protocol.explore import Event, Failure, explore

Memory: TypeAlias = dict[str, int]
State: TypeAlias = tuple[tuple[int, ...], tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class Step:
    """Taken at once, when its condition holds. ``expects`` is a word that must hold 1 by then."""

    does: str
    when: Callable[[Memory], bool] = lambda memory: True
    then: Callable[[Memory], object] = lambda memory: None
    expects: str | None = None


def sets(word: str, value: int = 1, when: Callable[[Memory], bool] = lambda memory: True) -> Step:
    return Step(f"{word} = {value}", when, lambda memory: memory.update({word: value}))


def adds(word: str, value: int = 1, when: Callable[[Memory], bool] = lambda memory: True) -> Step:
    return Step(f"{word} += {value}", when, lambda memory: memory.update({word: memory[word] + value}))


def waits(word: str, value: int = 1) -> Step:
    return Step(f"wait for {word} == {value}", lambda memory: memory[word] == value)


def reads(word: str) -> Step:
    return Step(f"read {word}", expects=word)


@dataclass(frozen=True)
class Threads:
    """Threads that take their steps in order, and each other's in any."""

    programs: tuple[tuple[Step, ...], ...]
    words: tuple[tuple[str, int], ...]

    def initial(self) -> State:
        return (0,) * len(self.programs), self.words

    def steps(self, state: State) -> Iterator[tuple[Event, State]]:
        positions, words = state
        for thread, position in enumerate(positions):
            if position == len(self.programs[thread]):
                continue
            step, memory = self.programs[thread][position], dict(words)
            if not step.when(memory):
                continue
            failure = Failure.STALE_READ if step.expects and not memory[step.expects] else None
            step.then(memory)
            after = (*positions[:thread], position + 1, *positions[thread + 1 :])
            yield Event(thread, 0, step.does, failure=failure), (after, tuple(memory.items()))

    def finished(self, state: State) -> bool:
        return all(p == len(program) for p, program in zip(state[0], self.programs, strict=True))

    def waiting(self, state: State) -> tuple[str, ...]:
        pairs = zip(state[0], self.programs, strict=True)
        return tuple(program[p].does for p, program in pairs if p < len(program))


def outcome(*programs: list[Step], **words: int) -> Failure | None:
    return explore(Threads(tuple(map(tuple, programs)), tuple(words.items()))).failure


# -- memory order ------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "failure"), [(False, Failure.STALE_READ), (True, None)])
def test_m10_without_release_a_late_clear_wipes_the_next_payload(release: bool, failure: Failure | None) -> None:
    """A block clears a slot and arrives; after the rotation a peer pushes into that slot, and the block reads it."""
    clear, arrive = sets("slot", 0), sets("arrived")
    peer = [waits("arrived"), sets("slot"), sets("pushed")]
    reader = [waits("pushed"), reads("slot")]
    block = [[clear, arrive]] if release else [[clear], [arrive]]  # unordered stores are two threads
    assert outcome(*block, peer, reader, slot=0, arrived=0, pushed=0) == failure


@pytest.mark.parametrize(("barrier", "failure"), [(False, Failure.STALE_READ), (True, None)])
def test_m11_a_head_without_a_block_barrier_overtakes_its_payload(barrier: bool, failure: Failure | None) -> None:
    writer = [sets("payload"), sets("written")]
    publisher = [*([waits("written")] if barrier else []), sets("head")]
    receiver = [waits("head"), reads("payload")]
    assert outcome(writer, publisher, receiver, payload=0, written=0, head=0) == failure


# -- programmatic dependent launch --------------------------------------------------------------


@pytest.mark.parametrize(
    ("early", "dependant_waits", "failure"),
    [(True, False, Failure.STALE_READ), (True, True, None), (False, False, None)],
)
def test_m16_a_dependant_that_does_not_wait_reads_what_is_not_written(
    early: bool, dependant_waits: bool, failure: Failure | None
) -> None:
    work = [sets("output"), sets("done")]
    collective = [sets("trigger"), *work] if early else [*work, sets("trigger")]
    dependant = [waits("trigger"), *([waits("done")] if dependant_waits else []), reads("output")]
    assert outcome(collective, dependant, trigger=0, output=0, done=0) == failure


def test_m16_waits_are_not_transitive() -> None:
    """Third in a chain: it waits for the second kernel, which never waited for the first."""
    first = [sets("trigger1"), sets("output"), sets("done1")]
    second = [waits("trigger1"), sets("trigger2"), sets("done2")]
    third = [waits("trigger2"), waits("done2"), reads("output")]
    words = dict.fromkeys(("trigger1", "output", "done1", "trigger2", "done2"), 0)
    assert outcome(first, second, third, **words) == Failure.STALE_READ
    assert outcome(first, [second[0], waits("done1"), *second[1:]], third, **words) is None


@pytest.mark.parametrize(("pdl", "failure"), [(True, Failure.STALE_READ), (False, None)])
def test_m17_a_load_before_the_wait_reads_the_old_residual(pdl: bool, failure: Failure | None) -> None:
    producer = [sets("trigger"), sets("residual"), sets("done")]
    start = waits("trigger") if pdl else waits("done")
    collective = [start, reads("residual"), waits("done")]
    assert outcome(producer, collective, trigger=0, residual=0, done=0) == failure


# -- residency ---------------------------------------------------------------------------------


def block(*body: Step) -> list[Step]:
    """A block takes a slot of the device, and gives it back at its end."""
    return [adds("slots", -1, when=lambda memory: memory["slots"] > 0), *body, adds("slots")]


@pytest.mark.parametrize(("slots", "failure"), [(2, Failure.DEADLOCK), (3, None)])
def test_m18_dependants_in_every_slot_keep_their_producer_out(slots: int, failure: Failure | None) -> None:
    """Blocks that were let in early wait for a producer whose blocks another stream has delayed."""
    dependant = block(waits("produced", 2))
    producer = block(adds("produced"))
    assert outcome(dependant, dependant, producer, producer, slots=slots, produced=0) == failure


@pytest.mark.parametrize(("slots", "failure"), [(2, Failure.DEADLOCK), (3, None)])
def test_m38_two_kernels_with_grid_barriers_starve_each_other(slots: int, failure: Failure | None) -> None:
    """Two blocks each: with three slots one kernel is always complete."""

    def meets(counter: str) -> list[Step]:
        return block(adds(counter), Step("grid barrier", lambda memory: memory[counter] == 2))

    kernels = [meets("one"), meets("one"), meets("other"), meets("other")]
    assert outcome(*kernels, slots=slots, one=0, other=0) == failure


# -- counters that are reset -------------------------------------------------------------------


def test_m39_a_reset_under_a_spinning_block_is_missed() -> None:
    arrive, all_here, reset = adds("count"), waits("count", 2), sets("count", 0)
    assert outcome([arrive, all_here, reset], [arrive, all_here], count=0) == Failure.DEADLOCK


def test_m39_all_reduces_reset_a_counter_that_only_the_resetter_waits_for() -> None:
    arrive, all_here, reset = adds("count"), waits("count", 2), sets("count", 0)
    assert outcome([arrive, all_here, reset], [arrive], count=0) is None


def test_m39_counting_up_and_waiting_for_at_least_is_safe() -> None:
    def rounds() -> list[Step]:
        goals = [Step(f"count >= {goal}", lambda memory, goal=goal: memory["count"] >= goal) for goal in (2, 4, 6)]
        return [step for goal in goals for step in (adds("count"), goal)]

    assert outcome(rounds(), rounds(), count=0) is None
