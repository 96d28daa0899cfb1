"""A page of memory that the ranks of one host can look into: how many calls of a group each of them has begun.

A rank that stands in a collective answers nobody, and unless a watchdog was asked for, no thread of it does. So it
writes one number where its neighbours can see it, at the beginning of each step. A rank that waits for it in an
exchange, and has not begun those calls itself, waits for ever: that rank waits for the calls.

The page is anonymous memory, reached through /proc: nothing of it is left when the process ends, however it ends.
Ranks of other hosts, or of another container, cannot be looked at; nothing is concluded of them.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import time
import weakref
from collections.abc import Sequence

from ..channel import Channel
from ..errors import RankMismatch, RecompiledAloneError
from ..spelling import group_word
from .culprit import alone_text
from .journal import Journal

_SIZE, _TOKEN, _MESSAGE = 8192, 64, 128
#: How long it must look so: a rank that has answered, and has heard all, goes on before the slowest one has.
SETTLED_SECONDS = 2.0


class Page:
    """calls: ``calls[0]`` is how many calls this rank will have made when its step ends."""

    def __init__(self, fd: int, address: str) -> None:
        self.address = address
        memory = mmap.mmap(fd, _SIZE)
        weakref.finalize(self, os.close, fd).atexit = False
        self._memory = memory
        self.calls: memoryview[int] = memoryview(memory)[:_TOKEN].cast("q")

    @classmethod
    def make(cls) -> Page | None:
        """One of this process; None where the system has no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            fd = os.memfd_create("ringfence", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        except OSError:
            return None
        token = secrets.token_bytes(16)
        page = cls(fd, f"/proc/{os.getpid()}/fd/{fd} {token.hex()}")
        page._memory[_TOKEN : _TOKEN + 16] = token
        return page

    @classmethod
    def at(cls, address: str) -> Page | None:
        """The one of another process; None where it cannot be seen from here, or is another's."""
        path, _, token = address.partition(" ")
        with contextlib.suppress(OSError, ValueError):
            page = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), address)
            if page._memory[_TOKEN : _TOKEN + 16].hex() == token:
                return page
        return None

    def leave(self, text: str) -> None:
        """For the rank whose page it is, where it will look when its collective breaks."""
        data = text.encode()[: _SIZE - _MESSAGE - 8]
        self._memory[_MESSAGE : _MESSAGE + len(data)] = data
        self.calls[1] = len(data)

    @property
    def left(self) -> str:
        """What another rank has left here; empty where none has."""
        return bytes(self._memory[_MESSAGE : _MESSAGE + self.calls[1]]).decode(errors="replace")


class Neighbours:
    """The pages of a group's ranks. ranks: their global ranks. channel: where they tell each other their addresses."""

    def __init__(self, channel: Channel, mine: Page, ranks: Sequence[int]) -> None:
        self._channel, self.mine, self.ranks = channel, mine, tuple(ranks)
        self._pages: dict[int, Page | None] = {}
        self._since: tuple[int, float] = (-1, 0.0)
        channel.post("page", mine.address)

    def ahead(self, calls: int, exchange: int) -> tuple[int, ...]:
        """The ranks that have begun more calls than this one, and will not come to the exchange that it waits in.

        exchange: another number for each. To be asked again and again while this rank waits; it answers when what
        it sees has lasted for :data:`SETTLED_SECONDS`.
        """
        ahead = tuple(rank for rank, page in self._others() if page.calls[0] > calls)
        if not ahead or self._since[0] != exchange:
            self._since = (exchange if ahead else -1, time.monotonic())
            return ()
        return ahead if time.monotonic() - self._since[1] > SETTLED_SECONDS else ()

    def check(self, journal: Journal, group: str) -> None:
        """Raises :class:`RankMismatch` where ranks of this host wait in a call for this one, which waits for them."""
        ahead = self.ahead(journal.calls(group), journal.changes)
        if not ahead:
            return
        position = journal.position()
        does = position.compiles or f"waits for the others in the exchange '{position.exchange}'"
        text = alone_text((journal.rank,), ahead, does, f"call {journal.calls(group)} of group '{group_word(group)}'")
        self.tell(text, (journal.rank,))
        raise RecompiledAloneError(text, (journal.rank,)) if position.compiles else RankMismatch(text)

    def tell(self, text: str, ranks: Sequence[int]) -> None:
        """Leave with all of them why this rank does not come, and who is to blame."""
        for _, page in self._others():
            page.leave(json.dumps([text, list(ranks)]))

    def told(self) -> tuple[str, tuple[int, ...]] | None:
        """What another rank has left with this one: the text, and the ranks."""
        if not self.mine.calls[1]:
            return None
        text, ranks = json.loads(self.mine.left)
        return text, tuple(ranks)

    def _others(self) -> list[tuple[int, Page]]:
        for place, rank in enumerate(self.ranks):
            if place != self._channel.rank and rank not in self._pages:
                address = self._channel.posted("page", place)
                if address is not None:
                    self._pages[rank] = Page.at(address)
        return [(rank, page) for rank, page in self._pages.items() if page is not None]
