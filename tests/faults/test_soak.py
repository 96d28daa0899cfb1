"""Faults and quiet runs of mixed sizes at random, for a while; benchmarks/soak.py does it for hours."""

from __future__ import annotations

import random
import runpy
import time
from pathlib import Path

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


SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_jobs_on_gpus_have_devices_of_their_own_and_every_row_is_one_fault() -> None:
    soak = runpy.run_path(str(SOAK))
    for collective in ("ringfence", "mnnvl", "trtllm", "reference"):
        some = soak["on_gpus"](collective, 2)
        assert {(f.device, f.ranks, f.first_device, f.options["collective"]) for f in some} == {
            ("cuda", 2, 2, collective)
        }
        assert len({soak["key"](f) for f in some}) == len(some) >= 20
    assert len({soak["key"](f) for f in FAULTS}) == len(FAULTS)
    gives_up = [f for f in soak["on_gpus"]("ringfence", 0) if f.options["kernel_wait_seconds"] < 1]
    assert [f.says for f in gives_up] == [r"rank 0 waited in vain for .*rank 1"]


def test_jobs_are_refused_that_have_no_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["soak.py", "--repetitions=1", "--jobs=2", "--collective=mnnvl"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SOAK), run_name="__main__")
    assert "--jobs 2 takes 4 GPUs; there are 2" in capsys.readouterr().err
