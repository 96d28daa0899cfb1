from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from ringfence.runtime.channel import Channel, by_value, open_channel
from ringfence.runtime.errors import ChannelTimeoutError, RankMismatch
from support import run_ranks, run_threaded


def test_an_exchange_returns_every_value_by_rank() -> None:
    def body(rank: int) -> list[Any]:
        channel = open_channel(dist.group.WORLD.group_name, seconds=20)
        return [channel.exchange("numbers", rank * 10), channel.exchange("words", f"r{rank}"), channel.barrier("end")]

    assert run_threaded(3, body) == [[[0, 10, 20], ["r0", "r1", "r2"], None]] * 3


def test_old_values_are_deleted_and_a_channel_opened_again_does_not_read_them() -> None:
    store = dist.HashStore()

    def body(rank: int) -> list[Any]:
        seen = []
        for turn in range(3):
            channel = Channel(store, rank, 2, seconds=20)
            seen += [channel.exchange("x", (turn, n, rank)) for n in range(3)]
        return seen

    expected = [[(turn, n, 0), (turn, n, 1)] for turn in range(3) for n in range(3)]
    assert run_threaded(2, body) == [expected] * 2
    assert store.num_keys() <= 2 + 3 * 2 + 1  # the counters, and the last exchange of each channel


def test_who_is_missing_is_named_at_the_deadline() -> None:
    def body(rank: int) -> Any:
        channel = open_channel(dist.group.WORLD.group_name, seconds=0.3)
        if rank == 2:
            return None
        start = time.monotonic()
        with pytest.raises(ChannelTimeoutError, match=r"rank 2 did not come to 'vote' within 0.3 s") as caught:
            channel.exchange("vote", True)
        return caught.value.missing, time.monotonic() - start < 5

    assert run_threaded(3, body) == [([2], True), ([2], True), None]


def test_ranks_that_exchange_different_things_are_told_apart() -> None:
    def body(rank: int) -> str:
        channel = open_channel(dist.group.WORLD.group_name, seconds=20)
        with pytest.raises(RankMismatch) as caught:
            channel.exchange("self-test" if rank == 1 else "workspace", 0)
        return str(caught.value)

    assert run_threaded(3, body) == ["ranks do different things: ranks 0, 2: workspace; rank 1: self-test"] * 3


@pytest.mark.parametrize("failing", [[1], [0, 2], []])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_attempt_fails_on_all_ranks_or_on_none(failing: list[int], after: int) -> None:
    """Also where the others wait inside the attempt for the rank that failed; and the channel goes on."""

    def body(rank: int) -> Any:
        channel = open_channel(dist.group.WORLD.group_name, seconds=20)

        def action() -> str:
            for n in range(2):
                if rank in failing and n == after:
                    raise MemoryError(f"step {n}")
                channel.exchange(f"inside {n}", rank)
            if rank in failing and after == 2:
                raise RankMismatch("at the end")
            return f"made by {rank}"

        return channel.attempt("create", action), channel.exchange("next", rank)

    why = "at the end" if after == 2 else f"MemoryError: step {after}"
    results = run_threaded(3, body)
    for rank, ((made, failures), following) in enumerate(results):
        assert failures == tuple((r, why) for r in failing)
        assert following == [0, 1, 2]
        if not failing:
            assert made == f"made by {rank}"


def test_by_value() -> None:
    assert by_value([1, 2, 1]) == "ranks 0, 2: 1; rank 1: 2"


def _two_groups(rank: int) -> list[Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    return open_channel(mine.group_name, seconds=20).exchange("rank", rank)


def test_real_processes_and_groups_apart() -> None:
    assert run_ranks(4, _two_groups) == [[0, 1], [0, 1], [2, 3], [2, 3]]
