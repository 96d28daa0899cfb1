"""What accompanies the steps of a runner: agreement before, and what follows when one breaks off."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from ..channel import DEFAULT_SECONDS, Channel, failures_text, open_channel
from ..errors import CaptureError, ChannelTimeoutError, GroupFailureError, PeerFailedError, RankMismatch
from ..groups import Group, ranks_of
from .agree import GroupAgreement, PlanDigest
from .culprit import Failure, where
from .health import Health
from .heartbeat import Deadlines
from .journal import CudaMarks, Journal
from .watchdog import Reaction, Watchdog, open_watchdog

T = TypeVar("T")


class Supervision:
    """What a runner asks for. This one is for a rank on its own: nobody to agree with.

    raise_on_capture: a capture that fails is an error, instead of a step down.
    """

    def __init__(self, *, raise_on_capture: bool = False) -> None:
        self._raise_on_capture = raise_on_capture

    def check(self) -> None:
        """Before anything else of a call. Raises :class:`PoisonedError` where the ranks are out of step."""

    def before_step(self, sizes: tuple[int, ...], how: str) -> None:
        """Before each step."""

    def before_capture(self, sizes: tuple[int, ...]) -> None:
        """Before a size is captured. Raises :class:`RankMismatch` where ranks would capture different things."""

    def after_capture(self, failure: str | None) -> tuple[str, ...]:
        """Why the captures of that step are not to be kept; empty where they are."""
        return self.after_own_capture(failure)

    def after_own_capture(self, failure: str | None) -> tuple[str, ...]:
        """The same of a capture that is no other rank's business. Raises :class:`CaptureError` where that was asked."""
        if failure is not None and self._raise_on_capture:
            raise CaptureError(f"{failure} (on_capture_failure='raise')")
        return () if failure is None else (failure,)

    def failed(self, error: BaseException) -> None:
        """A step breaks off with ``error``. May raise another one in its place; called while the step is open."""


class GroupSupervision(Supervision):
    """For a rank of a group.

    agreement: what the ranks agree on; None where they cannot be asked.
    watchdog: None where the user asked for none. folder: where journals go when a step breaks off.
    every_step: compare sizes and choice of graph before each step. raise_on_capture: a capture
    that fails on one rank is an error on all of them, instead of a step down for all of them.
    """

    def __init__(
        self,
        journal: Journal,
        health: Health,
        agreement: GroupAgreement | None,
        watchdog: Watchdog | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        every_step: bool = False,
        raise_on_capture: bool = False,
    ) -> None:
        super().__init__(raise_on_capture=raise_on_capture)
        self._journal, self._health = journal, health
        self._agreement, self._watchdog, self._folder = agreement, watchdog, folder
        self._every_step = every_step
        self._steps = 0

    def check(self) -> None:
        self._health.check()

    def before_step(self, sizes: tuple[int, ...], how: str) -> None:
        if self._agreement is None or not self._every_step:
            return
        agreement, step = self._agreement, self._steps
        self._steps += 1
        self._agreed(lambda: agreement.before_step(step, sizes, how))

    def before_capture(self, sizes: tuple[int, ...]) -> None:
        if self._agreement is not None:
            agreement = self._agreement
            self._agreed(lambda: agreement.before_capture(sizes))

    def after_capture(self, failure: str | None) -> tuple[str, ...]:
        if self._agreement is None:
            return super().after_capture(failure)
        agreement = self._agreement
        failed = self._agreed(lambda: agreement.after_capture(failure))
        if failed and self._raise_on_capture:
            text = failures_text(failed)
            self._health.poison(text)
            self._journal.try_dump(self._folder, text)
            raise GroupFailureError(f"a capture failed: {text}", tuple(rank for rank, _ in failed))
        return tuple(f"rank {rank}: {reason}" for rank, reason in failed)

    def failed(self, error: BaseException) -> None:
        if self._watchdog is None:
            _dump_failure(self._journal, self._folder, error, where(self._journal.position()))
            return
        instead = self._watchdog.failed(error)
        if instead is not error:
            raise instead from error

    def _agreed(self, body: Callable[[], T]) -> T:
        try:
            return body()
        except (RankMismatch, ChannelTimeoutError) as error:
            self._health.poison(str(error))
            if self._agreement is not None:
                self._agreement.leave(str(error))  # of a mesh only the ranks of one group raise it by themselves
            if isinstance(error, ChannelTimeoutError) and self._watchdog is not None:
                self._watchdog.failed(error)
            else:
                self._journal.try_dump(self._folder, str(error))
            raise


class Supervisor:
    """One per backend: its journal, its watchdog, and the supervision of each graph that it compiles.

    on_hang: what a hang is answered by; None watches nothing and starts no thread.
    """

    def __init__(
        self,
        *,
        on_hang: str | None = None,
        deadlines: Deadlines | None = None,
        agree_seconds: float = DEFAULT_SECONDS,
        folder: str | None = None,
        every_step: bool = False,
        raise_on_capture: bool = False,
    ) -> None:
        self.journal, self.health = Journal(), Health()
        self.watchdog: Watchdog | None = None
        #: Name -> what returns JSON-ready values about the state of a device's memory, for the journal of a hang.
        self.probes: dict[str, Callable[[], Any]] = {}
        self._on_hang, self._deadlines, self._agree_seconds = on_hang, deadlines, agree_seconds
        self._folder, self._every_step, self._raise_on_capture = folder, every_step, raise_on_capture
        self._has_marks = False
        self._opened: list[Channel] = []  # for the graph that is being compiled

    def open(self, groups: Collection[Group], device: torch.device) -> dict[str, Channel]:
        """Channels among the ranks of a graph's groups, by name; this rank is watched from now on.

        Empty where there is nobody to talk to. Every rank must open them for the same graphs.
        """
        real = sorted((g for g in groups if g.size > 1 and g.backend not in _WITHOUT_PEERS), key=lambda g: g.name)
        if not real:
            return {}
        import torch.distributed as dist

        self.journal.rank = dist.get_rank()
        if device.type == "cuda" and not self._has_marks:
            self.journal.use(CudaMarks(device, self.journal.slots))
            self._has_marks = True
        if self._on_hang is not None and self.watchdog is None:
            reaction = Reaction(self._on_hang, self._folder, self.probes, _abort_groups)
            self.watchdog = open_watchdog(self.journal, reaction, self._deadlines, self.health)
        channels = {}
        for group in real:
            ranks = ranks_of(group.name)
            self.journal.name_group(group.name, ranks)
            if self.watchdog is not None:
                self.watchdog.others.join_group(group.name, ranks)
            channel = channels[group.name] = open_channel(
                group.name,
                seconds=self._agree_seconds,
                waiting=self.journal.waiting,
                interrupt=self.watchdog.interrupt if self.watchdog is not None else lambda: None,
            )
            self._opened.append(channel)
        return channels

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Around all that is done for one graph. What one rank raises, the others hear of instead of waiting for it."""
        self._opened.clear()
        try:
            yield
        except (GroupFailureError, RankMismatch, PeerFailedError) as error:  # not this rank's own
            self.health.poison(str(error))
            if not isinstance(error, GroupFailureError):  # the watchdog, which raised that, has written more
                self.journal.try_dump(self._folder, str(error))
            for channel in self._opened:  # of a mesh only the ranks of one group raise it by themselves
                channel.leave(str(error))
            raise
        except BaseException as error:
            if self.watchdog is None:
                _dump_failure(self.journal, self._folder, error, _COMPILATION)
            elif (instead := self.watchdog.failed(error, _COMPILATION)) is not error:
                raise instead from error
            for channel in self._opened:  # for ranks that nobody watches
                channel.leave(f"{type(error).__name__}: {error}")
            raise

    def supervise(self, channels: Mapping[str, Channel], digest: PlanDigest) -> Supervision:
        """Agree on a compiled graph with the ranks of its groups, and accompany its steps.

        Raises :class:`RankMismatch` and :class:`ChannelTimeoutError`.
        """
        if not channels:
            return Supervision(raise_on_capture=self._raise_on_capture)
        return GroupSupervision(
            self.journal,
            self.health,
            GroupAgreement(tuple(channels.values()), digest),
            self.watchdog,
            folder=self._folder,
            every_step=self._every_step,
            raise_on_capture=self._raise_on_capture,
        )

    def close(self) -> None:
        """Stop watching."""
        if self.watchdog is not None:
            self.watchdog.close()


_COMPILATION = "the compilation of a graph"

#: Groups whose ranks are not processes of their own.
_WITHOUT_PEERS = frozenset({"fake", "threaded"})


def _abort_groups() -> None:
    """Wake a main thread that waits in NCCL. gloo has no abort."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        group.abort()


def _dump_failure(journal: Journal, folder: str | os.PathLike[str] | None, error: BaseException, place: str) -> None:
    text = f"{type(error).__name__}: {error}"
    lines = traceback.format_exception(error)
    journal.try_dump(folder, text, failures=[asdict(Failure(journal.rank, place, text))], traceback=lines)
