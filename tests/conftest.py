from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import engine_ops
import pytest
import torch
import torch.distributed as dist
from grouping import pytest_collection_modifyitems as pytest_collection_modifyitems
from watchdogs import clock as clock

from support import measure_no_guards, start_fake_group

torch.set_num_threads(1)
measure_no_guards()
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a child that crashes says where
gc.freeze()  # what imports made stays: a twelfth of a tracing test's time went into walking it again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-runs", type=int, default=1, help="how many pairs of runs tests/faults/test_soak.py makes")
    parser.addoption("--fuzz-seed", type=int, default=1, help="from where the programs of tests/fuzz are drawn")
    parser.addoption("--fuzz-programs", type=int, default=12, help="how many programs of tests/fuzz")


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
