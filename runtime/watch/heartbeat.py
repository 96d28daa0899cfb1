"""What the ranks tell each other while they run: where each is, and what it reports.

A rank puts its :meth:`position <.journal.Journal.position>` into the store every beat and reads the others'. That
is done by a thread of its own, over a connection of its own: a request to a store whose host is stopped
returns never, and a request that blocks locks its connection. Everything else here may be asked by any thread,
and waits for nothing unless it says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed import DistError

from ..channel import Store
from ..errors import on_one_line
from .culprit import place_of
from .deadlines import Deadlines
from .journal import Journal
from .line import Line
from .position import Position
from .process import ENDED, this_process, why_silent
from .report import Report

#: A position that was heard longer ago than so many beats is not judged.
_STALE_BEATS = 3
#: The last of them are told at every beat.
_TOLD = 8
#: A process that ends, and serves the store, waits so long for the others to have read it.
_FAREWELL_SECONDS = 0.4
#: How long an interpreter may take to end, and how long its peers' collectives to break after that.
_SECONDS_TO_END, _SECONDS_TO_BREAK = 15.0, 2.0


@dataclass
class _Peer:
    """What was last heard of another rank.

    token: of its process. end: how it ended, in its own words; ended_at: when that was first heard.
    closed: it may go on, and nobody talks for it.
    """

    token: str
    position: Position | None = None
    heard: float = 0.0
    beat: int = -1
    reports: int = 0  # how many it has read
    process: tuple[str, int] = ("", 0)
    end: str = ""
    ended_at: float = 0.0
    closed: bool = False
    read_ends: frozenset[int] = frozenset()  # of which ranks it knows that they ended
    gone: float | None = None  # since when its process is seen to have ended


class Heartbeat:
    """What this rank says to its peers, and the last that was heard of each.

    connect: called once, by the thread that talks: a store that all ranks share, under a prefix of
    this purpose. Where its host is gone, that may take as long as the store's time-out. host: who serves
    the store, for messages; None: no rank does. token: of this process, as its peers know it.
    """

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], Store],
        deadlines: Deadlines,
        host: int | None = 0,
        token: str | None = None,
    ) -> None:
        self.rank, self.host = journal.rank, host
        #: The ranks of each group.
        self.members: Mapping[str, tuple[int, ...]] = {}
        self.peers: dict[int, _Peer] = {}
        #: All of them, of all ranks, in the order in which they came.
        self.reports: tuple[Report, ...] = ()
        #: How this rank ends, for its peers; empty while it goes on.
        self.end = ""
        self.closed = False
        self._journal, self._connect, self.deadlines = journal, connect, deadlines
        self._token = token if token is not None else str(self.rank)
        self._store: Store | None = None
        self.line = Line()
        self._store_error: str | None = None
        self._outbox: list[Report] = []
        self._end_said = ""
        self._beat = 0
        self._process = this_process()
        self._talked = time.monotonic()

    def join_group(self, name: str, ranks: Sequence[int], tokens: Sequence[str] | None = None) -> None:
        """Heartbeat to the ranks of this group too. tokens: of their processes, by their place in the group."""
        self.members = {**self.members, name: tuple(ranks)}
        known = dict(self.peers)
        for rank, token in zip(ranks, tokens if tokens is not None else map(str, ranks), strict=True):
            if rank != self.rank and (rank not in known or known[rank].token != token):
                known[rank] = _Peer(token, heard=time.monotonic())
        self.peers = known

    def talk(self) -> None:
        """Say where this rank is, hear where the others are."""
        if self._store_error is not None:
            return
        try:
            if self._store is None:
                self._store = self.line.connect(self._connect)
            self._say(self._store)
            self._hear(self._store)
            self._talked = time.monotonic()
        except (DistError, OSError) as error:  # its host is gone
            self._store_error = on_one_line(error)

    def _say(self, store: Store) -> None:
        new, end = list(self._outbox), self.end
        self._learn(new)
        self._beat += 1
        said = {
            "beat": self._beat,
            "reports": len(self.reports),
            "position": self._journal.position().to_dict(),
            "process": self._process,
            # What it has heard too: its peers may not be those of who told it.
            "told": [report.to_dict() for report in self.reports[-_TOLD:]],
            "end": end,
            "closed": self.closed,
            "ends": list(self.ended()),
        }
        store.set(f"at/{self._token}", json.dumps(said).encode())
        del self._outbox[: len(new)]
        self._end_said = end

    def _hear(self, store: Store) -> None:
        if not self.peers:  # what is set is not answered, so it reaches a stopped host too; this is
            store.check([f"at/{self._token}"])
        for peer in self.peers.values():
            key = f"at/{peer.token}"
            if peer.position is None and not store.check([key]):
                continue
            said = json.loads(store.get(key))
            if said["beat"] != peer.beat:
                peer.position = Position.from_dict(said["position"])
                peer.beat, peer.reports, peer.heard = said["beat"], said["reports"], time.monotonic()
                if said["end"] and not peer.end:  # it may go on to talk while its process ends
                    peer.ended_at = peer.heard
                peer.end, peer.closed, peer.read_ends = said["end"], said["closed"], frozenset(said["ends"])
                peer.process = (str(said["process"][0]), int(said["process"][1]))
                self._learn([Report.from_dict(value) for value in said["told"]])

    def _learn(self, reports: Sequence[Report]) -> None:
        known = {(r.reporter, r.stamp) for r in self.reports}
        self.reports = (*self.reports, *(r for r in reports if (r.reporter, r.stamp) not in known))

    def tell(self, report: Report) -> None:
        """Give the talking thread a moment to send it; a store that is gone takes it from nobody."""
        if report.reporter != self.rank:
            return
        self._outbox.append(report)
        self._until(lambda: not self._outbox, time.monotonic() + 1)

    def tell_end(self, how: str) -> None:
        """The same of how this rank ends. Who serves the store waits until the others have read it."""
        self.end = how
        until = time.monotonic() + 4 * self.deadlines.beat
        self._until(lambda: self._end_said == how, until)
        if self.rank == self.host:
            self._until(self._end_is_read, until)

    def closes(self) -> None:
        """Nobody talks for this rank from now on, though it may go on calling the model."""
        if not self.end:
            self.closed = True
            self.end = self._ends("has closed its backend")

    def goes_on(self) -> None:
        """It talks again."""
        self.closed, self.end = False, ""

    def bid_farewell(self) -> None:
        """The talking thread's last words, when it is closed or the process ends."""
        self.end = self.end or self._ends("has ended")
        until = time.monotonic() + _FAREWELL_SECONDS
        self.talk()
        while self.rank == self.host and not self.closed and not self._end_is_read() and time.monotonic() < until:
            time.sleep(self.deadlines.beat / 10)
            self.talk()

    def _ends(self, how: str) -> str:
        return f"rank {self.rank} {how}, {place_of(self._journal.position())}"

    def until_read(self, since: float) -> None:
        """Wait until all ranks that answer have read the reports: this process may end now, and the store with it."""
        self._until(self._reports_are_read, since + 4 * self.deadlines.beat)

    def _reports_are_read(self) -> bool:
        gone = self.silent().keys() | self.ended().keys()
        return all(p.reports >= max(1, len(self.reports)) for r, p in self.peers.items() if r not in gone)

    def _end_is_read(self) -> bool:
        gone = self.silent().keys() | self.ended().keys()
        return all(self.rank in p.read_ends for r, p in self.peers.items() if r not in gone and p.position is not None)

    def _until(self, done: Callable[[], bool], until: float) -> None:
        while not self.store_is_gone() and time.monotonic() < until and not done():
            time.sleep(self.deadlines.beat / 20)

    def ended(self) -> dict[int, str]:
        """The ranks that said that they end, and how. One that only closed has no position any more."""
        return {rank: peer.end for rank, peer in self.peers.items() if peer.end}

    def still_ends(self) -> tuple[int, ...]:
        """The ranks that are about to end: until their processes are gone, a collective with them does not break.

        A rank that waits in one hears only then of what it was told itself.
        """
        now, ending = time.monotonic(), []
        for rank, peer in self.peers.items():
            if not peer.end or peer.closed:
                continue
            if peer.gone is None and why_silent(*peer.process) == ENDED:
                peer.gone = now
            limit = peer.ended_at + _SECONDS_TO_END if peer.gone is None else peer.gone + _SECONDS_TO_BREAK
            if now < limit:
                ending.append(rank)
        return tuple(ending)

    def seconds_since_end(self, rank: int) -> float:
        """0 of a rank that goes on, or only closed."""
        peer = self.peers.get(rank)
        return time.monotonic() - peer.ended_at if peer is not None and peer.end and not peer.closed else 0.0

    def heard_since(self, rank: int, moment: float) -> bool:
        """Whether a rank has talked since then; this one always has."""
        peer = self.peers.get(rank)
        return rank == self.rank or (peer is not None and peer.heard > moment)

    def positions(self) -> dict[int, Position]:
        """Where each rank is: this one now, the others when they were last heard of."""
        known = {rank: p.position for rank, p in self.peers.items() if p.position is not None and not p.closed}
        return {self.rank: self._journal.position(), **known}

    def silent(self, *, patient: bool = True) -> dict[int, str]:
        """The ranks that no longer answer, and how that shows. patient: while nobody spins, with who may compile."""
        now = time.monotonic()
        if self.store_is_gone():
            if self.host is None or self.host == self.rank:
                return {}
            if self.host in self.ended():
                return {}
            how = f"({self._store_error})" if self._store_error is not None else f"for {now - self._talked:.1f} s"
            return {self.host: f"serves the store, which does not answer {how}: its process ended or is stopped"}
        position = self._journal.position()
        # Before a rank has been in a call with this one, it may still be reading its weights.
        met = {rank for name, ranks in self.members.items() if position.completed.get(name) for rank in ranks}
        silent = {}
        for rank, peer in self.peers.items():
            limit = self._patience(position, peer) if patient else self.deadlines.silence
            since = now - peer.heard
            if since > limit and (peer.position is not None or rank in met) and not peer.end:
                silent[rank] = f"has not been heard of for {since:.1f} s ({why_silent(*peer.process)})"
        return silent

    def stale(self) -> tuple[int, ...]:
        """The ranks that were heard of too long ago to be judged by it, and not long enough to be silent."""
        if self.store_is_gone():  # nothing will be heard any more
            return ()
        silent, since = self.silent(), time.monotonic() - _STALE_BEATS * self.deadlines.beat
        heard = {rank: peer.heard for rank, peer in self.peers.items() if peer.position is not None and not peer.end}
        return tuple(rank for rank, at in heard.items() if rank not in silent and at < since)

    def _patience(self, position: Position, peer: _Peer) -> float:
        """How long a peer may be silent. Compilers hold Python's lock for seconds, and nobody spins meanwhile."""
        compiles = peer.position is not None and peer.position.phase in ("compile", "warm-up")
        short = position.stuck_in_piece and not compiles
        return self.deadlines.silence if short else max(self.deadlines.silence, self.deadlines.steady)

    def store_is_gone(self) -> bool:
        """It failed, or a request to it does not return."""
        return self._store_error is not None or time.monotonic() - self._talked > self.deadlines.silence

    def forgive(self, seconds: float) -> None:
        """This process was stopped for so long: that says nothing of the others."""
        self._talked += seconds
        for peer in self.peers.values():
            peer.heard += seconds
            peer.ended_at += seconds
