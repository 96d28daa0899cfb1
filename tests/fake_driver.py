"""A CUDA driver that keeps books, and a channel of ranks that all say the same."""

from __future__ import annotations

from typing import Any

from ringfence.runtime.collectives.forms import CallArguments
from ringfence.runtime.errors import WorkspaceError


class FakeDriver:
    """Keeps what was launched, opened and given back."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, int, CallArguments, bool]] = []
        self.open_memory: list[int] = []
        self.freed: list[int] = []
        self.unloaded: list[Any] = []
        self.refuse, self.allocated = False, 0

    def allocate(self, size: int) -> int:
        self.allocated += size
        return 4096

    def free(self, address: int) -> None:
        assert self.open_memory == [], "nobody may free what is still open"
        self.freed.append(address)

    def handle(self, address: int) -> bytes:
        return bytes(64)

    def open(self, handle: bytes) -> int:
        if self.refuse:
            raise WorkspaceError("cuIpcOpenMemHandle_v2 failed")
        self.open_memory.append(8192 + len(self.open_memory))
        return self.open_memory[-1]

    def close(self, address: int) -> None:
        self.open_memory.remove(address)

    def load(self, cubin: bytes) -> Any:
        return cubin

    def unload(self, module: Any) -> None:
        self.unloaded.append(module)

    def function(self, module: Any, name: str) -> Any:
        return module

    def launch(self, function: Any, blocks: int, threads: int, argument: Any, stream: int, *, dependent: bool) -> None:
        copy = CallArguments.from_buffer_copy(bytes(argument))
        self.launched.append((blocks, threads, copy, dependent))


class FakeChannel:
    """Of three ranks that all say the same."""

    rank, size = 1, 3

    def exchange(self, topic: str, value: Any, *, seconds: float | None = None) -> list[Any]:
        return [value] * self.size
