"""Calls: what a rank asks of a collective, in the order in which it asks.

A program is one rank's sequence of calls. Programs of different ranks may differ:
a call that is missing, of another size, in another place or of another strategy is how
rank divergence looks from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..hazards.situation import Payload, Strategy


@dataclass(frozen=True)
class Call:
    """One collective call of one rank.

    id: which collective of the plan this is; a value is right if it was sent for the same id.
    ctas: the grid of a kernel that meets its peers in a barrier (trtllm two-shot).
    epoch: the number of the call, where the host held it and a capture baked it in.
    workspace: which workspace it addresses; a re-created one has another number.
    active: the ranks that take part, where a mask says so (MoE all-to-all); None is all.
    capacity, width: of a dispatch and its combine: rows of each rank's block, words of a row.
    where: what launched it, for people.
    """

    id: int
    strategy: Strategy = Strategy.ONE_SHOT
    tokens: int = 1
    payload: Payload = Payload.ORDINARY
    ctas: int = 1
    epoch: int | None = None
    workspace: int = 0
    active: tuple[int, ...] | None = None
    capacity: int = 1
    width: int = 1
    where: str = ""

    @property
    def title(self) -> str:
        size = f", {self.tokens} token{'s' * (self.tokens != 1)}"
        return f"{self.strategy}{size}{f', {self.where}' if self.where else ''}"


Calls: TypeAlias = tuple[Call, ...]


def program(sizes: Iterable[int], strategy: Strategy = Strategy.ONE_SHOT, payload: Payload = Payload.ORDINARY) -> Calls:
    """Calls 0, 1, 2, ... with these token counts."""
    return tuple(Call(i, strategy, tokens, payload) for i, tokens in enumerate(sizes))


def rounds(count: int) -> Calls:
    """Dispatch, combine, dispatch, combine, ..."""
    return tuple(Call(i, (Strategy.DISPATCH, Strategy.COMBINE)[i % 2]) for i in range(2 * count))


def without(calls: Calls, *ids: int) -> Calls:
    """The program of a rank that skips these calls."""
    return tuple(call for call in calls if call.id not in ids)


def until(calls: Calls, id: int) -> Calls:
    """The program of a rank that stops before call ``id`` (a host exception, a graph that never progresses)."""
    return tuple(call for call in calls if call.id < id)


def swapped(calls: Calls, first: int, second: int) -> Calls:
    """The program of a rank that makes two calls in each other's place."""
    place = {call.id: i for i, call in enumerate(calls)}
    order = list(calls)
    order[place[first]], order[place[second]] = calls[place[second]], calls[place[first]]
    return tuple(order)


def changed(calls: Calls, *ids: int, **fields: object) -> Calls:
    """The program of a rank whose calls ``ids`` differ: ``tokens=``, ``strategy=``, ``payload=``, ..."""
    chosen = frozenset(ids)
    return tuple(replace(call, **fields) if call.id in chosen else call for call in calls)  # type: ignore[arg-type]


def distinct(ranks: Sequence[Calls]) -> list[Calls]:
    """The programs of some ranks, each that several have once."""
    return list({id(calls): calls for calls in ranks}.values())


def each(ranks: Sequence[Calls], changed: Callable[[Calls], Calls]) -> tuple[Calls, ...]:
    """The programs changed one by one; ranks that have one have one afterwards."""
    done = {id(calls): changed(calls) for calls in distinct(ranks)}
    return tuple(done[id(calls)] for calls in ranks)
