"""The founding hang through the backend, with the kernels: what docs/reproduce.md says comes of it, comes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpu import emulate

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reproduce.py"


@pytest.mark.gpu
@pytest.mark.xdist_group("gpu")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["A", "B", "eager"])
def test_what_hung_as_published_hangs_and_nothing_else_does(recipe: str) -> None:
    for release in ("0.6.10.post1", "0.6.13", "0.6.18.post1"):
        if reason := emulate.missing(release, "mnnvl"):
            pytest.skip(reason)
    process = subprocess.run(
        [sys.executable, SCRIPT, "--recipe", recipe], capture_output=True, text=True, timeout=800, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("never returned, in step 3") == 1
