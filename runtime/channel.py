"""What the ranks of a group tell each other beside the devices: small values, through the store.

A collective on the device cannot be used to agree on whether to run collectives on the device,
and c10d's object collectives wait for a missing rank without saying which. A store
(the one that ``init_process_group`` made) can be asked who has answered, so every exchange
here has a deadline and names the ranks that missed it.

Exchanges of one channel are numbered: the n-th of each rank belongs together. A channel that
is opened anew, as for each graph that is compiled, is told apart by how often each rank has
opened it.

Ranks that open unequally often, because one compiled a graph that another did not, would meet
what was never meant for them. So a rank that breaks off an exchange takes its answer back: an
answer stands for a rank that waits, or that has heard everybody. And a rank that waits for one
that has opened more often skips what it lacks, and says so where the other waits: both raise,
and the next opening of each belongs together again.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .errors import ChannelTimeoutError, GroupFailureError, PeerFailedError, RankLeftError, RankMismatch, RingfenceError
from .spelling import Failures, by_value, failures_text, ranks_text

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What most channels are opened for.
COMPILING = "compile a graph"
_PURPOSE = "purpose"
#: Peers may compile for minutes longer: another cache, a slower disk.
DEFAULT_SECONDS = 600.0
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.0005, 0.02
#: How often a rank that waits looks how often the others have opened a channel.
LOOK_SECONDS = 0.25
#: After this it says for whom it waits; then after three times as long, and so on.
_TELL_SECONDS = 20.0


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: Any, /) -> None: ...  # bytes; torch types it as str
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def delete_key(self, key: str, /) -> bool: ...


@dataclass(frozen=True)
class _Failed:
    """What a rank exchanges in place of a value when it cannot go on."""

    reason: str


@dataclass(frozen=True)
class _Left:
    """What stands in place of the answer of a rank that does not come, or not any more.

    in_step: it gives up the whole call, and may make the next; so do those that hear of it.
    """

    sentence: str
    in_step: bool = False


class _Skipped(_Left):
    """The same, of a rank that passes over a whole opening."""


class _PassedOver(_Left):
    """The same, of a rank that passes over one exchange, and comes to the next."""


class Patience:
    """A wait for other ranks: how long it lasts, what it says meanwhile, and what may break it off.

    topic: what they do not come to. seconds: the deadline. me: this rank. interrupt: see :class:`Channel`.
    about: what this rank says of itself where it waits in vain.
    """

    def __init__(
        self, topic: str, seconds: float, me: int, interrupt: Callable[[], None], about: Callable[[], str] = str
    ) -> None:
        self._topic, self._seconds, self._me, self._interrupt, self._about = topic, seconds, me, interrupt, about
        self._sleep, self._began = _SHORTEST_SLEEP, time.monotonic()
        self._look, self._tell = self._began + LOOK_SECONDS, self._began + _TELL_SECONDS

    def looks(self) -> bool:
        """Whether it is time for what costs more than asking who has come."""
        now = time.monotonic()
        if now <= self._look:
            return False
        self._look = now + LOOK_SECONDS
        return True

    def wait(self, missing: tuple[int, ...]) -> None:
        """Wait a moment for these ranks. Raises :class:`ChannelTimeoutError` at the deadline."""
        waited = time.monotonic() - self._began
        about = self._about()
        about = f"; rank {self._me} {about}" if about else ""
        if waited > self._seconds:
            raise ChannelTimeoutError(
                f"{ranks_text(missing)} did not come to '{self._topic}' within {self._seconds:g} s; "
                f"look at what those processes do: they died, hang, or run something else{about}",
                missing,
            )
        if time.monotonic() > self._tell:
            self._tell += 2 * (self._tell - self._began)
            log.warning(
                "ringfence: rank %d waits for %s in the exchange '%s' since %.0f s, and for %.0f s at most%s",
                self._me,
                ranks_text(missing),
                self._topic,
                waited,
                self._seconds,
                about,
            )
        self._interrupt()
        time.sleep(self._sleep)
        self._sleep = min(2 * self._sleep, _LONGEST_SLEEP)


class Channel:
    """Exchanges among the ranks of one group.

    store: one that all ranks share, under a prefix of this group's own.
    rank, size: of the group. seconds: how long an exchange waits for the slowest rank.
    ranks: what people call each rank of the group: its global rank. interrupt: called while waiting, raises
    what is known about why nobody comes. waiting: entered, with the topic, around all that may not return
    because of another rank; that is every request to the store too, whose host may be stopped.
    about: what this rank says of itself where it waits in vain, such as why it compiles.
    purpose: what the channel is opened for, where this rank comes to nothing else.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        seconds: float = DEFAULT_SECONDS,
        ranks: Sequence[int] | None = None,
        interrupt: Callable[[], None] = lambda: None,
        waiting: Callable[[str], AbstractContextManager[None]] = lambda topic: contextlib.nullcontext(),
        purpose: str = COMPILING,
    ) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        self.ranks = tuple(ranks if ranks is not None else range(size))
        self._store, self.interrupt, self.waiting = store, interrupt, waiting
        with waiting("open a channel"):
            self._opened = store.add(f"opened/{rank}", 1)
            self.post(_PURPOSE, purpose)
            store.delete_key(f"{self._opened - 1}/{_PURPOSE}/{rank}")  # who is behind asks about the last
        self._exchanges = self._kept = 0  # kept: the first of which this rank's answer may still be there
        self.about = ""

    def post(self, what: str, value: str) -> None:
        """Leave something for the others, who need not come for it."""
        self._store.set(f"{self._opened}/{what}/{self.rank}", value.encode())

    def posted(self, what: str, rank: int) -> str | None:
        """What a rank has left, in the same opening; None where it has not yet."""
        key = f"{self._opened}/{what}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def exchange(self, topic: str, value: Any, *, seconds: float | None = None) -> list[Any]:
        """Every rank's ``value``, by rank; small and picklable. Every rank must call, with the same topic.

        Raises :class:`ChannelTimeoutError` naming the ranks that did not come in time,
        :class:`RankLeftError` where one will not come, and :class:`RankMismatch` where ranks
        came to exchange different things.
        """
        with self.waiting(topic):
            answers = self._answers(topic, value, self.seconds if seconds is None else seconds)
        said = zip(self.ranks, answers, strict=True)
        if failures := tuple((rank, v.reason) for rank, (_, v) in said if isinstance(v, _Failed)):
            raise PeerFailedError(failures_text(failures), failures)
        topics = [t for t, _ in answers]
        if len(set(topics)) > 1:
            raise RankMismatch(f"ranks do different things: {by_value(topics, self.ranks)}")
        return [v for _, v in answers]

    def _answers(self, topic: str, value: Any, seconds: float) -> list[tuple[str, Any]]:
        key = f"{self._opened}/{self._exchanges}"
        self._answer(key, topic, value)
        try:
            answers = self._collect(key, topic, seconds)
        except BaseException as error:
            left = _Left(f"rank {self.ranks[self.rank]} left '{topic}': {_reason(error)}")
            if isinstance(error, RankLeftError):
                left = _Left(str(error), error.in_step)
            with contextlib.suppress(RuntimeError):  # it may be the store that is gone
                self._answer(key, topic, left)
            raise
        if isinstance(passed := answers[0][1], _PassedOver):
            raise RankLeftError(passed.sentence, in_step=True)
        for earlier in range(self._kept, self._exchanges):  # whoever is here has come past them
            self._store.delete_key(f"{self._opened}/{earlier}/{self.rank}")
        self._kept = self._exchanges
        self._exchanges += 1
        return answers

    def pass_over(self, why: str) -> None:
        """Come to the exchange after the next one, and wait for nobody.

        Those that wait in it, or will, raise :class:`RankLeftError` with ``why``, and must pass it over too: all are in
        step then.
        """
        with contextlib.suppress(RuntimeError):  # it may be the store that is gone
            self._answer(f"{self._opened}/{self._exchanges}", "", _PassedOver(why, in_step=True))
        self._exchanges += 1

    def leave(self, why: str, *, in_step: bool = False) -> None:
        """Say that this rank comes to no further exchange; the others raise :class:`RankLeftError` then.

        in_step: as they do, it gives up what was begun, and nothing else was done.
        """
        left = _Left(f"rank {self.ranks[self.rank]} left: {why}", in_step)
        with contextlib.suppress(RuntimeError):  # it may be the store that is gone
            self._answer(f"{self._opened}/{self._exchanges}", "", left)

    def barrier(self, topic: str) -> None:
        """Wait until every rank is here."""
        self.exchange(topic, None)

    def attempt(self, topic: str, action: Callable[[], T]) -> tuple[T | None, Failures]:
        """Do something on every rank, and learn on which it failed; no failures if it succeeded on all.

        ``action`` may exchange things itself: where one rank fails, the others are not left waiting
        for it. Every rank gets the same failures. A result of this rank comes with them, to be undone.
        """
        result = None
        try:
            result = action()
        except PeerFailedError as error:  # in an exchange of the action's own
            return None, error.failures
        except (ChannelTimeoutError, GroupFailureError, RankMismatch) as error:  # not of the action: nothing goes on
            self.leave(_reason(error))
            raise
        except Exception as error:
            failed: Any = _Failed(_reason(error))
        else:
            failed = None
        try:
            self.exchange(topic, failed)
        except PeerFailedError as error:
            return result, error.failures
        return result, ()

    def _collect(self, key: str, topic: str, seconds: float) -> list[tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        patience = Patience(topic, seconds, self.ranks[self.rank], lambda: self.interrupt(), lambda: self.about)
        again = False
        while True:
            for rank in range(self.size):  # who has answered may have left since
                if (again or rank not in answers) and self._has_answered(key, rank):
                    answers[rank] = self._answer_of(key, rank)
                    if isinstance(left := answers[rank][1], _Left):
                        if isinstance(left, _PassedOver):
                            return [answers[rank]]
                        if left.in_step:  # it may have opened the next, to which this rank comes too
                            raise RankLeftError(left.sentence, in_step=True)
                        raise RankLeftError(self._catch_up() or left.sentence)
            if len(answers) == self.size:
                return [answers[rank] for rank in range(self.size)]
            missing = [rank for rank in range(self.size) if rank not in answers]
            again = patience.looks()
            if again and self._has_passed(key, missing) and (sentence := self._catch_up()):
                raise RankLeftError(sentence)
            patience.wait(tuple(self.ranks[rank] for rank in missing))

    def _answer(self, key: str, topic: str, value: Any) -> None:
        self._store.set(f"{key}/{self.rank}", pickle.dumps((topic, value)))

    def _has_answered(self, key: str, rank: int) -> bool:
        return self._store.check([f"{key}/{rank}"])

    def _answer_of(self, key: str, rank: int) -> tuple[str, Any]:
        answer: tuple[str, Any] = pickle.loads(self._store.get(f"{key}/{rank}"))
        return answer

    def _has_passed(self, key: str, missing: Sequence[int]) -> bool:
        """Whether a missing rank has opened a channel that this one has not. Then it will not come to this exchange."""
        opened = self._opened_by_rank()
        ahead = [rank for rank in missing if opened[rank] > opened[self.rank]]
        # One may have answered, heard everybody and gone on since it was found missing.
        return any(not self._has_answered(key, rank) for rank in ahead)

    def _catch_up(self) -> str | None:
        """Skip what other ranks have opened and this one has not, and tell those that wait. Why; None if nothing.

        Those that wait stand in the first exchange of the last opening: further they cannot come alone,
        and ranks in an opening before that one see for themselves that they are behind.
        """
        opened = self._opened_by_rank()
        mine, most = opened[self.rank], max(opened)
        if mine == most:
            return None
        ahead = [r for r, n in enumerate(opened) if n == most and not self._has_skipped(most, r)]
        told, me = ranks_text([self.ranks[r] for r in ahead]), f"rank {self.ranks[self.rank]}"
        sentence = (
            f"{me} is at opening {mine} of the channel, and {told} at opening {most}: "
            f"{me} did not {self._purpose(most, ahead)} where {told} did"
        )
        self._answer(f"{most}/0", "", _Skipped(sentence))
        self._store.add(f"opened/{self.rank}", most - mine)
        return sentence

    def _purpose(self, opening: int, ranks: Sequence[int]) -> str:
        """What one of these ranks opened it for."""
        keys = [key for rank in ranks if self._store.check([key := f"{opening}/{_PURPOSE}/{rank}"])]
        return self._store.get(keys[0]).decode() if keys else COMPILING

    def _has_skipped(self, opening: int, rank: int) -> bool:
        key = f"{opening}/0"
        return self._has_answered(key, rank) and isinstance(self._answer_of(key, rank)[1], _Skipped)

    def _opened_by_rank(self) -> list[int]:
        return [self._store.add(f"opened/{rank}", 0) for rank in range(self.size)]


def open_channel(group_name: str, *, seconds: float = DEFAULT_SECONDS, start: str = "", **hooks: Any) -> Channel:
    """A channel among the ranks of a process group. Every rank of it must open it as often as the others.

    start: tells the processes of this start of the job from those of another (:mod:`.meeting`), whose answers the
    store may still hold. hooks: ``interrupt`` and ``waiting`` of :class:`Channel`.
    """
    from .groups import resolve_group

    group = resolve_group(group_name)
    store, ranks = store_of(group_name, start)
    return Channel(store, group.rank(), group.size(), seconds=seconds, ranks=ranks, **hooks)


def store_of(group_name: str, start: str = "") -> tuple[Store, tuple[int, ...]]:
    """The store that the ranks of a process group share, under a prefix of its own, and its global ranks."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from .groups import resolve_group

    group = resolve_group(group_name)
    ranks = tuple(dist.get_process_group_ranks(group))
    # By torch's name, as ranks may call it differently. Groups of other ranks may have the same name: meshes name
    # theirs by dimension.
    prefix = "/".join(filter(None, ("ringfence", start, str(group.group_name), "-".join(map(str, ranks)))))
    return dist.PrefixStore(prefix, distributed_c10d._get_default_store()), ranks  # type: ignore[attr-defined]


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, RingfenceError) else f"{type(error).__name__}: {error}"
