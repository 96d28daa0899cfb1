"""A FlashInfer whose kernels are torch over any process group, for the logic around the real ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import group_facts, mnnvl, reference, table, trtllm
from ringfence.runtime.collectives.epilogue import Epilogue
from ringfence.runtime.collectives.kernels import (
    Implementation,
    KernelCall,
    KernelMemory,
    always_adds_and_weights,
)
from ringfence.runtime.collectives.links import Links
from ringfence.runtime.collectives.lost import Lost
from ringfence.runtime.collectives.rank_facts import RankFacts
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.errors import HangError, WorkspaceError
from ringfence.runtime.groups import resolve_group
from ringfence.runtime.hazards.situation import Collective, Strategy

_ALL = table.ALL

FACTS = RankFacts(
    host="node0",
    device="NVIDIA H200",
    capability=(9, 0),
    multiprocessors=132,
    flashinfer="0.7.2.post1",
    flashinfer_missing=None,
    opt_outs=("NCCL_NVLS_ENABLE=0",),
    multicast=False,
    peers=None,
    links=Links("0000:01:00.0", switch=18),
)
#: Of ranks that reach each other's memory, and nothing is turned off.
H200 = replace(FACTS, opt_outs=(), peers=True, links=Links("gpu", switch=18, fabric="a rack"))
B200 = replace(H200, device="NVIDIA B200", capability=(10, 0), multiprocessors=148, multicast=True)
#: One-shot up to 8 tokens of 256 float32, two-shot up to 16, all-reduces up to 4.
SMALL = SizeRow(Collective.TRTLLM, "peer", (9, 0), 2, 8 << 10, 16 << 10, 4 << 10, "a test", bitwise=True)


def memory(collective: Collective = Collective.TRTLLM, **other: Any) -> KernelMemory:
    """Of rank 0 of two, at addresses that nobody may read."""
    given: dict[str, Any] = {
        "rank": 0,
        "world_size": 2,
        "words": 0,
        "lamport": 0,
        "buffer_bytes": 1 << 20,
        "element": 4 if collective is Collective.MNNVL else 2,
        "keeps_own": True,
    }
    layout = mnnvl.LAYOUT if collective is Collective.MNNVL else trtllm.LAYOUT
    return KernelMemory(layout, **given | other)


def one_shot_norm(total: Tensor, weight: Tensor, eps: float, weight_bias: float) -> Tensor:
    """The formula of the one-shot mnnvl kernel: squares in the activation dtype, which are widened then."""
    mean = (total * total).float().mean(-1, keepdim=True)
    return (total.float() * torch.rsqrt(mean + eps) * (weight_bias + weight.float())).to(total.dtype)


class FakeKernels:
    def __init__(self, package: FakeFlashInfer, group: str, strategies: tuple[Strategy, ...], name: str) -> None:
        self.package, self.group, self.strategies, self.name = package, group, strategies, name
        self.closed = False
        self.words = 0
        self.memory = memory(Collective(name.partition("/")[0]))
        self.lost: HangError | None = None
        self.host = torch.zeros(1, dtype=torch.int64)

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        assert not self.closed and x.ndim == 2 and x.is_contiguous()
        self.package.calls.append((self.name, str(strategy) if operands else "all_reduce", tuple(x.shape)))
        self.package.epilogues.append(epilogue)
        self.memory.note(x, strategy)
        self.words += 1
        reduced = self._waited(x) if self.package.bounded else reference.all_reduce(x, self.group)
        if operands is None or norm is None or epilogue.norm is None:
            assert epilogue == Epilogue()
            out.copy_(reduced)
            return
        residual, weight = operands
        assert (residual is not None, weight is not None) == (epilogue.residual, epilogue.norm.has_weight)
        assert self.name.startswith("ringfence") or always_adds_and_weights(epilogue)
        assert residual is None or residual.is_contiguous()
        normed, total = reference.apply(epilogue, reduced, *operands)
        if self.name.startswith("mnnvl") and strategy is Strategy.ONE_SHOT:
            assert weight is not None
            normed = one_shot_norm(total, weight, epilogue.norm.eps, epilogue.norm.weight_bias)
        norm.copy_(normed)
        out.copy_(total)
        if self.name in self.package.wrong:
            norm[0, 0] += 1
        if self.package.missing:  # what a kernel does whose wait ends without success
            norm.fill_(torch.nan)
            out.fill_(torch.nan)
            text = f"rank 0 waited in vain for rank {self.package.missing[0]}"
            self.lost = HangError(f"{text}; the outputs since then are NaN", self.package.missing)

    def _waited(self, x: Tensor) -> Tensor:
        """The sum of two ranks, or NaN where the other has not come in time: such a kernel sees nothing of sockets."""
        total, began = x.clone(), time.monotonic()
        work = dist.all_reduce(total, group=resolve_group(self.group), async_op=True) if self.lost is None else None
        while work is not None and not (work.is_completed() and work.exception() is None):
            if time.monotonic() - began > self.seconds:
                rank = dist.get_rank()
                self.lost = Lost(self.words, 0, 1 - rank, rank, (1 - rank,), sums=False, relayed=False).error()
                break
            time.sleep(0.001)
        return total if self.lost is None else torch.full_like(x, torch.nan)

    def holds(self, call: KernelCall) -> bool:
        return True

    def wait_for(self, seconds: float) -> None:
        self.host[0] = int(seconds * 1e9)  # real memory, also in the midst of a trace

    @property
    def seconds(self) -> float:
        return int(self.host[0]) / 1e9

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost

    def control_words(self) -> tuple[int, ...]:
        return (self.words,)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeFlashInfer:
    """One rank's package. ``wrong`` and ``broken`` name the kernels that are, on this rank.

    missing: the ranks for which kernels wait in vain from now on. own: stand-ins for ringfence's own kernels, too.
    bounded: they wait for the other of two ranks, and no longer than they are told.
    """

    group: str
    wrong: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    version: str = "0.7.2.post1"
    missing: tuple[int, ...] = ()
    own: bool = False
    bounded: bool = False
    calls: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    epilogues: list[Epilogue] = field(default_factory=list)
    made: list[tuple[str, int, int]] = field(default_factory=list)
    kernels: list[FakeKernels] = field(default_factory=list)

    def make(
        self, name: str, channel: Channel, max_tokens: int, hidden: int, strategies: tuple[Strategy, ...]
    ) -> FakeKernels:
        if name in self.broken:
            raise WorkspaceError("no memory left")
        channel.exchange(f"handles of {name}", channel.rank)
        self.made.append((name, max_tokens, hidden))
        self.kernels.append(FakeKernels(self, self.group, strategies, name))
        return self.kernels[-1]


def fakes(package: Callable[[], FakeFlashInfer], *, own: bool = False) -> tuple[Implementation, ...]:
    """The table, with the fake package's kernels in place of FlashInfer's. own: of ringfence's too, or without."""

    def of(one: Implementation) -> Implementation:
        name = "trtllm" if one.name == "trtllm" else str(one)

        def make(channel: Channel, group: Any, max_tokens: int, hidden: int, dtype: torch.dtype) -> FakeKernels:
            return package().make(name, channel, max_tokens, hidden, one.strategies)

        return replace(one, make=make)

    return tuple(one if one.make is None else of(one) for one in _ALL if own or one.name != "ringfence")


@contextlib.contextmanager
def installed(package: FakeFlashInfer, facts: RankFacts = FACTS) -> Iterator[FakeFlashInfer]:
    """This process has FlashInfer and a GPU, as far as can be told."""
    with (
        mock.patch.object(table, "ALL", fakes(lambda: package, own=package.own)),
        mock.patch.object(group_facts, "probe", lambda device: facts),
        mock.patch("ringfence.assign.why_reference_only", lambda group, device: None),
    ):
        yield package
