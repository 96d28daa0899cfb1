"""Whether the ranks are still in step, and who has to know when they are not."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import PoisonedError


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

    def share(self, shared: Shared) -> None:
        """What this health's graphs use from now on."""
        self._shared.add(shared)
        shared.users.add(self)

    def poison(self, why: str, ranks: Sequence[int] = ()) -> None:
        """The first reason stays. May be called from any thread."""
        if self.poisoned is None:
            self.ranks = tuple(ranks)
            self.poisoned = why
            for shared in list(self._shared):
                shared.invalidate(why)

    def check(self) -> None:
        if self.poisoned is not None:
            raise PoisonedError(
                f"the ranks are out of step, so the model is not called any more: {self.poisoned}. Start the job "
                "again; or, where the process group still works, begin anew on every rank: torch._dynamo.reset() "
                "and another ringfence.Backend, or ringfence.watch again",
                self.ranks,
            )
