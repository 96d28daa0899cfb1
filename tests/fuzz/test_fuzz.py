"""A share of the fuzzer's programs, and those that were wrong once.

The same programs in every run, so that nobody's change fails for what it did not cause. ``make fuzz`` draws new ones
from a seed that it prints, and ``tests/fuzz/run.py`` as many as one likes. A failure prints the program, which shows at
any commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from fuzz.check import check, draw, ensure_group
from fuzz.draft import MOVES
from fuzz.ranks import fuzz_ranks
from fuzz.regressions import REGRESSIONS
from fuzz.run import run
from fuzz.share import share

from support import HARD_END, run_ranks


def mostly_right(counts: Counter[str]) -> bool:
    """The programs are worth something: eager takes most of them, and so does plain torch.compile."""
    return 0 < counts["right"] >= counts["invalid"] + counts["upstream"] + counts["unsure"] - 8


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-seed"))


@pytest.fixture
def programs(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-programs"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "part"), [("eager", 1), ("inductor", 3)])
def test_random_programs(kind: str, part: int, seed: int, programs: int) -> None:
    how = {"inductor": float(kind == "inductor"), "device": "cpu"}
    counts, failures = run(share(programs // part, seed, **how), 1, **how, shrink_seconds=20)
    assert not failures, f"--fuzz-seed {seed}\n" + "\n".join(failures)
    assert counts["programs"] == programs // part and mostly_right(counts), counts


@pytest.mark.slow
@pytest.mark.xdist_group("two ranks")
def test_random_programs_on_two_ranks(seed: int, programs: int) -> None:
    seeds = share(programs // 2, seed, inductor=0.0, ranks=True)
    for counts, failures in run_ranks(2, fuzz_ranks, seeds, timeout=HARD_END + 20 * len(seeds)):
        assert not failures, f"--fuzz-seed {seed}\n" + "\n".join(failures)
        assert mostly_right(counts), counts


def test_a_share_makes_every_move() -> None:
    """Drawn at random, twelve programs leave some out; and another seed has other programs."""
    moves = {body.__name__ for _, body in MOVES}
    for seed in (1, 10**6):
        seeds = share(12, seed, inductor=0.0)
        assert len(set(seeds)) == 12 and seeds == share(12, seed, inductor=0.0) and min(seeds) >= seed
        made = [draw(at, inductor=0.0)[0].moves for at in seeds]
        assert set().union(*made) == moves
    few = [draw(at, inductor=1.0)[0].moves for at in share(4, 1, inductor=1.0)]
    assert len(set().union(*few)) >= 16  # of 25; four at random make 12


@pytest.mark.parametrize("name", list(REGRESSIONS))
def test_programs_that_were_wrong_once(name: str) -> None:
    outcome = check(REGRESSIONS[name].program, REGRESSIONS[name].setting)
    assert outcome.kind == "right", outcome.message


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_random_programs_under_cuda_graphs(seed: int) -> None:
    counts, failures = run(range(seed, seed + 60), 1, inductor=0.2, device="cuda", shrink_seconds=20, seconds=120)
    assert not failures, "\n".join(failures)
    assert counts["right"] > 0


@pytest.fixture(autouse=True)
def own_groups() -> Iterator[None]:
    """The programs make process groups of their own."""
    ensure_group(None)
    yield
    ensure_group(None)
