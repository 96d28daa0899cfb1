"""Watchdog: nothing freezes silently.

Two daemon threads per process, and only where the user asked for them (``on_hang``):

- one *talks* (:mod:`.heartbeat`): it says where this rank is and hears where the others are.
- one *watches*: when nothing of this rank has moved for the deadline of its phase, it asks
  :func:`.culprit.find_culprit` who is to blame. A culprit that still moves is slow, not
  hanging. Otherwise all ranks are told, every rank writes its journal, and ``on_hang`` follows.

Neither takes a lock that the main thread may hold, runs a collective, or synchronises a device; so
both work while the main thread sits in a call of the device. What they cannot do is work while a
call holds Python's global lock: then this rank goes silent, and its peers say so.

A rank whose own threads were stopped (SIGSTOP, a suspended machine) does not count the time
that it slept.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from ..channel import Store
from ..errors import ChannelTimeoutError, HangError, RingfenceError, on_one_line
from . import looping
from .cause import cause_of, is_of_a_peer, is_of_the_store, waited_for
from .culprit import Failure, Finding, compiles_too_long, find_alone, find_culprit, find_refused, place_of, where
from .deadlines import Deadlines
from .ending import how_it_ends, is_in_order
from .health import SECONDS_TO_ACT, Health
from .heartbeat import Heartbeat
from .in_vain import InVain
from .journal import Journal
from .position import Position
from .reaction import EXIT_CODE, Reaction, bounded
from .report import Report, ended, failed
from .told import Told

log = logging.getLogger(__name__)


class Watchdog:
    """Watches one rank. connect, host: see :class:`Heartbeat`."""

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], Store],
        reaction: Reaction,
        deadlines: Deadlines | None = None,
        *,
        host: int | None = 0,
        health: Health | None = None,
        token: str | None = None,
    ) -> None:
        self.journal, self.health = journal, health if health is not None else Health()
        self.reaction, self.deadlines = reaction, deadlines if deadlines is not None else Deadlines()
        self.report: Report | None = None
        self.others = Heartbeat(journal, connect, self.deadlines, host, token)
        self.told = Told()
        self._rank = journal.rank
        self._read = 0  # reports before this one are done with
        self._reported_at = -1  # what the journal's counter was
        self._moved, self._moved_at, self._ticked = -1, time.monotonic(), time.monotonic()
        self._acted, self._ended = threading.Event(), threading.Event()
        self._rests = looping.resting()
        self._in_vain = InVain(self.others)
        journal.waits = reaction.waits
        self._own = False  # what was reported is this rank's own failure
        self._reached = False  # the main thread came here with an exception, so nobody need wake it
        self._runs = False
        self._ended_at: int | None = None  # what the journal's counter was when this rank was told to end
        self._stop = threading.Event()

    def start(self) -> None:
        """Watch, and go on watching after it was closed."""
        if self.runs:
            return
        self._runs, self._stop = True, threading.Event()
        self.others.goes_on()
        self.told.listen()
        looping.start(
            self, self._stop, self._rests, {"talk": self.others.bid_farewell, "watch": None}, self.others.line
        )

    def close(self) -> None:
        """Stop watching, and say so. The threads end within a beat, unless the store keeps one of them."""
        self.told.close()
        self.others.closes()
        self._stop.set()

    @property
    def runs(self) -> bool:
        return self._runs and not self._stop.is_set()

    def configure(self, reaction: Reaction, deadlines: Deadlines) -> None:
        """What follows from now on, and when."""
        self.reaction, self.deadlines, self.others.deadlines = reaction, deadlines, deadlines

    # -- called by the main thread ---------------------------------------------------------

    def failed(self, error: BaseException, place: str | None = None) -> BaseException:
        """A step of this rank ends with ``error``: tell the others; returns what to raise.

        That is the error itself, unless another rank is its cause. ``place`` is where, if not in a step.
        """
        if self._stop.is_set():  # closed: nobody talks for this rank any more
            return error
        self._reached = True
        if self.ends(error):
            return error
        if self.report is not None and self.reaction.on_hang != "report":  # this is how the main thread was woken
            self._follows.wait(SECONDS_TO_ACT)
            return self._error(self.report)
        if isinstance(error, HangError):  # a kernel has named who did not come
            return self._given_up(error)
        position = self.journal.position()
        text = on_one_line(error)
        if isinstance(error, ChannelTimeoutError):
            self._blame(Report("failure", self._rank, Finding(error.ranks, (self._rank,), text)))
            return error
        victim = is_of_a_peer(error) if place is None and position.calls else is_of_the_store(error)
        failure = Failure(self._rank, place if place is not None else where(position), text, victim)
        if victim:
            found = cause_of(failure, self.others)
            if found is not None:
                self._blame(found)
                return self._error(found)
        report = failed(failure)
        self.report, self._own = report, True
        self.health.poison(report.sentence, report.ranks)
        # Told first, the others end at once, and a launcher with them: this process may not come to print it.
        bounded(lambda: log.error("ringfence: %s", report.sentence, exc_info=error), 0.2)
        told = time.monotonic()
        self.others.tell(report)
        self._write(report, error)
        self._acted.set()
        self.others.until_read(told)
        return error

    def _given_up(self, error: HangError) -> BaseException:
        """This thread tells who is to blame, unless the one that watches has found it."""
        self._in_vain.claimed = True
        while (found := self.report or self._found(error)) is None:
            time.sleep(self.deadlines.beat / 4)
        if self.report is None:
            self._blame(found)
        else:
            self._follows.wait(SECONDS_TO_ACT)
        self.health.poison(found.sentence, found.ranks)
        return self._error(found)

    def _found(self, error: HangError) -> Report | None:
        heard = self._heard_of_failure()
        return heard if heard is not None and heard.conclusive else self._in_vain.report(error)

    def _blame(self, report: Report) -> None:
        """Another rank is the cause of what this main thread met."""
        self.report = report
        told = time.monotonic()
        self.others.tell(report)
        self._act(report)
        self.others.until_read(told)

    def ends(self, error: BaseException) -> bool:
        """Whether this rank is told to end by ``error``. Who was waited for until then is written down, if one was."""
        position = self.journal.position()
        how = how_it_ends(error, waits=bool(position.calls or position.exchange))
        if how is None or self._stop.is_set():
            return False
        self._end(position, how)
        return True

    def _end(self, position: Position, how: str) -> None:
        self._ended_at = position.moved
        found, end = waited_for(self.others), ended(self._rank, how, place_of(position))
        bounded(lambda: log.warning("ringfence: %s", end.sentence), 0.2)
        if found is not None:
            bounded(lambda: self._write(found), 1.0)
        bounded(lambda: self._write(end), 1.0)
        self.others.tell_end(end.sentence)

    @property
    def _ends(self) -> bool:
        """Whether the process ends for what was found, and the main thread should not outrun that."""
        return self.reaction.on_hang == "abort" and not self._own

    @property
    def _follows(self) -> threading.Event:
        """What a main thread waits for that hears of a report: it may end the process, and the verdict be lost."""
        return self._ended if self._ends else self._acted

    def interrupt(self) -> None:
        """Raise what was found, for code of the main thread that waits for other ranks."""
        if self.report is not None and self.reaction.on_hang != "report" and not self._ends:
            self._acted.wait(SECONDS_TO_ACT)
            raise self._error(self.report)

    # -- what its two threads do at every beat ---------------------------------------------------

    def talk(self) -> None:
        """Say where this rank is, hear where the others are."""
        self.others.talk()

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
            self.others.forgive(slept)
        gone = {self._rank, *self.others.silent(), *self.others.ended()}
        positions = self.others.positions()
        self.reaction.waits.hears((p for r, p in positions.items() if r not in gone), self.deadlines.warm_up)
        lost = self.reaction.waits.lost()
        if lost is None:
            self._in_vain.nobody_gave_up(positions)
        if self._ended_at is not None:
            if position.moved == self._ended_at:
                return  # the process is about to end, which takes its time
            self._ended_at = None  # whoever caught it goes on
            self.others.goes_on()
        if self.report is not None:
            if self.reaction.on_hang == "report" and position.moved != self._reported_at:  # it was no hang, after all
                self.report, self._read = None, len(self.others.reports)
                self._acted.clear()
                went_on = f"rank {self._rank} went on after that"
                bounded(lambda: self.journal.withdraw(self.reaction.folder, went_on), 1.0)
            return
        heard, number = self._heard_of_failure(), self.told.look(position.moved)
        if heard is not None:
            self._act(heard)
        elif number is not None and position.waits and self.reaction.on_hang != "report" and self._waits_in_vain():
            self._end_unheard(position, number)
        elif lost is not None:  # whoever only reports tells it once
            if not self._in_vain.claimed and (found := self._in_vain.report(lost)) is not None:
                self._in_vain.claimed = True
                self._tell(found)
        elif (alone := self._alone()) is not None:
            compiles = any(p.compiles for r, p in self.others.positions().items() if r in alone.ranks)
            self._tell(Report("alone" if compiles else "hang", self._rank, alone))
        elif self._expired(position, now):
            finding = self._finding(position, now - self._moved_at)
            if finding is not None:
                self._tell(Report("hang", self._rank, finding))

    def _waits_in_vain(self) -> bool:
        """Whether all that this rank waits for have ended, so long ago that its collective would have broken."""
        ended = self.others.ended()
        finding = find_culprit(self.others.positions(), self.others.silent(), (), self.others.members, ended)
        return finding is not None and set(finding.ranks) <= ended.keys() - set(self.others.still_ends())

    def _end_unheard(self, position: Position, number: signal.Signals) -> None:
        """End this process for its main thread, which will not hear of it."""
        self._end(position, f"was told to end ({number.name}), and could not hear of it where it waits")
        code = 0 if all(is_in_order(how) for how in self.others.ended().values()) else 128 + number
        text = f"ringfence: rank {self._rank} ends with exit code {code}: {number.name}, and its peers have ended\n"
        bounded(lambda: (sys.stderr.write(text), sys.stderr.flush()), 0.2)
        self.reaction.end(code)

    def _tell(self, report: Report) -> None:
        self.report = report
        self.others.tell(report)
        self._act(report)

    def _alone(self) -> Finding | None:
        """Ranks that wait in two places, or for one whose call was an error: told at once, because it ends never."""
        if self.others.store_is_gone() or self.others.stale() or self.others.silent():
            return None
        there = self.others.positions(), self.others.members, self.deadlines.alone
        return find_alone(*there) or find_refused(*there)

    def _heard_of_failure(self) -> Report | None:
        """What another rank reported. A victim has looked for the cause before, so its report is the second choice."""
        others = [r for r in self.others.reports[self._read :] if r.reporter != self._rank]
        return next((r for r in others if r.conclusive), others[0] if others else None)

    def _expired(self, position: Position, now: float) -> bool:
        busy = position.waits or position.phase == "compile"
        return busy and now - self._moved_at > self._limit(position)

    def _limit(self, position: Position) -> float:
        patient = position.phase in ("warm-up", "compile") and not position.exchange  # who waits for others is not busy
        return self.deadlines.warm_up if patient else self.deadlines.steady

    def _finding(self, position: Position, still: float) -> Finding | None:
        """Who is to blame, unless the culprit only is slow."""
        if self.others.store_is_gone() and self.others.host in (None, self._rank):  # what was heard is old
            sentence = (
                f"rank {self._rank} waits in {where(position)}; the store does not answer, so for whom is not known"
            )
            return Finding((), (self._rank,), sentence)
        positions, silent, ended = self.others.positions(), self.others.silent(), self.others.ended()
        position = positions[self._rank]
        if position.exchange and not silent and not ended:
            return None  # an exchange has a deadline of its own for ranks that are merely late
        if position.phase == "compile" and not position.exchange:
            return compiles_too_long(position)
        if self.others.stale():
            return None  # it has gone on since, or is about to be silent: where it was tells nothing
        failures = [r.failure for r in self.others.reports if r.failure is not None]
        finding = find_culprit(positions, silent, failures, self.others.members, ended)
        if finding is not None and set(finding.ranks) & set(self.others.still_ends()):
            return None
        if finding is None or still > self.deadlines.warm_up:
            return finding
        gone = {self._rank, *silent, *ended}
        suspects = [positions[r] for r in finding.ranks if r in positions and r not in gone]
        if any(p.still < self._limit(p) and (p.phase != "idle") for p in suspects):
            return None
        # A rank that has just left the model has its deadline too: it may be about to come back.
        if any(p.phase == "idle" and p.step >= 0 and p.still < self.deadlines.steady for p in suspects):
            return None
        return finding

    # -- what follows --------------------------------------------------------------------------

    def _act(self, report: Report) -> None:
        with looping.acting(self._rests):
            self._do(report)

    def _do(self, report: Report) -> None:
        started = time.monotonic()
        self.report, self._reported_at = report, self._moved
        reaction = self.reaction
        if reaction.on_hang != "report" or report.kind == "failure":
            self.health.poison(report.sentence, report.ranks, self._follows)
        bounded(lambda: self._write(report), 1.0)
        bounded(lambda: log.error("ringfence: rank %d: %s", self._rank, report.sentence), 0.2)
        self._acted.set()
        if reaction.on_hang == "report":
            return
        stuck = self.journal.position()
        if reaction.on_hang == "raise":
            if self._reached or not stuck.waits:
                return  # it raises now, or when the model is called next
            if self.reaction.waits.lost() is not None and self._comes_back(stuck):
                return  # its kernels do not wait any more, so that nothing need be aborted to wake it
            if stuck.stuck_in_piece and reaction.abort_groups is not None:
                bounded(reaction.abort_groups, 0)  # it may never return: a kernel that polls keeps the device
            if self._comes_back(stuck):
                return
        self.others.until_read(started)
        last = "" if reaction.on_hang == "abort" else " (its main thread cannot be reached where it waits)"
        text = f"ringfence: rank {self._rank} ends with exit code {EXIT_CODE}{last}: {self._error(report.brief)}\n"
        bounded(lambda: (sys.stderr.write(text), sys.stderr.flush()), 0.2)
        reaction.end(EXIT_CODE)
        self._ended.set()

    def _comes_back(self, stuck: Position) -> bool:
        """Whether the main thread goes on within the grace."""
        until = time.monotonic() + self.deadlines.grace
        while time.monotonic() < until:
            now = self.journal.position()
            if self._reached or now.moved != stuck.moved or not now.waits:
                return True
            time.sleep(0.02)
        return False

    def _write(self, report: Report, error: BaseException | None = None) -> None:
        self.reaction.write(self.journal, self.others, report, error)

    def _error(self, report: Report) -> RingfenceError:
        return self.reaction.error(report)


def open_watchdog(
    journal: Journal,
    reaction: Reaction,
    deadlines: Deadlines | None = None,
    health: Health | None = None,
    token: str | None = None,
) -> Watchdog:
    """A running watchdog over the default process group's store. token: see :class:`Heartbeat`."""
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
        token=token,
    )
    watchdog.start()
    return watchdog
