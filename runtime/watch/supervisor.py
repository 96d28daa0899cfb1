"""The supervisor of a process: one journal, one watchdog, one count of each group's calls, for all its backends.

Ranks are processes, so whatever tells them apart belongs to the process: a draft and a target model, or the graphs
of one model that are compiled by backends of their own, share it. It is found through the default process group,
in a weak table which, with that of the workspaces, is this package's only state beyond a call. Who destroys the
group and initialises it again starts anew.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ..channel import COMPILING, LOOK_SECONDS, Channel, open_channel, store_of
from ..errors import (
    ChannelTimeoutError,
    GroupFailureError,
    HangError,
    OptionsError,
    PeerFailedError,
    RankMismatch,
    RecompiledAloneError,
    on_one_line,
)
from ..groups import Group, ranks_of, with_peers
from ..meeting import Start, leave_last_words, meet, raise_last_words, start_of, world_store
from . import user_code
from .agree import GroupAgreement, PlanDigest
from .bounded import BoundedWaits
from .cause import is_of_a_peer
from .culprit import Finding, place_of
from .deadlines import Deadlines
from .ending import broken_off, how_it_ends, on_uncaught
from .folder import Origin
from .health import Health
from .journal import Journal
from .marks import CudaMarks
from .page import Neighbours, Page
from .reaction import Reaction, abort_groups
from .recompile import CompiledGraph, graph_being_compiled
from .report import Report
from .settings import Own, alike, deadlines_of, differs_here, tell_differences, tell_unwatched
from .supervision import Asked, Supervision
from .watchdog import Watchdog, open_watchdog

_COMPILATION = "the compilation of a graph"


@dataclass
class _Graph:
    """What is being compiled, for whom, and the channels that were opened for it."""

    asked: Asked
    about: CompiledGraph = field(default_factory=CompiledGraph)
    opened: list[Channel] = field(default_factory=list)
    purpose: str = COMPILING


class Supervisor:
    """See above. A backend joins it with what it asks for; what several ask of the process must be the same.

    It watches as long as somebody asks for it (``on_hang``): a backend that was not closed, or a graph of one.
    """

    def __init__(self) -> None:
        self.journal, self.health, self.waits = Journal(), Health(), BoundedWaits()
        self.watchdog: Watchdog | None = None
        #: Name -> what returns JSON-ready values about the state of a device's memory, for the journal of a hang.
        self.probes: dict[str, Callable[[], Any]] = {}
        self._asked: weakref.WeakSet[Asked] = weakref.WeakSet()
        self._graph = _Graph(Asked())
        self.start = Start.of_this_process()
        self._met: dict[str, tuple[str, ...]] = {}  # the tokens of each group's processes
        self._tokens: dict[int, str] = {}  # of all of them, by rank
        self._forget_uncaught: Callable[[], None] | None = None
        self._neighbours: dict[str, Neighbours] = {}
        self._has_marks, self._first = False, 0
        self._looked = 0.0  # whether a rank has died, which it left in the store
        self._told: set[str] = set()  # what of the ranks' own options differs

    # -- who asks for what -------------------------------------------------------------------

    def join(self, asked: Asked) -> None:
        """Raises :class:`OptionsError` where another backend asks for something else of the process."""
        if asked in self._asked:
            return
        if differs_here(self._settings, asked.process) is not None:
            gc.collect()  # a backend that nobody holds any more asks for nothing
        if (differs := differs_here(self._settings, asked.process)) is not None:
            raise OptionsError(differs)
        self._asked.add(asked)
        weakref.finalize(asked, _rest, weakref.ref(self)).atexit = False
        if self.watchdog is not None and self._settings:
            self.watchdog.configure(self._reaction(), self.deadlines)
        if self._forget_uncaught is None and self._tells_of_its_death:
            died, supervisor = Supervisor._died, weakref.ref(self)
            self._forget_uncaught = on_uncaught(lambda error: died(found, error) if (found := supervisor()) else None)

    def leave(self, asked: Asked) -> None:
        """The watch ends with the last that asked for it."""
        self._asked.discard(asked)
        self.rest()

    def knows(self, asked: Asked) -> bool:
        return asked in self._asked

    def rest(self) -> None:
        """Stop watching if nobody asks for it any more; else watch as those ask that are left."""
        if not self._tells_of_its_death:
            self.close()
        elif self.watchdog is not None and self._settings.get("on_hang") is None:
            self.watchdog.close()
        elif self.watchdog is not None:
            self.watchdog.configure(self._reaction(), self.deadlines)

    def close(self) -> None:
        """Stop watching, whoever asks for it."""
        if self._forget_uncaught is not None:
            self._forget_uncaught()
            self._forget_uncaught = None
        if self.watchdog is not None:
            self.watchdog.close()

    @property
    def _tells_of_its_death(self) -> bool:
        """Whether the others are to hear of an exception that ends this process between two calls of the model."""
        return self._settings.get("on_hang") is not None or any(asked.every_step for asked in self._asked)

    @property
    def folder(self) -> str | None:
        """Where journals go; None writes none."""
        return self._settings.get("journal_dir")

    @property
    def _settings(self) -> dict[str, Any]:
        return {name: value for asked in self._asked for name, value in asked.process.items()}

    @property
    def deadlines(self) -> Deadlines:
        return deadlines_of(self._settings)

    def _reaction(self) -> Reaction:
        on_hang = self._settings.get("on_hang") or "report"
        return Reaction(on_hang, self.folder, self.probes, abort_groups, self.waits)

    # -- while a graph is compiled ------------------------------------------------------------

    @contextlib.contextmanager
    def compiling(self, asked: Asked, purpose: str = COMPILING) -> Iterator[None]:
        """Around all that a backend does for one graph. purpose: what else the ranks do together (``"call f"``)."""
        before, self._graph = self._graph, _Graph(asked, graph_being_compiled(), purpose=purpose)
        self.journal.compiling(True, self._graph.about.why)
        try:
            yield
        finally:
            self.journal.compiling(False)
            self._graph = before

    def open(self, groups: Collection[Group], device: torch.device) -> dict[str, Channel]:
        """Channels among the ranks of a graph's groups, by name; this rank is watched from now on.

        Empty where there is nobody to talk to. Every rank must open them for the same graphs, in the same order.
        """
        real = with_peers(groups)
        if not real:
            return {}
        self.journal.rank = dist.get_rank()
        if device.type == "cuda" and not self._has_marks:
            self.journal.use(CudaMarks(device, self.journal.slots))
            self._has_marks = True
        if self._settings.get("on_hang") is not None:
            self._watch()
        elif self.folder is not None:
            tell_unwatched(self.folder, self.journal.rank, self._told)
        return {group.name: self._open(group.name, turn) for group, turn in real}

    def _watch(self) -> None:
        if self.watchdog is None:
            self.watchdog = open_watchdog(self.journal, self._reaction(), self.deadlines, self.health, self.start.token)
            self.journal.one_caller = True
        else:
            self.watchdog.start()

    def _open(self, name: str, turn: int) -> Channel:
        ranks = ranks_of(name)
        self.journal.name_group(name, ranks)
        hooks: dict[str, Any] = {
            "seconds": self._graph.asked.agree_seconds,
            "waiting": functools.partial(self.journal.waiting, among=ranks),
            "interrupt": functools.partial(self._interrupt, name),
        }
        if name not in self._met:
            store, _ = store_of(name)
            self._met[name] = meet(store, world_store(), self.start, ranks.index(dist.get_rank()), ranks, **hooks)
            self._tokens |= dict(zip(ranks, self._met[name], strict=True))
        start = self.start
        self.journal.begin_file(self.folder, Origin(start.token, self._tokens, start.run, start.attempt))
        if self.watchdog is not None:
            self.watchdog.others.join_group(name, ranks, self._met[name])
        channel = open_channel(name, start=start_of(self._met[name]) + "+" * turn, purpose=self._graph.purpose, **hooks)
        channel.about = self._graph.about.why if self._graph.about.guard else ""
        self._graph.opened.append(channel)
        if name not in self._neighbours and (page := Page.make()) is not None:
            self._neighbours[name] = Neighbours(channel, page, ranks)
            self.journal.show(name, page.calls)
        return channel

    def _interrupt(self, group: str) -> None:
        """Raise why nobody comes to an exchange, as far as that is known."""
        if self.watchdog is not None and self.watchdog.runs:  # it hears of ranks on other hosts too, and tells them
            self.watchdog.interrupt()
            return
        now = time.monotonic()
        if group in self._met and now > self._looked + LOOK_SECONDS:
            self._looked = now
            for rank in ranks_of(group):
                raise_last_words(world_store(), self.start, self.journal.rank, rank)
        if (neighbours := self._neighbours.get(group)) is not None:
            neighbours.check(self.journal, group)

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Around what AOT has compiled: what one rank raises there, the others hear of instead of waiting for it."""
        self._graph.opened.clear()
        try:
            yield
        except (GroupFailureError, RankMismatch, PeerFailedError) as error:  # not this rank's own
            in_step = isinstance(error, RankMismatch) and error.in_step
            if not in_step:
                self.health.poison(str(error))
            if self.watchdog is None or self.watchdog.report is None:  # the watchdog has written more
                self.write(str(error), report=self._report(error))
            for channel in self._graph.opened:  # of a mesh only the ranks of one group raise it by themselves
                channel.leave(str(error), in_step=in_step)
            raise
        except BaseException as error:
            try:
                self.broke_off(error, _COMPILATION)
            finally:
                for channel in self._graph.opened:  # for ranks that nobody watches
                    channel.leave(f"{type(error).__name__}: {error}", in_step=isinstance(error, Exception))
            raise
        finally:
            for channel in self._graph.opened:
                channel.about = ""

    def supervise(self, channels: Mapping[str, Channel], digest: PlanDigest) -> Supervision:
        """Agree on a compiled graph with the ranks of its groups, and accompany its steps.

        Raises :class:`RankMismatch` and :class:`ChannelTimeoutError`.
        """
        graph = self._graph
        if not channels:
            return Supervision(asked=graph.asked, graph=graph.about.name)
        agreement = GroupAgreement(tuple(channels.values()), self.compared(digest))
        own = Own(graph.asked.agree_seconds, self.folder is not None)
        for name, channel in channels.items():  # a rank that failed, or ran a step uncompiled, has counted fewer
            calls, owns = zip(*channel.exchange("calls so far", (self.journal.calls(name), own)), strict=True)
            self.journal.count_from(name, max(calls))
            tell_differences(owns, channel, self._told)
        return Supervision(self, agreement, graph.asked, graph.about.name)

    def compared(self, digest: PlanDigest) -> PlanDigest:
        """With what the ranks must have alike of the process's options, whoever gave them."""
        if self._settings.keys() - self._graph.asked.process.keys():
            gc.collect()  # as in join: which ranks have collected it is luck
        return replace(digest, parts=(*alike(self._settings), *digest.parts))

    def begins(self, first: bool) -> None:
        """A step begins. Until the last first one of its kind has ended, kernels have the patience of a warm-up."""
        self._first = self.journal.begun if first else self._first
        self.waits.begins(first, self.deadlines.warm_up if first else 0.0, self._is_busy)

    def _is_busy(self) -> bool:
        """Whether that step, or one before, still runs on the device; in a capture the device may not be asked."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return True
        at = self.journal.position()  # an engine that runs ahead always has a later step there
        return bool(at.exchange) or (at.stuck_in_piece and at.step <= self._first)

    def check(self) -> None:
        """Raises :class:`HangError` where a kernel has given up, :class:`PoisonedError` where ranks are out of step."""
        Supervision(self).check()

    def refused(self, error: Exception, groups: Collection[str]) -> None:
        """A call of the model over these groups is an error, and began no step."""
        self.journal.refuse(groups, on_one_line(error))

    # -- when something breaks off ---------------------------------------------------------------

    def broke_off(self, error: BaseException, place: str | None = None) -> None:
        """Tell the others, and write the journal; place: if not in a step. Raises what is to be raised instead."""
        if self.watchdog is None:
            told = next(filter(None, (n.told() for n in self._neighbours.values())), None)
            if told is not None and is_of_a_peer(error):
                self.health.poison(*told)
                alone = Report("alone", told[1][0], Finding(told[1], (self.journal.rank,), told[0]))
                self.write(told[0], report=alone, **user_code.written(error))
                raise RecompiledAloneError(*told) from error
            self._write_own(error, place)
            return
        try:
            instead = self.watchdog.failed(error, place)
        except BaseException as told:  # a signal that came while the main thread sat in the collective
            self.watchdog.ends(told)
            raise
        if instead is not error:
            raise instead from error

    def _died(self, error: BaseException) -> None:
        """An exception outside of every call ends this process. Whoever knows of its cause already has told it."""
        if self.health.poisoned is not None or not dist.is_initialized():
            return
        self.journal.rank = dist.get_rank()
        position = self.journal.position()
        place = f"its own code, {place_of(position)}"
        if self.watchdog is not None and self._met:
            self.watchdog.failed(error, place)
            return
        self._write_own(error, place)
        if how_it_ends(error, waits=False) is None:
            sentence = f"rank {self.journal.rank} failed in {place}: {type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # the store may be gone
                leave_last_words(world_store(), self.start, self.journal.rank, dist.get_world_size(), sentence)

    def _write_own(self, error: BaseException, place: str | None) -> None:
        """What broke a step of this rank off, where nobody watches."""
        report = broken_off(error, self.journal.position(), place, victim=is_of_a_peer(error))
        if isinstance(error, HangError):
            self.health.poison(str(error), error.ranks)
        failures = [asdict(report.failure)] if report.failure is not None else []
        self.write(report.sentence, report=report, failures=failures, **user_code.written(error))

    def disagreed(self, error: Exception) -> None:
        """An exchange beside the steps came to no agreement."""
        self.health.poison(str(error))
        if isinstance(error, ChannelTimeoutError) and self.watchdog is not None:
            self.watchdog.failed(error)
        elif self.watchdog is None or self.watchdog.report is None:
            self.write(str(error), report=self._report(error))

    def _report(self, error: Exception) -> Report | None:
        """What is known of who is to blame where no watchdog looked."""
        if isinstance(error, RecompiledAloneError):
            waiting = tuple(r for n in self._neighbours.values() for r in n.ranks if r not in error.ranks)
            return Report("alone", self.journal.rank, Finding(error.ranks, waiting, str(error)))
        return None

    def write(self, reason: str, **more: Any) -> None:
        """Write the journal where somebody asked for it."""
        self.journal.try_dump(self.folder, reason, **more)


class _NoWorld:
    """Stands for the default process group where there is none."""


_NO_WORLD = _NoWorld()
_of_world: weakref.WeakKeyDictionary[Any, Supervisor] = weakref.WeakKeyDictionary()


def supervisor_for(asked: Asked) -> Supervisor:
    """The supervisor of this process, which a backend has joined then.

    One whose ranks are out of step serves its own backends only; another backend starts anew, as on the other ranks.
    Raises :class:`OptionsError` where the backends ask for different things.
    """
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    key = world if world is not None else _NO_WORLD
    found = _of_world.get(key)
    if found is None or (found.health.poisoned is not None and not found.knows(asked)):
        for old in list(_of_world.values()):  # of a process group that was destroyed, too: something may still hold it
            old.close()
        _of_world[key] = found = Supervisor()
    found.join(asked)
    return found


def leave(asked: Asked) -> None:
    """What a backend asked for counts no more, in whatever process group it was used."""
    for supervisor in list(_of_world.values()):
        supervisor.leave(asked)


def _rest(supervisor: weakref.ref[Supervisor]) -> None:
    found = supervisor()
    if found is not None:
        found.rest()
