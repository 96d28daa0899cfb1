"""What the ranks of a group tell each other beside the devices: small values, through the store.

A collective on the device cannot be used to agree on whether to run collectives on the device,
and c10d's object collectives wait for a missing rank without saying which. A store
(the one that ``init_process_group`` made) can be asked who has answered, so every exchange
here has a deadline and names the ranks that missed it.

Exchanges of one channel are numbered: the n-th of each rank belongs together. A channel that
is opened anew, as for each graph that is compiled, is told apart by how often each rank has
opened it.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .errors import ChannelTimeoutError, PeerFailedError, RankMismatch, RingfenceError

T = TypeVar("T")

#: Which ranks failed, and why.
Failures = tuple[tuple[int, str], ...]

#: Peers may compile for minutes longer: another cache, a slower disk.
DEFAULT_SECONDS = 600.0
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.0005, 0.02


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


class Channel:
    """Exchanges among the ranks of one group.

    store: one that all ranks share, under a prefix of this group's own.
    rank, size: of the group. seconds: how long an exchange waits for the slowest rank.
    """

    def __init__(self, store: Store, rank: int, size: int, *, seconds: float = DEFAULT_SECONDS) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        self._store = store
        #: Called while waiting; raises what is known about why nobody comes.
        self.interrupt: Callable[[], None] = lambda: None
        self._opened = store.add(f"opened/{rank}", 1)
        self._exchanges = 0

    def exchange(self, topic: str, value: Any, *, seconds: float | None = None) -> list[Any]:
        """Every rank's ``value``, by rank; small and picklable. Every rank must call, with the same topic.

        Raises :class:`ChannelTimeoutError` naming the ranks that did not come in time, and
        :class:`RankMismatch` where ranks came to exchange different things.
        """
        key = f"{self._opened}/{self._exchanges}"
        self._store.set(f"{key}/{self.rank}", pickle.dumps((topic, value)))
        answers = self._collect(key, topic, self.seconds if seconds is None else seconds)
        if self._exchanges:  # whoever is here has read the exchange before
            self._store.delete_key(f"{self._opened}/{self._exchanges - 1}/{self.rank}")
        self._exchanges += 1
        if failures := tuple((rank, v.reason) for rank, (_, v) in enumerate(answers) if isinstance(v, _Failed)):
            raise PeerFailedError(failures_text(failures), failures)
        topics = [t for t, _ in answers]
        if len(set(topics)) > 1:
            raise RankMismatch(f"ranks do different things: {by_value(topics)}")
        return [v for _, v in answers]

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
            self.exchange(topic, None)
        except PeerFailedError as error:
            return result, error.failures
        except ChannelTimeoutError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, RingfenceError) else f"{type(error).__name__}: {error}"
            try:
                self.exchange(topic, _Failed(reason))
            except PeerFailedError as failed:
                return None, failed.failures
        return result, ()

    def _collect(self, key: str, topic: str, seconds: float) -> list[tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        deadline, sleep = time.monotonic() + seconds, _SHORTEST_SLEEP
        while True:
            for rank in range(self.size):
                if rank not in answers and self._store.check([f"{key}/{rank}"]):
                    answers[rank] = pickle.loads(self._store.get(f"{key}/{rank}"))
            if len(answers) == self.size:
                return [answers[rank] for rank in range(self.size)]
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self.size) if rank not in answers]
                raise ChannelTimeoutError(
                    f"{ranks_text(missing)} did not come to '{topic}' within {seconds:g} s; "
                    "look at what those processes do: they died, hang, or run something else",
                    missing,
                )
            self.interrupt()
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP)


def open_channel(group_name: str, *, seconds: float = DEFAULT_SECONDS) -> Channel:
    """A channel among the ranks of a process group. Every rank of it must open it as often as the others."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    group = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
    ranks = dist.get_process_group_ranks(group)
    # Groups of other ranks may have the same name: meshes name theirs by dimension.
    prefix = f"ringfence/{group_name}/{'-'.join(map(str, ranks))}"
    store = dist.PrefixStore(prefix, distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    return Channel(store, group.rank(), group.size(), seconds=seconds)


def failures_text(failures: Failures) -> str:
    """Who failed, and why: ``rank 0: a; rank 2: b``."""
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in failures)


def by_value(values: Sequence[Any]) -> str:
    """Which ranks hold which value: ``rank 0: a; ranks 1, 2: b``."""
    holders: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    return "; ".join(f"{ranks_text(ranks)}: {value}" for value, ranks in holders.items())


def ranks_text(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
