"""Meeting: the processes of one start of a job find each other, in a store that may hold what others left there.

A launcher that restarts a job in place (``torchrun --max-restarts``) may keep its store, and with it every counter and
every answer of processes that are dead. Nothing that a variable says tells them apart for certain: where a node joins,
its launcher counts restarts otherwise than the rest. So each process has a token that nobody had before, and writes
down which tokens it has read. A dead process cannot have read that of a living one: who reads its own token in
another's list has met it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from .channel import LOOK_SECONDS, Patience, Store
from .errors import GroupFailureError

TOPIC = "meet"


@dataclass(frozen=True)
class Start:
    """One process of one start of the job.

    token: nobody else's. run, attempt: what torchrun calls the job, and how often it has started it again; where
    another launcher started it, "" and None. launchers: how many of them count.
    """

    run: str = ""
    attempt: int | None = None
    launchers: int = 1
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def of_this_process(cls) -> Start:
        """As the launcher's variables say."""
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        launchers = os.environ.get("GROUP_WORLD_SIZE", "1")
        return cls(
            os.environ.get("TORCHELASTIC_RUN_ID", ""),
            int(count) if count.isdigit() else None,
            int(launchers) if launchers.isdigit() else 1,
        )

    def is_of(self, other: Mapping[str, Any]) -> bool:
        """Whether what another process left is known to be of the same start. Several launchers count differently."""
        return (
            self.launchers == 1
            and self.attempt is not None
            and (self.run, self.attempt) == (other["run"], other["attempt"])
        )


def meet(
    store: Store,
    world: Store,
    start: Start,
    rank: int,
    ranks: Sequence[int],
    *,
    seconds: float,
    interrupt: Callable[[], None],
    waiting: Callable[[str], AbstractContextManager[None]],
) -> tuple[str, ...]:
    """The tokens of all ranks of a group, by rank, when all are here. Every rank must call.

    store, world: under a prefix of the group, and of the process. rank: within the group; ranks: its global ranks.
    seconds, interrupt, waiting: as of :class:`~.channel.Channel`.
    Raises :class:`ChannelTimeoutError`, and :class:`GroupFailureError` with the last words of a rank that died before.
    """
    read = ["" if r != rank else start.token for r in range(len(ranks))]
    patience = Patience(TOPIC, seconds, ranks[rank], interrupt)
    with waiting(TOPIC):
        world.set(f"here/{ranks[rank]}", start.token)
        _write(store, rank, read)
        while True:
            said = {r: _read(store, r) for r in range(len(ranks)) if r != rank}
            known = [said[r][r] if r in said and len(said[r]) == len(read) else read[r] for r in range(len(ranks))]
            if known != read:
                read = known
                _write(store, rank, read)
            elif all(read) and all(told == read for told in said.values()):
                return tuple(read)
            missing = tuple(ranks[r] for r, told in said.items() if len(told) != len(read) or told[rank] != read[rank])
            if patience.looks():
                for r in missing:
                    raise_last_words(world, start, ranks[rank], r)
            patience.wait(missing or tuple(r for r in ranks if r != ranks[rank]))


def world_store() -> Store:
    """What all ranks of the job share."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    return dist.PrefixStore("ringfence", distributed_c10d._get_default_store())  # type: ignore[attr-defined]


def start_of(tokens: Sequence[str]) -> str:
    """A name of the start that these processes are of, the same on all of them."""
    return hashlib.sha256("/".join(tokens).encode()).hexdigest()[:12]


def leave_last_words(world: Store, start: Start, rank: int, size: int, sentence: str) -> None:
    """For ranks that wait for this one, which dies. May raise what the store raises."""
    others = [r for r in range(size) if r != rank]
    read = {str(r): world.get(f"here/{r}").decode() for r in others if world.check([f"here/{r}"])}
    said = {"run": start.run, "attempt": start.attempt, "read": read, "sentence": sentence}
    world.set(f"died/{rank}", json.dumps(said))
    if rank == 0:  # the store may end with it
        time.sleep(2 * LOOK_SECONDS)


def raise_last_words(world: Store, start: Start, rank: int, missing: int) -> None:
    """Raises :class:`GroupFailureError` where a rank of this start has left why it died. rank: this one."""
    with contextlib.suppress(ValueError, KeyError):
        if world.check([f"died/{missing}"]):
            said = json.loads(world.get(f"died/{missing}"))
            if said["read"].get(str(rank)) == start.token or start.is_of(said):
                raise GroupFailureError(said["sentence"], (missing,))


def _write(store: Store, rank: int, read: Sequence[str]) -> None:
    store.set(f"met/{rank}", json.dumps(read))


def _read(store: Store, rank: int) -> list[str]:
    if not store.check([f"met/{rank}"]):
        return []
    value = json.loads(store.get(f"met/{rank}"))
    return [str(token) for token in value]
