"""A share of the fuzzer's programs, and those that were wrong once.

Other programs in every run, whose seed the first lines of pytest's output say: ``--fuzz-seed`` draws them again, and
``tests/fuzz/run.py`` as many as one likes. A failure prints the program, which shows at any commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from fuzz.check import check, ensure_group
from fuzz.ranks import fuzz_ranks
from fuzz.regressions import REGRESSIONS
from fuzz.run import run

from support import run_ranks


def mostly_right(counts: Counter[str]) -> bool:
    """The programs are worth something: eager takes most of them, and so does plain torch.compile."""
    return 0 < counts["right"] >= counts["invalid"] + counts["upstream"] + counts["unsure"] - 8


@pytest.mark.slow
@pytest.mark.parametrize("inductor", [False, True], ids=["eager", "inductor"])
def test_random_programs(inductor: bool, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--fuzz-seed") + (500_000 if inductor else 0)
    programs = request.config.getoption("--fuzz-programs")
    print(f"python tests/fuzz/run.py --seed {seed} --inductor {float(inductor)}")
    counts, failures = run(
        programs, seed, 1, inductor=float(inductor), device="cpu", shrink_seconds=20, seconds=18, least=3
    )
    assert not failures, f"--fuzz-seed {seed}\n" + "\n".join(failures)
    assert mostly_right(counts), counts


@pytest.mark.slow
@pytest.mark.xdist_group("two ranks")
def test_random_programs_on_two_ranks(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--fuzz-seed")
    for counts, failures in run_ranks(2, fuzz_ranks, seed, 30, 8.0, timeout=240):
        assert not failures, f"--fuzz-seed {seed}\n" + "\n".join(failures)
        assert mostly_right(counts), counts


@pytest.mark.parametrize("name", list(REGRESSIONS))
def test_programs_that_were_wrong_once(name: str) -> None:
    outcome = check(REGRESSIONS[name].program, REGRESSIONS[name].setting)
    assert outcome.kind == "right", outcome.message


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_random_programs_under_cuda_graphs(request: pytest.FixtureRequest) -> None:
    counts, failures = run(
        60, request.config.getoption("--fuzz-seed"), 1, inductor=0.2, device="cuda", shrink_seconds=20, seconds=120
    )
    assert not failures, "\n".join(failures)
    assert counts["right"] > 0


@pytest.fixture(autouse=True)
def own_groups() -> Iterator[None]:
    """The programs make process groups of their own."""
    ensure_group(None)
    yield
    ensure_group(None)
