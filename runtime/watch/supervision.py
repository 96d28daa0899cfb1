"""What accompanies the steps of a graph: agreement before, and what follows when one breaks off."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..channel import DEFAULT_SECONDS
from ..errors import CaptureError, ChannelTimeoutError, GroupFailureError, HangError, RankMismatch
from ..spelling import failures_text
from .agree import HOW, GroupAgreement
from .bounded import BoundedWaits
from .health import Health
from .journal import CAPTURE
from .position import sizes_text
from .rings import Marks

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a backend asks of the supervisor.

    process: of the options that are the process's (:data:`.settings.OF_PROCESS`), those that it was given. The rest
    is for its own graphs: agree_seconds, how long an exchange waits; every_step, compare sizes and choice of graph
    before each step; raise_on_capture, a capture that fails on one rank is an error on all, instead of a step down for
    all. agreements: of its graphs, while they live.
    """

    process: Mapping[str, Any] = field(default_factory=dict)
    agree_seconds: float = DEFAULT_SECONDS
    every_step: bool = False
    raise_on_capture: bool = False
    agreements: weakref.WeakSet[GroupAgreement] = field(default_factory=weakref.WeakSet, repr=False)


class Watching(Protocol):
    """What steps tell the supervisor of the process."""

    @property
    def health(self) -> Health:
        """Whether the ranks are in step."""

    @property
    def waits(self) -> BoundedWaits:
        """Kernels that end a wait by themselves."""

    def begins(self, first: bool) -> None:
        """A step begins; first: of its kind."""

    def write(self, reason: str) -> Any:
        """Write the journal down."""

    def refused(self, error: Exception, groups: Collection[str]) -> None:
        """A call over these groups began no step."""

    def broke_off(self, error: BaseException) -> None:
        """A step breaks off. May raise another error in its place."""

    def disagreed(self, error: Exception) -> None:
        """The ranks do not go the same way."""


@dataclass
class Supervision:
    """What a runner asks for. Without a supervisor: for a rank on its own, with nobody to agree with.

    agreement: what the ranks agree on; None where they cannot be asked. asked: by the graph's backend, which is
    known to the supervisor as long as a graph of it lives. graph: its name.
    """

    supervisor: Watching | None = None
    agreement: GroupAgreement | None = None
    asked: Asked | None = None
    graph: str = ""
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.agreement is not None and self.asked is not None:
            self.asked.agreements.add(self.agreement)

    def check(self) -> None:
        """Before anything else of a call. Raises :class:`PoisonedError` where the ranks are out of step.

        And :class:`HangError` where a kernel has given up waiting since the last call; then the ranks are out of step.
        """
        if self.supervisor is None:
            return
        self.supervisor.health.check()
        try:
            self.check_kernels()
        except HangError as error:
            self.failed(error)  # raises in its place what says more
            raise

    def check_kernels(self) -> None:
        """Raises :class:`HangError` where a kernel has given up waiting. Waits for nothing."""
        lost = self.supervisor.waits.lost() if self.supervisor is not None else None
        if lost is not None:
            raise lost

    def before_step(self, sizes: tuple[int, ...], how: str, *, first: bool = False, name: str = "") -> None:
        """Before each step. first: of its kind, so that ranks may come to it minutes apart. name: of its kind.

        Raises :class:`RankMismatch` where ranks choose differently, if that is asked for.
        """
        if self.supervisor is not None:
            self.supervisor.begins(first or how == CAPTURE)
        if self.agreement is None or self.asked is None or not self.asked.every_step:
            return
        agreement, step = self.agreement, self._steps
        self._agreed(lambda: agreement.before_step(step, (("name", name), ("sizes", sizes_text(sizes)), (HOW, how))))
        self._steps += 1

    def refuses(self, error: Exception, groups: Collection[str]) -> None:
        """A call ends with ``error``, and its step does not begin: the others may begin theirs, and wait for this rank.

        The watch tells them so, unless they refuse the call too. Where every step is compared they read it at once, in
        whichever graph of the backend they come to, and give the call up: then all are in step, and may call again.
        groups: those that the step has calls of.
        """
        if self.supervisor is None or self.supervisor.health.poisoned is not None:
            return
        self.supervisor.refused(error, groups)
        if self.asked is not None and self.asked.every_step:
            for agreement in tuple(self.asked.agreements):
                agreement.pass_over(error)

    def before_capture(self, sizes: tuple[int, ...]) -> None:
        """Before a size is captured. Raises :class:`RankMismatch` where ranks would capture different things."""
        if self.agreement is not None:
            agreement = self.agreement
            self._agreed(lambda: agreement.before_capture(sizes))

    @property
    def peers(self) -> bool:
        """Whether there are other ranks that must go the same way."""
        return self.agreement is not None

    def moved(self, sizes: tuple[int, ...], name: str | None) -> tuple[str | None, ...]:
        """What the ranks say of their captured parameters: which one moved, or None. Every rank must ask."""
        if self.agreement is None:
            return (name,)
        agreement = self.agreement
        return self._agreed(lambda: agreement.moved(sizes, name))

    def after_capture(self, failure: str | None) -> tuple[str, ...]:
        """Why the captures of that step are not to be kept; empty where they are.

        A capture that failed on one rank is an error on all, where that is asked for.
        """
        if self.agreement is None or self.supervisor is None:
            return self.after_own_capture(failure)
        agreement = self.agreement
        failed = self._agreed(lambda: agreement.after_capture(failure))
        if failed and self._raises_on_capture:
            text = failures_text(failed)
            self.supervisor.health.poison(text)
            self.supervisor.write(text)
            raise GroupFailureError(f"a capture failed: {text}", tuple(rank for rank, _ in failed))
        return tuple(f"rank {rank}: {reason}" for rank, reason in failed)

    def after_own_capture(self, failure: str | None) -> tuple[str, ...]:
        """The same of a capture that is no other rank's business. Raises :class:`CaptureError` where that was asked."""
        if failure is not None and self._raises_on_capture:
            raise CaptureError(f"{failure} (on_capture_failure='raise')")
        return () if failure is None else (failure,)

    @property
    def _raises_on_capture(self) -> bool:
        return self.asked is not None and self.asked.raise_on_capture

    def failed(self, error: BaseException) -> None:
        """A step breaks off with ``error``. May raise another one in its place; called while the step is open."""
        if self.supervisor is not None:
            self.supervisor.broke_off(error)

    def break_off(self, error: BaseException, marks: Marks) -> None:
        """The same, and the step's marks end with it."""
        try:
            self.failed(error)
        finally:
            marks.fail()

    def _agreed(self, body: Callable[[], T]) -> T:
        try:
            return body()
        except (RankMismatch, ChannelTimeoutError, GroupFailureError) as error:
            if isinstance(error, RankMismatch) and error.in_step:
                raise
            if self.agreement is not None:
                self.agreement.leave(str(error))  # of a mesh only the ranks of one group raise it by themselves
            if self.supervisor is not None:
                self.supervisor.disagreed(error)
            raise
