"""benchmarks/moe.py without a GPU: what it races, over the library in Python, is what it says, and its soak counts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_library import Library, host_bytes

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import moe_one_sided
from ringfence.runtime.collectives.moe_ready import needed
from ringfence.runtime.collectives.workspace import MoeWorkspace, workspaces_of
from ringfence.runtime.hazards.situation import Collective, Situation
from support import run_threaded

CPU, H, E = torch.device("cpu"), 128, 8
OPTIONS = {"experts": E, "top_k": 2, "pairs": 3, "dtype": torch.bfloat16, "payload": "bf16", "hidden": (H,)}
MODULES = ("moe", "moe_ways", "moe_soak", "moe_layer", "ranks")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(moe_one_sided, "device_bytes", host_bytes)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import moe

    yield moe
    for name in MODULES:
        sys.modules.pop(name, None)


def on_ranks(ranks: int, body: Any) -> tuple[Library, list[Any]]:
    """``body`` on each, with the kernels prepared, and as a benchmark's ranks that have no device."""
    library, store = Library(ranks), dist.HashStore()

    def run(rank: int) -> Any:
        channel = Channel(store, rank, ranks, seconds=120)
        kernels = moe_one_sided.create(library.package(rank), channel, needed(4 * H, 2, 2 * H, 16))
        name = dist.group.WORLD.group_name
        workspace = MoeWorkspace(kernels, CPU, Situation(Collective.MOE_ALL_TO_ALL))
        found = workspaces_of(name)
        found.moe_prepared = workspace
        found.moe.append(workspace)
        with torch.no_grad():
            return body(SimpleNamespace(rank=rank, size=ranks, cuda=False, device=CPU, group_name=name))

    return library, run_threaded(ranks, run)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_what_is_raced_does_the_same_and_launches_what_its_name_says(bench: Any, payload: str, ranks: int) -> None:
    options = argparse.Namespace(**OPTIONS | {"payload": payload})
    makers = {
        "bare": partial(bench.bare),
        "staged": partial(bench.bare, staged=True),
        "lie": partial(bench.bare, sanitised=False),
        "lean": partial(bench.functions, lean=True),
        "as it comes": partial(bench.functions, lean=False),
    }

    def body(mine: Any) -> dict[str, Any]:
        given, found = bench.inputs(mine, options, H, 5), {}
        for name, make in makers.items():
            contender = make(mine, options, given)
            y = contender.call()
            found[name] = bool(contender.right) and bench.r.distance(y, given.wanted)
            assert y.shape == (5, H) and y.dtype == torch.bfloat16
        return found

    library, found = on_ranks(ranks, body)
    for each in found:
        right = {name: value for name, value in each.items() if value is not False}
        assert right == ({} if payload == "fp8" else {"staged": 0.0, "as it comes": 0.0})
    copied = [call["copied"] for call in library.calls[0] if "copied" in call]
    of = dict(zip(makers, (copied[i : i + 3] for i in range(0, 15, 3)), strict=True))
    assert {name for name, each in of.items() if all(each)} == {"staged", "as it comes"}
    assert {name for name, each in of.items() if not any(each)} == {"bare", "lie", "lean"}


def test_the_soak_finds_nothing_in_what_is_right_and_counts_what_is_not(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(**OPTIONS)
    import moe_soak

    monkeypatch.setattr(moe_soak, "SIZES", ((1, 1), (7, 3), (6, 0), (0, 5)))
    flaws: list[bool] = []
    combine = bench.moe_soak.ringfence.moe.combine

    def flawed(partial: Any, route: Any) -> Any:
        result = combine(partial, route)
        return result + 1 if flaws else result

    monkeypatch.setattr("ringfence.moe.combine", flawed)

    def body(mine: Any) -> list[int]:
        kinds = [(counts, lean) for counts in moe_soak.SIZES for lean in (False, True)]
        wrong = torch.zeros(len(kinds), dtype=torch.int64)
        torch.manual_seed(mine.rank)
        calls = [moe_soak.pair_of(mine, options, counts, lean, wrong[i]) for i, (counts, lean) in enumerate(kinds)]
        for _ in range(3):
            for call in calls:
                call()
        return [int(n) for n in wrong]

    assert [sum(each) for each in on_ranks(2, body)[1]] == [0, 0]
    flaws.append(True)
    first, second = on_ranks(2, body)[1]
    assert first == [3, 3, 3, 3, 3, 3, 0, 0] and second == [3, 3, 3, 3, 0, 0, 3, 3], "wherever there is a token"
