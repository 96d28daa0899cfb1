"""Hosts that wait for one another while a kernel spins: M21, M23, M24, M26, M27, M28, M29, M30, M33, M36, M43."""

from __future__ import annotations

from hangs.models.device import Devices
from hangs.models.instructions import (
    Await,
    HostOp,
    Launch,
    Meet,
    Poll,
    Push,
    Read,
    Synchronize,
    Write,
    all_reduce,
    kernel,
    launch,
    replay,
)
from hangs.scheduling import PAIR, assert_fails, assert_safe
from ringfence.runtime.protocol.explore import ModelFailure

Program = list[HostOp]


def fused(rank: int, value: str = "x", box: str = "workspace", stream: str = "main") -> Launch:
    return launch(kernel(f"all_reduce of {box}", *all_reduce(rank, PAIR, value, box)), stream=stream)


# -- M21: a rendezvous over WORLD (FI#2955, FI#3408, V#45917) -------------------------------


def rendezvous(*, over_group: bool) -> Devices:
    """Two pipeline stages of two ranks; the second has its first work from the first."""
    world = (0, 1, 2, 3)

    def program(rank: int) -> Program:
        group = (0, 1) if rank < 2 else (2, 3)
        create = Meet("rendezvous of the workspace", group if over_group else world)
        if rank < 2:
            return [create, Push("activations", rank + 2, "a")]
        return [Poll("activations", rank - 2, "a"), create]

    return Devices([program(rank) for rank in world])


def test_m21_a_rendezvous_over_world_waits_for_ranks_that_are_elsewhere() -> None:
    assert_fails(
        rendezvous(over_group=False),
        ModelFailure.DEADLOCK,
        "rank 0: its host waits to meet ranks (0, 1, 2, 3) at 'rendezvous of the workspace', without rank 2, 3",
        "rank 2: its host waits to take 'a' of rank 0 from 'activations'",
    )


def test_m21_a_rendezvous_over_the_group_is_safe() -> None:
    assert_safe(rendezvous(over_group=True))


# -- M23: one rank has no workspace; M24: probes differ (FI#3701, V#45800) ------------------


def decided(able: tuple[bool, ...], *, vote: bool) -> list[bool]:
    """What each rank goes by: its own answer, or whether all said yes."""
    return [all(able)] * len(able) if vote else list(able)


def fallback(able: tuple[bool, ...], *, vote: bool) -> Devices:
    votes: Program = [Meet("vote", PAIR)] if vote else []
    uses = decided(able, vote=vote)
    return Devices([[*votes, fused(r, box="workspace" if uses[r] else "nccl")] for r in PAIR])


def test_m23_one_rank_falls_back_and_both_wait_in_different_collectives() -> None:
    assert_fails(
        fallback((True, False), vote=False),
        ModelFailure.DEADLOCK,
        "rank 0: 'all_reduce of workspace' waits to take 'x' of rank 1",
        "rank 1: 'all_reduce of nccl' waits to take 'x' of rank 0",
    )


def test_m23_a_vote_before_acting_is_safe() -> None:
    for able in ((True, False), (False, True), (True, True), (False, False)):
        assert_safe(fallback(able, vote=True))


def probe(multicast: tuple[bool, ...], *, vote: bool) -> Devices:
    votes: Program = [Meet("AND of the probes", PAIR)] if vote else []
    uses = decided(multicast, vote=vote)
    handles = [Meet(f"exchange of {'fabric' if uses[r] else 'POSIX'} handles", PAIR) for r in PAIR]
    return Devices([[*votes, handles[r], fused(r)] for r in PAIR])


def test_m24_ranks_that_probe_differently_never_meet() -> None:
    assert_fails(probe((True, False), vote=False), ModelFailure.DEADLOCK, "fabric", "without rank 1", "POSIX")


def test_m24_the_and_of_the_probes_is_safe() -> None:
    assert_safe(probe((True, False), vote=True))


# -- M26: autotuning and compilation (FI#3187, FI#4192); invariant 13 -----------------------


def autotune(*, before: bool) -> Devices:
    """Rank 1 meets a shape that it has no tactic for, and tunes it together with rank 0."""
    tune = Meet("broadcast of the tactic", PAIR)
    rank_0: Program = [fused(0), Synchronize(why="read the result"), tune]
    rank_1: Program = [tune, fused(1)]
    if before:
        rank_0, rank_1 = [tune, fused(0), Synchronize()], [tune, fused(1)]
    return Devices([rank_0, rank_1])


def test_m26_tuning_on_one_rank_while_the_other_spins() -> None:
    assert_fails(
        autotune(before=False),
        ModelFailure.DEADLOCK,
        "rank 0: its host waits to read the result, which needs its streams idle",
        "'all_reduce of workspace' waits to take 'x' of rank 1",
        "rank 1: its host waits to meet ranks (0, 1) at 'broadcast of the tactic', without rank 0",
    )


def test_m26_tuning_before_the_first_collective_is_safe() -> None:
    assert_safe(autotune(before=True))


def tactics(scratch: tuple[int, int], *, broadcast: bool) -> Devices:
    sizes = [scratch[0]] * 2 if broadcast else scratch
    return Devices([[Meet(f"register {sizes[r]} bytes", PAIR), fused(r)] for r in PAIR])


def test_m26_tactics_measured_per_rank_register_different_scratch() -> None:
    assert_fails(tactics((64, 128), broadcast=False), ModelFailure.DEADLOCK, "register 64", "register 128")


def test_m26_a_tactic_that_is_broadcast_is_safe() -> None:
    assert_safe(tactics((64, 128), broadcast=True))


# -- M28 and invariant 13: a module load needs an idle device -------------------------------


def lazy_loading(*, lazy: bool) -> Devices:
    """Two collectives on two streams, issued in another order per rank; each loads a module of its own."""

    def program(rank: int) -> Program:
        calls = [fused(rank, box="a", stream="main"), fused(rank, box="b", stream="side")]
        load: Program = [Synchronize(why="load a module")] if lazy else []
        first, second = calls if rank == 0 else reversed(calls)
        return [first, *load, second]

    return Devices([program(rank) for rank in PAIR])


def test_m28_a_lazy_module_load_waits_for_a_kernel_that_waits_for_the_peer() -> None:
    """CUDA C++ Programming Guide, Lazy Loading: loading may need the context idle, and concurrent kernels deadlock."""
    assert_fails(
        lazy_loading(lazy=True),
        ModelFailure.DEADLOCK,
        "rank 0: its host waits to load a module, which needs its streams idle; 'all_reduce of a'",
        "rank 1: its host waits to load a module, which needs its streams idle; 'all_reduce of b'",
    )


def test_m28_modules_loaded_beforehand_are_safe() -> None:
    assert_safe(lazy_loading(lazy=False))


# -- M36, M43, M28: the spinning kernel is the victim ---------------------------------------


def neighbour(*, defined_padding: bool) -> Devices:
    """Before its collective, rank 1 runs a kernel that counts rows; padded rows hold a length (V#51593)."""
    rows: Program = [
        Write("rows", 4 if defined_padding else -7),
        replay(kernel("top_k", Await("rows", 0)), kernel("all_reduce", *all_reduce(1, PAIR, "x"))),
    ]
    return Devices([[fused(0)], rows])


def test_m43_a_kernel_that_never_ends_shows_as_a_spin_of_the_peer() -> None:
    """So does a replay that never progresses (M36, PT#196133), whatever stops it: the sentences name it."""
    result = assert_fails(neighbour(defined_padding=False), ModelFailure.DEADLOCK)
    assert result.waiting == (
        "rank 0: 'all_reduce of workspace' waits to take 'x' of rank 1 from 'workspace'",
        "rank 1: 'top_k' waits to see 'rows' at least 0",
    )


def test_m43_defined_padding_is_safe() -> None:
    assert_safe(neighbour(defined_padding=True))


# -- M27: a rank without tokens -------------------------------------------------------------


def idle_rank(tokens: tuple[int, int], *, pad: bool) -> Devices:
    return Devices([[fused(r)] if max(tokens[r], int(pad)) else [] for r in PAIR])


def test_m27_a_rank_without_tokens_skips_the_call() -> None:
    assert_fails(idle_rank((3, 0), pad=False), ModelFailure.DEADLOCK, "of rank 1 from 'workspace', which has ended")


def test_m27_at_least_one_padded_token_is_safe() -> None:
    assert_safe(idle_rank((3, 0), pad=True))


# -- M29: a collective in `finally` (SGL#11275); invariant 16 -------------------------------


def capture(*, vote: bool, raises: int | None = 1) -> Devices:
    """Two pieces are captured; each is warmed up, and ``raises`` raises in the first."""

    def program(rank: int) -> Program:
        register = Meet("register_graph_buffers", PAIR)
        pieces: Program = []
        for piece in range(2):
            pieces += [fused(rank, f"warm-up {piece}"), Synchronize(why="warm up")]
            if vote:
                pieces.append(Meet(f"vote on piece {piece}", PAIR))
                if raises is not None:
                    return pieces  # all undo what they recorded
            if rank == raises:
                return [*pieces, register]
        return [*pieces, register]

    return Devices([program(rank) for rank in PAIR])


def test_m29_a_collective_in_finally_hides_the_exception_in_a_hang() -> None:
    assert_fails(
        capture(vote=False),
        ModelFailure.DEADLOCK,
        "rank 0: its host waits to warm up",
        "waits to take 'warm-up 1' of rank 1",
        "rank 1: its host waits to meet ranks (0, 1) at 'register_graph_buffers', without rank 0",
    )


def test_m29_a_vote_after_each_piece_is_safe() -> None:
    assert_safe(capture(vote=True))
    assert_safe(capture(vote=True, raises=None))


def test_m29_without_an_exception_both_ways_are_safe() -> None:
    assert_safe(capture(vote=False, raises=None))


# -- M30: a workspace is made during warm-up (TRT#8781); invariant 7 ------------------------


def creation(*, before: bool) -> Devices:
    """Rank 0 has a workspace from before; rank 1 built its module anew and makes one at its first call."""
    create: Program = [Synchronize(why="make a workspace"), Meet("barrier of the workspace", PAIR)]
    if before:
        return Devices([[*create, fused(r), Synchronize(why="warm up")] for r in PAIR])
    return Devices([[fused(0), Synchronize(why="warm up")], [*create, fused(1)]])


def test_m30_a_workspace_made_in_warm_up_waits_for_a_rank_that_spins() -> None:
    assert_fails(
        creation(before=False),
        ModelFailure.DEADLOCK,
        "waits to take 'x' of rank 1",
        "rank 1: its host waits to meet ranks (0, 1) at 'barrier of the workspace', without rank 0",
    )


def test_m30_a_workspace_made_by_all_before_the_first_call_is_safe() -> None:
    assert_safe(creation(before=True))


# -- M33: capture starts while a peer still warms up (SGL#33795); invariant 8 ---------------


def warm_up_then_capture(*, barrier: bool) -> Devices:
    """Buffers are registered by the host in a table of the peer's, which kernels read."""

    def program(rank: int) -> Program:
        def call(buffer: str, value: str) -> Launch:
            return launch(kernel("all_reduce", Read("table", buffer), *all_reduce(rank, PAIR, value)))

        between: Program = [Synchronize(why="end warm-up"), Meet("end of warm-up", PAIR)] if barrier else []
        return [
            Write("table", "eager buffer", of=1 - rank),
            Meet("registered", PAIR),
            call("eager buffer", "warm-up"),
            *between,
            Write("table", "graph buffer", of=1 - rank),
            Meet("registered again", PAIR),
            call("graph buffer", "replay"),
        ]

    return Devices([program(rank) for rank in PAIR])


def test_m33_registration_of_the_capture_meets_a_peer_in_its_warm_up() -> None:
    assert_fails(
        warm_up_then_capture(barrier=False),
        ModelFailure.STALE_READ,
        "write 'graph buffer' to 'table' of rank",
        "all_reduce[0] read 'eager buffer' in 'table'",
    )


def test_m33_synchronising_and_a_barrier_before_capture_are_safe() -> None:
    assert_safe(warm_up_then_capture(barrier=True))


def test_m33_the_barrier_alone_is_not_enough() -> None:
    """The hosts have met, and a kernel that they launched has yet to run."""

    def program(rank: int) -> Program:
        reader = kernel("all_reduce", Read("table", "eager buffer"))
        return [
            Write("table", "eager buffer", of=1 - rank),
            Meet("registered", PAIR),
            launch(reader),
            Meet("end of warm-up", PAIR),
            Write("table", "graph buffer", of=1 - rank),
        ]

    assert_fails(Devices([program(rank) for rank in PAIR]), ModelFailure.STALE_READ)
