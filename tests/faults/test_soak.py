"""Faults and quiet runs of mixed sizes at random, for a while; benchmarks/soak.py does it for hours."""

from __future__ import annotations

import random
import time

import pytest
from faults.ranks import FAULTS, Fault, run_fault


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_faults_at_random_between_quiet_runs(request: pytest.FixtureRequest) -> None:
    draw, end = random.Random(5), time.monotonic() + request.config.getoption("--soak-seconds")
    while time.monotonic() < end:
        sizes = tuple(draw.choice((1, 2, 3, 4, 5, 8, 13)) for _ in range(draw.randrange(3, 30)))
        quiet = Fault("no fault", 0, None, steps=draw.randrange(50, 200), sizes=sizes)
        for fault in (quiet, draw.choice(FAULTS)):
            outcome = run_fault(fault)
            assert not outcome.problems(), fault.name
