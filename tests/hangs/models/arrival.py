"""Arrival: the counter by which a kernel knows that all its blocks have got somewhere.

Every block adds one; somebody waits until the count is that of the grid, then sets it back to
zero. Three choices decide what that is worth:

- two launches on one workspace at once share the counter. trtllm waits for equality, which an
  overshoot makes unreachable; MNNVL waits for "at least", and goes on too early.
- where every block waits, and not one alone, the reset can come before the last of them has
  looked (FI#3615). Both all-reduce kernels let one thread wait.

Source: ``comm.update`` in trtllm_allreduce_fusion.cuh, ``waitAndUpdate`` in
trtllm_mnnvl_allreduce.cuh, FlashInfer 0.6.0 to 0.7.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from ringfence.runtime.protocol.explore import Event, ModelFailure


class _At(IntEnum):
    ARRIVE = 0
    WAIT = 1
    RESET = 2
    DONE = 3


State = tuple[int, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Arrival:
    """A model of one rank's launches on one counter, each a grid of blocks; block 0 leads.

    grids: blocks of each launch, in stream order.
    overlap: launches may run at once (two streams, or an early trigger), and not one after another.
    exact: wait until the count equals the grid, and not until it is at least that.
    all_wait: every block waits for the count, and not the leader alone.
    left_over: what an aborted launch left in the counter (FlashInfer never resets it otherwise).
    """

    grids: tuple[int, ...]
    overlap: bool = False
    exact: bool = True
    all_wait: bool = False
    left_over: int = 0

    def initial(self) -> State:
        return self.left_over, tuple((_At.ARRIVE,) * grid for grid in self.grids)

    def finished(self, state: State) -> bool:
        return all(at == _At.DONE for blocks in state[1] for at in blocks)

    def steps(self, state: State) -> Iterator[tuple[Event, State]]:
        counter, launches = state
        for n, blocks in enumerate(launches):
            if not self._started(n, launches):
                continue
            for b, at in enumerate(blocks):
                if at == _At.ARRIVE:
                    after = _At.WAIT if b == 0 or self.all_wait else _At.DONE
                    yield (
                        self._event(n, b, f"arrives, the counter is {counter + 1}"),
                        self._moved(counter + 1, launches, n, b, after),
                    )
                elif at == _At.WAIT and self._content(counter, n):
                    after = _At.RESET if b == 0 else _At.DONE
                    yield self._go_on(counter, n, b, blocks), self._moved(counter, launches, n, b, after)
                elif at == _At.RESET:
                    yield self._event(n, b, "sets the counter to 0"), self._moved(0, launches, n, b, _At.DONE)

    def waiting(self, state: State) -> tuple[str, ...]:
        counter, launches = state
        test = "==" if self.exact else ">="
        return tuple(
            f"block {b} of call {n} polls the counter for {test} {self.grids[n]}, and it holds {counter}"
            for n, blocks in enumerate(launches)
            for b, at in enumerate(blocks)
            if at == _At.WAIT
        )

    def _started(self, n: int, launches: tuple[tuple[int, ...], ...]) -> bool:
        return self.overlap or all(at == _At.DONE for blocks in launches[:n] for at in blocks)

    def _content(self, counter: int, n: int) -> bool:
        return counter == self.grids[n] if self.exact else counter >= self.grids[n]

    def _go_on(self, counter: int, n: int, block: int, blocks: tuple[int, ...]) -> Event:
        """Too early is a failure where the test says so little. An exact test is told by what it leaves behind."""
        note = f"goes on at {counter} of {self.grids[n]}"
        if _At.ARRIVE not in blocks:
            return self._event(n, block, note)
        note += ", before every block has arrived"
        return self._event(n, block, note, None if self.exact else ModelFailure.STALE_READ)

    def _event(self, n: int, block: int, detail: str, failure: ModelFailure | None = None) -> Event:
        return Event(0, n, f"block {block}", detail, failure)

    @staticmethod
    def _moved(counter: int, launches: tuple[tuple[int, ...], ...], n: int, block: int, at: _At) -> State:
        blocks = (*launches[n][:block], at, *launches[n][block + 1 :])
        return counter, (*launches[:n], blocks, *launches[n + 1 :])
