"""Peer copy: does what is copied into and out of a peer's memory arrive?

The driver answers from lists of boards and chipsets. Whether a store to a peer gets there depends on switches, access
control and the IOMMU between them, and one that is dropped is reported by nobody (hazard M51). So numbers are copied
both ways between all pairs before a kernel that would spin on them is launched. All waits have a deadline.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..channel import Channel
from ..errors import WorkspaceError
from ..spelling import failures_text

#: Bytes of one copy: several pages.
SIZE = 1 << 16
#: The driver may put smaller allocations into a block that others share.
_BLOCK = 1 << 21
_SECONDS = 5.0


class PeerMemory(Protocol):
    """Memory of one rank's device that other processes can map. Addresses are ints, sizes bytes."""

    def allocate(self, size: int) -> int: ...
    def handle(self, address: int) -> bytes: ...
    def map(self, handle: bytes) -> int: ...
    def write(self, address: int, data: bytes) -> None:
        """It is there when this returns, also for another process and another stream."""

    def read(self, address: int, size: int) -> bytes: ...
    def copy(self, to: int, of: int, size: int, seconds: float) -> bool:
        """Device to device; False where it has not come back in time."""
        ...

    def unmap(self, address: int) -> None: ...
    def free(self, address: int) -> None: ...


@dataclass(frozen=True)
class Copies:
    """What came of them; the same on all ranks. lost: a sentence for each that did not bring the data.

    untried: why nothing is known.
    """

    lost: tuple[str, ...] = ()
    untried: str | None = None


def try_copies(channel: Channel, make: Callable[[], PeerMemory], *, seconds: float = _SECONDS) -> Copies:
    """Copy numbers into and out of the memory of every other rank of a node. Every rank must call.

    make: the memory of this rank's device.
    A failure to try is none of the copies: a container may forbid handles while the memory is well.
    """
    others = [rank for rank in range(channel.size) if rank != channel.rank]
    trial = _CopiesOfRank(channel, others, seconds)
    handles, failures = channel.attempt("peer copy: memory", lambda: trial.allocate(make()))
    if not failures:
        every = channel.exchange("peer copy: handles", handles)
        _, failures = channel.attempt("peer copy: mapping", lambda: trial.map(every))
    if failures:
        trial.free()
        return Copies(untried=failures_text(failures))
    found, failures = channel.attempt("peer copy: copies", trial.copy)
    hung = channel.exchange("peer copy: all have written", trial.hung)
    arrived, more = channel.attempt("peer copy: what arrived", lambda: trial.arrived(hung))
    lost = channel.exchange("peer copy: lost", (*(found or ()), *(arrived or ())))
    trial.free()
    if failures or more:
        return Copies(untried=failures_text(failures or more))
    return Copies(tuple(sentence for of_rank in lost for sentence in of_rank))


class _CopiesOfRank:
    """One rank's part: a buffer with a slot for each rank, what this one puts into its peers, and what it takes."""

    _memory: PeerMemory

    def __init__(self, channel: Channel, others: Sequence[int], seconds: float) -> None:
        self._rank, self._size, self._names = channel.rank, channel.size, channel.ranks
        self._others, self._seconds = others, seconds
        self._own = self._scratch = 0
        self._mapped: dict[int, int] = {}
        self.hung = False

    def allocate(self, memory: PeerMemory) -> bytes:
        """Slot r is for rank r to write; this rank's own slot is there to be read. All others hold other numbers."""
        self._memory = memory
        self._own = self._memory.allocate(_rounded(SIZE * self._size))
        self._scratch = self._memory.allocate(_rounded(SIZE * 2))
        for rank in range(self._size):
            kind = "to be read" if rank == self._rank else "nothing yet"
            self._memory.write(self._own + SIZE * rank, _numbers(kind, rank, self._rank))
        return self._memory.handle(self._own)

    def map(self, handles: Sequence[bytes]) -> None:
        for rank in self._others:
            self._mapped[rank] = self._memory.map(handles[rank])

    def copy(self) -> list[str]:
        """Into each peer, and out of it. What did not come back is not waited for any more."""
        lost: list[str] = []
        for rank in self._others:
            me, peer = self._names[self._rank], self._names[rank]
            self._memory.write(self._scratch, _numbers("written", self._rank, rank))
            self._memory.write(self._scratch + SIZE, _numbers("nothing yet", rank, rank))
            there = self._mapped[rank]
            for to, of, what in (
                (there + SIZE * self._rank, self._scratch, f"from rank {me} into the memory of rank {peer}"),
                (self._scratch + SIZE, there + SIZE * rank, f"by rank {me} out of the memory of rank {peer}"),
            ):
                if not self._memory.copy(to, of, SIZE, self._seconds):
                    self.hung = True
                    return [*lost, f"a copy {what} did not come back within {self._seconds:g} s"]
            if self._memory.read(self._scratch + SIZE, SIZE) != _numbers("to be read", rank, rank):
                lost.append(f"a copy by rank {me} out of the memory of rank {peer} brought other data")
        return lost

    def arrived(self, hung: Sequence[bool]) -> list[str]:
        """Whether what the others wrote is here. A device on which a copy hangs might not answer, or not write."""
        if self.hung:
            return []
        me = self._names[self._rank]
        return [
            f"a copy from rank {self._names[rank]} into the memory of rank {me} did not arrive"
            for rank in self._others
            if not hung[rank]
            and self._memory.read(self._own + SIZE * rank, SIZE) != _numbers("written", rank, self._rank)
        ]

    def free(self) -> None:
        """After an exchange, so that nobody maps it any more. With a copy under way, the process keeps it."""
        if self.hung:
            return
        for address in self._mapped.values():
            self._memory.unmap(address)
        for address in (self._own, self._scratch):
            if address:
                self._memory.free(address)


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _numbers(kind: str, of: int, at: int) -> bytes:
    """Other numbers for every purpose and pair, so that nothing stale can pass for them."""
    return hashlib.shake_128(f"{kind} {of} {at}".encode()).digest(SIZE)


# -- the driver --------------------------------------------------------------------------

_NOT_READY = 600
_LAZY_PEER_ACCESS, _NON_BLOCKING, _NO_TIMING = 1, 1, 2


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class CudaMemory:
    """By the driver, in the context of the current device. No kernel runs, and nothing waits for the device."""

    def __init__(self, driver: Any = None) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1") if driver is None else driver
        torch.cuda.current_stream()  # so that there is a context
        self._stream, self._event = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        self._call("cuEventCreate", ctypes.byref(self._event), _NO_TIMING)

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def handle(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def map(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        given = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
        return int(address.value)

    def write(self, address: int, data: bytes) -> None:
        """``cuMemcpyHtoD`` of pageable memory returns before the data is there, which a busy device makes long."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)), self._stream)
        if not self._done(_SECONDS):
            raise WorkspaceError(f"{len(data)} bytes did not reach the device within {_SECONDS:g} s")

    def read(self, address: int, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return data.raw

    def copy(self, to: int, of: int, size: int, seconds: float) -> bool:
        places = ctypes.c_uint64(to), ctypes.c_uint64(of)
        self._call("cuMemcpyAsync", *places, ctypes.c_size_t(size), self._stream)
        return self._done(seconds)

    def _done(self, seconds: float) -> bool:
        """Whether the stream has got so far within the time."""
        self._call("cuEventRecord", self._event, self._stream)
        deadline = time.monotonic() + seconds
        while (status := int(self._driver.cuEventQuery(self._event))) == _NOT_READY:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        self._check("cuEventQuery", status)
        return True

    def unmap(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, int(getattr(self._driver, name)(*arguments)))

    def _check(self, name: str, status: int) -> None:
        if status:
            raise WorkspaceError(f"{name} returned {status}")
