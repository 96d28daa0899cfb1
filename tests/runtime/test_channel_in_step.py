"""Ranks that open a channel unequally often, leave it, or come late."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch.distributed as dist
from watchdogs import Clock

from ringfence.runtime.channel import Channel
from ringfence.runtime.errors import ChannelTimeoutError, HangError, RankLeftError
from ringfence.runtime.spelling import ranks_text
from support import HARD_END, run_threaded

T = TypeVar("T")


# -- ranks that open a channel unequally often


def _alone(store: dist.Store, rank: int, size: int, topic: str = "facts") -> None:
    """A graph that only this rank compiles: nobody else comes, or another one that has given up by now."""
    with pytest.raises((ChannelTimeoutError, RankLeftError)):
        Channel(store, rank, size, seconds=0.05).exchange(topic, f"stale, of rank {rank}")


def _on_threads(size: int, body: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(size) as pool:
        return [each.result(timeout=HARD_END) for each in [pool.submit(body, rank) for rank in range(size)]]


def _next_opening(store: dist.Store, size: int, turn: int, ahead: Sequence[int] = ()) -> list[list[Any] | str]:
    """What every rank makes of one more opening and exchange. ahead: who opens before the others come."""
    channels = {rank: Channel(store, rank, size, seconds=120) for rank in ahead}

    def body(rank: int) -> list[Any] | str:
        try:
            return (channels.get(rank) or Channel(store, rank, size, seconds=120)).exchange("facts", (turn, rank))
        except RankLeftError as error:
            return str(error)

    start = time.monotonic()
    said = _on_threads(size, body)
    assert time.monotonic() - start < 60  # long before the deadline, on every rank
    return said


@pytest.mark.parametrize("alone", [[0], [1], [2], [0, 2], [0, 1]])
@pytest.mark.parametrize("times", [1, 2])
def test_what_a_rank_left_behind_is_no_answer(alone: list[int], times: int) -> None:
    """Some ranks compile graphs that the others do not, and give up; then all compile the next one."""
    store = dist.HashStore()
    behind = [rank for rank in range(3) if rank not in alone]
    for turn in (0, 2, 4):  # also after they were out of step
        assert _next_opening(store, 3, turn) == [[(turn, 0), (turn, 1), (turn, 2)]] * 3
        for _ in range(times):
            _on_threads(len(alone), lambda n: _alone(store, alone[n], 3))
        said = _next_opening(store, 3, turn + 1, ahead=alone)
        assert all(isinstance(each, str) for each in said), f"stale values were taken for answers: {said}"
        for rank in behind:
            assert f"rank {rank} did not compile a graph where {ranks_text(alone)} did" in said[rank]
        assert {said[rank] for rank in alone} <= {said[rank] for rank in behind}


def test_who_is_behind_is_named_on_every_rank() -> None:
    """Also where the rank that is ahead opened a channel and failed before it exchanged anything."""
    store = dist.HashStore()
    Channel(store, 0, 2)
    said = (
        "rank 1 is at opening 1 of the channel, and rank 0 at opening 2: "
        "rank 1 did not compile a graph where rank 0 did"
    )
    assert _next_opening(store, 2, 0, ahead=[0]) == [said] * 2
    assert _next_opening(store, 2, 1) == [[(1, 0), (1, 1)]] * 2


def test_a_rank_that_skipped_is_told_in_an_older_channel_too() -> None:
    """A channel is used for long, and the graph that one rank compiles alone comes in between."""
    store = dist.HashStore()
    old = [Channel(store, rank, 2, seconds=120) for rank in range(2)]

    def body(rank: int) -> str:
        old[rank].exchange("step", rank)
        with pytest.raises(RankLeftError) as caught:
            (Channel(store, 0, 2, seconds=120) if rank == 0 else old[1]).exchange("step", rank)
        return str(caught.value)

    said = _on_threads(2, body)
    assert said[0] == said[1] and "rank 1 did not compile a graph where rank 0 did" in said[0]


def test_a_rank_that_comes_too_late_hears_why_nobody_waits(clock: Clock) -> None:
    store = dist.HashStore()
    channels = [Channel(store, rank, 3, seconds=0.1) for rank in range(3)]

    def wait_in_vain(rank: int) -> None:
        with pytest.raises(ChannelTimeoutError):
            channels[rank].exchange("vote", True)

    clock.run(2, wait_in_vain)
    with pytest.raises(RankLeftError, match=r"^rank 0 left 'vote': rank 2 did not come to 'vote' within 0.1 s"):
        channels[2].exchange("vote", True)


def test_what_interrupts_a_wait_takes_the_answer_back() -> None:
    store = dist.HashStore()
    channels = [Channel(store, rank, 2, seconds=120) for rank in range(2)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    channels[0].interrupt = interrupt
    with pytest.raises(KeyboardInterrupt):
        channels[0].exchange("vote", True)
    with pytest.raises(RankLeftError, match=r"^rank 0 left 'vote': KeyboardInterrupt"):
        channels[1].exchange("vote", True)


def test_what_interrupts_a_wait_is_raised_where_the_store_is_gone_too() -> None:
    store = dist.HashStore()
    channel = Channel(store, 0, 2, seconds=120)

    class Gone:
        def set(self, key: str, value: Any) -> None:
            raise dist.DistNetworkError("connection reset")

    def interrupt_and_cut() -> None:
        channel._store = Gone()  # type: ignore[assignment]
        raise HangError("rank 1 hangs")

    channel.interrupt = interrupt_and_cut
    with pytest.raises(HangError, match="rank 1 hangs"):
        channel.exchange("vote", True)


def test_an_attempt_ends_where_a_rank_has_left() -> None:
    """It is not told to ranks that are not there."""
    store = dist.HashStore()
    _alone(store, 0, 2)
    channel = Channel(store, 1, 2, seconds=120)
    start = time.monotonic()
    with pytest.raises(RankLeftError, match="rank 0 left 'facts'"):
        channel.attempt("create", lambda: channel.exchange("facts", 1))
    assert time.monotonic() - start < 60


def test_a_rank_that_gives_a_call_up_and_makes_the_next_is_in_step() -> None:
    """What it left is read in the opening that it left, though it has gone on."""
    store = dist.HashStore()
    first = [Channel(store, rank, 2, seconds=20) for rank in range(2)]
    first[1].leave("called wrongly", in_step=True)

    def body(rank: int) -> list[Any]:
        if rank == 0:
            with pytest.raises(RankLeftError, match=r"^rank 1 left: called wrongly$") as caught:
                first[0].exchange("agree", 0)
            assert caught.value.in_step
        return Channel(store, rank, 2, seconds=20, purpose="call prepare").exchange("again", rank)

    assert _on_threads(2, body) == [[0, 1]] * 2
    behind, _ = Channel(other := dist.HashStore(), 1, 2, seconds=20), Channel(other, 0, 2)
    Channel(other, 0, 2, purpose="call prepare")
    with pytest.raises(RankLeftError, match="rank 1 did not call prepare where rank 0 did") as caught:
        behind.exchange("agree", 1)
    assert not caught.value.in_step


def test_an_attempt_ends_where_a_rank_is_ahead() -> None:
    store = dist.HashStore()
    Channel(store, 0, 2)
    Channel(store, 0, 2)
    channel = Channel(store, 1, 2, seconds=5)
    with pytest.raises(RankLeftError, match="rank 1 is at opening 1 of the channel, and rank 0 at opening 2"):
        channel.attempt("create", lambda: channel.exchange("facts", 1))


def test_every_rank_hears_of_it_however_far_ahead_it_is() -> None:
    store = dist.HashStore()
    channels = [[Channel(store, rank, 3, seconds=120) for _ in range(3 - rank)][-1] for rank in range(3)]

    def body(rank: int) -> bool:
        start = time.monotonic()
        with pytest.raises(RankLeftError, match="did not compile a graph"):
            channels[rank].exchange("facts", rank)
        return time.monotonic() - start < 60

    assert _on_threads(3, body) == [True] * 3
    assert _next_opening(store, 3, 0) == [[(0, 0), (0, 1), (0, 2)]] * 3


def test_a_rank_that_answers_and_goes_on_while_it_is_looked_for_is_not_ahead() -> None:
    class GoesOn:
        """Rank 0 answers, hears rank 1 and opens the next channel when rank 1 looks at the counters."""

        def __init__(self) -> None:
            self._store = dist.HashStore()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def add(self, key: str, amount: int) -> int:
            if amount == 0 and key == "opened/0":
                self._store.set("1/0/0", pickle.dumps(("x", 0)))
                return self._store.add(key, 1)
            return self._store.add(key, amount)

    store = GoesOn()
    store.add("opened/0", 1)
    assert Channel(store, 1, 2, seconds=120).exchange("x", 1) == [0, 1]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_is_only_late_is_waited_for(slow: int) -> None:
    """Others look how often it has opened a channel meanwhile, and find nothing."""
    store = dist.HashStore()

    def body(rank: int) -> list[Any]:
        if rank == slow:
            time.sleep(0.7)
        seen = []
        for turn in range(2):
            channel = Channel(store, rank, 2, seconds=120)
            seen.append(channel.exchange("x", (turn, rank)))
            if rank == slow:
                time.sleep(0.7)
            seen.append(channel.exchange("y", (turn, rank)))
        return seen

    expected = [[(turn, 0), (turn, 1)] for turn in range(2) for _ in range(2)]
    assert _on_threads(2, body) == [expected] * 2


def test_a_rank_that_leaves_is_not_waited_for() -> None:
    def body(rank: int) -> str:
        channel = Channel(store, rank, 3, seconds=60)
        channel.barrier("all are here")
        if rank == 1:
            channel.leave("ValueError: no such op")
            return ""
        with pytest.raises(RankLeftError) as caught:
            channel.exchange("agree", rank)
        return str(caught.value)

    store = dist.HashStore()
    assert run_threaded(3, body)[0].startswith("rank 1 left: ValueError: no such op")
