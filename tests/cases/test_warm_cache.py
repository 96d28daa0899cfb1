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
def test_so_do_later_starts_of_models_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two of the suite's architectures that cost the least; ``make support`` starts all five, in four minutes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    kinds = ["llama", "mistral"]
    save_models(tmp_path / "models", kinds)
    first, second = (start(kinds, tmp_path / "models") for _ in range(2))
    for kind in kinds:
        assert first[kind].misses > 0
        assert second[kind].hits > 0 and second[kind].misses == 0
        assert second[kind].logits == first[kind].logits
