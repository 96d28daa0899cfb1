"""A second and a third start that find Inductor's cache warm, after two ranks that filled it at once."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WARM = Path(__file__).with_name("warm.py")


def start(world_size: int, cache: Path) -> list[tuple[int, int]]:
    """Hits and misses of Inductor's cache, for each rank of one start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WARM), str(rank), str(world_size), str(port)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = []
    for rank, output in zip(ranks, outputs, strict=True):
        said = re.search(r"RIGHT hits (\d+) misses (\d+)", output)
        assert rank.returncode == 0 and said, output[-3000:]
        found.append((int(said[1]), int(said[2])))
    return found


@pytest.mark.slow
def test_later_starts_find_what_two_ranks_left_that_filled_the_cache_at_once(tmp_path: Path) -> None:
    assert sum(misses for _, misses in start(2, tmp_path)) > 0
    for world_size in (2, 1):
        for hits, misses in start(world_size, tmp_path):
            assert hits > 0 and misses == 0
