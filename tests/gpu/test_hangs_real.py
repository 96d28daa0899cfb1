"""What the models say, asked of FlashInfer's real kernels: two emulated ranks on one GPU.

M1 (payloads that look as if they had not arrived), M23, M25 to M27, M29, M36 and M37 (ranks that
do different things). For every case the model is asked first; then the kernels run the same
programs in a child process. "Never returned" is a deadlock, "wrong" a stale read.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from gpu import emulate
from gpu.cases import NEVER, RETURNED, WRONG, Case
from gpu.children import run_child
from ringfence.runtime.hazards.situation import Payload, Strategy
from ringfence.runtime.protocol import mnnvl, trtllm
from ringfence.runtime.protocol.calls import Call, Calls, changed, program, swapped, until, without
from ringfence.runtime.protocol.explore import ModelFailure
from ringfence.runtime.protocol.plan import check

pytestmark = pytest.mark.xdist_group("gpu")

OLD, FIXED, NEW = "0.6.10.post1", "0.6.13", "0.6.18.post1"
PAYLOADS = {
    "ordinary": Payload.ORDINARY,
    "subnormal word": Payload.SUBNORMAL,
    "small activations": Payload.SUBNORMAL,
    "negative zeros": Payload.NEGATIVE_ZERO,
}
SAYS = {None: RETURNED, ModelFailure.DEADLOCK: NEVER, ModelFailure.STALE_READ: WRONG}

#: At once: each hanging case takes a share of the one GPU.
_TOGETHER = 6


@dataclass(frozen=True)
class Claim:
    """A case, its programs in the model's words, and what happens.

    exact: False where ranks place rows differently, so that both a stale read and a deadlock may come first.
    """

    case: Case
    ranks: tuple[Calls, Calls]
    expect: str
    exact: bool = True

    @property
    def predicted(self) -> str:
        """By the model, for the payload that the kernel is sent."""
        payload = Payload.ORDINARY if self.case.cleaned else PAYLOADS[self.case.payload]
        ranks = [changed(calls, *(c.id for c in calls), payload=payload) for calls in self.ranks]
        return SAYS[check(self.case.collective, self.case.release, ranks).failure]


def make_claim(
    what: str, collective: str, release: str, ranks: tuple[Calls, Calls], expect: str, *, exact: bool = True,
    **fields: Any,
) -> Claim:  # fmt: skip
    programs = tuple(tuple((c.id, c.strategy is Strategy.TWO_SHOT, c.tokens) for c in calls) for calls in ranks)
    case = Case(f"{collective}-{release}-{what}", collective, release, programs, **fields)
    return Claim(case, ranks, expect, exact)


def m1(release: str) -> list[Claim]:
    """Four calls of 16 tokens, in rounds; the payload comes when all has gone well for a while."""
    calls = program([16] * 4)
    hangs = NEVER if release == OLD else RETURNED
    aliased = release != NEW
    claims = []

    def add(what: str, expect: str, **fields: Any) -> None:
        fields = {"hidden": 4096, "rounds": 6, "aliased": aliased} | fields
        claims.append(make_claim(what, "mnnvl", release, (calls, calls), expect, **fields))

    for captured in (False, True):
        how = "replayed" if captured else "eager"
        word = {"payload": "subnormal word", "payload_from": 3, "captured": captured}
        add(f"{how} ordinary", RETURNED, captured=captured)
        add(f"{how} subnormal word", hangs, **word)
        add(f"{how} negative zeros", RETURNED, payload="negative zeros", captured=captured)
        if release == OLD:
            add(f"{how} subnormal word cleaned", RETURNED, cleaned=True, **word)
    add("float16 ordinary", RETURNED, dtype="float16", rounds=3)
    small = {"payload": "small activations", "dtype": "float16", "rounds": 2}
    add("float16 small activations", hangs, **small)
    if release == OLD:
        add("float16 small activations cleaned", RETURNED, cleaned=True, **small)
    return claims


def divergence(collective: str) -> list[Claim]:
    """One round: ranks that differ in one call."""
    calls, sizes = program([4] * 6), program([8, 4, 8, 4])
    claims = []

    def add(what: str, first: Calls, second: Calls, expect: str, **fields: Any) -> None:
        claims.append(make_claim(what, collective, NEW, (first, second), expect, **fields))

    for captured in (False, True):
        how = "replayed" if captured else "eager"
        add(f"{how} skipped call", calls, without(calls, 2), WRONG, captured=captured)
        add(f"{how} other order", calls, swapped(calls, 2, 3), WRONG, captured=captured)
    add("early end", calls, until(calls, 3), NEVER)
    add("no call at all", calls, (), NEVER)
    add("other size", sizes, changed(sizes, 1, tokens=8), NEVER, exact=collective == "mnnvl")
    if collective == "trtllm":
        eight, two_shot = program([8] * 4), program([8] * 3, Strategy.TWO_SHOT)
        add("other strategy", eight, changed(eight, 2, strategy=Strategy.TWO_SHOT), NEVER)
        add("other grid", two_shot, changed(two_shot, 0, 1, 2, tokens=4), NEVER, exact=False)
    return claims


def sequences() -> list[Claim]:
    """Equal ranks, sizes that grow and shrink; with trtllm, strategies that alternate."""
    sizes = program([16, 3, 8, 8, 1, 32, 5])
    mixed = changed(sizes, 0, 2, 5, strategy=Strategy.TWO_SHOT)
    claims = []
    for captured in (False, True):
        how = "replayed" if captured else "eager"
        for what, collective, calls in (
            ("sizes", "mnnvl", sizes),
            ("sizes", "trtllm", sizes),
            ("sizes and strategies", "trtllm", mixed),
        ):
            fields: dict[str, Any] = {"rounds": 4, "captured": captured, "hidden": 2048}
            claims.append(make_claim(f"{how} {what}", collective, NEW, (calls, calls), RETURNED, **fields))
            fields |= {"dtype": "float32", "hidden": 1024, "rounds": 2}
            if not captured:
                claims.append(make_claim(f"float32 {what}", collective, NEW, (calls, calls), RETURNED, **fields))
    return claims


SEQUENCES = sequences()
CLAIMS = [*m1(OLD), *m1(FIXED), *m1(NEW), *divergence("mnnvl"), *divergence("trtllm"), *SEQUENCES]
Outcomes = Callable[[Claim], dict[str, Any]]


def by_name(claims: list[Claim]) -> Any:
    return pytest.mark.parametrize("claim", [pytest.param(c, id=c.case.name) for c in claims])


@pytest.fixture(scope="module")
def outcome_of(request: pytest.FixtureRequest) -> Outcomes:
    """Runs every case that the selected tests ask for: those that return together, then each other in a child."""
    wanted: dict[str, Claim] = {}
    for item in request.session.items:
        asked = getattr(item, "callspec", None)
        if asked is not None and isinstance(asked.params.get("claim"), Claim):
            found = asked.params["claim"]
            if emulate.missing(found.case.release, found.case.collective) is None:
                wanted[found.case.name] = found
    batches: dict[tuple[str, str], list[Claim]] = {}
    alone: list[list[Claim]] = []
    for found in wanted.values():
        if found.expect == RETURNED:  # one release in a process: their symbols have the same names
            batches.setdefault((found.case.collective, found.case.release), []).append(found)
        else:
            alone.append([found])

    def run(claims: list[Claim]) -> list[dict[str, Any]]:
        return run_child("gpu.cases:run", [dataclasses.asdict(c.case) for c in claims], timeout=40 + 6 * len(claims))

    outcomes: dict[str, dict[str, Any]] = {}
    for group in (list(batches.values()), alone):
        with concurrent.futures.ThreadPoolExecutor(_TOGETHER) as pool:
            for claims, results in zip(group, pool.map(run, group), strict=True):
                outcomes |= {c.case.name: result for c, result in zip(claims, results, strict=True)}

    def find(claim: Claim) -> dict[str, Any]:
        if reason := emulate.missing(claim.case.release, claim.case.collective):
            pytest.skip(reason)
        return outcomes[claim.case.name]

    return find


@by_name(CLAIMS)
def test_the_model_expects_what_the_kernels_will_show(claim: Claim) -> None:
    """Needs no GPU."""
    assert claim.predicted == claim.expect


@pytest.mark.gpu
@by_name(CLAIMS)
def test_the_kernels_do_what_the_model_says(claim: Claim, outcome_of: Outcomes) -> None:
    outcome = outcome_of(claim)
    assert outcome["kind"] in ((claim.expect,) if claim.exact else (NEVER, WRONG)), outcome
    if claim.expect == NEVER and claim.exact and claim.case.rounds > 1:
        assert outcome["round"] == claim.case.payload_from, "not by the payload"


@pytest.mark.gpu
@by_name(SEQUENCES)
def test_the_control_words_after_each_call_are_those_of_the_model(claim: Claim, outcome_of: Outcomes) -> None:
    outcome, case = outcome_of(claim), claim.case
    assert outcome["kind"] == RETURNED, outcome
    calls: list[Call] = list(claim.ranks[0]) * case.rounds
    element = 4 if case.dtype == "float32" else 2
    size = max(call.tokens for call in calls) * emulate.RANKS * case.hidden * element
    if case.collective == "mnnvl":
        predicted = mnnvl.control_words(calls, emulate.RANKS, case.hidden, element, size)
    else:
        predicted = trtllm.control_words(calls, emulate.RANKS, case.hidden, size)
    assert outcome["words"] == [[list(words.words) for words in predicted[1:]]] * emulate.RANKS


@pytest.mark.gpu
@by_name([claim for claim in CLAIMS if claim.case.name.endswith("eager skipped call")])
def test_a_skipped_call_is_read_as_the_next_one_until_the_last_waits(claim: Claim, outcome_of: Outcomes) -> None:
    """Right numbers before, stale ones silently after, a hang at the very end."""
    calls, other = outcome_of(claim)["calls"]
    assert [state for _, state, _ in calls] == ["right", "right", "wrong", "wrong", "wrong", "missing"]
    assert [state for _, state, _ in other] == ["right", "right", "wrong", "wrong", "wrong"]
