"""Kernels on two threads that meet at a barrier, for the start-up self-test: they can be told what to get wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from fake_flashinfer import memory
from torch import Tensor

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import reference, trtllm
from ringfence.runtime.collectives.epilogue import Epilogue
from ringfence.runtime.collectives.kernels import KernelCall, KernelMemory
from ringfence.runtime.collectives.self_test import self_test
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.collectives.tested import SelfTest
from ringfence.runtime.collectives.workspace import Workspace
from ringfence.runtime.hazards.situation import Collective, Strategy

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
H, RANKS = 256, 2
TOKENS = (1, 4, 8)
#: 1 by one-shot, 4 and 8 by both, and down again: 4 and 1.
SHAPES = 1 + 2 + 2 + 2 + 1
ROW = SizeRow(Collective.TRTLLM, "peer", (9, 0), RANKS, 1 << 20, 1 << 20, 0, "a test")


class Meeting:
    """Where the ranks bring their inputs. Who waits for a rank that does not come gets an error in its place."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=15)
        self.inputs: list[Tensor | None] = [None] * RANKS

    def total(self, rank: int, x: Tensor) -> Tensor:
        self.inputs[rank] = x.clone()
        self.barrier.wait()
        total = torch.stack([t.float() for t in self.inputs if t is not None]).sum(0)
        self.barrier.wait()
        return total


Fault = Callable[[int, Strategy, Tensor, Tensor, Tensor], None]


@dataclass
class Kernels:
    """Of one rank. ``fault`` is given the number of the call, and what was read and written."""

    meeting: Meeting
    rank: int
    fault: Fault | None = None
    strategies: tuple[Strategy, ...] = (ONE, TWO)
    memory: KernelMemory = field(default_factory=memory)
    words: tuple[int, ...] = (0, 0)
    calls: list[tuple[int, Strategy]] = field(default_factory=list)
    operands: list[tuple[bool, bool]] = field(default_factory=list)
    recorded: list[Callable[[], None]] | None = None
    seconds: float = 0.0
    alone: list[tuple[int, Strategy]] = field(default_factory=list)
    fault_alone: bool = False

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        if epilogue.norm is None:
            assert operands is None and norm is None and self.recorded is None
            self.alone.append((x.shape[0], strategy))
            out.copy_(self.meeting.total(self.rank, x))
            if self.fault_alone:
                out[0, 0] += 1
            return
        assert operands is not None and norm is not None

        def run() -> None:
            residual, weight = (t.float() if t is not None else None for t in operands)
            self.calls.append((x.shape[0], strategy))
            self.operands.append((residual is not None, weight is not None))
            normed, total = reference.apply(epilogue, self.meeting.total(self.rank, x), residual, weight)
            out.copy_(total)
            norm.copy_(normed)
            if self.fault is not None:
                self.fault(len(self.calls) - 1, strategy, x, norm, out)

        if self.recorded is None:
            run()
        else:
            self.recorded.append(run)

    def holds(self, call: KernelCall) -> bool:
        return True

    def wait_for(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self) -> None:
        pass

    def control_words(self) -> tuple[int, ...]:
        return self.words

    def close(self) -> None:
        raise AssertionError("not the self-test's to close")


def workspace(kernels: Kernels, row: SizeRow = ROW) -> Workspace:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return Workspace(trtllm.IMPLEMENTATION, row, kernels, torch.device("cpu"), RANKS, 1 << 20, dtypes)


def on_ranks(body: Callable[[Kernels, Channel], Any], faults: dict[int, Fault], **other: Any) -> list[Any]:
    """Run on threads; no rank may be left waiting for another."""
    meeting, store = Meeting(), dist.HashStore()

    def run(rank: int) -> Any:
        channel = Channel(store, rank, RANKS, seconds=120)
        result = body(Kernels(meeting, rank, faults.get(rank), **other), channel)
        channel.barrier("and the channel goes on")
        return result

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(run, range(RANKS)))


def outcome(
    faults: dict[int, Fault] | None = None, dtype: torch.dtype = torch.bfloat16, **other: Any
) -> tuple[SelfTest, list[tuple[int, Strategy]]]:
    """The result, which is the same on all ranks, and the calls, which are too."""

    def body(kernels: Kernels, channel: Channel) -> Any:
        return self_test(workspace(kernels), channel, H, dtype, TOKENS, capture=False), kernels.calls

    (first, calls), *others = on_ranks(body, faults or {}, **other)
    assert all(o == (first, calls) for o in others)
    return first, calls


def off_by(amount: float, which: str, at: int | None = None) -> Fault:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        if at is None or number == at:
            target = norm if which == "norm" else out
            target[-1, -1] += amount

    return fault
