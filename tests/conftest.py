from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from support import start_fake_group

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seconds", type=float, default=120.0, help="how long tests/faults/test_soak.py runs")
    parser.addoption("--fuzz-seed", type=int, default=None, help="the programs of tests/fuzz; new ones by default")
    parser.addoption("--fuzz-programs", type=int, default=60, help="how many programs of tests/fuzz, at most")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fuzz_seed is None:  # drawn once, before the workers of pytest-xdist are given the options
        config.option.fuzz_seed = time.time_ns() // 10**6 % 10**9


def pytest_report_header(config: pytest.Config) -> str:
    return f"random programs: --fuzz-seed {config.option.fuzz_seed}"


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Two fake ranks, of which this process is the first."""
    start_fake_group(2)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No compiled code of another test."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
