"""Equal calls are made once: the same answers, traces and ends as when each is made."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from hangs.test_decide import diverging, random_lamport
from ringfence.runtime.errors import TooManyStatesError
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol.bound import Bound
from ringfence.runtime.protocol.calls import Call, program, rounds, without
from ringfence.runtime.protocol.compiler import CompiledMachine
from ringfence.runtime.protocol.decide import decide
from ringfence.runtime.protocol.explore import Result
from ringfence.runtime.protocol.machine import Machine, State
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.moe_a2a import moe_a2a
from ringfence.runtime.protocol.plan import machine_for
from ringfence.runtime.protocol.ringfence import RULES, ringfence
from ringfence.runtime.protocol.rules import Epoch, LamportRules, MoeRules
from ringfence.runtime.protocol.trtllm import trtllm
from ringfence.runtime.protocol.walk import begin

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT


def random_machine(rng: random.Random) -> CompiledMachine:
    """Longer than those of test_decide, of few kinds of call that come back, and often one protection short."""
    ranks = rng.choice([2, 2, 3, 4])
    strategies = rng.choice([[ONE], [TWO], [ONE, TWO]])
    kinds = [
        Call(0, rng.choice(strategies), rng.choice([1, 2, 3]), ctas=rng.choice([1, 2]))
        for _ in range(rng.randint(1, 3))
    ]
    calls = tuple(
        replace(rng.choice(kinds), id=i, epoch=rng.choice([i, i % 4]), workspace=int(i > 15))
        for i in range(rng.randint(1, 20))
    )
    family = rng.choice(["mnnvl", "mnnvl", "trtllm", "moe"])
    if family == "moe":
        calls = rounds(rng.randint(1, 9))
    if rng.random() < 0.3:
        calls = diverging(rng, calls) or calls
    programs = [calls] * (ranks - 1) + [diverging(rng, calls) if rng.random() < 0.4 else calls]
    rng.shuffle(programs)
    rules = replace(random_lamport(rng), epoch=rng.choice([*Epoch, Epoch.DEVICE]))
    if family == "moe":
        return moe_a2a(programs, MoeRules(rng.random() < 0.8, rng.random() < 0.9))
    if family == "trtllm":
        return trtllm(programs, rules)
    return mnnvl(programs, rules, torn=rng.random() < 0.2)


def every_call_made(machine: CompiledMachine) -> Machine:
    """The same machine, with nothing known of the calls it is made of."""
    return Machine([list(launches) for launches in machine.programs], list(machine.names))


def answer(machine: Machine) -> Result[State] | None:
    try:
        return replace(decide(machine, limit=400), states=0)
    except TooManyStatesError:
        return None


def test_random_plans_end_as_when_each_call_is_made() -> None:
    seen: Counter[object] = Counter()
    for seed in range(150):
        machine = random_machine(random.Random(seed))
        folded, whole = answer(machine), answer(every_call_made(machine))
        assert folded == whole, f"seed {seed}"
        seen[folded.failure if folded is not None else "undecided"] += 1
    assert len(seen) >= 4 and min(seen[None], sum(seen.values()) - seen[None]) > 40


@pytest.mark.parametrize("sizes", [(2, 1), (3, 1), (4, 2)])
def test_what_a_large_call_did_last_is_not_taken_for_known_after_a_small_one(sizes: tuple[int, ...]) -> None:
    """With one buffer a rank may still wait where the next call is written. Its wait is a late op of the large call."""
    one_buffer = ringfence([program(sizes)] * 2, replace(RULES, buffers=1))
    assert not decide(one_buffer, limit=300).safe
    lamport = mnnvl([program(sizes)] * 2, LamportRules(buffers=1))
    assert decide(lamport, limit=300).safe is decide(every_call_made(lamport), limit=300).safe is False


@pytest.mark.parametrize("strategy", [ONE, TWO])
@pytest.mark.parametrize("collective", ["mnnvl", "trtllm", "moe_all_to_all"])
def test_a_long_plan_costs_what_a_short_one_does(collective: str, strategy: Strategy) -> None:
    states = {}
    for layers in (10, 1000):
        calls = rounds(layers) if collective == "moe_all_to_all" else program([1] * 2 * layers, strategy)
        result = decide(machine_for(collective, "0.7.2", [calls] * 4))
        assert result.safe
        states[layers] = result.states
    assert states[10] == states[1000] < 400


def test_a_failure_far_into_a_plan_is_told_by_the_calls_of_the_plan() -> None:
    calls = program([1] * 1000)
    machine = machine_for("mnnvl", "0.7.0", [calls, calls, calls, without(calls, 900)])
    result = decide(machine)
    assert result.failure is not None and result.skipped >= 897
    assert {event.call for event in result.trace} <= set(range(897, 905))


def test_numbers_that_come_twice_are_not_told_apart_by_their_place() -> None:
    """A word of the first call 0 would be right for the second."""
    calls = (*program([1] * 3), *program([1] * 3))
    machine = mnnvl([calls] * 2, random_lamport(random.Random(0)))
    assert not begin(machine, None, Bound()).finished
