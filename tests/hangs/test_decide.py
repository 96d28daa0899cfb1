"""One order speaks for all, or the failure is found: compared with the unreduced search."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from ringfence.runtime.errors import TooManyStatesError
from ringfence.runtime.hazards.situation import Payload, Strategy
from ringfence.runtime.protocol.calls import Call, Calls, changed, program, rounds, swapped, until, without
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import ModelFailure, Result, explore
from ringfence.runtime.protocol.machine import Launch, Machine, Op, OpKind, State
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.moe_a2a import moe_a2a
from ringfence.runtime.protocol.plan import PlannedRank, check, even_pieces, machine_for, programs, reduced
from ringfence.runtime.protocol.rules import Clear, LamportRules, MoeRules, Sentinel, Words, mnnvl_rules
from ringfence.runtime.protocol.trtllm import trtllm

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT


def diverging(rng: random.Random, calls: Calls) -> Calls:
    """One rank's program: often as the others', else with one fault."""
    id, other = rng.choice(calls).id, rng.choice(calls).id
    strategies = [call.strategy for call in calls if call.id == id]
    return rng.choice(
        [
            calls,
            calls,
            without(calls, id),
            until(calls, id),
            swapped(calls, id, other),
            changed(calls, id, tokens=rng.choice([1, 2])),
            changed(calls, id, ctas=rng.choice([1, 2])),
            changed(calls, id, strategy=rng.choice([ONE, TWO]) if strategies[0] in (ONE, TWO) else strategies[0]),
            changed(calls, id, payload=rng.choice(list(Payload))),
        ]
    )


def random_lamport(rng: random.Random) -> LamportRules:
    """Often one protection short."""
    rules = LamportRules(polls_own=rng.random() < 0.5)
    weakness = rng.choice(
        [
            {},
            {},
            {"buffers": 1},
            {"buffers": 2},
            {"buffers": 4},
            {"clear": Clear.CURRENT},
            {"clear": Clear.NONE},
            {"sentinel": Sentinel.FLOAT},
            {"sanitises_input": False},
            {"sanitises_sum": False},
            {"words": Words.FIRST},
        ]
    )
    return replace(rules, **weakness)  # type: ignore[arg-type]


def random_machine(rng: random.Random) -> Machine:
    ranks = rng.choice([2, 2, 2, 3])
    family = rng.choice(["mnnvl", "mnnvl", "trtllm", "moe"])
    strategies = rng.choice([[ONE], [TWO], [ONE, TWO]])
    calls = tuple(
        Call(i, rng.choice(strategies), rng.choice([1, 2]) if ranks == 2 else 1)
        for i in range(rng.randint(1, 6 if ranks == 2 else 4))
    )
    if family == "moe":
        calls = rounds(rng.randint(1, 3))
    all_programs = [calls] * (ranks - 1) + [diverging(rng, calls)]
    rng.shuffle(all_programs)
    if family == "moe":
        return moe_a2a(all_programs, MoeRules(rng.random() < 0.8, rng.random() < 0.9))
    if family == "trtllm":
        return trtllm(all_programs, replace(random_lamport(rng), own_flag_first=rng.random() < 0.3))
    return mnnvl(all_programs, random_lamport(rng), torn=rng.random() < 0.2)


def replays(machine: Machine, result: Result[State]) -> bool:
    """Whether the trace of a result can be run, and ends in what the result says."""
    states = {machine.initial()} if not result.skipped else None
    if states is None:
        return True
    for event in result.trace:
        states = {after for state in states for step, after in machine.steps(state) if step == event}
    if result.failure is ModelFailure.DEADLOCK:
        return any(not list(machine.steps(state)) and not machine.finished(state) for state in states)
    return bool(states)


def compare(seeds: Iterable[int], limit: int) -> Counter[ModelFailure | None]:
    seen: Counter[ModelFailure | None] = Counter()
    for seed in seeds:
        machine = random_machine(random.Random(seed))
        try:
            full = explore(machine, limit=limit)
        except TooManyStatesError:
            continue
        result = decide(machine)
        assert result.failure is full.failure, f"seed {seed}"
        assert replays(machine, result), f"seed {seed}"
        if result.shortest and not result.skipped:
            assert len(result.trace) == len(full.trace), f"seed {seed}"
        assert replays(machine, full), f"seed {seed}"
        seen[full.failure] += 1
    return seen


def test_random_machines_are_decided_as_the_unreduced_search_decides_them() -> None:
    seen = compare(range(300), 1500) + compare([2071], 10_000)
    assert seen[None] > 60
    assert seen[ModelFailure.DEADLOCK] > 60
    assert seen[ModelFailure.STALE_READ] > 20
    assert seen[ModelFailure.LOST_WRITE] >= 2


def test_without_the_exhaustive_search_the_held_order_finds_the_failure_too() -> None:
    """``limit=0`` leaves only the order that holds up one step: a failure, and a trace that runs."""
    found = 0
    for seed in range(300, 500):
        machine = random_machine(random.Random(seed))
        try:
            full = explore(machine, limit=1500)
            result = decide(machine, limit=0)
        except TooManyStatesError:
            continue
        assert (result.failure is None) is (full.failure is None), f"seed {seed}"
        assert replays(machine, result), f"seed {seed}"
        found += result.failure is not None and not result.shortest
    assert found > 20


def test_fewer_tokens_tell_what_many_would() -> None:
    rng = random.Random(0)
    seen: Counter[bool] = Counter()
    for _ in range(40):
        calls = tuple(Call(i, rng.choice([ONE, ONE, TWO]), rng.choice([1, 3, 4, 6])) for i in range(rng.randint(2, 5)))
        ranks = [calls, diverging(rng, calls)]
        rules = random_lamport(rng)
        safe = decide(mnnvl(ranks, rules), limit=1000).safe
        assert decide(mnnvl(reduced(ranks), rules), limit=1000).safe is safe
        seen[safe] += 1
    assert min(seen[True], seen[False]) > 5


def test_reduced_keeps_order_and_owners() -> None:
    ones = [program([512, 16, 1, 512])]
    assert [call.tokens for call in reduced(ones * 4)[0]] == [3, 2, 1, 3]
    mixed = [changed(ones[0], 0, strategy=TWO)]
    tokens = [call.tokens for call in reduced(mixed * 4)[0]]
    assert tokens == [8, 4, 1, 8]


def test_a_sliced_trace_can_lose_no_step() -> None:
    calls = program([1] * 8)
    machine = machine_for("mnnvl", "0.6.13", [calls] * 7 + [without(calls, 4)])
    result = decide(machine)
    assert result.failure is ModelFailure.STALE_READ
    assert not result.shortest
    assert len(result.trace) < 12


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("clear", [Clear.CURRENT, Clear.NONE])
def test_every_rank_count_loses_the_same_protections(world_size: int, clear: Clear) -> None:
    calls = program([2, 1, 1, 1, 1, 2, 2])
    assert decide(mnnvl([calls] * world_size, mnnvl_rules("0.6.13"))).safe
    result = decide(mnnvl([calls] * world_size, replace(mnnvl_rules("0.6.13"), clear=clear)))
    assert result.failure is ModelFailure.STALE_READ


@pytest.mark.parametrize("strategy", [ONE, TWO])
@pytest.mark.parametrize("collective", ["mnnvl", "trtllm"])
def test_eighty_layers_in_33_pieces_on_4_ranks_are_decided_in_seconds(collective: str, strategy: Strategy) -> None:
    """160 calls a step; four steps: 640 calls on each rank.

    `make bench` measures it against two seconds; a machine that runs other tests meanwhile gets more.
    """
    rank = PlannedRank(even_pieces(80, 2, 33, strategy), steps=(16, 8, 8, 16), capture_sizes=(8, 16))
    calls = programs([rank] * 4)
    assert [len(each) for each in calls] == [640] * 4
    started = time.process_time()
    result = check(collective, "0.7.2", calls)
    assert time.process_time() - started < 10
    assert result.safe
    started = time.process_time()
    broken = check(collective, "0.7.2", (*calls[:3], without(calls[3], 77)))
    assert time.process_time() - started < 20
    assert broken.failure is not None
    assert broken.skipped >= 74, "the trace begins where it matters"


def test_a_machine_is_left_as_it_was() -> None:
    machine = machine_for("mnnvl", "0.6.13", [program([1] * 4)] * 2)
    assert decide(machine) == decide(machine)


PUSH, POLL, CLEAR, RAISE, AWAIT = OpKind.PUSH, OpKind.POLL, OpKind.CLEAR, OpKind.RAISE, OpKind.AWAIT_EQUAL


def by_hand(*ranks: list[list[Op]]) -> Machine:
    """Ranks of launches of ops on cells 0, 1 and 2. The run that is watched starts with rank 0."""
    return Machine([[Launch(at, "by hand", tuple(ops)) for at, ops in enumerate(rank)] for rank in ranks], "abc")


@pytest.mark.parametrize(
    ("machine", "failure"),
    [
        pytest.param(
            by_hand(
                [[Op(PUSH, (0,), (1,))], [Op(AWAIT, (1,), (1,)), Op(PUSH, (0,), (2,), after=1)]],
                [[Op(POLL, (0,), (1,)), Op(RAISE, (1,), (1,), after=1)], [Op(POLL, (0,), (2,))]],
            ),
            ModelFailure.STALE_READ,
            id="the second poll can see the first word, which was never cleared",
        ),
        pytest.param(
            by_hand([[Op(PUSH, (0,), (1,)), Op(PUSH, (1,), (1,))]], [[Op(POLL, (0, 1), (1, 1), trusted=1)]]),
            ModelFailure.STALE_READ,
            id="the untested word can come after the tested one",
        ),
        pytest.param(
            by_hand(
                [[Op(PUSH, (0,), (1,)), Op(RAISE, (1,), (1,), after=1)]],
                [[Op(AWAIT, (1,), (1,)), Op(CLEAR, (0,), (0,), after=1), Op(POLL, (0,), (2,), after=1)]],
            ),
            ModelFailure.STALE_READ,
            id="the poll that waits in vain can come before the clear",
        ),
        pytest.param(
            by_hand([[Op(PUSH, (0,), (1,))], [Op(PUSH, (0,), (2,))]], [[Op(POLL, (0,), (1,))], [Op(POLL, (0,), (2,))]]),
            ModelFailure.LOST_WRITE,
            id="the second write can come before the first poll",
        ),
        pytest.param(
            by_hand([[Op(PUSH, (0,), (1,))], [Op(PUSH, (0,), (1,))]], [[Op(POLL, (0,), (1,))]]),
            ModelFailure.LOST_WRITE,
            id="a second write of the right word can come before the poll",
        ),
        pytest.param(
            by_hand([[Op(PUSH, (0,), (1,))], [Op(POLL, (0,), (1,))]], [[Op(POLL, (0,), (1,))]]),
            ModelFailure.STALE_READ,
            id="two polls take one word",
        ),
        pytest.param(
            by_hand(
                [[Op(POLL, (0,), (1,)), Op(PUSH, (0,), (1,), after=1)]],
                [[Op(PUSH, (0,), (1,))], [Op(POLL, (0,), (1,))]],
            ),
            ModelFailure.STALE_READ,
            id="a poll can come between another rank's poll and the word that replaces it",
        ),
        pytest.param(
            by_hand([[Op(PUSH, (0,), (1,))]], [[Op(CLEAR, (0,), (0,))], [Op(POLL, (0,), (1,))]]),
            ModelFailure.DEADLOCK,
            id="the clear can come after the push",
        ),
        pytest.param(
            by_hand(
                [[Op(AWAIT, (1,), (1,)), Op(PUSH, (0,), (1,), after=1), Op(POLL, (0,), (1,))]],
                [[Op(PUSH, (0,), (2,)), Op(CLEAR, (0,), (0,), after=1), Op(RAISE, (1,), (1,), after=3)]],
            ),
            ModelFailure.STALE_READ,
            id="a launch that has not begun when it is first looked at has not ended either",
        ),
    ],
)
def test_a_run_that_ends_well_does_not_hide_another_order(machine: Machine, failure: ModelFailure) -> None:
    assert explore(machine).failure is failure
    assert decide(machine).failure is failure
    assert decide(machine, limit=0).failure is not None


def test_the_last_of_these_is_safe_once_it_is_ordered() -> None:
    """The clear is told to rank 0, which pushes only then."""
    machine = by_hand(
        [[Op(AWAIT, (1,), (1,)), Op(PUSH, (0,), (1,), after=1)]],
        [[Op(CLEAR, (0,), (0,)), Op(RAISE, (1,), (1,), after=1)], [Op(POLL, (0,), (1,))]],
    )
    assert explore(machine).safe
    assert decide(machine, limit=0).safe


def random_ops(rng: random.Random) -> Machine:
    """Ops as no protocol has them: repeated pushes, several readers, flags without meaning."""

    def launch() -> list[Op]:
        ops: list[Op] = []
        for _ in range(rng.randint(1, 3)):
            action = rng.choice([PUSH, PUSH, POLL, POLL, CLEAR, RAISE, AWAIT])
            cell = 2 if action in (RAISE, AWAIT) else rng.randrange(2)
            earlier = [i for i in range(len(ops)) if rng.random() < 0.4]
            after = 0
            for i in earlier:
                after |= 1 << i | ops[i].after
            ops.append(Op(action, (cell,), (0 if action is CLEAR else rng.choice([1, 1, 2]),), after))
        return ops

    return by_hand(*[[launch() for _ in range(rng.randint(1, 3))] for _ in range(rng.choice([2, 2, 3]))])


def test_machines_of_random_ops_are_never_called_safe_when_an_order_fails() -> None:
    safe = 0
    for seed in range(8000):
        machine = random_ops(random.Random(seed))
        unreduced, answer = explore(machine), decide(machine)
        assert answer.safe == unreduced.safe, seed
        safe += answer.safe
    assert safe > 50
