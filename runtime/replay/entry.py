"""What was recorded for one tuple of sizes, and the arguments whose addresses it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .buffers import Loads
from .capture import CapturedPiece

#: Whether nobody holds a storage any more, without the two calls of Python around it.
_expired = cast(Callable[[int], bool], torch.UntypedStorage._expired)

#: Sizes of a call, and what tells where its kept arguments are.
Key = tuple[tuple[int, ...], tuple[Any, ...]]


class Kept:
    """An argument as a capture saw it: a parameter, or an input that the program writes into.

    Keeps its memory not alive. The memory counts, not the object: a captured graph knows addresses only, and
    ``nn.Parameter(p.data)`` is another object at the same one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._reference = StorageWeakRef(tensor.untyped_storage())
        self.memory: int = self._reference.cdata


@dataclass
class SizedModule:
    """Sizes and a set of parameters, wherever those are: what all ranks tell apart alike.

    places: their addresses at the last capture. captures, replayed: how many there were, and how many of them were
    replayed. recent: the numbers of those that are kept, or whose cache is gone, the last used at the end. Ranks that
    capture collectives use them alike, and so drop them alike; when memory is gone is luck.
    moves, calls: how often parameters moved, the calls since the last capture. off: it runs uncaptured from now on.
    """

    sizes: tuple[int, ...]
    parameters: list[weakref.ref[Tensor]]
    places: tuple[int, ...]
    captures: int = 0
    replayed: int = 0
    recent: list[int] = field(default_factory=list)
    moves: int = 0
    calls: int = 0
    off: bool = False


@dataclass
class Entry:
    """Everything recorded for one tuple of sizes and one place of the kept arguments.

    slots: a value for each of the program's, in buffers that stay where they are. own: those of the arguments,
    between calls; loads: copies into those that are buffers. parameters: the kept arguments, in the order of
    ``addresses``. failed: why it cannot be used. nbytes: of the buffers and of what pieces return. module: what it
    belongs to among those of its runner, and which of its captures it is. replays: how often it was replayed.
    """

    sizes: tuple[int, ...]
    slots: list[Any]
    actions: list[Callable[[], None]]
    pieces: list[CapturedPiece]
    addresses: tuple[Any, ...]
    parameters: list[Kept]
    own: list[Any] = field(default_factory=list)
    loads: Loads = field(default_factory=lambda: Loads({}))
    failed: str | None = None
    nbytes: int = 0
    module: Any = None
    number: int = 0
    replays: int = 0

    @property
    def key(self) -> Key:
        return self.sizes, self.addresses

    def settle(self, args: Sequence[Any], kept: Sequence[int]) -> None:
        """After the recording, when memory is where it will be: keep nothing that stays with the caller."""
        for i in kept:
            self.slots[i] = None
        self.own = self.slots[: len(args)]
        self.loads = Loads({i: buffer for i, buffer in enumerate(self.own) if isinstance(buffer, Tensor)})

    def lend(self, args: Sequence[Any], copied: Sequence[int]) -> None:
        """Let islands read the caller's arguments, but for those that are copied, until :meth:`forget`."""
        self.slots[: len(args)] = args
        for i in copied:
            self.slots[i] = self.own[i]

    def forget(self) -> None:
        """Keep nothing of the caller's alive: a module that is dropped takes its memory with it."""
        self.slots[: len(self.own)] = self.own

    @property
    def gone(self) -> bool:
        """Whether it can never be used again: nobody holds the memory of some argument any more."""
        return any(map(_expired, [kept.memory for kept in self.parameters]))  # in every replay, for every parameter

    def release(self) -> None:
        """Release every piece, also behind one whose release fails; then raise what the first of those raised."""
        errors: list[Exception] = []
        for piece in self.pieces:
            try:
                piece.release()
            except Exception as error:
                errors.append(error)
        self.pieces = []
        if errors:
            raise errors[0]
