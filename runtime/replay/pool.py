"""The memory that captures share: blocks at fixed addresses, handed out again once nobody holds them.

Replays of one pool never overlap in time, so what is dead when something is captured may be written by
it in every replay. Who holds memory is told by references, as in a caching allocator: a block is free when
the storage that was handed out is gone, views of it included.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .buffers import on_memory_of, tensor_at

#: A small tensor does not take a large block, as in torch's own allocator.
_SMALL = 1 << 16
_ROUND = 64


class Block:
    """A piece of memory that stays where it is as long as anything refers to it.

    ``used`` says that it may hold something else than poison, ``open`` that others than captures write to it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.address = self.memory.data_ptr()
        self.nbytes = nbytes
        self.used, self.open = True, False
        self._user: StorageWeakRef | None = None

    @property
    def free(self) -> bool:
        return self._user is None or self._user.expired()

    def lend(self, nbytes: int) -> Tensor:
        """A storage of its own on this memory; the block is taken until that is gone."""
        given = tensor_at(self.address, nbytes, self.memory.device, self.memory)
        self._user = StorageWeakRef(given.untyped_storage())
        return given

    def like(self, tensor: Tensor) -> Tensor:
        """``tensor``, which lies in this block, without keeping the block taken."""
        return on_memory_of(tensor, self.memory)


class Pool:
    """Blocks of one device, for whoever captures one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[Block] = []
        self._busy = threading.Lock()

    def enter(self) -> bool:
        """Before a step that uses the memory. False where another one does: on another thread, or around this one."""
        return self._busy.acquire(blocking=False)

    def leave(self) -> None:
        """After it."""
        self._busy.release()

    @property
    def busy(self) -> bool:
        return self._busy.locked()

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, free or not."""
        return sum(block.nbytes for block in self.blocks)

    def bytes(self, nbytes: int) -> Tensor:
        """Uninitialised bytes that are not handed out again while their storage lives."""
        if not nbytes:
            return tensor_at(0, 0, self.device, self)
        fits = [b for b in self.blocks if b.nbytes >= nbytes and b.free and (b.nbytes <= _SMALL or nbytes > _SMALL)]
        block = min(fits, key=lambda b: b.nbytes, default=None)
        if block is None:
            block = Block(max(-(-nbytes // _ROUND) * _ROUND, _ROUND), self.device)
            self.blocks.append(block)
        block.used = True
        return block.lend(nbytes)

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of this layout, with no more memory than that spans."""
        elements = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=dtype, device=self.device)
            return empty.set_(self.bytes(elements * dtype.itemsize).untyped_storage(), 0, size, stride)

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor with the layout of ``tensor``, for somebody who writes into it between replays."""
        made = self.empty(tensor.size(), tensor.stride(), tensor.dtype)
        block = self.block_of(made)
        if block is not None:
            block.open = True
        return made

    def block_of(self, tensor: Tensor) -> Block | None:
        """Where a tensor lies; None for memory of somebody else's."""
        address = tensor.untyped_storage().data_ptr()
        inside = (b for b in self.blocks if b.address <= address < b.address + b.nbytes)
        return next(inside, None) if address else None


P = TypeVar("P", bound=Pool)

#: (kind, device, thread, nesting) -> the pool of this process. Runners keep it alive.
_POOLS: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def shared_pool(kind: str, device: torch.device, make: Callable[[torch.device], P]) -> P:
    """The pool of this process for ``device``, shared by all graphs that one thread captures and replays in turn.

    A model that is called from an island of another one replays in the midst of it, so it gets the next pool.
    """
    with _LOCK:
        depth = 0
        while True:
            key = kind, str(device), threading.get_ident(), depth
            pool: P | None = _POOLS.get(key)
            if pool is None:
                pool = _POOLS[key] = make(device)
            if not pool.busy:
                return pool
            depth += 1
