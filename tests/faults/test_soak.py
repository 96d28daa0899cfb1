"""Faults and quiet runs of mixed sizes at random, for a while; benchmarks/soak.py does it for hours."""

from __future__ import annotations

import random
import time

import pytest
from faults.ranks import FAULTS, faults, quiet, run_fault


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_faults_at_random_between_quiet_runs(request: pytest.FixtureRequest) -> None:
    draw, end = random.Random(5), time.monotonic() + request.config.getoption("--soak-seconds")
    while time.monotonic() < end:
        for fault in (quiet(draw, FAULTS[0], 200), draw.choice(FAULTS)):
            outcome = run_fault(fault)
            assert not outcome.problems(), fault.name


def test_quiet_runs_are_on_the_devices_of_the_faults() -> None:
    """Which are started as such devices ask for: what was forked after CUDA cannot use it."""
    of_gpus = faults(2, "cuda", 4, collective="mnnvl")[0]
    run = quiet(random.Random(1), of_gpus)
    assert (run.ranks, run.device, run.first_device, run.options) == (2, "cuda", 4, {"collective": "mnnvl"})
    assert run.says is None and run.journal is None and run.signalled is None and len(run.sizes) >= 3
