"""Watch: journal, agreement and watchdog around steps that somebody else runs.

    watch = ringfence.watch(group, on_hang="abort", journal_dir="/var/log/job")   # every rank
    with watch.step("decode", tokens):
        engine.execute(...)

Nothing is known of what a step launches, so it counts as one call of the group: the rank that has entered fewest steps
is the one that the others wait for. Ranks must run the same steps.
"""

from __future__ import annotations

import operator
import warnings
from typing import SupportsIndex

import torch

from ..errors import ArgumentError, RingfenceError
from ..groups import describe_group
from .agree import PlanDigest
from .journal import REPLAY, UNCAPTURED, Journal, PieceNote, ProgramNote
from .rings import Marks
from .supervision import Asked, Supervision
from .supervisor import leave, supervisor_for


class Watch:
    """What :func:`watch_group` returns. The watch ends with :meth:`close`, or with the last that holds it."""

    def __init__(self, name: str, supervision: Supervision, journal: Journal, asked: Asked) -> None:
        self._name, self._supervision, self._asked = name, supervision, asked
        self._numbers: dict[str, int] = {}
        self.journal = journal

    def step(self, name: str, tokens: int = 0, *, replay: bool = False) -> WatchedStep:
        """Around one step, as ``with watch.step(...)``. What is raised inside goes on to the other ranks.

        name: what kind it is; tokens: how many it takes; replay: it replays a captured graph. These are what
        ``check_every_step`` compares.

        Raises :class:`ArgumentError`; at its beginning :class:`PoisonedError` where the ranks are out of step, and
        :class:`RankMismatch`; and in place of what was raised inside what another rank caused it with.
        """
        try:
            tokens = _checked(name, tokens, replay)
        except ArgumentError as error:
            self._supervision.refuses(error, (self._name,))
            raise
        number = self._numbers.get(name)
        if number is None:
            note = ProgramNote((PieceNote(name, not replay, (self._name,)),), name=name)
            number = self._numbers[name] = self.journal.register(note)
        how = REPLAY if replay else UNCAPTURED
        return WatchedStep(self._supervision, self.journal, self._name, name, number, tokens, how)

    def check(self) -> None:
        """Call it once the device has ended a step (a synchronisation of yours), before its outputs are used.

        Raises :class:`HangError` where a kernel has given up waiting for a peer, so that outputs since then are NaN,
        and :class:`PoisonedError` where the ranks are out of step. It waits for nothing.
        """
        self._supervision.check()

    def close(self) -> None:
        """Stop watching, as far as nobody else asks for it. The journal goes on being written."""
        leave(self._asked)


class WatchedStep:
    """What :meth:`Watch.step` returns: nothing is watched before ``with`` enters it."""

    def __init__(
        self, supervision: Supervision, journal: Journal, group: str, name: str, number: int, tokens: int, how: str
    ) -> None:
        self._supervision, self._journal, self._groups = supervision, journal, (group,)
        self._name, self._number, self._tokens, self._how = name, number, tokens, how
        self._marks: Marks | None = None
        self._entered = False

    def __enter__(self) -> None:
        self._entered = True
        supervision, sizes = self._supervision, (self._tokens,)
        try:
            supervision.check()
            supervision.before_step(sizes, self._how, first=not self._journal.has_run(self._number), name=self._name)
        except RingfenceError as error:  # another rank begins none
            supervision.refuses(error, self._groups)
            raise
        marks = self._journal.begin(self._number, sizes, self._how)
        try:
            marks.enter()
        except BaseException as error:
            supervision.break_off(error, marks)
            raise
        self._marks = marks

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        marks, self._marks = self._marks, None
        if marks is None:
            return
        try:
            if error is None:
                marks.leave()
                self._supervision.check_kernels()
        except BaseException as own:
            self._supervision.break_off(own, marks)  # raises in its place where another rank is the cause
            raise
        if error is not None:
            self._supervision.break_off(error, marks)
            return
        marks.end()

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                f"watch.step({self._name!r}) was called without `with`, and nothing was watched: "
                f"with watch.step({self._name!r}, ...): run the step",
                RuntimeWarning,
                stacklevel=2,
            )


def _checked(name: object, tokens: object, replay: object) -> int:
    """The tokens of a step. What is wrong here would be found in the journal, after a hang."""
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"a step is named by its kind, as 'decode', and {name!r} is no name")
    if not isinstance(replay, bool):
        raise ArgumentError(f"replay={replay!r} is not a bool")
    if isinstance(tokens, bool) or not isinstance(tokens, SupportsIndex) or isinstance(tokens, torch.Tensor):
        raise ArgumentError(f"tokens={tokens!r} is no number of tokens; of a tensor pass its length")
    count = operator.index(tokens)
    if count < 0:
        raise ArgumentError(f"tokens={count} is negative; it is how many the step takes")
    return count


def watch_group(name: str, device: torch.device, asked: Asked) -> Watch:
    """Watch the steps of a group's ranks. Every rank must call, as often as the others.

    Raises :class:`RankMismatch` where the ranks ask for different things.
    """
    supervisor = supervisor_for(asked)
    told = (("check_every_step", str(asked.every_step)),)
    digest = PlanDigest(told, what="options of the watch", arguments=True)
    try:
        with supervisor.compiling(asked, "call ringfence.watch"), supervisor.compilation():
            channels = supervisor.open([describe_group(name, device)], device)
            supervision = supervisor.supervise(channels, digest)
    except BaseException:
        leave(asked)  # who watches already goes on as before
        raise
    return Watch(name, supervision, supervisor.journal, asked)
