"""Sizes and ranks are folded: the same verdict as of the plan as it is, also where a protection is left out."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from ringfence.runtime.errors import NotDecidedError
from ringfence.runtime.hazards.situation import Payload, Strategy
from ringfence.runtime.protocol import plan as planning
from ringfence.runtime.protocol.bound import Bound
from ringfence.runtime.protocol.calls import Call, Calls, program, rounds
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.fold import KEPT_RANKS, mnnvl_folds, trtllm_folds
from ringfence.runtime.protocol.plan import check, check_alike, compiler_for, even_pieces, exercise, programs
from ringfence.runtime.protocol.rules import Clear, Epoch, LamportRules, MoeRules, Sentinel

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
#: What vLLM captures by default.
ENGINE_SIZES = (1, 2, 4, *range(8, 257, 8))

#: Mutants: what each leaves out, and the rules without it.
MUTANTS = {
    "a buffer": {"buffers": 2},
    "two buffers": {"buffers": 1},
    "the epoch on the device": {"epoch": Epoch.HOST},
    "the record of the size before": {"clear": Clear.CURRENT},
    "the clear": {"clear": Clear.NONE},
    "the bitwise compare": {"sentinel": Sentinel.FLOAT},
    "sanitised inputs": {"sanitises_input": False},
    "sanitised sums": {"sanitises_sum": False},
}


def random_plan(rng: random.Random, most_ranks: int) -> tuple[str, LamportRules, Calls, int]:
    world_size = rng.choice([2, 2, 3, 4, 5, 6, 8][: 2 + most_ranks // 2])
    strategies = rng.choice([[ONE], [TWO], [ONE, TWO]])
    sizes = sorted({rng.randint(1, (3 if world_size < 5 else 2) * world_size) for _ in range(rng.randint(1, 4))})
    rules = replace(LamportRules(polls_own=rng.random() < 0.5), **rng.choice([{}, {"buffers": 4}, *MUTANTS.values()]))
    payload = rng.choice(list(Payload))
    if rng.random() < 0.5:
        pieces = even_pieces(rng.choice([1, 2, 3]), 1, 1, strategies[0] if len(strategies) == 1 else None)
        rank = exercise(pieces, tuple(sizes), world_size, padding=rng.random() < 0.5)
        (calls,) = programs([replace(rank, payload=payload)])
    else:
        kinds = [(rng.choice(strategies), tokens) for tokens in sizes]
        calls = tuple(
            Call(i, *rng.choice(kinds), payload, epoch=rng.choice([i, i % 4])) for i in range(rng.randint(1, 12))
        )
    return rng.choice(["mnnvl", "mnnvl", "trtllm"]), rules, calls, world_size


@pytest.mark.parametrize(("seeds", "most_ranks"), [(range(100), 3), (range(1000, 1010), 8)])
def test_random_plans_fold_to_the_same_verdict(seeds: range, most_ranks: int) -> None:
    """Against the plan as it is: no size is reduced, no rank left out."""
    seen: Counter[bool] = Counter()
    for seed in seeds:
        collective, rules, calls, world_size = random_plan(random.Random(seed), most_ranks)
        machine = compiler_for(collective, rules, [calls] * world_size).machine([calls] * world_size)
        try:
            whole = decide(machine, limit=300, bound=Bound(6_000))
            folded = check_alike(collective, rules, calls, world_size, Bound(30_000, shortest=300))
        except NotDecidedError:
            continue
        assert folded.safe is whole.safe, f"seed {seed}"
        seen[whole.safe] += 1
    assert min(seen[True], seen[False]) >= len(seeds) // 8


def test_tiny_plans_fold_to_what_every_order_says() -> None:
    """Against the search through every order, which is in nothing the folding's own."""
    seen: Counter[bool] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        collective, rules, _, _ = random_plan(rng, 2)
        strategies = rng.choice([[ONE], [TWO], [ONE, TWO]])
        calls = tuple(Call(i, rng.choice(strategies), rng.choice([1, 2, 3]), epoch=i % 4) for i in range(5))
        try:
            whole = explore(compiler_for(collective, rules, [calls] * 2).machine([calls] * 2), limit=3000)
        except NotDecidedError:
            continue
        assert check_alike(collective, rules, calls, 2, Bound(shortest=300)).safe is whole.safe, f"seed {seed}"
        seen[whole.safe] += 1
    assert min(seen[True], seen[False]) > 5


@pytest.mark.parametrize("world_size", [2, 8, 16])
@pytest.mark.parametrize("strategy", [ONE, TWO, None])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_protection_that_is_left_out_is_found(mutant: str, strategy: Strategy | None, world_size: int) -> None:
    """In the plan of an engine, with all its sizes; what the strategy has no use for stays unmissed."""
    rank = exercise(even_pieces(1, 2, 1, strategy), ENGINE_SIZES[:9], world_size)
    payload = {"sanitised inputs": Payload.NEGATIVE_ZERO}.get(mutant, Payload.SUBNORMAL)
    (calls,) = programs([replace(rank, payload=payload)])
    mutated = replace(LamportRules(), **MUTANTS[mutant])  # type: ignore[arg-type]
    found = check_alike("mnnvl", mutated, calls, world_size, Bound(shortest=100))
    assert found.safe is (mutant == "sanitised sums" and strategy is ONE)  # sums of subnormals are flushed to -0.0


@pytest.mark.parametrize(
    ("collective", "strategy", "sizes"),
    [
        ("mnnvl", ONE, (1, 3)),
        ("mnnvl", TWO, (4, 8)),
        ("mnnvl", TWO, (5, 6)),
        ("trtllm", ONE, (1, 3)),
        ("trtllm", ONE, (2, 3)),
    ],
)
def test_a_word_that_only_some_sizes_use_is_looked_at(
    collective: str, strategy: Strategy, sizes: tuple[int, ...]
) -> None:
    """Cleared by the size of the call that clears, it is stale when a large size comes back. All ranks own a token."""
    small, large = sizes
    calls = program([large, small, small, large], strategy)
    rules = LamportRules(polls_own=True)
    for clear, safe in ((Clear.RECORDED, True), (Clear.CURRENT, False)):
        weak = replace(rules, clear=clear)
        whole = decide(compiler_for(collective, weak, [calls] * 2).machine([calls] * 2), limit=300)
        assert whole.safe is safe
        assert check_alike(collective, weak, calls, 2, Bound(shortest=300)).safe is safe


@pytest.mark.parametrize("flags", [{"separate_flags": False}, {"shared_memory": False}])
def test_an_all_to_all_without_its_flags_is_found(flags: dict[str, bool]) -> None:
    assert check_alike("moe_all_to_all", MoeRules(), rounds(80), 16, Bound()).safe
    found = check_alike("moe_all_to_all", replace(MoeRules(), **flags), rounds(80), 16, Bound())
    assert not found.safe


@pytest.mark.parametrize("grids", [(1, 2), (2, 1), (2, 3), (3, 2, 1)])
def test_grids_are_not_folded(grids: tuple[int, ...]) -> None:
    """Two-shot of trtllm: the folded plan asks the machine with these very grids."""
    calls = tuple(Call(i, TWO, tokens=8 * grid, ctas=grid) for i, grid in enumerate(grids * 2))
    whole = decide(compiler_for("trtllm", LamportRules(), [calls] * 2).machine([calls] * 2))
    folded = check_alike("trtllm", LamportRules(), calls, 2, Bound())
    assert (folded.failure, folded.states) == (whole.failure, whole.states)


@pytest.mark.parametrize(("version", "safe"), [("0.7.1", False), ("0.7.2", True)])
def test_a_flag_that_is_raised_too_early_is_found_where_grids_change(version: str, safe: bool) -> None:
    """M58, among all sizes of an engine, with the grids of the sizes as they were before they were folded."""
    for strategy in (TWO, None):
        ranks = programs([exercise(even_pieces(2, 2, 2, strategy), ENGINE_SIZES, 8)] * 8)
        assert check("trtllm", version, ranks, Bound(shortest=400)).safe is safe


def test_a_plan_without_a_fold_is_not_safe_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in (ONE, TWO):
        for calls in (program([1], strategy), program([3, 5], strategy)):
            assert list(mnnvl_folds(calls, 4)) and list(trtllm_folds(calls))
    monkeypatch.setattr(planning, "mnnvl_folds", lambda calls, world_size: ())
    with pytest.raises(AssertionError, match="unasked"):
        check("mnnvl", "0.7.0", [program([1])] * 2)


@pytest.mark.parametrize("strategy", [ONE, TWO, None])
@pytest.mark.parametrize("collective", ["mnnvl", "trtllm"])
def test_an_engines_sizes_on_sixteen_ranks_are_decided_in_seconds(collective: str, strategy: Strategy | None) -> None:
    rank = exercise(even_pieces(80, 2, 33, strategy), ENGINE_SIZES, 16)
    ranks = programs([rank] * 16)
    assert len(ranks[0]) == 160 * 106
    started = time.process_time()
    result = check(collective, "0.7.2", ranks)
    assert time.process_time() - started < 10
    assert result.safe and result.states < 12_000


def test_a_failure_names_the_ranks_that_are_kept() -> None:
    result = check(
        "mnnvl",
        "0.6.12",
        programs([replace(exercise(even_pieces(4, 2, 2, TWO), ENGINE_SIZES, 16), payload=Payload.SUBNORMAL)] * 16),
    )
    assert result.failure is ModelFailure.DEADLOCK
    assert {event.rank for event in result.trace} <= set(range(KEPT_RANKS)) and len(result.waiting) == KEPT_RANKS


def test_a_search_ends_at_its_bound() -> None:
    calls = program([1, 2] * 4)
    with pytest.raises(NotDecidedError, match="bound of 20 states"):
        check("mnnvl", "0.7.0", [calls] * 2, Bound(20))
    with pytest.raises(NotDecidedError, match="bound of 1e-09 seconds"):
        check("mnnvl", "0.7.0", [calls] * 2, Bound(seconds=1e-9))
    told: list[int] = []
    assert check("mnnvl", "0.7.0", [calls] * 2, Bound(told=told.append)).safe
    assert told == sorted(told) and told[-1] > 20
