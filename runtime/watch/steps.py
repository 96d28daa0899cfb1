"""Watch: journal, agreement and watchdog around steps that somebody else runs.

    watch = ringfence.watch(group, on_hang="abort", journal_dir="/var/log/job")   # every rank
    with watch.step("decode", tokens):
        engine.execute(...)

Nothing is known of what a step launches, so it counts as one call of the group: the rank that has entered fewest steps
is the one that the others wait for. Ranks must run the same steps.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator
from typing import SupportsIndex

import torch

from ..errors import ArgumentError
from ..groups import describe_group
from .agree import PlanDigest
from .journal import REPLAY, UNCAPTURED, Journal, PieceNote, ProgramNote
from .supervision import Asked, Supervision
from .supervisor import leave, supervisor_for


class Watch:
    """What :func:`watch_group` returns. The watch ends with :meth:`close`, or with the last that holds it."""

    def __init__(self, name: str, supervision: Supervision, journal: Journal, asked: Asked) -> None:
        self._name, self._supervision, self._asked = name, supervision, asked
        self._numbers: dict[str, int] = {}
        self.journal = journal

    @contextlib.contextmanager
    def step(self, name: str, tokens: int = 0, *, replay: bool = False) -> Iterator[None]:
        """Around one step. name: what kind it is; tokens: how many it takes; replay: it replays a captured graph.

        What is raised inside goes on to the other ranks; where another rank is its cause, that is raised instead.
        Raises :class:`PoisonedError` where the ranks are out of step, and :class:`ArgumentError`.
        """
        tokens = _checked(name, tokens, replay)
        number = self._numbers.get(name)
        if number is None:
            note = ProgramNote((PieceNote(name, not replay, (self._name,)),), name=name)
            number = self._numbers[name] = self.journal.register(note)
        self._supervision.check()
        self._supervision.before_step((tokens,), name, first=not self.journal.has_run(number))
        marks = self.journal.begin(number, (tokens,), REPLAY if replay else UNCAPTURED)
        try:
            marks.enter()
            yield
            marks.leave()
            self._supervision.check_kernels()
        except BaseException as error:
            self._supervision.break_off(error, marks)  # raises in its place where another rank is the cause
            raise
        marks.end()

    def check(self) -> None:
        """Call it once the device has ended a step (a synchronisation of yours), before its outputs are used.

        Raises :class:`HangError` where a kernel has given up waiting for a peer, so that outputs since then are NaN,
        and :class:`PoisonedError` where the ranks are out of step. It waits for nothing.
        """
        self._supervision.check()

    def close(self) -> None:
        """Stop watching, as far as nobody else asks for it. The journal goes on being written."""
        leave(self._asked)


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


def watch_group(
    name: str,
    device: torch.device,
    asked: Asked,
    *,
    own: Collection[str] = ("journal_dir",),
) -> Watch:
    """Watch the steps of a group's ranks. Every rank must call, as often as the others.

    own: of the settings, those that may differ between ranks.

    Raises :class:`RankMismatch` where the ranks ask for different things.
    """
    supervisor = supervisor_for(asked)
    group = describe_group(name, device)
    settings = (*sorted(asked.process.items()), ("check_every_step", asked.every_step))
    told = tuple((key, str(value)) for key, value in settings if key not in own)
    with supervisor.compiling(asked), supervisor.compilation():
        channels = supervisor.open([group], device)
        supervision = supervisor.supervise(channels, PlanDigest(told, lockstep=False, what="options of the watch"))
    return Watch(name, supervision, supervisor.journal, asked)
