"""Whether the ranks are still in step, and who has to know when they are not."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import PoisonedError

#: How long whoever hears of a verdict leaves the thread that watches to write it down, and to end the process where it
#: does.
SECONDS_TO_ACT = 10.0


class Shared(Protocol):
    """What several graphs of the ranks use, such as the workspaces of a group."""

    users: weakref.WeakSet[Any]

    def invalidate(self, why: str, /) -> None: ...


class Health:
    """Whether the ranks are still in step. ``poisoned`` says why not; nothing heals it. ranks: to blame, if known.

    What is shared with other backends is invalid then, and they are poisoned with it.
    """

    def __init__(self) -> None:
        self.poisoned: str | None = None
        self.ranks: tuple[int, ...] = ()
        self._shared: weakref.WeakSet[Any] = weakref.WeakSet()
        self._written: threading.Event | None = None

    def share(self, shared: Shared) -> None:
        """What this health's graphs use from now on."""
        self._shared.add(shared)
        shared.users.add(self)

    def poison(self, why: str, ranks: Sequence[int] = (), written: threading.Event | None = None) -> None:
        """The first reason stays. May be called from any thread.

        written: set by that thread once the verdict is in the journal. No step may begin before that, and whoever hears
        of it may end the process, so :meth:`check` waits for it.
        """
        if self.poisoned is None:
            self.ranks, self._written = tuple(ranks), written
            self.poisoned = why
            for shared in list(self._shared):
                shared.invalidate(why)

    def check(self) -> None:
        if self.poisoned is not None:
            if self._written is not None:
                self._written.wait(SECONDS_TO_ACT)
            raise PoisonedError(
                f"the ranks are out of step, so the model is not called any more: {self.poisoned}. Start the job "
                "again; or, where the process group still works, begin anew on every rank: torch._dynamo.reset() "
                "and another ringfence.Backend, or ringfence.watch again",
                self.ranks,
            )
