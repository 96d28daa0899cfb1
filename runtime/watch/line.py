"""Line: the connection of the thread that talks, which is hung up where that thread has to end and waits for an answer.

A thread inside of torch's C++ when the interpreter is gone aborts the process, and an answer may come at that moment.
torch closes no connection that a request waits on, so this is done to its socket: the request fails then, at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from ..channel import Store


class Line:
    def __init__(self) -> None:
        self._sockets: tuple[int, ...] = ()
        self.is_hung_up = False

    def connect(self, connect: Callable[[], Store]) -> Store:
        """A store, and the sockets that it opens."""
        before = _sockets()
        store = connect()
        port = _port(store)
        # Another thread may open some meanwhile.
        self._sockets = tuple(fd for fd in _sockets() - before if port is not None and _leads_to(fd) == port)
        return store

    def hang_up(self) -> None:
        """Only while a request waits: the sockets may be somebody else's later."""
        self.is_hung_up = True
        for fd in self._sockets:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> set[int]:
    """The file descriptors of this process that are sockets; none where the system does not say."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    found.add(int(name))
    return found


def _port(store: Store) -> int | None:
    """Where a store is served; None where no connection leads to it."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "port", None)


def _leads_to(fd: int) -> int | None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        return int(connection.getpeername()[1])
    return None
