"""Probe: reads the memory of the workspaces while a kernel hangs, and never waits for the hang.

The main thread may sit in a call of the device, a kernel may hold every multiprocessor, and whoever calls
the device now may come to stand too. So whatever allocates is done when the probe is made; what is left is to copy into
pinned memory, on a stream of its own, and to ask an event until a deadline. The calls go to the CUDA
runtime by ctypes, which gives Python's lock away around each: one that blocks costs a thread, and not the process.

A stream of torch would come from a pool that captures and models draw from, and could be the one that hangs.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..groups import ranks_of
from .buffer_dump import CELL, FLAGS, Cells, describe
from .kernels import BUFFERS, KernelMemory
from .moe_dump import describe_moe
from .workspace import MOE_WAY, MoeWorkspace, Workspace, workspaces_of

#: For all workspaces of a group together.
SECONDS = 0.5

#: Bytes of pinned memory, and the most that is read of a workspace.
STAGING = 256 * 1024
MOST = 64 << 20

_DEVICE_TO_HOST = 2
_NON_BLOCKING = 1
_DISABLE_TIMING = 2
_NOT_READY = 600


class Reader(Protocol):
    """Copies to the host beside whatever the device does."""

    staging: Tensor

    def copy(self, address: int, size: int) -> None:
        """Begin to copy ``size`` bytes from an address of the device into ``staging``."""

    def done(self) -> bool:
        """Whether the last copy is complete. Never waits."""


class CudaReader:
    """A stream, an event and pinned memory. Raises OSError or RuntimeError where the runtime cannot be had."""

    def __init__(self, device: torch.device) -> None:
        major = (torch.version.cuda or "").split(".")[0]
        self._runtime = ctypes.CDLL(f"libcudart.so.{major}")  # loaded already: torch's own
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        with torch.cuda.device(self._index), torch.inference_mode(False):
            self.staging = torch.empty(STAGING // 4, dtype=torch.int32, pin_memory=True)
            self._stream, self._event = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))
            weakref.finalize(self, self._runtime.cudaStreamDestroy, self._stream).atexit = False
            self._call("cudaEventCreateWithFlags", ctypes.byref(self._event), ctypes.c_uint(_DISABLE_TIMING))
            weakref.finalize(self, self._runtime.cudaEventDestroy, self._event).atexit = False

    def copy(self, address: int, size: int) -> None:
        to, source = ctypes.c_void_p(self.staging.data_ptr()), ctypes.c_void_p(address)
        self._call("cudaSetDevice", ctypes.c_int(self._index))  # of this thread
        kind = ctypes.c_int(_DEVICE_TO_HOST)
        self._call("cudaMemcpyAsync", to, source, ctypes.c_size_t(size), kind, self._stream)
        self._call("cudaEventRecord", self._event, self._stream)

    def done(self) -> bool:
        return self._call("cudaEventQuery", self._event, unless=_NOT_READY) == 0

    def _call(self, name: str, *arguments: Any, unless: int = 0) -> int:
        code = int(getattr(self._runtime, name)(*arguments))
        if code not in (0, unless):
            raise RuntimeError(f"{name} returned CUDA error {code}")
        return code


class _NoAnswer(Exception):
    pass


class GroupProbe:
    """What the open workspaces of a group hold, as JSON-ready values; called while this rank hangs, from any thread."""

    def __init__(self, group: str, device: Reader, *, seconds: float = SECONDS) -> None:
        self._group, self._device, self._seconds = group, device, seconds
        self._lock = threading.Lock()
        self._begun = False  # a copy that was begun may still write into the staging memory
        self._until = 0.0

    def __call__(self) -> Any:
        """A list with an entry for each workspace; or a text, where nothing can be said."""
        if not self._lock.acquire(timeout=self._seconds):
            return "another probe of this group has not ended"
        try:
            self._until = time.monotonic() + self._seconds
            ranks = ranks_of(self._group)
            workspaces = workspaces_of(self._group)
            found = [self._entry(w, ranks) for w in workspaces.open] + [
                self._moe_entry(w, ranks) for w in workspaces.moe
            ]
            return found or "no workspace is open"
        finally:
            self._lock.release()

    def _entry(self, workspace: Workspace, ranks: tuple[int, ...]) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            memory = workspace.kernels.memory
            return self._look(memory, ranks) if memory is not None else {"says": "it keeps nothing to look at"}

        return self._said(str(workspace.collective), workspace.transport, workspace.closed, look)

    def _moe_entry(self, workspace: MoeWorkspace, ranks: tuple[int, ...]) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            memory, count = workspace.kernels.memory, workspace.kernels.ranks
            (call,) = self._read(memory.flag, 4).tolist()
            of_ranks = (memory.dispatch_flags, memory.combine_flags, memory.received)
            dispatched, combined, received = (self._read(at, 4 * count).tolist() for at in of_ranks)
            return describe_moe(memory, call, dispatched, combined, received, ranks)

        return self._said(*MOE_WAY, workspace.closed, look)

    def _said(
        self, collective: str, transport: str | None, closed: bool, look: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"collective": collective, "transport": transport}
        if closed:
            return entry | {"says": "the workspace was closed"}
        try:
            return entry | look()
        except _NoAnswer:
            return entry | {"says": f"the device did not answer within {self._seconds} s"}
        except Exception as error:  # the journal says why, and the other workspaces are still looked at
            return entry | {"says": f"{type(error).__name__}: {error}"}

    def _look(self, memory: KernelMemory, ranks: tuple[int, ...]) -> dict[str, Any]:
        names = memory.layout.words
        words = self._read(memory.words, 4 * len(names)).tolist()
        flags = None
        if memory.flags is not None:
            flags = self._read(memory.flags, 4 * FLAGS * memory.world_size).clone()
        named = dict(zip(names, words, strict=True))
        asked = [(named["buffer"], memory.parts())]
        if named["arrived_blocks"] == 0:
            asked.append(memory.layout.previous(memory, named))
        cells, read, late, step = [], 0, False, 4 * self._device.staging.numel()
        for buffer, parts in asked:
            for offset, size in parts:
                cells.append(Cells(memory.element))
                if not 0 <= buffer < BUFFERS:
                    continue
                start, size = memory.lamport + buffer * memory.buffer_bytes + offset, size // CELL * CELL
                for at in range(0, min(size, MOST - read), step):
                    try:
                        cells[-1].add(self._read(start + at, min(step, size - at)))
                    except _NoAnswer:  # what was read says something
                        late = True
                        break
                    read += min(step, size - at)
        previous = (cells[2], cells[3]) if len(cells) > 2 else None
        value = describe(memory, words, cells[0], cells[1], flags, ranks, previous)
        used = sum(size for _, parts in asked for _, size in parts)
        return value | {"read_bytes": read, "used_bytes": used} | ({"late": True} if late else {})

    def _read(self, address: int, size: int) -> Tensor:
        """int32, in the staging memory until the next read."""
        self._wait()
        self._device.copy(address, size)
        self._begun = True
        self._wait()
        return self._device.staging[: size // 4]

    def _wait(self) -> None:
        while self._begun and not self._device.done():
            if time.monotonic() > self._until:
                raise _NoAnswer
            time.sleep(0.0001)
        self._begun = False
        if time.monotonic() > self._until:
            raise _NoAnswer


def make_probe(group: str, device: torch.device) -> Callable[[], Any]:
    """The probe of a group of CUDA devices. Made before anything can hang; never raises."""
    try:
        return GroupProbe(group, CudaReader(device))
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"the probe could not be made: {type(error).__name__}: {error}"
        return lambda: reason
