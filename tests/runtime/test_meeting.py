"""Processes of one start of a job find each other, whatever another start has left in the store."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from watchdogs import Clock

from ringfence.runtime.errors import ChannelTimeoutError, GroupFailureError
from ringfence.runtime.meeting import Start, leave_last_words, meet, start_of

RANKS = (4, 5, 6)


def meets(store: Any, start: Start, rank: int, seconds: float = 120.0) -> tuple[str, ...]:
    return meet(
        dist.PrefixStore("group", store),
        dist.PrefixStore("world", store),
        start,
        rank,
        RANKS,
        seconds=seconds,
        interrupt=lambda: None,
        waiting=lambda topic: contextlib.nullcontext(),
    )


def all_meet(clock: Clock, store: Any, starts: list[Start], late: float = 0.0) -> list[tuple[str, ...]]:
    def one(rank: int) -> tuple[str, ...]:
        clock.sleep(late * rank)
        return meets(store, starts[rank], rank)

    return clock.run(len(starts), one)


def test_the_processes_of_each_start_meet_and_are_told_from_those_of_the_others(clock: Clock) -> None:
    store, names = dist.HashStore(), []
    for _ in range(3):
        starts = [Start() for _ in RANKS]
        met = all_meet(clock, store, starts, late=0.05)
        assert met == [tuple(s.token for s in starts)] * 3
        names.append(start_of(met[0]))
    assert len(set(names)) == 3


@pytest.mark.parametrize("dead", range(3))
def test_nobody_meets_a_process_that_died_in_another_start(clock: Clock, dead: int) -> None:
    """It had written down its token, and read those of the others of its time."""
    store = dist.HashStore()
    old = [Start() for _ in RANKS]
    all_meet(clock, store, old)
    new = [Start() for _ in RANKS]

    def one(rank: int) -> tuple[str, ...]:
        with pytest.raises(ChannelTimeoutError, match=rf"rank {RANKS[dead]} did not come to 'meet'") as caught:
            meets(store, new[rank], rank, seconds=0.7)
        return tuple(map(str, caught.value.ranks))

    alive = [rank for rank in range(3) if rank != dead]
    assert set(clock.run(2, lambda n: one(alive[n]))) == {(str(RANKS[dead]),)}
    assert all_meet(clock, store, new) == [tuple(s.token for s in new)] * 3  # it comes at last


@pytest.mark.parametrize("told_by", ["token", "launcher"])
def test_the_last_words_of_a_rank_that_died_before_reach_those_that_wait(told_by: str) -> None:
    store, launched = dist.HashStore(), Start("run", 1) if told_by == "launcher" else Start()
    world = dist.PrefixStore("world", store)

    def dies() -> None:
        if told_by == "token":
            world.wait(["here/4"])
        leave_last_words(world, replace(launched, token="dead"), 5, 7, "rank 5 failed in its own code: MemoryError")

    dying = threading.Thread(target=dies)
    dying.start()
    if told_by == "launcher":
        dying.join()
    with pytest.raises(GroupFailureError, match="rank 5 failed in its own code: MemoryError") as caught:
        meets(store, launched, 0)
    assert caught.value.ranks == (5,)
    dying.join()


@pytest.mark.parametrize(
    ("dead", "living"),
    [
        (Start("run", 0), Start("run", 1)),
        (Start("other", 0), Start("run", 0)),
        (Start(), Start()),
        (Start("run", 0), Start("run", 0, launchers=2)),  # one that joins makes all start again, uncounted
    ],
)
def test_last_words_of_another_start_are_nobodys(dead: Start, living: Start) -> None:
    store = dist.HashStore()
    leave_last_words(dist.PrefixStore("world", store), dead, 5, 7, "rank 5 failed")
    with pytest.raises(ChannelTimeoutError):
        meets(store, living, 0, seconds=0.6)


def test_what_a_launcher_says_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    none = Start.of_this_process()
    assert (none.run, none.attempt) == ("", None) and none.token != Start.of_this_process().token
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    launched = Start.of_this_process()
    assert (launched.run, launched.attempt, launched.launchers) == ("job", 2, 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "none")
    assert Start.of_this_process().attempt is None


def test_what_lies_in_the_place_of_a_process_is_read_as_a_list(clock: Clock) -> None:
    store = dist.HashStore()
    dist.PrefixStore("group", store).set("met/1", json.dumps(["an older world"]))
    starts = [Start() for _ in RANKS]
    assert all_meet(clock, store, starts) == [tuple(s.token for s in starts)] * 3
