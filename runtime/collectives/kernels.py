"""The contract of a collective: what its kernels do, what they take for granted, and what is known of it.

A collective is a file: its adapter (a :class:`Kernels` and what makes one), its requirements, where it can be had,
how it uses memory, and an :class:`Implementation` that puts them together. :mod:`.table` lists these, and whoever
chooses, makes, calls, measures or explains a collective goes through that list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..channel import Channel
from ..errors import WorkspaceError
from ..hazards.situation import Fact, Strategy
from .epilogue import Epilogue
from .rank_facts import RankFacts

#: Lamport buffers that take turns.
BUFFERS = 3
#: The word that means "not arrived".
SENTINEL = -(2**31)  # 0x80000000

#: Of calls over a workspace that is gone.
CLOSED = "this workspace was closed; compile the model, or call ringfence.prepare, anew on all ranks"
#: How long a kernel waits for a peer, if nobody says another and its waits have an end.
WAIT_SECONDS = 30.0

#: FI#4473: the two stages of a Lamport buffer must both start at a multiple of 16 bytes.
STAGE_ALIGNMENT = 32
#: A clear offset of two buffers is a signed 32-bit product (trtllm_allreduce_fusion.cuh), which wraps from here on.
WRAPPING_BUFFER = 2**30

#: Offset and size in bytes: of the front of a buffer, and of the sums of two-shot.
BufferParts = tuple[tuple[int, int], tuple[int, int]]


# -- what a call must look like ------------------------------------------------------


@dataclass(frozen=True)
class KernelCall:
    """One call: ``[tokens, hidden]`` of a dtype on each of ``world_size`` ranks."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    world_size: int
    strategy: Strategy

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return self.tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Requirement:
    """Something that a kernel takes for granted. What it does not check itself ends in garbage."""

    id: str
    met: Callable[[KernelCall], bool]
    message: str
    source: str


# -- what a call leaves in memory ----------------------------------------------------


class Launched(NamedTuple):
    """What a call was launched with. row_bytes: of one token."""

    strategy: Strategy
    tokens: int
    row_bytes: int


@dataclass(frozen=True)
class Layout:
    """How the kernels of a collective use memory, which a probe reads in a hang; buffer_dump.py puts it into words.

    words: the names of the control words; "buffer" and "arrived_blocks" are among them.
    previous: the buffer before the current one, and what the call that turned to the current one uses of it.
    uses: bytes at the front of a buffer, and of its second half, that a call uses.
    readings: the shapes that were launched and that a buffer fits, given its front and its second half in cells.
    strategy_before: that of the call that used the previous buffer; None where the words do not say.
    """

    words: tuple[str, ...]
    previous: Callable[[KernelMemory, Mapping[str, int]], tuple[int, BufferParts]]
    uses: Callable[[KernelMemory, Launched], tuple[int, int]]
    readings: Callable[[KernelMemory, Any, Any], list[Any]]
    strategy_before: Callable[[Mapping[str, int]], Strategy | None]


@dataclass(frozen=True)
class KernelMemory:
    """Where the kernels of one rank keep what a hang leaves behind: addresses on its device, sizes in bytes.

    words: the control words. lamport: three buffers of ``buffer_bytes``. element: width of the
    sentinel, 2 (0x8000) or 4 (0x80000000). keeps_own: this rank's part is in its own buffer too.
    flags: the barrier flags of two-shot, where it has any. calls: every shape that the host launched or captured.
    """

    layout: Layout
    rank: int
    world_size: int
    words: int
    lamport: int
    buffer_bytes: int
    element: int
    keeps_own: bool
    flags: int | None = None
    calls: set[Launched] = field(default_factory=set)

    def note(self, x: Tensor, strategy: Strategy) -> None:
        """A call with input ``x`` of ``[tokens, hidden]`` is launched, or captured."""
        self.calls.add(Launched(strategy, x.shape[0], x.shape[1] * x.element_size()))

    def parts(self) -> BufferParts:
        """Offset and size of what the largest calls use of a buffer: its front, and the sums of two-shot."""
        front = back = 0
        for call in tuple(self.calls):  # the main thread may add one
            uses = self.layout.uses(self, call)
            front, back = max(front, uses[0]), max(back, uses[1])
        half = self.buffer_bytes // 2
        return (0, min(front, self.buffer_bytes)), (half, min(back, half))


# -- kernels -------------------------------------------------------------------------


class Kernels(Protocol):
    """The kernels of one collective over memory of their own. One workspace owns them."""

    strategies: tuple[Strategy, ...]

    @property
    def memory(self) -> KernelMemory | None:
        """What a probe reads in a hang; None where there is nothing to look at."""

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        """The sum over the ranks and what follows it, of ``[tokens, hidden]``, contiguous, of one dtype.

        Without a norm, the sum goes into ``out``. With one, ``operands`` are the residual and the weight ``[hidden]``,
        None where the epilogue has none, and the results go to ``norm`` and ``out``. The epilogue is one that
        :attr:`Implementation.takes`.
        """

    def holds(self, call: KernelCall) -> bool:
        """Whether their memory is large enough for a call of no more bytes than the workspace is made for."""

    def wait_for(self, seconds: float) -> None:
        """How long a kernel waits for a peer from now on, where its waits have an end."""

    def check(self) -> None:
        """Raises :class:`HangError` where a wait has ended without success. Waits for nothing."""

    def control_words(self) -> tuple[int, ...]:
        """The words that the protocol keeps on this rank's device. Waits for the device."""

    def close(self) -> None:
        """Give the memory back. Every rank must close, and none may be inside a call."""


#: Makes the kernels for calls of up to so many tokens of a hidden size and dtype. Every rank must call.
Make = Callable[[Channel, dist.ProcessGroup, int, int, torch.dtype], Kernels]


@dataclass(frozen=True)
class Implementation:
    """A collective that ringfence can carry sites out with: a row of :data:`.table.ALL`.

    name: what options and graphs call it. transport: how the ranks' memory is reached, None where it does not matter.
    fits: why it cannot be had on these ranks, or None. make: its kernels; None for the reference, which needs none.
    requirements: what a call must look like. strategies: what the kernels have. safe: which of them a release
    carries out right; the others are not used.
    takes: whether the kernels carry out an epilogue; where they do not, what a site lacks is given as zeros, or ones.
    dtypes: which dtypes a workspace that is made for one serves.
    epoch_on_device: whether a replay finds the protocol's epoch on the device; what the host holds would be baked in.
    facts: what the hazard table should know of each of its calls.
    changes_at: token counts from which on a call is another kernel than with fewer; each is tried.
    load: makes its kernels ready for these calls; by default they are when they are first called.
    model: its protocol's name among the models of runtime/protocol, None where there is none.
    """

    name: str
    transport: str | None
    fits: Callable[[Sequence[RankFacts]], str | None] = lambda ranks: None
    make: Make | None = None
    requirements: tuple[Requirement, ...] = ()
    takes: Callable[[Epilogue], bool] = lambda epilogue: True
    strategies: tuple[Strategy, ...] = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
    safe: Callable[[str | None], tuple[Strategy, ...]] = lambda version: (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
    dtypes: Callable[[torch.dtype], tuple[torch.dtype, ...]] = lambda dtype: (dtype,)
    epoch_on_device: bool = False
    facts: frozenset[Fact] = frozenset()
    model: str | None = None
    changes_at: tuple[int, ...] = ()
    load: Callable[[Kernels, Sequence[tuple[KernelCall, Epilogue]]], None] = lambda kernels, calls: None

    def __str__(self) -> str:
        return f"{self.name}/{self.transport}" if self.transport else str(self.name)

    def unmet(self, call: KernelCall) -> Requirement | None:
        """The first requirement that a call does not meet."""
        return next((r for r in self.requirements if not r.met(call)), None)


def always_adds_and_weights(epilogue: Epilogue) -> bool:
    """What kernels take that have two forms: the sum alone, and a residual, a norm and a weight behind it."""
    return epilogue.norm is None or (epilogue.residual and epilogue.norm.has_weight)


# -- helpers of adapters -------------------------------------------------------------


class EndlessWaits:
    """Of :class:`Kernels`, what those do whose memory takes any call of its bytes, and whose waits have no end."""

    def holds(self, call: KernelCall) -> bool:
        return True

    def wait_for(self, seconds: float) -> None:
        """There is nothing to bound."""

    def check(self) -> None:
        """Nothing is reported."""


def closed(*_: object, **__: object) -> None:
    """In place of a kernel whose workspace is gone."""
    raise WorkspaceError(CLOSED)


def aligned(size: int) -> int:
    """The next multiple of :data:`STAGE_ALIGNMENT`."""
    return -(-size // STAGE_ALIGNMENT) * STAGE_ALIGNMENT


def check_buffer(size: int) -> None:
    """Raises :class:`WorkspaceError` for a Lamport buffer whose offsets would wrap."""
    if size >= WRAPPING_BUFFER:
        raise WorkspaceError(
            f"a Lamport buffer of {size} bytes (ranks x max_tokens x hidden size x element size) is 1 GiB or more, "
            "where the kernel's clear offset wraps (hazard M6); lower max_tokens"
        )


class _DeviceArray:
    def __init__(self, pointer: int, elements: int, kind: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": (elements,),
            "typestr": kind,
            "data": (pointer, False),
            "version": 3,
        }


def device_words(pointer: int, words: int) -> Tensor:
    """Memory of this device that torch did not allocate, as int32."""
    return torch.as_tensor(_DeviceArray(pointer, words, "<i4"), device="cuda")


def device_bytes(pointer: int, size: int) -> Tensor:
    """The same, as uint8."""
    return torch.as_tensor(_DeviceArray(pointer, size, "|u1"), device="cuda")
