"""A hundred thousand calls on one GPU: eager and replayed, three sizes, one-shot and two-shot in turn."""

from __future__ import annotations

import pytest

from gpu import emulate, soak
from gpu.children import run_child
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol import mnnvl, trtllm
from ringfence.runtime.protocol.calls import Call

pytestmark = pytest.mark.xdist_group("gpu")
RELEASE = "0.6.18.post1"
CALLS = 100_000


def calls_of(collective: str, blocks: list[soak.Block]) -> list[Call]:
    calls = []
    for block in blocks:
        strategy = Strategy.TWO_SHOT if soak.two_shot(collective, block.size) else Strategy.ONE_SHOT
        calls += [Call(0, strategy, soak.SIZES[block.size])] * soak.CALLS
    return calls


def test_the_plan_of_the_soak_mixes_what_it_says() -> None:
    blocks = soak.blocks(CALLS)
    assert len(calls_of("trtllm", blocks)) == CALLS
    assert {block.size for block in blocks} == {0, 1, 2}
    assert 0.08 < sum(block.eager for block in blocks) / len(blocks) < 0.12


@pytest.mark.gpu
@pytest.mark.parametrize("collective", ["mnnvl", "trtllm"])
def test_100k(collective: str) -> None:
    """No hang, no wrong number, and at the end the control words of the model."""
    if reason := emulate.missing(RELEASE, collective):
        pytest.skip(reason)
    item = {"collective": collective, "release": RELEASE, "calls": CALLS}
    (outcome,) = run_child("gpu.soak:run", [item], timeout=150)
    assert outcome["kind"] == "returned", outcome
    calls = calls_of(collective, soak.blocks(CALLS))
    size = outcome["buffer_bytes"]
    if collective == "mnnvl":
        last = mnnvl.control_words(calls, emulate.RANKS, soak.HIDDEN, soak.DTYPE.itemsize, size)[-1].words
    else:
        last = trtllm.control_words(calls, emulate.RANKS, soak.HIDDEN, size)[-1].words
    assert outcome["words"] == [list(last)] * emulate.RANKS
    elements = soak.CALLS * soak.HIDDEN * soak.SIZES[soak.blocks(CALLS)[0].size]
    assert all(noticed > elements / 2 for noticed in outcome["noticed"]), "a wrong reference would go unnoticed"
    assert outcome["mismatches"] == [0, 0]
