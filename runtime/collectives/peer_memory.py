"""Memory on each rank's device that the other ranks have open: by IPC handles over a channel, without multicast."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from ..channel import Channel
from ..errors import RingfenceError
from .cuda_driver import Driver

#: Seconds that ranks wait for each other before memory is given back.
_CLOSE_SECONDS = 5.0


@dataclass
class Release:
    """Gives memory back once nobody has it open. Every rank must call; ``together`` is not for what only some have."""

    driver: Driver
    channel: Channel
    inbox: int
    opened: list[int] = field(default_factory=list)

    def __call__(self, *, together: bool = True) -> None:
        while self.opened:
            self.driver.close(self.opened.pop())
        if together:
            with contextlib.suppress(RingfenceError, RuntimeError):  # of a rank that is gone, the driver closes it
                self.channel.exchange("ringfence workspace: closed", None, seconds=_CLOSE_SECONDS)
        self.driver.free(self.inbox)


def share(driver: Driver, channel: Channel, size: int) -> tuple[int, tuple[int, ...], Release]:
    """``size`` bytes of 0 on each rank's device: this rank's address, those of the others, and how to give it back.

    All ranks have it, or none: one that fails is missed in an exchange, and the others give theirs back alone.
    """
    inbox = driver.allocate(size)
    release = Release(driver, channel, inbox)
    try:
        handles = channel.exchange("ringfence workspace: memory", driver.handle(inbox))
        for rank, handle in enumerate(handles):
            if rank != channel.rank:
                release.opened.append(driver.open(handle))
        channel.exchange("ringfence workspace: opened", None)  # only what all have open is closed by all
    except BaseException:
        release(together=False)
        raise
    return inbox, tuple(release.opened), release
