"""A second and a third start that find Inductor's cache warm, after two ranks that filled it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.warm import hits_and_misses
from warm_starts import save_models, start

from support import run_ranks


@pytest.mark.slow
def test_later_starts_find_what_two_ranks_left_that_filled_the_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert sum(misses for _, misses in run_ranks(2, hits_and_misses)) > 0
    for world_size in (2, 1):
        for hits, misses in run_ranks(world_size, hits_and_misses):
            assert hits > 0 and misses == 0


@pytest.mark.slow
def test_so_does_a_later_start_of_a_model_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the suite's architectures; ``make support`` starts all."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    save_models(tmp_path / "models", ["llama"])
    first, second = (start(["llama"], tmp_path / "models")["llama"] for _ in range(2))
    assert first.misses > 0
    assert second.hits > 0 and second.misses == 0
    assert second.logits == first.logits
