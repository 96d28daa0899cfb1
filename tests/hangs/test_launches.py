"""Faults between kernels and between blocks, in models of a few steps: order, launch, residency, counters, flags.

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


# -- control words -----------------------------------------------------------------------------


def kernel(grid: int, *, counter: str = "counter", exact: bool = True) -> list[list[Step]]:
    """Blocks that arrive; the first waits for all, resets the counter and leaves."""
    full = Step("all have arrived", lambda m: m[counter] == grid if exact else m[counter] >= grid)
    return [[adds(counter), full, sets(counter, 0)], *([adds(counter)] for _ in range(grid - 1))]


def after(word: str, value: int, blocks: list[list[Step]]) -> list[list[Step]]:
    return [[waits(word, value), *steps] for steps in blocks]


def test_m9_a_foreign_write_into_the_counter_is_never_made_good() -> None:
    assert outcome(*kernel(2), counter=0) is None
    assert outcome(*kernel(2), [sets("counter", 7)], counter=0) == Failure.DEADLOCK


@pytest.mark.parametrize(("counter", "failure"), [("counter", Failure.DEADLOCK), ("own counter", None)])
def test_m12_an_aborted_one_shot_hangs_the_next_two_shot(counter: str, failure: Failure | None) -> None:
    aborted = [adds("counter"), sets("gone")]  # one block had arrived
    next_call = after("gone", 1, kernel(2, counter=counter))
    assert outcome(aborted, *next_call, **{"counter": 0, "own counter": 0, "gone": 0}) == failure


def test_m37_two_kernels_on_one_counter_miss_its_value() -> None:
    assert outcome(*kernel(2), *kernel(2), counter=0) == Failure.DEADLOCK
    first = [[*steps, adds("complete")] for steps in kernel(2)]  # stream order
    assert outcome(*first, *after("complete", 2, kernel(2)), counter=0, complete=0) is None
    assert outcome(*kernel(2, counter="one"), *kernel(2, counter="other"), one=0, other=0) is None


@pytest.mark.parametrize(("device_epoch", "failure"), [(False, Failure.STALE_READ), (True, None)])
def test_m15_a_replay_repeats_the_epoch_that_the_host_chose(device_epoch: bool, failure: Failure | None) -> None:
    """Two replays of one graph. The receiver frees the slot; the flag stays."""
    epochs = (1, 2) if device_epoch else (1, 1)
    sender = [step for e in epochs for step in (waits("data", 0), sets("data"), sets("flag", e))]
    receiver = [step for e in epochs for step in (waits("flag", e), reads("data"), sets("data", 0))]
    assert outcome(sender, receiver, data=0, flag=0) == failure


@pytest.mark.parametrize(("cut", "failure"), [(True, Failure.STALE_READ), (False, None)])
def test_m20_a_call_between_the_halves_takes_their_buffer(cut: bool, failure: Failure | None) -> None:
    """The first half leaves the rotation to the second, so a call in between uses the same slot."""
    first_half, second_half = sets("sum of two-shot"), reads("sum of two-shot")
    between = sets("sum of two-shot", 0)  # another call's word in its place
    order = [first_half, between, second_half] if cut else [first_half, second_half, between]
    assert outcome(order, **{"sum of two-shot": 0}) == failure


@pytest.mark.parametrize(
    ("grids", "failure"), [((1, 1), None), ((2, 2), None), ((2, 1), Failure.DEADLOCK), ((3, 2), Failure.DEADLOCK)]
)
def test_m22_a_late_block_takes_a_lapped_flag_for_the_previous_one(
    grids: tuple[int, int], failure: Failure | None
) -> None:
    """trtllm two-shot: flags of three values, two barriers per call; block b writes flags b, b + grid, ..."""
    flags, calls = max(grids), 3
    words = {f"{owner}/{k}/{source}": 0 for owner in (0, 1) for k in range(flags) for source in (0, 1)}

    def barrier(rank: int, block: int, value: int) -> list[Step]:
        mine = range(block, flags, grids[rank])
        raised = {f"{owner}/{k}/{rank}": value for owner in (0, 1) for k in mine}
        watched = [f"{rank}/{block}/{source}" for source in (0, 1)]
        return [
            Step(f"raise {value}", then=lambda memory: memory.update(raised)),
            Step(f"pass {value}", lambda memory: all(memory[flag] != (value - 1) % 3 for flag in watched)),
        ]

    def program(rank: int, block: int) -> list[Step]:
        steps: list[Step] = []
        for call in range(calls):
            boundary = call * grids[rank]
            steps.append(Step("kernel boundary", lambda m, n=boundary: m[f"complete {rank}"] >= n))
            steps += [*barrier(rank, block, (2 * call + 1) % 3), *barrier(rank, block, (2 * call + 2) % 3)]
            steps.append(adds(f"complete {rank}"))
        return steps

    blocks = [program(rank, block) for rank in (0, 1) for block in range(grids[rank])]
    assert outcome(*blocks, **words, **{"complete 0": 0, "complete 1": 0}) == failure
