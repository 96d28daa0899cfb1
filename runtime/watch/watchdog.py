"""Watchdog: nothing freezes silently.

Two daemon threads per backend, and only where the user asked for them (``on_hang``):

- one *talks*: every quarter of a second it puts this rank's position (:meth:`.journal.Journal.position`)
  into the store and reads the others', and the failures that they reported. It uses a store
  connection of its own, because a thread that waits in another holds its lock; and it is a
  thread of its own, because a request to a store whose host is stopped returns never.
- one *watches*: when nothing of this rank has moved for the deadline of its phase, it asks
  :func:`.suspects.find_culprit` who is to blame. A culprit that still moves is slow, not
  hanging. Otherwise all ranks are told, every rank writes its journal, and ``on_hang`` follows.

Neither takes a lock that the main thread may hold, runs a collective, or synchronises a device; so
both work while the main thread sits in a call of the device. What they cannot do is work while a
call holds Python's global lock: then this rank goes silent, and its peers say so.

A rank whose own threads were stopped (SIGSTOP, a suspended machine) does not count the time
that it slept.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed import DistError

from ..channel import Store, ranks_text
from ..errors import ChannelTimeoutError, GroupFailureError, HangError
from .health import Health
from .journal import Journal, Position
from .suspects import Failure, Finding, compiles_too_long, find_culprit, where

log = logging.getLogger(__name__)

#: What the process ends with when a hang, or the failure of another rank, ends it.
EXIT_CODE = 85

#: For all probes together, of the second that writing a journal may take.
_PROBE_SECONDS = 0.6

#: A position that was heard longer ago than so many beats is not judged.
_STALE_BEATS = 3

#: How long a main thread leaves the watchdog to write, and to end the process where it does.
_SECONDS_TO_ACT = 10.0

#: What an exception of a collective says when its cause is another rank.
_OF_A_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed? ?out|aborted|socket|remote|peer", re.IGNORECASE
)


@dataclass(frozen=True)
class Deadlines:
    """In seconds. steady: without progress in a step. warm_up: the same while a rank compiles, warms up or captures.

    beat: how often ranks tell each other where they are. silence: how long a rank may leave that
    out before it counts as gone. grace: how long the main thread has to come back before the process ends.
    """

    steady: float = 60.0
    warm_up: float = 1800.0
    beat: float = 0.25
    silence: float = 1.25
    grace: float = 0.75


@dataclass
class _Peer:
    """What was last heard of another rank."""

    position: Position | None = None
    heard: float = 0.0
    beat: int = -1
    reports: int = 0  # how many it has read


@dataclass
class _Report:
    """What goes to all ranks: who is to blame, and for what."""

    kind: str  # "hang" or "failure"
    reporter: int
    sentence: str
    ranks: tuple[int, ...]
    failure: Failure | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> _Report:
        value = json.loads(data)
        failure = Failure(**value["failure"]) if value["failure"] is not None else None
        return cls(value["kind"], value["reporter"], value["sentence"], tuple(value["ranks"]), failure)

    @property
    def conclusive(self) -> bool:
        """A victim reports what hit it, and looks for the cause; others should wait for what it finds."""
        return self.failure is None or not self.failure.victim


@dataclass(frozen=True)
class Reaction:
    """What follows a hang. folder: for the journals; None writes none.

    on_hang: "raise", "abort" or "report". probes: name -> what returns JSON-ready values about
    the state of a device's memory, called without any synchronisation. abort_groups: called
    to wake a main thread that waits in a collective. end: ends the process.
    """

    on_hang: str
    folder: str | None = None
    probes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    abort_groups: Callable[[], None] | None = None
    end: Callable[[int], Any] = os._exit


class Watchdog:
    """Watches one rank and talks to the watchdogs of its peers.

    connect: called once, by the thread that talks: a store that all ranks share, under a prefix of
    this purpose. Where its host is gone, that may take as long as the store's time-out. host: who serves
    the store, for messages.
    """

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], Store],
        reaction: Reaction,
        deadlines: Deadlines | None = None,
        *,
        host: int | None = 0,
        health: Health | None = None,
    ) -> None:
        self.journal, self.health = journal, health if health is not None else Health()
        self.reaction, self.deadlines = reaction, deadlines if deadlines is not None else Deadlines()
        self.report: _Report | None = None
        self._connect, self._host = connect, host
        self._store: Store | None = None
        self._rank = journal.rank
        self._peers: dict[int, _Peer] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        self._reports: list[_Report] = []
        self._outbox: list[_Report] = []
        self._read = 0  # reports before this one are done with
        self._reported_at = -1  # what the journal's counter was
        self._prefix = ""
        self._beat = 0
        self._talked = time.monotonic()
        self._store_error: str | None = None
        self._moved, self._moved_at = -1, time.monotonic()
        self._ticked = time.monotonic()
        self._acted = threading.Event()
        self._ended = threading.Event()
        self._own = False  # what was reported is this rank's own failure
        self._reached = False  # the main thread came here with an exception, so nobody need wake it
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=_loop, args=(weakref.ref(self), self._stop, name), name=f"ringfence-{name}", daemon=True
            )
            for name in ("talk", "watch")
        ]
        weakref.finalize(self, _end, self._stop, self._threads)  # also when the interpreter exits

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching. The threads end within a beat, unless the store keeps one of them."""
        self._stop.set()

    def join_group(self, name: str, ranks: Sequence[int]) -> None:
        """Watch the ranks of this group too."""
        self._members = {**self._members, name: tuple(ranks)}
        known = dict(self._peers)
        for rank in ranks:
            if rank != self._rank:
                known.setdefault(rank, _Peer(heard=time.monotonic()))
        self._peers = known

    # -- called by the main thread ---------------------------------------------------------

    def failed(self, error: BaseException, place: str | None = None) -> BaseException:
        """A step of this rank ends with ``error``: tell the others; returns what to raise.

        That is the error itself, unless another rank is its cause. ``place`` is where, if not in a step.
        """
        if self._stop.is_set():  # closed: nobody talks for this rank any more
            return error
        self._reached = True
        if self.report is not None and self.reaction.on_hang != "report":  # this is how the main thread was woken
            (self._ended if self._ends else self._acted).wait(_SECONDS_TO_ACT)
            return self._error(self.report)
        position = self.journal.position()
        text = f"{type(error).__name__}: {_first_lines(str(error))}"
        if isinstance(error, ChannelTimeoutError):
            self._blame(_Report("failure", self._rank, text, error.ranks))
            return error
        victim = _is_of_a_peer(error) if place is None and position.calls else _is_of_the_store(error)
        failure = Failure(self._rank, place if place is not None else where(position), text, victim)
        if victim:
            found = self._cause(failure)
            if found is not None:
                self._blame(found)
                return self._error(found)
        report = _Report(
            "failure", self._rank, f"rank {self._rank} failed in {failure.where}: {text}", (self._rank,), failure
        )
        self.report, self._own = report, True
        self.health.poison(report.sentence, report.ranks)
        # Told first, the others end at once, and a launcher with them: this process may not come to print it.
        _bounded(lambda: log.error("ringfence: %s", report.sentence, exc_info=error), 0.2)
        told = time.monotonic()
        self._tell(report)
        self._write(report, error)
        self._until_read(told)
        return error

    def _blame(self, report: _Report) -> None:
        """Another rank is the cause of what this main thread met."""
        self.report = report
        told = time.monotonic()
        self._tell(report)
        self._act(report)
        self._until_read(told)

    @property
    def _ends(self) -> bool:
        """Whether the process ends for what was found, and the main thread should not outrun that."""
        return self.reaction.on_hang == "abort" and not self._own

    def _cause(self, failure: Failure) -> _Report | None:
        """Who made a collective of this rank fail? Waits until a dead rank would have become silent."""
        until = time.monotonic() + self.deadlines.silence + 2 * self.deadlines.beat
        while True:
            other = next((r for r in self._reports if r.conclusive), None)
            if other is not None:
                return other
            silent = self._silent(patient=False)
            if silent:
                finding = find_culprit(self._positions(), silent, members=self._members)
                assert finding is not None
                sentence = f"{finding.sentence}; rank {self._rank} got {failure.error} in {failure.where}"
                return _Report("failure", self._rank, sentence, finding.ranks)
            if time.monotonic() > until:
                return None
            time.sleep(self.deadlines.beat / 4)

    def _tell(self, report: _Report) -> None:
        """Give the talking thread a moment to send it; a store that is gone takes it from nobody."""
        if report.reporter != self._rank:
            return
        self._outbox.append(report)
        until = time.monotonic() + 1
        while self._outbox and not self._store_is_gone() and time.monotonic() < until:
            time.sleep(0.01)

    def _until_read(self, since: float) -> None:
        """Wait until all ranks that answer have read the reports: this process may end now, and the store with it."""
        until = since + 4 * self.deadlines.beat
        while time.monotonic() < until and not self._store_is_gone():
            silent = self._silent()
            if all(p.reports >= max(1, len(self._reports)) for r, p in self._peers.items() if r not in silent):
                return
            time.sleep(self.deadlines.beat / 10)

    def interrupt(self) -> None:
        """Raise what was found, for code of the main thread that waits for other ranks."""
        if self.report is not None and self.reaction.on_hang != "report" and not self._ends:
            raise self._error(self.report)

    # -- talking -----------------------------------------------------------------------------

    def talk(self) -> None:
        """Say where this rank is, hear where the others are."""
        if self._store_error is not None:
            return
        try:
            if self._store is None:
                store = self._connect()
                self._prefix = str(store.add(f"opened/{self._rank}", 1))
                self._store = store
            self._say(self._store)
            self._hear(self._store)
            self._talked = time.monotonic()
        except (DistError, OSError) as error:  # its host is gone
            self._store_error = f"{type(error).__name__}: {_first_lines(str(error))}"

    def _say(self, store: Store) -> None:
        while self._outbox:
            number = store.add(f"{self._prefix}/reports", 1)
            store.set(f"{self._prefix}/report/{number}", self._outbox[0].to_bytes())
            self._outbox.pop(0)
        self._beat += 1
        said = {"beat": self._beat, "reports": len(self._reports), "position": self.journal.position().to_dict()}
        store.set(f"{self._prefix}/at/{self._rank}", json.dumps(said).encode())

    def _hear(self, store: Store) -> None:
        for rank, peer in self._peers.items():
            key = f"{self._prefix}/at/{rank}"
            if peer.position is None and not store.check([key]):
                continue
            said = json.loads(store.get(key))
            if said["beat"] != peer.beat:
                peer.position = Position.from_dict(said["position"])
                peer.beat, peer.reports, peer.heard = said["beat"], said["reports"], time.monotonic()
        number = len(self._reports) + 1
        while store.check([f"{self._prefix}/report/{number}"]):
            report = _Report.from_bytes(store.get(f"{self._prefix}/report/{number}"))
            self._reports = [*self._reports, report]
            number += 1

    # -- watching ----------------------------------------------------------------------------

    def watch(self) -> None:
        """One look at this rank and at what was heard."""
        now = time.monotonic()
        slept = now - self._ticked - self.deadlines.beat
        self._ticked = now
        position = self.journal.position()
        if position.moved != self._moved:
            self._moved, self._moved_at = position.moved, now
        if slept > 2 * self.deadlines.beat:  # this process was stopped, or starved: that time says nothing
            self._moved_at += slept
            self._talked += slept
            for peer in self._peers.values():
                peer.heard += slept
        if self.report is not None:
            if self.reaction.on_hang == "report" and position.moved != self._reported_at:  # it was no hang, after all
                self.report, self._read = None, len(self._reports)
            return
        heard = self._heard_of_failure()
        if heard is not None:
            self._act(heard)
        elif self._expired(position, now):
            finding = self._finding(position, now - self._moved_at)
            if finding is not None:
                report = _Report("hang", self._rank, finding.sentence, finding.ranks)
                self.report = report
                self._tell(report)
                self._act(report)

    def _heard_of_failure(self) -> _Report | None:
        """What another rank reported. A victim has looked for the cause before, so its report is the second choice."""
        others = [r for r in self._reports[self._read :] if r.reporter != self._rank]
        return next((r for r in others if r.conclusive), others[0] if others else None)

    def _expired(self, position: Position, now: float) -> bool:
        busy = position.waits or position.phase == "compile"
        return busy and now - self._moved_at > self._limit(position)

    def _limit(self, position: Position) -> float:
        patient = position.phase in ("warm-up", "compile") and not position.exchange  # who waits for others is not busy
        return self.deadlines.warm_up if patient else self.deadlines.steady

    def _finding(self, position: Position, still: float) -> Finding | None:
        """Who is to blame, unless the culprit only is slow."""
        if self._store_is_gone() and self._host in (None, self._rank):  # what was heard of the others is old
            sentence = (
                f"rank {self._rank} waits in {where(position)}; the store does not answer, so for whom is not known"
            )
            return Finding((), (self._rank,), sentence)
        positions, silent = self._positions(), self._silent()
        position = positions[self._rank]
        if position.exchange and not silent:
            return None  # an exchange has a deadline of its own for ranks that are merely late
        if position.phase == "compile" and not position.exchange:
            return compiles_too_long(position)
        if any(r not in silent and self._is_stale(p) for r, p in self._peers.items()) and not self._store_is_gone():
            return None  # it has gone on since, or is about to be silent: where it was tells nothing
        failures = [r.failure for r in self._reports if r.failure is not None]
        finding = find_culprit(positions, silent, failures, self._members)
        if finding is None or still > self.deadlines.warm_up:
            return finding
        suspects = [positions[r] for r in finding.ranks if r != self._rank and r in positions and r not in silent]
        if any(p.still < self._limit(p) and (p.phase != "idle") for p in suspects):
            return None
        # A rank that has just left the model has its deadline too: it may be about to come back.
        if any(p.phase == "idle" and p.step >= 0 and p.still < self.deadlines.steady for p in suspects):
            return None
        return finding

    def _positions(self) -> dict[int, Position]:
        known = {rank: p.position for rank, p in self._peers.items() if p.position is not None}
        return {self._rank: self.journal.position(), **known}

    def _silent(self, *, patient: bool = True) -> dict[int, str]:
        """The ranks that no longer answer, and how that shows. patient: while nobody spins, with who may compile."""
        now = time.monotonic()
        if self._store_is_gone():
            if self._host is None or self._host == self._rank:
                return {}
            how = f"({self._store_error})" if self._store_error is not None else f"for {now - self._talked:.1f} s"
            return {self._host: f"serves the store, which does not answer {how}: its process ended or is stopped"}
        why = "its process ended, is stopped, or holds Python's lock"
        position = self.journal.position()
        # Before a rank has been in a call with this one, it may still be reading its weights.
        met = {rank for name, ranks in self._members.items() if position.completed.get(name) for rank in ranks}
        silent = {}
        for rank, peer in self._peers.items():
            limit = self._patience(position, peer) if patient else self.deadlines.silence
            since = now - peer.heard
            if since > limit and (peer.position is not None or rank in met):
                silent[rank] = f"has not been heard of for {since:.1f} s ({why})"
        return silent

    def _is_stale(self, peer: _Peer) -> bool:
        return peer.position is not None and time.monotonic() - peer.heard > _STALE_BEATS * self.deadlines.beat

    def _patience(self, position: Position, peer: _Peer) -> float:
        """How long a peer may be silent. Compilers hold Python's lock for seconds, and nobody spins meanwhile."""
        compiles = peer.position is not None and peer.position.phase in ("compile", "warm-up")
        short = position.stuck_in_piece and not compiles
        return self.deadlines.silence if short else max(self.deadlines.silence, self.deadlines.steady)

    def _store_is_gone(self) -> bool:
        """It failed, or a request to it does not return."""
        return self._store_error is not None or time.monotonic() - self._talked > self.deadlines.silence

    # -- what follows --------------------------------------------------------------------------

    def _act(self, report: _Report) -> None:
        started = time.monotonic()
        self.report, self._reported_at = report, self._moved
        reaction = self.reaction
        if reaction.on_hang != "report" or report.kind == "failure":
            self.health.poison(report.sentence, report.ranks)
        _bounded(lambda: self._write(report), 1.0)
        _bounded(lambda: log.error("ringfence: rank %d: %s", self._rank, report.sentence), 0.2)
        self._acted.set()
        if reaction.on_hang == "report":
            return
        stuck = self.journal.position()
        if reaction.on_hang == "raise":
            if self._reached or not stuck.waits:
                return  # it raises now, or when the model is called next
            if stuck.stuck_in_piece and reaction.abort_groups is not None:
                _bounded(reaction.abort_groups, 0)  # it may never return: a kernel that polls keeps the device
            until = time.monotonic() + self.deadlines.grace
            while time.monotonic() < until:
                now = self.journal.position()
                if self._reached or now.moved != stuck.moved or not now.waits:
                    return
                time.sleep(0.02)
        self._until_read(started)
        last = "" if reaction.on_hang == "abort" else " (its main thread cannot be reached where it waits)"
        text = f"ringfence: rank {self._rank} ends with exit code {EXIT_CODE}{last}: {self._error(report)}\n"
        _bounded(lambda: (sys.stderr.write(text), sys.stderr.flush()), 0.2)
        reaction.end(EXIT_CODE)
        self._ended.set()

    def _write(self, report: _Report, error: BaseException | None = None) -> None:
        """Write the journal, and again with what the probes found: they may cost all the time that there is."""
        lines = traceback.format_exception(error) if error is not None else []
        self._write_with(report, traceback=lines, probes={})
        if self.reaction.folder is not None and self.reaction.probes:
            self._write_with(report, traceback=lines, probes=self._probe())

    def _probe(self) -> dict[str, Any]:
        probes = dict(self.reaction.probes)
        found: dict[str, Any] = {}

        def run() -> None:
            self.journal.watch_from_here()
            for name, probe in probes.items():
                found[name] = _probed(probe)

        _bounded(run, _PROBE_SECONDS)
        late = f"no answer within {_PROBE_SECONDS} s"
        return {name: found.get(name, late) for name in probes}

    def _write_with(self, report: _Report, **more: Any) -> None:
        folder = self.reaction.folder
        if folder is None:
            return
        heard = {str(r): p.position.to_dict() for r, p in self._peers.items() if p.position is not None}
        failures = [asdict(r.failure) for r in (*self._reports, report) if r.failure is not None]
        try:
            self.journal.dump(
                folder,
                f"{report.kind}: {report.sentence}",
                heard=heard,
                silent={str(r): how for r, how in self._silent().items()},
                failures=failures,
                **more,
            )
        except OSError as error:
            log.error("ringfence: the journal of rank %d cannot be written: %s", self._rank, error)

    def _error(self, report: _Report) -> GroupFailureError:
        journals = f"; journals: ringfence journal {self.reaction.folder}" if self.reaction.folder is not None else ""
        if report.kind == "hang":
            return HangError(f"the ranks hang: {report.sentence}{journals}", report.ranks)
        return GroupFailureError(f"{ranks_text(report.ranks)} broke off: {report.sentence}{journals}", report.ranks)


def open_watchdog(
    journal: Journal, reaction: Reaction, deadlines: Deadlines | None = None, health: Health | None = None
) -> Watchdog:
    """A running watchdog over the default process group's store. Every rank must open it as often as the others."""
    from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]

    store = distributed_c10d._get_default_store()
    clone = getattr(store, "clone", lambda: store)  # a connection of our own: a blocking request locks its connection
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    watchdog = Watchdog(
        journal,
        lambda: PrefixStore("ringfence/watchdog", clone()),
        reaction,
        deadlines,
        host=None if by_launcher else 0,
        health=health,
    )
    watchdog.start()
    return watchdog


def _end(stop: threading.Event, threads: Sequence[threading.Thread]) -> None:
    """Stop the threads, and wait a moment: one that is inside torch when the interpreter is gone aborts the process."""
    stop.set()
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(0.5)


def _loop(reference: weakref.ref[Watchdog], stop: threading.Event, name: str) -> None:
    """Without keeping the watchdog alive: who drops the model drops the threads."""
    beat, told, said = 0.0, False, ""
    while not stop.wait(beat):
        watchdog = reference()
        if watchdog is None:
            return
        if not told:
            watchdog.journal.watch_from_here()
            told = True
        beat = watchdog.deadlines.beat
        try:
            getattr(watchdog, name)()
        except Exception as error:  # a watchdog that dies of its own mistake would be the silence that it is against
            if repr(error) != said:
                said = repr(error)
                log.exception("ringfence: the watchdog's thread '%s' goes on after an error", name)
        del watchdog


def _bounded(body: Callable[[], Any], seconds: float) -> None:
    """Give ``body`` some seconds: a full pipe, a dead file server or an abort that hangs must not stop the watchdog."""
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)


def _probed(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a probe looks at memory that may be gone
        return f"{type(error).__name__}: {error}"


def _is_of_a_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _OF_A_PEER.search(str(error)) is not None


def _is_of_the_store(error: BaseException) -> bool:
    return isinstance(error, DistError)


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:400]
