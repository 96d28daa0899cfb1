"""Faults and quiet runs of mixed sizes at random, for a while; benchmarks/soak.py does it for hours."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from unittest import mock

import pytest
from faults import gpus
from faults.catalogue import FAULTS, Ending, Fault, Outcome, faults, quiet
from faults.gpus import Used
from faults.run import run_fault


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_faults_at_random_between_quiet_runs(request: pytest.FixtureRequest) -> None:
    draw = random.Random(5)
    for _ in range(request.config.getoption("--soak-runs")):
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
    assert soak["on_gpus"].__module__ == "faults.own_kernels"


def run_soak(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["soak.py", "--repetitions=1", *arguments])
    runpy.run_path(str(SOAK), run_name="__main__")


def test_jobs_are_refused_that_have_no_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit, match="2"):
        run_soak(monkeypatch, "--jobs=2", "--collective=mnnvl")
    assert "--collective takes 2 GPUs; there are 1" in capsys.readouterr().err


@pytest.mark.parametrize(("jobs", "after_each"), [(2, True), (4, False)])
def test_jobs_share_pairs_and_nothing_may_be_left_on_a_gpu(
    jobs: int, after_each: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a job that shares its pair nobody can say after a run what is its own."""
    ran: list[tuple[str, int]] = []
    asked: list[tuple[int, ...]] = []
    ahead: list[tuple[object, ...]] = []

    def run(fault: Fault, _: object) -> Outcome:
        ran.append((fault.name, fault.first_device))
        return Outcome(fault, [Ending(1 - fault.rank, 1, SAID)], SAID)

    def left(before: Used, *_: object) -> str:
        asked.append(tuple(before.memory))
        return "512 MiB of device 3" if 3 in before.memory and len(asked) == 3 * after_each + 2 else ""

    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.setattr("faults.run.run_fault", run)
    monkeypatch.setattr("faults.run.Ahead", lambda *given: ahead.append(given) or mock.Mock())
    monkeypatch.setattr(gpus, "used", lambda devices: Used(dict.fromkeys(devices, 0)))
    monkeypatch.setattr(gpus, "left_behind", left)
    with pytest.raises(SystemExit, match="1"):
        run_soak(monkeypatch, f"--jobs={jobs}", "--collective=ringfence", "--only=late, rank 1", "--repetitions=3")
    assert sorted(ran) == [("late", 0)] * 2 + [("late", 2)] and ahead == [("cuda", 2)] * jobs
    assert len(asked) == 3 * after_each + 2 and asked[-2:] == [(0, 1), (2, 3)]
    said = capsys.readouterr().out
    assert "3 runs" in said and "0 with a miss" in said and "left on the GPUs: 512 MiB of device 3" in said


SAID = (
    "rank 1 did not come to call 14 of group 'world', in which rank 0 waits: rank 1 is in step 7; "
    "rank 0 waited in vain for the part of rank 1 (call 313 of the workspace, token 2)"
)
