"""The rules of the model of devices, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from hangs.models.device import Devices
from hangs.models.instructions import (
    Add,
    Await,
    Free,
    Grid,
    HostOp,
    Kernel,
    Launch,
    Meet,
    ModelError,
    Poll,
    Push,
    Read,
    Record,
    Synchronize,
    WaitEvent,
    Write,
    all_reduce,
    kernel,
    launch,
    replay,
)
from ringfence.runtime.protocol.explore import ModelFailure, Result, explore

WRITE = kernel("write", Write("x", "v"))
READ = kernel("read", Read("x", "v"))


def run(*programs: Sequence[HostOp], slots: int | None = None) -> Result[object]:
    return explore(Devices(programs, slots=slots), limit=100_000)


# -- streams and hosts -------------------------------------------------------------------


@pytest.mark.parametrize("submit", [launch, replay])
def test_kernels_of_a_stream_run_one_after_the_other(submit: Callable[..., Launch]) -> None:
    assert run([submit(WRITE, READ)]).safe
    assert run([submit(WRITE), submit(READ)]).safe


def test_streams_run_side_by_side_until_an_event_joins_them() -> None:
    write, read = launch(WRITE, stream="a"), launch(READ, stream="b")
    assert run([write, read]).failure is ModelFailure.STALE_READ
    assert run([write, Record("e", "a"), WaitEvent("e", "b"), read]).safe


def test_an_event_covers_what_was_launched_before_it_and_no_more() -> None:
    read = launch(READ, stream="b")
    early = [Record("e", "a"), launch(WRITE, stream="a"), WaitEvent("e", "b"), read]
    assert run(early).failure is ModelFailure.STALE_READ


def test_a_host_does_not_wait_for_its_launches_and_does_when_it_synchronises() -> None:
    assert run([launch(WRITE), Read("x", "v")]).failure is ModelFailure.STALE_READ
    assert run([launch(WRITE), Synchronize("main"), Read("x", "v")]).safe
    assert run([launch(WRITE), Synchronize(), Read("x", "v")]).safe
    assert run([launch(WRITE), Synchronize("side"), Read("x", "v")]).failure is ModelFailure.STALE_READ


def test_hosts_meet_when_they_agree_and_not_otherwise() -> None:
    meet = Meet("m", (0, 1))
    assert run([Write("x", "v", of=1), meet], [meet, Read("x", "v")]).safe
    assert run([meet], [Meet("n", (0, 1))]).failure is ModelFailure.DEADLOCK
    assert run([meet], []).waiting == ("rank 0: its host waits to meet ranks (0, 1) at 'm', without rank 1",)
    assert run([Meet("m", (0, 1, 2))], [Meet("m", (1, 2))], [Meet("m", (1, 2))]).failure is ModelFailure.DEADLOCK


def test_a_stream_that_waits_for_an_event_is_told() -> None:
    stuck = [launch(kernel("spin", Await("go", 1))), Record("e", "main"), WaitEvent("e", "side"), launch(READ)]
    assert "rank 0: stream 'side' waits for event 'e'; 'spin' waits to see 'go' at least 1" in run(stuck).waiting


# -- programmatic dependents -------------------------------------------------------------


def dependent(*ops: Grid | Read) -> Kernel:
    return kernel("dependent", *ops, Read("x", "v"), pdl=True)


def test_a_dependent_of_a_kernel_that_never_triggers_starts_at_its_end() -> None:
    assert run([launch(WRITE, dependent())]).safe


def test_a_dependent_starts_when_all_blocks_of_its_primary_have_triggered_or_ended() -> None:
    late = Kernel("late", ((Grid.TRIGGER, Read("y", "v")), (Write("x", "v"), Write("y", "v"))))
    assert run([Write("y", "v"), launch(late, dependent())]).safe


def test_a_kernel_that_is_no_dependent_waits_for_all_before_it() -> None:
    first = kernel("first", Grid.TRIGGER, Write("x", "v"))
    middle = kernel("middle", Write("y", "v"), pdl=True)
    assert run([launch(first, middle, READ)]).safe
    assert run([launch(first, middle, dependent(Grid.WAIT))]).failure is ModelFailure.STALE_READ


def test_an_event_lies_between_a_kernel_and_its_dependent() -> None:
    primary = kernel("primary", Grid.TRIGGER, Write("x", "v"))
    assert run([launch(primary), launch(dependent())]).failure is ModelFailure.STALE_READ
    assert run([launch(primary), Record("e", "main"), launch(dependent())]).safe


# -- slots -------------------------------------------------------------------------------


def test_blocks_hold_their_slots_until_they_end() -> None:
    spin = launch(kernel("spin", Await("go", 1)), stream="a")
    go = launch(kernel("go", Add("go")), stream="b")
    assert run([spin, go], slots=1).waiting == (
        "rank 0: 'spin' waits to see 'go' at least 1; 'go' waits for a slot; they are held by 'spin'",
    )
    assert run([spin, go], slots=2).safe
    assert run([launch(kernel("in turn", Add("n"), blocks=3)), Synchronize(), Await("n", 3, exact=True)], slots=1).safe


def test_blocks_are_dispatched_in_order() -> None:
    """A block may wait for one of a lower number, which was there first; not the other way round."""
    add, wait = (Add("n"),), (Await("n", 1),)
    assert run([launch(Kernel("up", (add, wait)))], slots=1).safe
    assert run([launch(Kernel("down", (wait, add)))], slots=1).failure is ModelFailure.DEADLOCK


def test_each_rank_has_slots_of_its_own() -> None:
    calls = [[launch(kernel("call", *all_reduce(rank, (0, 1, 2), "x")))] for rank in range(3)]
    assert run(*calls, slots=1).safe


# -- memory ------------------------------------------------------------------------------


def test_a_box_holds_two_calls() -> None:
    """As three Lamport buffers do: one that is polled, one that a peer is ahead by, one being cleared."""
    calls = [[launch(kernel(f"call {n}", *all_reduce(rank, (0, 1), f"{n}"))) for n in range(3)] for rank in range(2)]
    assert run(*calls).safe
    pushes = [Push("box", 0, f"{n}") for n in range(3)]
    assert run(pushes[:2]).safe
    assert run(pushes).failure is ModelFailure.LOST_WRITE


def test_a_skipped_call_is_first_a_stale_read() -> None:
    call = [[kernel(f"call {n}", *all_reduce(rank, (0, 1), f"{n}")) for n in range(3)] for rank in range(2)]
    result = run([launch(*call[0])], [launch(call[1][0], call[1][2])])
    assert result.failure is ModelFailure.STALE_READ


def test_a_poll_takes_what_came_first() -> None:
    pushes = [Push("box", 1, "a"), Push("box", 1, "b")]
    assert run(pushes, [Poll("box", 0, "a"), Poll("box", 0, "b")]).safe
    assert run(pushes, [Poll("box", 0, "b")]).failure is ModelFailure.STALE_READ
    assert run([], [Poll("box", 0, "a")]).failure is ModelFailure.DEADLOCK


@pytest.mark.parametrize(
    ("op", "failure"),
    [
        (Read("box", "v"), ModelFailure.STALE_READ),
        (Poll("box", 0, "v"), ModelFailure.STALE_READ),
        (Await("box", 0), ModelFailure.STALE_READ),
        (Write("box", "v"), ModelFailure.LOST_WRITE),
        (Add("box"), ModelFailure.LOST_WRITE),
        (Push("box", 0, "v"), ModelFailure.LOST_WRITE),
    ],
    ids=str,
)
def test_memory_that_was_freed(op: HostOp, failure: ModelFailure) -> None:
    assert run([Push("box", 0, "v"), Write("box", "v"), Free("box"), op]).failure is failure


def test_a_counter_awaited_exactly_can_be_missed() -> None:
    adds = launch(kernel("adds", Add("n"), Add("n")))
    watch = [launch(kernel("watch", Await("n", 1, exact=True)), stream="side")]
    assert run([adds, *watch]).failure is ModelFailure.DEADLOCK
    assert run([adds, launch(kernel("watch", Await("n", 1)), stream="side")]).safe


# -- reductions --------------------------------------------------------------------------


def chain(rank: int) -> list[HostOp]:
    primary = kernel("primary", Grid.TRIGGER, *all_reduce(rank, (0, 1), "x"), Write("x", "v"), blocks=1)
    return [launch(primary), launch(dependent(Grid.WAIT)), launch(kernel("side", Add("n"), blocks=2), stream="side")]


@pytest.mark.parametrize(
    "programs",
    [
        [chain(0), chain(1)],
        [chain(0), []],
        [[launch(WRITE, stream="a"), launch(READ, stream="b")]],
        [[launch(kernel("primary", Grid.TRIGGER, Write("x", "v")), dependent())]],
    ],
    ids=["safe", "deadlock", "streams", "dependent"],
)
def test_slots_that_never_run_out_need_no_step_to_take_one(programs: list[list[HostOp]]) -> None:
    without, with_steps = run(*programs), run(*programs, slots=99)
    assert without.failure is with_steps.failure
    assert without.states < with_steps.states


# -- programs that no host could run -----------------------------------------------------


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([WaitEvent("e", "main")], "rank 0 waits for event 'e' before it records it"),
        ([Record("e", "main"), Record("e", "main")], "records event 'e' twice"),
        ([Meet("m", (1,))], "meets others at 'm'; name itself"),
        ([Meet("m", (0, 2))], r"speaks to ranks \[2\]; there are 2"),
        ([Poll("box", 3, "v")], r"speaks to ranks \[3\]"),
        ([launch(kernel("k", Push("box", -1, "v")))], r"speaks to ranks \[-1\]"),
        ([launch(kernel("k", Read("x", "v", of=2)))], r"speaks to ranks \[2\]"),
        ([launch(kernel("k"))], "a block of kernel 'k' does nothing"),
        ([launch(kernel("k", Add("n"), blocks=0))], "a block of kernel 'k' does nothing"),
    ],
)
def test_a_program_that_no_host_could_run(program: list[HostOp], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Devices([program, []])


@pytest.mark.parametrize("slots", [0, -1])
def test_a_device_without_slots(slots: int) -> None:
    with pytest.raises(ModelError, match=f"{slots} slots"):
        Devices([[]], slots=slots)
