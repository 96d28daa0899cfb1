"""A second and a third start that find Inductor's cache warm, after two ranks that filled it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.warm import hits_and_misses, hits_and_misses_of_architectures

from support import run_ranks, save_tiny_model


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
def test_so_do_later_starts_of_a_model_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the suite's architectures: the others are made of the same layers, and each costs CI a minute.

    Twice, at half of that a start: one that misses nothing leaves to the next what it has found itself.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "models" / "llama", "llama", num_hidden_layers=1)
    for start in range(2):
        for found in run_ranks(2, hits_and_misses_of_architectures, tmp_path / "models"):
            hits, misses = found["llama"]
            assert (misses > 0) if start == 0 else (hits > 0 and misses == 0), (start, found)
