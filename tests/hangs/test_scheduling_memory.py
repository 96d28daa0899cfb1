"""Memory whose time has passed, and calls cut in two: M20, M31, M32, M34, M40, M41, M42."""

from __future__ import annotations

import pytest

from hangs.models.device import Devices
from hangs.models.instructions import (
    Free,
    HostOp,
    Kernel,
    Meet,
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
from hangs.scheduling import PAIR, assert_fails, assert_safe
from ringfence.runtime.protocol.explore import ModelFailure

Program = list[HostOp]


# -- M20: a protocol of two launches (two-shot and rmsNormLamport); invariant 5 -------------


def two_launches(order: str) -> Devices:
    """Calls a and b, in halves. The first half scatters; only the second goes on to the next buffer."""

    def program(rank: int) -> Program:
        buffer, launches = 0, []
        for call, part in order.split():
            box = f"buffer {buffer}"
            if part == "1":
                launches.append(replay(kernel(f"{call}, scatter", Push(box, 1 - rank, call, depth=1))))
            else:
                launches.append(replay(kernel(f"{call}, norm", Poll(box, 1 - rank, call))))
                buffer += 1
        return [*launches]

    return Devices([program(rank) for rank in PAIR])


def test_m20_another_call_between_the_halves_overwrites_what_was_scattered() -> None:
    assert_fails(
        two_launches("a1 b1 b2 a2"), ModelFailure.LOST_WRITE, "a, scatter[0] push 'a'", "b, scatter[0] push 'b'"
    )


def test_m20_halves_side_by_side_are_safe_even_in_two_pieces() -> None:
    assert_safe(two_launches("a1 a2 b1 b2"))


# -- M31: a workspace is made anew after capture; invariant 7 -------------------------------


def regrown(*, regrow: bool, recapture: bool = False) -> Devices:
    """A larger size comes: the manager makes a larger workspace, and a graph replays the smaller size."""

    def program(rank: int) -> Program:
        def graph(box: str, value: str) -> Kernel:
            return kernel(f"graph with {box}", *all_reduce(rank, PAIR, value, box))

        steps: Program = [replay(graph("workspace 0", "step 0")), Synchronize()]
        if regrow:
            steps += [Meet("all are done with workspace 0", PAIR), Free("workspace 0"), Meet("workspace 1", PAIR)]
        return [*steps, replay(graph(f"workspace {int(recapture)}", "step 1"))]

    return Devices([program(rank) for rank in PAIR])


def test_m31_a_graph_writes_to_a_workspace_that_is_gone() -> None:
    assert_fails(
        regrown(regrow=True), ModelFailure.LOST_WRITE, "free 'workspace 0'", "push 'step 1' into 'workspace 0' of rank"
    )


def test_m31_a_workspace_of_frozen_capacity_is_safe() -> None:
    assert_safe(regrown(regrow=False))


def test_m31_capturing_again_is_safe() -> None:
    assert_safe(regrown(regrow=True, recapture=True))


# -- M32: buffers of some pieces are not registered (SGL#14193, SGL#12106) ------------------


def registered(pieces: tuple[int, ...]) -> Devices:
    """Kernels find the peer's buffer in a table that is filled after capture."""

    def program(rank: int) -> Program:
        table = [Write(f"table[{piece}]", "address", of=1 - rank) for piece in pieces]
        replays = [
            replay(kernel(f"piece {p}", Read(f"table[{p}]", "address"), *all_reduce(rank, PAIR, f"call {p}")))
            for p in range(2)
        ]
        return [*table, Meet("register_graph_buffers", PAIR), *replays]

    return Devices([program(rank) for rank in PAIR])


def test_m32_a_piece_captured_outside_the_context_has_no_peer_address() -> None:
    assert_fails(registered((0,)), ModelFailure.STALE_READ, "piece 1[0] read 'address' in 'table[1]'")


def test_m32_one_context_for_all_pieces_is_safe() -> None:
    assert_safe(registered((0, 1)))


# -- M34: a collective that the host carries out (V#46253) ----------------------------------


def staged(*, split: bool) -> Devices:
    """Host-staged: copy out, exchange by the hosts, copy in. A capture holds the copies only."""

    def program(rank: int) -> Program:
        step: Program = []
        for n in range(2):
            out = kernel("copy out", Write("staging", f"x{n}"))
            back = kernel("copy in", Read("landing", f"sum {n}"))
            host: Program = [
                Synchronize(why="stage"),
                Read("staging", f"x{n}"),
                *all_reduce(rank, PAIR, f"x{n}", "socket"),
                Write("landing", f"sum {n}"),
            ]
            eager = split or n == 0  # call 0 is the warm-up
            step += [replay(out), *host, replay(back)] if eager else [replay(out, back)]
            step += [Synchronize()]
        return step

    return Devices([program(rank) for rank in PAIR])


def test_m34_the_hosts_part_of_a_captured_collective_is_not_replayed() -> None:
    assert_fails(staged(split=False), ModelFailure.STALE_READ, "replay copy out, copy in", "read 'sum 1' in 'landing'")


def test_m34_an_island_for_the_hosts_part_is_safe() -> None:
    assert_safe(staged(split=True))


# -- M40: an island's output is elsewhere each time (SGL#12106, V#57227); invariant 14 ------


def island(*, copy: bool) -> Devices:
    """The island allocates its output; the piece behind it reads the address that was seen at capture."""
    steps: Program = []
    for n in range(3):
        steps.append(replay(kernel("piece 0", Write("x", f"x{n}"))))
        steps.append(launch(kernel("island", Read("x", f"x{n}"), Write(f"y at {n}", f"y{n}"))))
        if copy:
            steps.append(launch(kernel("copy", Read(f"y at {n}", f"y{n}"), Write("y", f"y{n}"))))
        steps.append(replay(kernel("piece 1", Read("y" if copy else "y at 0", f"y{n}"))))
    return Devices([steps])


def test_m40_a_piece_reads_the_output_that_the_island_had_at_capture() -> None:
    assert_fails(
        island(copy=False), ModelFailure.STALE_READ, "write 'y1' to 'y at 1'", "piece 1[0] read 'y1' in 'y at 0'"
    )


def test_m40_an_output_copied_to_where_the_piece_looks_is_safe() -> None:
    assert_safe(island(copy=True))


# -- M41: memory of one piece is used again by the next; invariant 14 -----------------------


def pool(*, join: bool, same_memory: bool = True) -> Devices:
    """Piece 1 reuses the pool's memory that an island of another stream reads."""
    reused = "pool" if same_memory else "pool 1"
    joined: Program = [Record("read", "side"), WaitEvent("read", "main")] if join else []
    return Devices(
        [
            [
                replay(kernel("piece 0", Write("pool", "x"))),
                Record("written", "main"),
                WaitEvent("written", "side"),
                launch(kernel("island", Read("pool", "x")), stream="side"),
                *joined,
                replay(kernel("piece 1", Write(reused, "temporary"))),
            ]
        ]
    )


def test_m41_a_piece_overwrites_what_an_island_still_reads() -> None:
    assert_fails(
        pool(join=False), ModelFailure.STALE_READ, "piece 1[0] write 'temporary' to 'pool'", "island[0] read 'x'"
    )


@pytest.mark.parametrize("policy", [{"join": True}, {"join": False, "same_memory": False}], ids=["join", "kept"])
def test_m41_joining_or_keeping_the_memory_is_safe(policy: dict[str, bool]) -> None:
    assert_safe(pool(**policy))


def zero_copy(*, end_barrier: bool) -> Devices:
    """A collective that reads its peer's input in place; the next kernel uses that memory again."""

    def program(rank: int) -> Program:
        peer = 1 - rank
        end = all_reduce(rank, PAIR, "read", "end barrier") if end_barrier else ()
        return [
            replay(
                kernel("gemm", Write("pool", "x")),
                kernel("all_reduce", *all_reduce(rank, PAIR, "there", "barrier"), Read("pool", "x", of=peer), *end),
                kernel("next", Write("pool", "temporary")),
            )
        ]

    return Devices([program(rank) for rank in PAIR])


def test_m41_memory_is_used_again_while_a_peer_reads_it() -> None:
    assert_fails(zero_copy(end_barrier=False), ModelFailure.STALE_READ, "next[0] write", "read 'x' in 'pool' of rank")


def test_m41_a_barrier_at_the_end_of_a_zero_copy_collective_is_safe() -> None:
    assert_safe(zero_copy(end_barrier=True))


# -- M42: one executable for segments that look alike (SGL#29625) ---------------------------


def shared_executable(*, updated: tuple[bool, bool]) -> Devices:
    """Segments a and b share one; a rank that does not update it replays a in the place of b."""
    return Devices(
        [
            [
                replay(kernel("segment", *all_reduce(r, PAIR, "a"))),
                replay(kernel("segment", *all_reduce(r, PAIR, "b" if updated[r] else "a"))),
            ]
            for r in PAIR
        ]
    )


def test_m42_a_segment_updated_on_one_rank_only() -> None:
    assert_fails(shared_executable(updated=(True, False)), ModelFailure.STALE_READ, "rank 0", "take 'b' of rank 1")


def test_m42_a_segment_updated_on_all_ranks_is_safe() -> None:
    assert_safe(shared_executable(updated=(True, True)))
