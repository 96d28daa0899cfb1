from __future__ import annotations

import os
from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringfence.assign import nccl_situation
from ringfence.compile_passes.assignment import Assignment
from ringfence.compile_passes.judge import Decision, judge
from ringfence.runtime import groups
from ringfence.runtime.collectives.ready import why_reference_only
from ringfence.runtime.errors import GroupError
from ringfence.runtime.groups import Group, describe_group, nccl_version
from support import aot_graph, run_threaded, start_fake_group

CPU = torch.device("cpu")


def test_describe_group_without_a_process_group_says_what_to_call() -> None:
    assert not dist.is_initialized()
    with pytest.raises(GroupError, match=r"'tensor_parallel'.*init_process_group"):
        describe_group("tensor_parallel", CPU)


@pytest.mark.usefixtures("fake_group")
def test_describe_group_names_the_unknown_group_and_the_default_one() -> None:
    with pytest.raises(GroupError, match=r"'tensor_parallel'.* the default one is 'world' too"):
        describe_group("tensor_parallel", CPU)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_describe_group_of_a_fake_world(world_size: int) -> None:
    start_fake_group(world_size)
    try:
        name = dist.group.WORLD.group_name
        assert describe_group(name, CPU) == Group(name, "fake", world_size, 0)
    finally:
        dist.destroy_process_group()


def test_describe_group_of_fake_subgroups() -> None:
    start_fake_group(8)
    try:
        pair, four = dist.new_group([0, 5]), dist.new_group([0, 2, 4, 6])
        assert describe_group(pair.group_name, CPU) == Group(pair.group_name, "fake", 2, 0)
        assert describe_group(four.group_name, CPU) == Group(four.group_name, "fake", 4, 0)
        assert pair.group_name != four.group_name
    finally:
        dist.destroy_process_group()


def test_describe_group_forgets_a_destroyed_group() -> None:
    start_fake_group(2)
    name = dist.group.WORLD.group_name
    describe_group(name, CPU)
    dist.destroy_process_group()
    with pytest.raises(GroupError, match="init_process_group"):
        describe_group(name, CPU)


@pytest.mark.usefixtures("fake_group")
def test_describe_group_without_a_backend_for_the_device_says_which() -> None:
    name = dist.group.WORLD.group_name
    with pytest.raises(GroupError, match=r"'world'.*meta"):
        describe_group(name, torch.device("meta"))


def test_describe_group_of_gloo_by_device() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        name = dist.group.WORLD.group_name
        assert describe_group(name, CPU) == Group(name, "gloo", 1, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_describe_group_of_threaded_ranks(world_size: int) -> None:
    def body(rank: int) -> Group:
        return describe_group(dist.group.WORLD.group_name, CPU)

    groups = run_threaded(world_size, body)
    assert [astuple(g)[1:] for g in groups] == [("threaded", world_size, rank) for rank in range(world_size)]


def test_describe_group_of_threaded_subgroups() -> None:
    def body(rank: int) -> Group:
        groups = [dist.new_group([0, 2, 4]), dist.new_group([1, 3])]
        return describe_group(groups[rank % 2].group_name, CPU)

    groups = run_threaded(5, body)
    assert [(g.size, g.rank) for g in groups] == [(3, 0), (2, 0), (3, 1), (2, 1), (3, 2)]
    assert len({g.name for g in groups}) == 2


# -- which NCCL -------------------------------------------------------------------------


class Library:
    """libnccl.so.2, as ctypes has it."""

    def __init__(self, code: int, status: int = 0) -> None:
        self.code, self.status = code, status

    def ncclGetVersion(self, version: Any) -> int:
        version._obj.value = self.code
        return self.status


@pytest.mark.parametrize(
    ("library", "version"),
    [
        (Library(23004), "2.30.4"),  # newer than the one that torch was built with
        (Library(22809), "2.28.9"),
        (Library(23004, status=1), "2.28.9"),
        (OSError("not loaded"), "2.28.9"),
        (object(), "2.28.9"),
    ],
)
def test_the_nccl_that_is_loaded_counts(monkeypatch: pytest.MonkeyPatch, library: object, version: str) -> None:
    def load(name: str, mode: int) -> object:
        assert name == "libnccl.so.2" and mode & os.RTLD_NOLOAD
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9, "suffix"))
    monkeypatch.setattr(groups.ctypes, "CDLL", load)
    assert nccl_version() == version


def test_a_torch_without_nccl_has_no_version_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert nccl_version() is None


@pytest.mark.parametrize("called", ["nccl", "nccl2", "nccl-lazy"])
def test_nccl_is_nccl_whatever_torch_calls_it(monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    """Captured like NCCL, and asked about NCCL's hazards: the rule and the table go by one name."""
    made = []

    def make(store: object, rank: int, size: int, timeout: object) -> FakeProcessGroup:
        made.append(FakeProcessGroup._create_internal(rank, size))
        return made[-1]

    unlike = f"{called}_of_a_test"  # a name is registered for the life of a process
    dist.Backend.register_backend(unlike, make, devices=["cpu"])
    dist.init_process_group(unlike, store=FakeStore(), rank=0, world_size=2)
    try:
        monkeypatch.setattr(FakeProcessGroup, "name", lambda _: called)
        group = describe_group("0", CPU)
        assert group.backend == "nccl"
        assert nccl_situation({"0": group}, {}, None) is not None

        def model(x: torch.Tensor) -> torch.Tensor:
            return funcol.all_reduce(x, "sum", "0") + 1.0

        gm = aot_graph(model, torch.randn(4, 8))
        verdict = next(v for v in judge(gm, Assignment({"0": group}), capture=True) if "all_reduce" in v.op)
        assert (verdict.decision, verdict.rule) == (Decision.IN_GRAPH, "nccl"), verdict
        assert why_reference_only(group, torch.device("cuda")) is None
    finally:
        dist.destroy_process_group()
