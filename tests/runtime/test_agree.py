from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist
from watchdogs import Clock

from ringfence.runtime.channel import Channel, open_channel
from ringfence.runtime.errors import ChannelTimeoutError, RankMismatch
from ringfence.runtime.watch.agree import HOW, GroupAgreement, PlanDigest, agree, first_difference, vote
from support import run_threaded


def digest(**parts: str) -> PlanDigest:
    return PlanDigest(tuple(parts.items()))


def channel(seconds: float = 120) -> Channel:
    return open_channel(dist.group.WORLD.group_name, seconds=seconds)


def raises_on_every_rank(ranks: int, body: Any) -> set[str]:
    def guarded(rank: int) -> str:
        with pytest.raises(RankMismatch) as caught:
            body(rank)
        return str(caught.value)

    return set(run_threaded(ranks, guarded))


def test_equal_digests_agree() -> None:
    agreed = run_threaded(3, lambda rank: agree(channel(), digest(torch="2.13", ops="a b")) or "agreed")
    assert agreed == ["agreed"] * 3


def test_the_first_difference_is_named_with_both_sides_on_every_rank() -> None:
    said = raises_on_every_rank(
        3, lambda rank: agree(channel(), digest(torch="2.13", flashinfer="0.7" if rank == 1 else "0.6", ops=str(rank)))
    )
    assert said == {
        "the ranks do not agree on the compiled graph: flashinfer differs: ranks 0, 2: 0.6; rank 1: 0.7",
    }


def test_a_plan_that_is_longer_on_one_rank() -> None:
    short, long = digest(a="1").parts, digest(a="1", op1="all_reduce").parts
    assert first_difference([short, long]) == "op1 differs: rank 0: nothing; rank 1: all_reduce"
    assert (
        first_difference([long, digest(a="1", piece="p").parts]) == "op1 differs: rank 0: all_reduce; rank 1: nothing"
    )


def test_a_difference_is_told_with_its_source_which_alone_is_none() -> None:
    def at(line: int, call: str) -> PlanDigest:
        return PlanDigest((("call 0", "sum"), ("call 1", call)), (("call 0", f"m.py:{line}"), ("call 1", "m.py:9")))

    assert run_threaded(2, lambda rank: agree(channel(), at(rank, "sum")) or "agreed") == ["agreed"] * 2
    (said,) = raises_on_every_rank(2, lambda rank: agree(channel(), at(rank, "max" if rank else "sum")))
    assert said.endswith("call 1 differs: rank 0: sum (m.py:9); rank 1: max (m.py:9)")


def test_a_rank_that_does_not_come_to_agree_is_named(clock: Clock) -> None:
    store = dist.HashStore()

    def body(rank: int) -> None:
        mine = Channel(store, rank, 3, seconds=0.3)
        if rank != 1:
            with pytest.raises(ChannelTimeoutError, match="rank 1 did not come to 'agree on the compiled graph'"):
                agree(mine, digest(a="1"))

    clock.run(3, body)


def test_a_vote_tells_every_rank_who_failed_and_why() -> None:
    def body(rank: int) -> Any:
        mine = channel()
        return vote(mine, "workspace", None), vote(mine, "workspace", "out of memory" if rank == 2 else None)

    assert run_threaded(3, body) == [((), ((2, "out of memory"),))] * 3


def test_sizes_are_compared_before_each_capture() -> None:
    def body(rank: int) -> None:
        agreement = GroupAgreement([channel()], digest(a="1"))
        agreement.before_capture((4,))
        agreement.before_capture((8,) if rank else ())

    (said,) = raises_on_every_rank(2, body)
    assert "rank 0: fixed sizes of graph" in said and "rank 1: sizes (8,) of graph" in said


def test_a_failed_capture_is_known_everywhere_once() -> None:
    def body(rank: int) -> Any:
        agreement = GroupAgreement([channel(), channel()], digest(a="1"))
        return agreement.after_capture("no memory" if rank else None)

    assert run_threaded(2, body) == [((1, "no memory"),)] * 2


def test_steps_are_compared_where_asked_for() -> None:
    def body(rank: int) -> None:
        agreement = GroupAgreement([channel()], digest(a="1"))
        agreement.before_step(0, (("sizes", "4"), (HOW, "replayed")))
        agreement.before_step(1, (("sizes", "4" if rank else "none"), (HOW, "uncaptured" if rank else "replayed")))

    (said,) = raises_on_every_rank(2, body)
    assert "their step 1: sizes differs: rank 0: none; rank 1: 4;" in said


@pytest.mark.parametrize("lockstep", [True, False])
def test_how_a_step_runs_matters_where_collectives_are_captured(lockstep: bool) -> None:
    def body(rank: int) -> None:
        agreement = GroupAgreement([channel()], PlanDigest((("a", "1"),), lockstep=lockstep))
        agreement.before_step(0, ((HOW, "captured" if rank else "replayed"),))

    if lockstep:
        assert "how it runs differs: rank 0: replayed; rank 1: captured" in raises_on_every_rank(2, body).pop()
    else:
        run_threaded(2, body)


def mesh(store: Any, rank: int, rows: int, columns: int, seconds: float = 120) -> list[Channel]:
    """Channels of a rank's column and row, in the order of names that all ranks share: "10" comes before "2"."""
    row, column = divmod(rank, columns)
    groups = {
        str(column + 1): tuple(range(column, rows * columns, columns)),
        str(columns + 1 + row): tuple(range(row * columns, (row + 1) * columns)),
    }
    return [
        Channel(dist.PrefixStore(name, store), ranks.index(rank), len(ranks), seconds=seconds, ranks=ranks)
        for name, ranks in sorted(groups.items())
    ]


@pytest.mark.parametrize("failing", [1, 8, 15])
def test_all_ranks_of_a_mesh_drop_what_one_could_not_capture(failing: int) -> None:
    store = dist.HashStore()

    def body(rank: int) -> Any:
        agreement = GroupAgreement(mesh(store, rank, 2, 8), digest(plan="the same"))
        return agreement.after_capture("no memory" if rank == failing else None)

    said = run_threaded(16, body)
    assert all(any("no memory" in reason for _, reason in failed) for failed in said)
    assert said[failing ^ 8][0] == (failing, "no memory")  # of a dp group; called by its global rank


def test_a_difference_in_one_group_of_a_mesh_ends_the_others_too() -> None:
    """The digest differs on rank 1. Ranks 2 and 3 agree with each other, and are not left waiting for 0 and 1."""
    store = dist.HashStore()

    def body(rank: int) -> str:
        channels = mesh(store, rank, 2, 2, seconds=60)
        channels.reverse()  # rows first
        try:
            GroupAgreement(channels, digest(plan="other" if rank == 1 else "one"))
        except RankMismatch as error:
            for channel in channels:
                channel.leave(str(error))
            return str(error)
        return "agreed"

    start = time.monotonic()
    said = run_threaded(4, body)
    assert time.monotonic() - start < 60
    assert all("plan differs: rank 0: one; rank 1: other" in each for each in said)
    assert said[2].startswith("rank 0 left: ") and said[3].startswith("rank 1 left: ")
