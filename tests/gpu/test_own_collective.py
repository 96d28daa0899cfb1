"""ringfence's own kernels on one GPU: 2, 4 and 8 emulated ranks. Numbers, bits, mixed calls, waits without an end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu import own_ranks
from gpu.children import run_child
from ringfence.runtime.collectives import nvrtc
from support import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing())),
]

WORLD_SIZES = (2, 4, 8)
CALLS = 10_000

ITEMS: dict[str, dict[str, Any]] = {
    **{f"numerics {n}": {"what": "numerics", "world_size": n} for n in WORLD_SIZES},
    **{
        f"{how} {n}": {"what": "soak", "world_size": n, "calls": CALLS, "captured": how == "replayed"}
        for n in WORLD_SIZES
        for how in ("eager", "replayed")
    },
    **{
        f"alone {n} {strategy}": {"what": "alone", "world_size": n, "strategy": strategy}
        for n, strategy in ((2, "one-shot"), (4, "one-shot"), (4, "two-shot"))
    },
    "told": {"what": "told"},
    "timing": {"what": "timing", "tokens": [1, 16, 64]},
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """All of it in one child, because to make a context takes longer than most of it."""
    found = run_child("gpu.own_ranks:run", list(ITEMS.values()), timeout=100)
    return dict(zip(ITEMS, found, strict=True))


def outcome_of(outcomes: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    found = outcomes[name]
    print(f"{name}: {found}")
    assert found["kind"] == "returned", found
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_form_and_payload_is_right_and_has_the_same_bits_everywhere(
    outcomes: dict[str, dict[str, Any]], world_size: int
) -> None:
    found = outcome_of(outcomes, f"numerics {world_size}")
    assert found["wrong"] == [] and found["lost"] == []


@pytest.mark.parametrize("how", ["eager", "replayed"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ten_thousand_mixed_calls_return_the_bits_of_the_first_time(
    outcomes: dict[str, dict[str, Any]], world_size: int, how: str
) -> None:
    found = outcome_of(outcomes, f"{how} {world_size}")
    assert found["wrong"] == [] and found["lost"] == [] and found["bad"] == 0
    assert found["calls"] >= CALLS and found["counts_alike"] and found["noticed"]


@pytest.mark.parametrize(("world_size", "calls"), [(2, 1_000_000), (4, 100_000)])
def test_many_mixed_calls_over_a_link(world_size: int, calls: int) -> None:
    """Eager and captured in turn, each a programmatic dependent launch."""
    if world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} CUDA devices, {torch.cuda.device_count()} here")
    for found in run_ranks(world_size, own_ranks.over_a_link, calls, 0.05, backend="nccl", timeout=150):
        print(found)
        assert found["wrong"] == [] and found["lost"] == [] and found["bad"] == 0
        assert found["calls"] >= calls and found["eager"] > calls / 100 and found["counts_alike"] and found["noticed"]


@pytest.mark.parametrize(("world_size", "strategy"), [(2, "one-shot"), (4, "one-shot"), (4, "two-shot")])
def test_a_rank_that_never_comes_is_named_and_nothing_spins(
    outcomes: dict[str, dict[str, Any]], world_size: int, strategy: str
) -> None:
    found = outcome_of(outcomes, f"alone {world_size} {strategy}")
    missing = world_size - 1
    assert 0.4 < found["took"] < 3
    for rank, report in enumerate(found["reports"]):
        call, token, absent, own, _ = report
        assert call == 2 and 0 <= token < 6 and own == rank and absent == [missing]
    assert all(found["nan"]) and len(found["raised"]) == world_size - 1
    sentence, ranks = found["raised"][0]
    assert ranks == [missing] and "token" in sentence and "rank 0" in sentence


def test_a_rank_that_comes_late_is_told_and_waits_for_nothing(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcome_of(outcomes, "told")
    first, second = found["reports"]
    assert first == [1, 1, [1], 0, False] and second == [2, 0, [1], 1, True]
    assert found["nan"] == [True, True, False, True] and found["right"]
    assert found["took"][1] < 0.25


def test_the_time_of_a_site_without_a_link(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcome_of(outcomes, "timing")
    print("\ntokens  strategy  blocks a token  us a site (two ranks on one GPU, 50 sites in a graph, H=8192 bf16)")
    for tokens, strategy, blocks, us, wrong in found["rows"]:
        print(f"{tokens:6d}  {strategy:8s}  {blocks:14d}  {us:9.2f}")
        assert wrong is None and 0 < us < 1000
