"""M62, M63, M64 in the one-sided MoE all-to-all: where rows lie, and who still reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.runtime.protocol.calls import Calls, changed, rounds
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.machine import Machine
from ringfence.runtime.protocol.moe_planes import Writes, moe_planes
from ringfence.runtime.protocol.rules import MoeRules, moe_rules

RULES = moe_rules("0.6.18")
FIXED = replace(RULES, combine_offset_fixed=True)


def sized(*capacities: int, tokens: int = 1) -> Calls:
    """A round for each capacity."""
    calls = rounds(len(capacities))
    for i, capacity in enumerate(capacities):
        calls = changed(calls, 2 * i, 2 * i + 1, capacity=capacity, tokens=tokens)
    return calls


def check(machine: Machine) -> ModelFailure | None:
    return explore(machine).failure


@pytest.mark.parametrize("rules", [RULES, FIXED])
@pytest.mark.parametrize("capacities", [(1, 1), (2, 2)])
def test_rounds_of_one_geometry_are_safe(rules: MoeRules, capacities: tuple[int, ...]) -> None:
    assert check(moe_planes([sized(*capacities)] * 2, rules)) is None


def test_three_ranks_of_one_geometry_are_safe() -> None:
    assert check(moe_planes([sized(1)] * 3, RULES)) is None


def test_a_rank_without_tokens_takes_part() -> None:
    """It writes no row, and its peers read none of it; its flags come all the same."""
    none = changed(sized(1, 1), 0, 1, 2, 3, tokens=0)
    assert check(moe_planes([none, none], RULES)) is None


def test_m62_ranks_with_different_capacities_read_what_nobody_wrote_there() -> None:
    """SGL#30242: no flag is late, so nothing hangs, and the numbers are wrong."""
    result = explore(moe_planes([sized(1), sized(2)], RULES))
    assert result.failure is ModelFailure.STALE_READ
    assert "takes what nobody wrote for rank 1's part" in result.trace[-1].detail
    assert explore(moe_planes([sized(2), sized(2)], RULES)).safe
    assert check(moe_planes([sized(1), sized(2)], FIXED)) is ModelFailure.STALE_READ, "one offset does not cure it"


def test_m63_a_larger_dispatch_overwrites_what_a_slow_rank_combines() -> None:
    result = explore(moe_planes([sized(1, 2)] * 2, RULES))
    assert result.failure is ModelFailure.LOST_WRITE
    last = result.trace[-1]
    assert last.action == "push" and last.call == 2 and "in call 1, unread" in last.detail
    slow = 1 - last.rank
    assert [e.action for e in result.trace if e.call == 1 and e.rank == slow].count("raise") == 1
    late = [e for e in result.trace if e.rank == slow and e.call == 1 and e.action == "read"]
    assert len(late) < 2, "the rank that still combines has told that it began, and no more"
    assert len(result.trace) == 22, "the search is breadth first: no shorter schedule loses a row"


def test_m63_wider_rows_are_a_larger_dispatch_too() -> None:
    """One layer's payload is quantised, the next one's is not."""
    wider = changed(sized(1, 1), 2, 3, width=2)
    assert check(moe_planes([wider] * 2, RULES)) is ModelFailure.LOST_WRITE
    assert check(moe_planes([wider] * 2, FIXED)) is None


@pytest.mark.parametrize("capacities", [(1, 2), (2, 1)])
def test_m63_one_offset_behind_the_largest_rows_cures_it(capacities: tuple[int, ...]) -> None:
    assert check(moe_planes([sized(*capacities)] * 2, FIXED)) is None


def test_m64_without_a_barrier_a_first_flag_is_wiped() -> None:
    flags = sized(1, tokens=0)
    result = explore(moe_planes([flags] * 2, RULES, initialises=True))
    assert not RULES.barrier_after_init and result.failure is ModelFailure.DEADLOCK
    assert any("wipes" in e.detail or e.action == "clear" for e in result.trace)
    assert check(moe_planes([sized(1)] * 2, RULES, initialises=True)) is not None, "rows are wiped too"
    met = replace(RULES, barrier_after_init=True)
    assert check(moe_planes([sized(1)] * 2, met, initialises=True)) is None
    assert moe_rules("0.7.2").barrier_after_init


@pytest.mark.parametrize("capacities", [(1, 1), (1, 2), (2, 1)])
def test_experts_may_write_what_is_combined_between_their_dispatch_and_its_combine(capacities: tuple[int, ...]) -> None:
    """A peer's flag of this dispatch says that it has done with the combine before."""
    assert check(moe_planes([sized(*capacities)] * 2, FIXED, writes=Writes.BETWEEN)) is None
    none = changed(sized(1, 1), 0, 1, 2, 3, tokens=0)
    assert check(moe_planes([sized(1, 1)] * 2, FIXED, writes=Writes.BETWEEN)) is None
    assert check(moe_planes([none] * 2, FIXED, writes=Writes.BETWEEN)) is None


def test_three_ranks_experts_may_write_there() -> None:
    assert check(moe_planes([sized(1)] * 3, FIXED, writes=Writes.BETWEEN)) is None


def test_experts_that_write_before_their_dispatch_overwrite_what_a_slow_rank_combines() -> None:
    result = explore(moe_planes([sized(1, 1)] * 2, FIXED, writes=Writes.EARLY))
    assert result.failure is ModelFailure.LOST_WRITE
    last = result.trace[-1]
    assert last.action == "push" and last.call == 3 and "in call 1, unread" in last.detail
    assert check(moe_planes([sized(1)] * 2, FIXED, writes=Writes.EARLY)) is None, "nobody combined before the first"


def test_experts_that_write_after_their_combine_began_are_not_waited_for() -> None:
    result = explore(moe_planes([sized(1)] * 2, FIXED, writes=Writes.LATE))
    assert result.failure is ModelFailure.STALE_READ


def test_m63_a_region_that_moves_is_no_place_for_experts_either() -> None:
    assert check(moe_planes([sized(1, 2)] * 2, RULES, writes=Writes.BETWEEN)) is ModelFailure.LOST_WRITE
