"""Sizes and ranks of our own collective are folded: the same verdict as of the plan as it is, mutants included."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from ringfence.runtime.errors import NotDecidedError
from ringfence.runtime.hazards.situation import Collective, Strategy
from ringfence.runtime.protocol import plan as planning
from ringfence.runtime.protocol.bound import Bound
from ringfence.runtime.protocol.calls import Call, Calls, changed, program, without
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.fold import KEPT_RANKS
from ringfence.runtime.protocol.plan import check, check_alike, even_pieces, exercise, programs
from ringfence.runtime.protocol.ringfence import RULES, LineRules, RingfenceCompiler, ringfence
from ringfence.runtime.protocol.rules import Epoch

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
ENGINE_SIZES = (1, 2, 4, *range(8, 257, 8))

#: Mutants of the protocol: what each leaves out, and the rules without it.
MUTANTS = {
    "a buffer": {"buffers": 1},
    "the epoch on the device": {"epoch": Epoch.HOST},
    "the shares of blocks that are not there": {"every_share_counts": False},
    "the flag in the line": {"flag_with_data": False},
}


def folded(rules: LineRules, calls: Calls, world_size: int) -> bool:
    return check_alike(Collective.RINGFENCE, rules, calls, world_size, Bound(60_000, shortest=300)).safe


def random_plan(rng: random.Random, most_ranks: int, most_calls: int) -> tuple[LineRules, Calls, int]:
    """Sizes, strategies and grids that change; host epochs come back as a replay's do, of either strategy."""
    rules = replace(RULES, **rng.choice([{}, {"buffers": 3}, {"buffers": 3, "epoch": Epoch.HOST}, *MUTANTS.values()]))
    strategies = rng.choice([[ONE], [TWO], [ONE, TWO], [ONE, TWO]])
    kinds = [(rng.choice(strategies), rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
    grids, epochs = rng.randint(1, 2), rng.randint(2, 5)
    calls = []
    for i in range(rng.randint(1, most_calls)):
        strategy, tokens = rng.choice(kinds)
        grid = rng.randint(1, grids) if rules.every_share_counts is False else 1
        calls.append(Call(i, strategy, tokens, ctas=grid, epoch=rng.choice([i, i % epochs])))
    return rules, tuple(calls), rng.randint(2, most_ranks)


@pytest.mark.parametrize(("seeds", "most_ranks"), [(range(100), 3), (range(1000, 1008), 6)])
def test_random_plans_fold_to_the_same_verdict(seeds: range, most_ranks: int) -> None:
    """Against the plan as it is: no size is reduced, no rank left out."""
    seen: Counter[bool] = Counter()
    for seed in seeds:
        rules, calls, world_size = random_plan(random.Random(seed), most_ranks, 10)
        try:
            whole = decide(ringfence([calls] * world_size, rules), limit=300, bound=Bound(20_000)).safe
        except NotDecidedError:
            continue
        assert folded(rules, calls, world_size) is whole, f"seed {seed}"
        seen[whole] += 1
    assert min(seen[True], seen[False]) >= len(seeds) // 8


def test_tiny_plans_fold_to_what_every_order_says() -> None:
    """Against the search through every order, which is in nothing the folding's own."""
    seen: Counter[bool] = Counter()
    for seed in range(60):
        rules, calls, _ = random_plan(random.Random(seed), 2, 4)
        try:
            whole = explore(ringfence([calls] * 2, rules), limit=2000).safe
        except NotDecidedError:
            continue
        assert folded(rules, calls, 2) is whole, f"seed {seed}"
        seen[whole] += 1
    assert min(seen[True], seen[False]) > 5


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("strategy", [ONE, TWO, None])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_protection_that_is_left_out_is_found(mutant: str, strategy: Strategy | None, world_size: int) -> None:
    """In the plan of an engine, with grids that change with the sizes. Two-shot calls alone need one buffer only."""
    (calls,) = programs([exercise(even_pieces(1, 2, 1, strategy), ENGINE_SIZES[:5], world_size)])
    calls = tuple(replace(call, ctas=min(call.tokens, 2)) for call in calls)
    assert folded(RULES, calls, world_size)
    unmissed = mutant == "a buffer" and strategy is TWO  # sums answer the parts, so who has all has been received from
    assert folded(replace(RULES, **MUTANTS[mutant]), calls, world_size) is unmissed  # type: ignore[arg-type]


#: Replays whose numbers come back: only the lines of the last tokens, which the calls between leave as they were, are
#: taken for new. By one strategy, and where a line of one call lies where another's lies by the other strategy.
STALE = {
    name: [first, *((between, 1, epoch) for epoch in (1, 2, 3)), last]
    for name, first, between, last in (
        ("one size", (ONE, 3, 0), ONE, (ONE, 3, 0)),
        ("the other size", (ONE, 2, 0), ONE, (ONE, 3, 0)),
        ("two-shot", (TWO, 3, 0), TWO, (TWO, 3, 0)),
        ("a line of the other strategy", (ONE, 3, 0), ONE, (TWO, 4, 0)),
        ("and the other way round", (TWO, 4, 0), TWO, (ONE, 3, 0)),
    )
}


@pytest.mark.parametrize("name", STALE)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_line_that_only_some_sizes_use_is_looked_at(name: str, world_size: int) -> None:
    calls = tuple(Call(i, strategy, n, epoch=epoch) for i, (strategy, n, epoch) in enumerate(STALE[name]))
    host = replace(RULES, epoch=Epoch.HOST)
    if world_size < 8:
        assert not decide(ringfence([calls] * world_size, host), limit=300).safe
    assert not folded(host, calls, world_size)
    assert folded(RULES, calls, world_size)
    fresh = tuple(replace(call, epoch=call.id) for call in calls)
    assert folded(host, fresh, world_size), "with numbers that never come back the host counts as well"


def test_the_kept_ranks_have_a_line_of_each_relation() -> None:
    """Between the sender of a line by one-shot and by two-shot; so which line lies where need not be told."""

    def writers(world_size: int) -> set[tuple[str, str]]:
        compiler = planning._kept_ranks(Collective.RINGFENCE, RULES, world_size, 0, program([1]))
        assert isinstance(compiler, RingfenceCompiler) and compiler.stride is not None
        by: dict[Strategy, dict[int, tuple[int, str]]] = {ONE: {}, TWO: {}}
        for strategy, rank in ((s, r) for s in by for r in range(world_size)):
            for op in compiler.ops(rank, (0,), Call(0, strategy, 2)):
                sent = () if op.kind.waits else op.cells
                by[strategy].update((cell, (rank, "sum" if op.after else "part")) for cell in sent)
        found = set()
        for cell in by[ONE].keys() & by[TWO].keys():
            words = compiler.memory.names[cell].split()  # buffer 1 granule 9 in rank 2's memory
            (one, _), (two, what) = by[ONE][cell], by[TWO][cell]
            relation = "the same" if one == two else "the receiver" if f"{two}'s" == words[-2] else "another"
            if int(words[3]) >= compiler.stride:  # of the second token
                found.add((what, relation))
        return found

    all_of_them = {("part", "the same"), ("part", "another")}
    all_of_them |= {("sum", who) for who in ("the same", "another", "the receiver")}
    assert writers(KEPT_RANKS) == writers(3) == all_of_them
    assert writers(2) == {pair for pair in all_of_them if pair[1] != "another"}


@pytest.mark.parametrize("strategy", [ONE, TWO, None])
def test_an_engines_sizes_on_eight_ranks_are_decided_in_seconds(strategy: Strategy | None) -> None:
    ranks = programs([exercise(even_pieces(80, 2, 33, strategy), ENGINE_SIZES, 8)] * 8)
    assert len(ranks[0]) == 160 * 106
    started = time.process_time()
    result = check(Collective.RINGFENCE, "", ranks)
    assert time.process_time() - started < 10
    assert result.safe and result.states < 10_000


@pytest.mark.parametrize("strategy", [ONE, TWO])
def test_a_call_that_one_of_eight_ranks_leaves_out_is_found_among_all_sizes(strategy: Strategy) -> None:
    (calls,) = programs([exercise(even_pieces(2, 2, 1, strategy), ENGINE_SIZES, 8)])
    found = check(Collective.RINGFENCE, "", [*[calls] * 7, without(calls, 40)], Bound(60_000, shortest=300))
    assert found.failure in (ModelFailure.STALE_READ, ModelFailure.DEADLOCK) and found.skipped >= 38


def test_without_a_fold_nothing_is_safe_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(planning.line_folds(program([1]))) == [{(ONE, 1): 2}]
    mixed = changed(program([1, 5, 3]), 1, strategy=TWO)
    assert list(planning.line_folds(mixed)) == [
        {(ONE, 1): one, (ONE, 3): 2, (TWO, 5): 2} for one in (2, 1)
    ]  # fmt: skip
    monkeypatch.setattr(planning, "line_folds", lambda calls: ())
    with pytest.raises(AssertionError, match="unasked"):
        check(Collective.RINGFENCE, "", [program([1])] * 2)
