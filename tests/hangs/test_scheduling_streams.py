"""Several streams, few slots: M37, M38, M39."""

from __future__ import annotations

import pytest

from hangs.models.device import Devices
from hangs.models.instructions import (
    Add,
    Await,
    BlockOp,
    HostOp,
    Kernel,
    Read,
    Record,
    WaitEvent,
    Write,
    all_reduce,
    kernel,
    launch,
    replay,
)
from hangs.scheduling import PAIR, assert_fails, assert_safe
from ringfence.runtime.protocol.explore import ModelFailure

Program = list[HostOp]


# -- M37: two calls in flight on one workspace (TRT#3988, TRT#10633); invariant 4 -----------


def in_flight(first: Kernel, second: Kernel, how: str, *before: HostOp) -> Devices:
    chain: Program = [Record("first", "main"), WaitEvent("first", "side")] if how == "chained" else []
    stream = "main" if how == "one stream" else "side"
    return Devices([[*before, replay(first), *chain, replay(second, stream=stream)]])


def trtllm(call: str) -> Kernel:
    """Of two blocks. The leader waits until the counter equals their number, and resets it."""
    return Kernel(call, ((Add("counter"), Await("counter", 2, exact=True), Write("counter", 0)), (Add("counter"),)))


def mnnvl(call: int) -> Kernel:
    """Every block reads the epoch. The leader waits for at least the number of blocks, and rotates."""
    leader: tuple[BlockOp, ...] = (Await("access", 2), Write("access", 0), Write("epoch", call + 1))
    start = Read("epoch", call), Add("access")
    return Kernel(f"call {call}", ((*start, *leader), start))


ORDERED = pytest.mark.parametrize("how", ["one stream", "chained"])


def test_m37_two_trtllm_calls_at_a_time_count_past_the_number() -> None:
    assert_fails(
        in_flight(trtllm("a"), trtllm("b"), "two streams"), ModelFailure.DEADLOCK, "waits to see 'counter' at exactly 2"
    )


@ORDERED
def test_m37_trtllm_calls_in_order_are_safe(how: str) -> None:
    assert_safe(in_flight(trtllm("a"), trtllm("b"), how))


def test_m37_two_mnnvl_calls_at_a_time_use_one_epoch() -> None:
    machine = in_flight(mnnvl(0), mnnvl(1), "two streams", Write("epoch", 0))
    assert_fails(machine, ModelFailure.STALE_READ, "call 1[0] read '1' in 'epoch'")


@ORDERED
def test_m37_mnnvl_calls_in_order_are_safe(how: str) -> None:
    assert_safe(in_flight(mnnvl(0), mnnvl(1), how, Write("epoch", 0)))


def test_m37_two_calls_at_a_time_arrive_in_another_order_at_the_peer() -> None:
    """The same on two ranks, whatever the protocol: which call a payload is of depends on the race."""

    def program(rank: int, stream: str) -> Program:
        calls = [kernel(value, *all_reduce(rank, PAIR, value)) for value in "ab"]
        return [replay(calls[0]), replay(calls[1], stream=stream)]

    assert_fails(Devices([program(r, "side") for r in PAIR]), ModelFailure.STALE_READ)
    assert_safe(Devices([program(r, "main") for r in PAIR]))


# -- M38: a grid that needs all its blocks resident (SGL#36657, FI#3615); invariant 11 ------


def grid_barrier(name: str) -> Kernel:
    return kernel(name, Add(f"arrived at {name}"), Await(f"arrived at {name}", 2), blocks=2)


def two_grids(how: str, *, slots: int) -> Devices:
    chain: Program = [Record("first", "main"), WaitEvent("first", "side")] if how == "chained" else []
    return Devices(
        [[replay(grid_barrier("a")), *chain, launch(grid_barrier("b"), stream="side")]],
        slots=slots,
    )


def test_m38_two_grids_with_half_of_the_slots_each() -> None:
    assert_fails(
        two_grids("two streams", slots=2),
        ModelFailure.DEADLOCK,
        "'a' waits to see 'arrived at a' at least 2",
        "'a' waits for a slot; they are held by 'a', 'b'",
    )


def test_m38_grids_one_after_the_other_are_safe() -> None:
    assert_safe(two_grids("chained", slots=2))


def test_m38_slots_for_both_grids_are_safe() -> None:
    assert_safe(two_grids("two streams", slots=3))


def persistent_neighbour(*, slots: int) -> Devices:
    """A worker on a side stream stays until the step is over; on rank 0 only, for rank 1 is the victim."""

    def reduce(rank: int) -> Kernel:
        leader = (Add("arrived"), Await("arrived", 2), *all_reduce(rank, PAIR, "x"))
        return Kernel("all_reduce", (leader, (Add("arrived"), Await("arrived", 2))))

    worker = launch(kernel("worker", Await("stop", 1)), stream="side")
    return Devices([[worker, replay(reduce(0), kernel("last", Add("stop")))], [replay(reduce(1))]], slots=slots)


def test_m38_a_side_stream_takes_a_slot_of_a_co_resident_grid() -> None:
    assert_fails(
        persistent_neighbour(slots=2),
        ModelFailure.DEADLOCK,
        "'all_reduce' waits for a slot; they are held by 'worker', 'all_reduce'",
        "rank 1: 'all_reduce' waits to take 'x' of rank 0",
    )


def test_m38_a_reserved_slot_is_safe() -> None:
    assert_safe(persistent_neighbour(slots=3))


# -- M39: a counter is reset under a peer's last look (FI#3615) -----------------------------


def reset(*, all_wait: bool, monotone: bool = False) -> Devices:
    """Two launches, one after the other, of a leader and another block."""

    def call(n: int) -> Kernel:
        target = 2 * n + 2 if monotone else 2
        arrive: tuple[BlockOp, ...] = (Add("counter"), Await("counter", target))
        leader = arrive if monotone else (*arrive, Write("counter", 0))
        return Kernel(f"call {n}", (leader, arrive if all_wait else arrive[:1]))

    return Devices([[replay(call(0)), replay(call(1))]])


def test_m39_the_leader_resets_the_counter_before_another_block_has_seen_it() -> None:
    assert_fails(
        reset(all_wait=True), ModelFailure.DEADLOCK, "[0] write '0' to 'counter'", "waits to see 'counter' at least 2"
    )


def test_m39_one_waiter_as_in_the_all_reduce_kernels_is_safe() -> None:
    assert_safe(reset(all_wait=False))


def test_m39_a_counter_that_is_never_reset_is_safe() -> None:
    assert_safe(reset(all_wait=True, monotone=True))
