"""M15, M22, M23, M25, M26, M27, M29, M31, M36, M42, M44, M58: ranks that launch different things, and those that may.

Each case is a plan of two pieces on two or four ranks, decided as a user would ask for it, and
again with what avoids the hazard.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol.calls import Call, Calls, changed, program, swapped, until, without
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.plan import PlannedRank, check, even_pieces, programs
from ringfence.runtime.protocol.rules import Epoch, mnnvl_rules, trtllm_rules
from ringfence.runtime.protocol.trtllm import trtllm

RANK = PlannedRank(even_pieces(2, 2, 2), steps=(4, 4, 4), capture_sizes=(4, 8))
COLLECTIVES = ["mnnvl", "trtllm"]


def failure_of(collective: str, ranks: list[Calls] | tuple[Calls, ...]) -> ModelFailure | None:
    return check(collective, "0.6.13", ranks).failure


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_equal_ranks_are_safe(collective: str, world_size: int) -> None:
    assert check(collective, "0.6.13", programs([RANK] * world_size)).safe


@pytest.mark.parametrize("sites", [1, 2, 4])
def test_m15_an_epoch_that_the_host_holds_cannot_be_captured(sites: int) -> None:
    """Replays repeat the number that the capture saw; only a multiple of three calls comes round right."""
    captured = PlannedRank(even_pieces(sites, 1, 1), steps=(4,) * 4, capture_sizes=(4,))
    rules = replace(mnnvl_rules("0.6.13"), epoch=Epoch.HOST)
    assert not explore(mnnvl(programs([captured] * 2), rules)).safe
    assert explore(mnnvl(programs([replace(captured, capture_sizes=())] * 2), rules)).safe, "eager"
    island = replace(captured, pieces=tuple(replace(piece, island=True) for piece in captured.pieces))
    assert explore(mnnvl(programs([island] * 2), rules)).safe, "split"
    assert explore(mnnvl(programs([captured] * 2), mnnvl_rules("0.6.13"))).safe, "epoch on the device"


def test_m22_unequal_grids_deadlock_and_equal_ones_do_not() -> None:
    calls = program([8] * 3, Strategy.TWO_SHOT)
    unequal = [calls, changed(calls, 0, 1, 2, tokens=4)]
    assert check("trtllm", "0.7.2", unequal).failure is ModelFailure.DEADLOCK
    assert failure_of("trtllm", [calls, calls]) is None


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_m23_a_rank_that_falls_back_leaves_the_others_waiting(collective: str) -> None:
    """What the rank calls instead is another collective, on another workspace: here it calls nothing."""
    calls = program([4] * 6)
    assert failure_of(collective, [calls, ()]) is ModelFailure.DEADLOCK
    assert failure_of(collective, [calls, calls]) is None


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_m25_ranks_that_choose_different_graphs_fail(collective: str, world_size: int) -> None:
    """V#25906: the local token count decided. A count that all ranks agree on does not fail."""
    local = [replace(RANK, steps=(4, 4, 4 + 4 * (r == 1))) for r in range(world_size)]
    assert failure_of(collective, programs(local)) is not None
    agreed = [replace(RANK, steps=(4, 4, max(rank.steps[2] for rank in local))) for _ in range(world_size)]
    assert failure_of(collective, programs(agreed)) is None


def test_m25_padding_on_one_rank_only_fails() -> None:
    asked = replace(RANK, steps=(3,))
    assert failure_of("mnnvl", programs([asked, replace(asked, padding=False)])) is not None
    assert failure_of("mnnvl", programs([asked, asked])) is None


def test_m25_a_rank_that_already_captured_makes_the_same_calls() -> None:
    """The call that captures launches what a replay does; extra warm-up runs on one rank would not be safe."""
    first, second = programs([RANK, replace(RANK, capture_sizes=())])
    assert [c.where for c in first] != [c.where for c in second]
    assert failure_of("mnnvl", [first, second]) is None
    warmed = [replace(c, id=-1) for c in first[:2]]
    assert failure_of("mnnvl", [(*warmed, *first), second]) is not None


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_m26_a_rank_tuned_to_another_strategy_fails(collective: str) -> None:
    calls = program([8] * 4)
    assert failure_of(collective, [calls, changed(calls, 2, strategy=Strategy.TWO_SHOT)]) is not None
    agreed = changed(calls, 2, strategy=Strategy.TWO_SHOT)
    assert failure_of(collective, [agreed, agreed]) is None


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_m27_a_rank_without_tokens_launches_nothing(collective: str) -> None:
    idle = programs([replace(RANK, steps=(4, 1), capture_sizes=()), replace(RANK, steps=(4, 0), capture_sizes=())])
    assert failure_of(collective, idle) is ModelFailure.DEADLOCK
    padded = programs([replace(RANK, steps=(4, 1), capture_sizes=())] * 2)
    assert failure_of(collective, padded) is None


def test_m29_an_exception_that_jumps_to_a_collective_in_finally() -> None:
    """SGL#11275: rank 1 fails in call 2 and goes straight to the last collective."""
    calls = program([4] * 6)
    assert failure_of("mnnvl", [calls, without(calls, 2, 3, 4)]) is not None
    assert failure_of("mnnvl", [until(calls, 2), until(calls, 2)]) is None, "all ranks stop together"


def test_m31_a_rank_that_recreated_its_workspace_is_alone_with_it() -> None:
    calls = program([4] * 6)
    recreated = changed(calls, 3, 4, 5, workspace=1)
    assert explore(mnnvl([calls, recreated], mnnvl_rules("0.6.13"))).failure is ModelFailure.DEADLOCK
    assert explore(mnnvl([recreated, recreated], mnnvl_rules("0.6.13"))).safe, "all ranks captured again"


@pytest.mark.parametrize("strategy", [Strategy.ONE_SHOT, Strategy.TWO_SHOT])
def test_m36_the_rank_that_spins_is_the_victim(strategy: Strategy) -> None:
    """SGL#38300: rank 1's graph never progresses, and rank 0 is found spinning."""
    calls = program([4] * 6, strategy)
    result = check("mnnvl", "0.6.17", [calls, until(calls, 3)])
    assert result.failure is ModelFailure.DEADLOCK
    assert result.waiting[0].startswith("rank 0 in call 3")
    assert result.waiting[1] == "rank 1 waits for nothing: its program has ended"
    assert check("mnnvl", "0.6.17", [calls, calls]).safe


def test_m37_two_streams_in_another_order_read_each_others_data() -> None:
    calls = program([4] * 6)
    result = check("mnnvl", "0.6.13", [calls, swapped(calls, 2, 3)])
    assert result.failure is ModelFailure.STALE_READ


def test_m42_a_graph_that_one_rank_did_not_update_fails() -> None:
    """SGL#29625: one executable graph serves equal segments; rank 1 replays the one of another size."""
    calls = program([8, 4, 8, 4])
    assert failure_of("mnnvl", [calls, changed(calls, 1, tokens=8)]) is ModelFailure.DEADLOCK
    assert failure_of("mnnvl", [calls, calls]) is None


@pytest.mark.parametrize("strategy", [Strategy.ONE_SHOT, Strategy.TWO_SHOT])
def test_m44_graphs_of_different_sizes_and_strategies_may_alternate(strategy: Strategy) -> None:
    """Suspected early and disproved: sizes are recorded on the device."""
    sizes = program([1, 2, 1, 2, 2, 1])
    mixed = changed(sizes, 1, 3, strategy=strategy)
    assert explore(mnnvl([mixed] * 2, mnnvl_rules("0.6.13"))).safe
    assert explore(trtllm([mixed] * 2, trtllm_rules("0.6.13"))).safe


def test_m58_before_0_7_2_a_larger_grid_takes_a_flag_that_is_two_barriers_old() -> None:
    """The peer waits for the flag of the block alone; those behind it may come after its next launch has begun."""

    def found(version: str, grids: tuple[int, ...]) -> ModelFailure | None:
        calls = tuple(Call(i, Strategy.TWO_SHOT, ctas=grid) for i, grid in enumerate(grids))
        return explore(trtllm([calls] * 2, trtllm_rules(version))).failure

    for version in ("0.6.18", "0.7.1"):
        assert found(version, (1, 2)) is ModelFailure.STALE_READ
        assert found(version, (2, 1)) is None and found(version, (2, 2)) is None, "no flag comes behind another"
    for grids in ((1, 2), (2, 1), (1, 3)):
        assert found("0.7.2", grids) is None


@pytest.mark.parametrize("version", ["0.6.13", "0.6.18", "0.7.1", "0.7.2", "0.7.2.post1"])
def test_m58_is_found_in_plans_whose_sizes_take_turns(version: str) -> None:
    fixed = version.startswith("0.7.2")
    assert check("trtllm", version, [program((4, 64), Strategy.TWO_SHOT)] * 4).safe is fixed
    for sizes, stale in (((4, 64), True), ((64, 4), True), ((64, 64), False), ((4, 64, 4), True)):
        result = check("trtllm", version, [program(sizes, Strategy.TWO_SHOT)] * 2)
        assert result.failure is (ModelFailure.STALE_READ if stale and not fixed else None)
    assert check("trtllm", version, [program((4, 64))] * 2).safe, "one-shot has no such flags"
