"""What ranks exchange over a store, and an attempt that fails on all of them or on none."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from watchdogs import Clock

from ringfence.runtime import channel as module
from ringfence.runtime.channel import Channel, open_channel
from ringfence.runtime.errors import ChannelTimeoutError, HangError, RankLeftError, RankMismatch, WorkspaceError
from ringfence.runtime.spelling import by_value, ranks_text
from support import run_ranks, run_threaded


def test_an_exchange_returns_every_value_by_rank() -> None:
    def body(rank: int) -> list[Any]:
        channel = open_channel(dist.group.WORLD.group_name, seconds=120)
        return [channel.exchange("numbers", rank * 10), channel.exchange("words", f"r{rank}"), channel.barrier("end")]

    assert run_threaded(3, body) == [[[0, 10, 20], ["r0", "r1", "r2"], None]] * 3


def test_old_values_are_deleted_and_a_channel_opened_again_does_not_read_them() -> None:
    store = dist.HashStore()

    def body(rank: int) -> list[Any]:
        seen = []
        for turn in range(3):
            channel = Channel(store, rank, 2, seconds=120)
            seen += [channel.exchange("x", (turn, n, rank)) for n in range(3)]
        return seen

    expected = [[(turn, n, 0), (turn, n, 1)] for turn in range(3) for n in range(3)]
    assert run_threaded(2, body) == [expected] * 2
    assert store.num_keys() <= 2 + 3 * 2 + 2 + 1  # the counters, the last exchange of each channel, what is open


def test_who_is_missing_is_named_at_the_deadline(clock: Clock) -> None:
    store = dist.HashStore()

    def body(rank: int) -> Any:
        channel = Channel(store, rank, 3, seconds=0.3)
        if rank == 2:
            return None
        start = clock.monotonic()
        with pytest.raises(ChannelTimeoutError, match=r"rank 2 did not come to 'vote' within 0.3 s") as caught:
            channel.exchange("vote", True)
        return caught.value.ranks, 0.3 <= clock.monotonic() - start < 0.5

    assert clock.run(3, body) == [((2,), True), ((2,), True), None]


def test_ranks_that_exchange_different_things_are_told_apart() -> None:
    def body(rank: int) -> str:
        channel = open_channel(dist.group.WORLD.group_name, seconds=120)
        with pytest.raises(RankMismatch) as caught:
            channel.exchange("self-test" if rank == 1 else "workspace", 0)
        return str(caught.value)

    assert run_threaded(3, body) == ["ranks do different things: ranks 0, 2: workspace; rank 1: self-test"] * 3


@pytest.mark.parametrize("failing", [[1], [0, 2], []])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_attempt_fails_on_all_ranks_or_on_none(failing: list[int], after: int) -> None:
    """Also where the others wait inside the attempt for the rank that failed; and the channel goes on."""

    def body(rank: int) -> Any:
        channel = open_channel(dist.group.WORLD.group_name, seconds=120)

        def action() -> str:
            for n in range(2):
                if rank in failing and n == after:
                    raise MemoryError(f"step {n}")
                channel.exchange(f"inside {n}", rank)
            if rank in failing and after == 2:
                raise WorkspaceError("at the end")
            return f"made by {rank}"

        return channel.attempt("create", action), channel.exchange("next", rank)

    why = "at the end" if after == 2 else f"MemoryError: step {after}"
    results = run_threaded(3, body)
    for rank, ((made, failures), following) in enumerate(results):
        assert failures == tuple((r, why) for r in failing)
        assert following == [0, 1, 2]
        if not failing:
            assert made == f"made by {rank}"


def test_an_attempt_that_meets_something_else_waits_for_nobody() -> None:
    def body(rank: int) -> str:
        channel = open_channel(dist.group.WORLD.group_name, seconds=60)
        with pytest.raises(RankMismatch) as caught:
            if rank == 0:
                channel.attempt("create", lambda: channel.exchange("handles", rank))
            else:
                channel.exchange("agree", rank)
        return str(caught.value)

    start = time.monotonic()
    assert run_threaded(2, body) == ["ranks do different things: rank 0: handles; rank 1: agree"] * 2
    assert time.monotonic() - start < 60


def test_a_hang_inside_an_attempt_is_no_failure_of_the_action() -> None:
    """Whether it is seen before or after the others have read that rank's answer."""

    def body(rank: int, late: float) -> str:
        begun = time.monotonic()

        def interrupt() -> None:
            if rank == 0 and time.monotonic() > begun + late:
                raise HangError("the ranks hang", (2,))

        channel = open_channel(dist.group.WORLD.group_name, seconds=120, interrupt=interrupt)
        if rank == 2:
            time.sleep(1)
            return ""
        with pytest.raises((HangError, RankLeftError)) as caught:
            channel.attempt("create", lambda: "made")
        return f"{type(caught.value).__name__}: {caught.value}"

    for late in (-1.0, 0.5):
        said = run_threaded(3, lambda rank, late=late: body(rank, late))
        assert said[:2] == ["HangError: the ranks hang", "RankLeftError: rank 0 left 'create': the ranks hang"]


def test_ranks_are_called_what_they_are_in_the_world(clock: Clock) -> None:
    store = dist.HashStore()

    def body(rank: int) -> list[str]:
        said = []
        channel = Channel(store, rank, 2, seconds=0.3, ranks=(1, 9))
        _, failures = channel.attempt("create", [lambda: 1, lambda: 1 // 0][rank])
        said.append(str(failures))
        with pytest.raises(RankMismatch) as caught:
            channel.exchange("abc"[rank], 0)
        said.append(str(caught.value))
        if rank == 1:
            with pytest.raises(ChannelTimeoutError) as missing:
                channel.exchange("vote", 0)
            said.append(f"{missing.value} {missing.value.ranks}")
        return said

    first, second = clock.run(2, body)
    assert first == second[:2]
    assert first[0].startswith("((9, 'ZeroDivisionError") and first[1].endswith("rank 1: a; rank 9: b")
    assert second[2].startswith("rank 1 did not come to 'vote'") and second[2].endswith("(1,)")


def test_who_waits_long_says_for_whom(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.05)
    said: list[str] = []
    monkeypatch.setattr(module.log, "warning", lambda text, *values: said.append(text % values))
    with pytest.raises(ChannelTimeoutError):
        Channel(dist.HashStore(), 0, 2, seconds=0.5, ranks=(4, 5)).exchange("vote", 0)
    assert len(said) == 3 and said[0].startswith("ringfence: rank 4 waits for rank 5 in the exchange 'vote'")


def test_by_value() -> None:
    assert by_value([1, 2, 1]) == "ranks 0, 2: 1; rank 1: 2"


def _two_groups(rank: int) -> list[Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    return open_channel(mine.group_name, seconds=120).exchange("rank", rank)


def test_real_processes_and_groups_apart() -> None:
    assert run_ranks(4, _two_groups) == [[0, 1], [0, 1], [2, 3], [2, 3]]


class _Counting:
    """A store that counts the requests to it."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.requests = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.requests[name] += 1
        return getattr(self._store, name)


def test_requests_to_the_store_of_an_exchange() -> None:
    """Every request is a round trip to another machine."""
    store = _Counting(dist.HashStore())
    channels = [Channel(store, rank, 3, seconds=120) for rank in range(3)]
    for n in range(3):
        for rank in (1, 2):  # the others are here already
            store.set(f"1/{n}/{rank}", pickle.dumps(("x", rank)))
        store.requests.clear()
        assert channels[0].exchange("x", 0) == [0, 1, 2]
        assert store.requests == {"set": 1, "check": 3, "get": 3} | ({"delete_key": 1} if n else {})


def test_many_ranks_in_a_row_are_named_by_their_ends() -> None:
    assert ranks_text([1]) == "rank 1"
    assert ranks_text([0, 1, 2]) == "ranks 0, 1, 2"
    assert ranks_text([0, 2, 3, 4, 5, 7]) == "ranks 0, 2-5, 7"
    assert ranks_text(list(range(100))) == "ranks 0-99"
