"""`make bench` measures what there is: its rows are computed for a small model, whatever the times are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/run.py, which is a script beside its modules."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import caches
    import passes
    import run
    import runner

    for module, small in (
        (run, {"PIECES": 3}),
        (runner, {"PIECES": 3}),
        (passes, {"LAYERS": 2}),
        (caches, {"SLOTS": 1}),
    ):
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    step_ms = caches.step_ms
    monkeypatch.setattr(run, "median_ms", lambda body, repeats: (body() and 0.0) or 1.0)
    monkeypatch.setattr(caches, "step_ms", lambda backends: step_ms(backends, repeats=3))
    yield run
    for name in ("run", "runner", "caches", "passes", "against"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("fake_group")
def test_every_row_of_the_passes_and_the_runner_is_computed(bench: Any) -> None:
    rows = [bench.bench_passes(), bench.bench_split(), *bench.bench_runner(), bench.bench_journal()]
    assert [r.what for r in rows if "8 parts" in r.what], rows
    assert len(rows) == 7 and all(r.ours for r in rows)


@pytest.mark.usefixtures("fake_group")
def test_what_the_passes_cost_is_counted(bench: Any) -> None:
    assert bench.passes.cost(2)["calls"] == bench.passes.cost(1)["calls"] > 1000


@pytest.mark.usefixtures("fake_group")
def test_the_caches_are_written_by_every_backend_and_timed_beside_inductor(bench: Any) -> None:
    uncaptured, captured = bench.bench_caches()  # it compares what each of them wrote
    assert "1.5x" in uncaptured.target and not captured.target
    assert all(r.ours.endswith(" ms") and "x)" in r.peer for r in (uncaptured, captured))


def test_who_cannot_be_made_is_recorded_and_the_others_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import ranks

    class Alone(ranks.Ranks):
        def __init__(self) -> None:
            self.rank, self.size, self.cuda, self.results = 0, 1, False, []

        def _limit(self) -> None: ...
        def gather(self, value: Any) -> list[Any]:
            return [value]

        def record(self, **fields: Any) -> None:
            self.results.append(fields)

    def fails() -> str:
        raise RuntimeError("no such kernel")

    alone = Alone()
    assert alone.made({"one": lambda: "1", "two": fails, "three": lambda: "3"}, part="sites", tokens=4) == ["1", "3"]
    assert alone.results == [
        {"part": "sites", "tokens": 4, "contender": "two", "failed": "rank 0: RuntimeError: no such kernel"}
    ]
    sys.modules.pop("ranks")
