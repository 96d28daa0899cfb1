from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch.distributed as dist
from watchdogs import Clock

from ringfence.runtime import channel as module
from ringfence.runtime.channel import Channel, by_value, open_channel, ranks_text
from ringfence.runtime.errors import ChannelTimeoutError, HangError, RankLeftError, RankMismatch, WorkspaceError
from support import HARD_END, run_ranks, run_threaded

T = TypeVar("T")


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


def test_many_ranks_in_a_row_are_named_by_their_ends() -> None:
    assert ranks_text([1]) == "rank 1"
    assert ranks_text([0, 1, 2]) == "ranks 0, 1, 2"
    assert ranks_text([0, 2, 3, 4, 5, 7]) == "ranks 0, 2-5, 7"
    assert ranks_text(list(range(100))) == "ranks 0-99"
