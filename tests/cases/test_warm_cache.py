"""A second and a third start that find Inductor's cache warm, after two ranks that filled it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.warm import hits_and_misses

from support import run_ranks


@pytest.mark.slow
def test_later_starts_find_what_two_ranks_left_that_filled_the_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert sum(misses for _, misses in run_ranks(2, hits_and_misses, timeout=240)) > 0
    for world_size in (2, 1):
        for hits, misses in run_ranks(world_size, hits_and_misses, timeout=240):
            assert hits > 0 and misses == 0
