from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import engine_ops
import pytest
import torch
import torch.distributed as dist
from grouping import pytest_collection_modifyitems as pytest_collection_modifyitems
from watchdogs import clock as clock

from support import start_fake_group

torch.set_num_threads(1)
gc.freeze()  # what imports made stays: a twelfth of a tracing test's time went into walking it again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seconds", type=float, default=45.0, help="how long tests/faults/test_soak.py runs")
    parser.addoption("--fuzz-seed", type=int, help="the first of the programs of tests/fuzz; drawn anew by default")
    parser.addoption("--fuzz-programs", type=int, default=60, help="how many programs of tests/fuzz, at most")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fuzz_seed is None:  # of all workers, which are given the options of whoever starts them
        config.option.fuzz_seed = random.SystemRandom().randrange(1, 10**8)


def pytest_report_header(config: pytest.Config) -> str:
    return f"--fuzz-seed {config.option.fuzz_seed}"


@pytest.fixture(scope="module")
def engines() -> Iterator[None]:
    """Ops with the names and schemas of the engines'."""
    libraries = engine_ops.define()
    yield
    for library in libraries:
        library._destroy()


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
