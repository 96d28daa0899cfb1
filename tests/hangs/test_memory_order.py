"""Faults of memory order, in models of a few steps: the mechanism, and that what the table advises is safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pytest

from ringfence.runtime.protocol.explore import Event, ModelFailure, explore

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
            failure = ModelFailure.STALE_READ if step.expects and not memory[step.expects] else None
            step.then(memory)
            after = (*positions[:thread], position + 1, *positions[thread + 1 :])
            yield Event(thread, 0, step.does, failure=failure), (after, tuple(memory.items()))

    def finished(self, state: State) -> bool:
        return all(p == len(program) for p, program in zip(state[0], self.programs, strict=True))

    def waiting(self, state: State) -> tuple[str, ...]:
        pairs = zip(state[0], self.programs, strict=True)
        return tuple(program[p].does for p, program in pairs if p < len(program))


def outcome(*programs: list[Step], **words: int) -> ModelFailure | None:
    return explore(Threads(tuple(map(tuple, programs)), tuple(words.items()))).failure


@pytest.mark.parametrize(("release", "failure"), [(False, ModelFailure.STALE_READ), (True, None)])
def test_m10_without_release_a_late_clear_wipes_the_next_payload(release: bool, failure: ModelFailure | None) -> None:
    """A block clears a slot and arrives; after the rotation a peer pushes into that slot, and the block reads it."""
    clear, arrive = sets("slot", 0), sets("arrived")
    peer = [waits("arrived"), sets("slot"), sets("pushed")]
    reader = [waits("pushed"), reads("slot")]
    block = [[clear, arrive]] if release else [[clear], [arrive]]  # unordered stores are two threads
    assert outcome(*block, peer, reader, slot=0, arrived=0, pushed=0) == failure


@pytest.mark.parametrize(("barrier", "failure"), [(False, ModelFailure.STALE_READ), (True, None)])
def test_m11_a_head_without_a_block_barrier_overtakes_its_payload(barrier: bool, failure: ModelFailure | None) -> None:
    writer = [sets("payload"), sets("written")]
    publisher = [*([waits("written")] if barrier else []), sets("head")]
    receiver = [waits("head"), reads("payload")]
    assert outcome(writer, publisher, receiver, payload=0, written=0, head=0) == failure
