from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import memory

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives import workspace as module
from ringfence.runtime.collectives.kernels import KernelCall
from ringfence.runtime.collectives.moe_one_sided import MoeSizes, OneSided
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.collectives.workspace import (
    MoeWorkspace,
    Workspace,
    Workspaces,
    close_workspaces,
    workspaces_of,
)
from ringfence.runtime.errors import GroupError, HangError, WorkspaceError
from ringfence.runtime.hazards.situation import Collective, Situation, Strategy
from support import run_threaded

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
TRTLLM, MNNVL = Collective.TRTLLM, Collective.MNNVL
CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)

#: Of 512-byte rows: one-shot up to 8, two-shot up to 16, all-reduces up to 4.
ROW = SizeRow(TRTLLM, "peer", (9, 0), 2, 8 * 512, 16 * 512, 4 * 512, "a test")


class Kernels:
    def __init__(self, strategies: tuple[Strategy, ...] = (ONE, TWO), words: int = 0) -> None:
        self.strategies, self.words, self.closed = strategies, words, 0
        self.memory = memory()

    def holds(self, call: KernelCall) -> bool:
        return True

    def wait_for(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self) -> None:
        pass

    def control_words(self) -> tuple[int, ...]:
        return (self.words, self.words + 1)

    def close(self) -> None:
        self.closed += 1


def workspace(capacity: int = 16 * 512, **other: Any) -> Workspace:
    given: dict[str, Any] = {
        "implementation": trtllm.IMPLEMENTATION,
        "row": ROW,
        "kernels": Kernels(),
        "device": CPU,
        "world_size": 2,
        "capacity": capacity,
        "dtypes": HALF,
        "passed": set(HALF),
    }
    return Workspace(**given | other)


def alone() -> Channel:
    return Channel(dist.HashStore(), 0, 1, seconds=5)


def opened(*made: Workspace) -> Workspaces:
    found = Workspaces()
    for one in made:
        assert found.create(alone(), lambda one=one: one, one.collective, one.transport) == (one, None)  # type: ignore[misc]
    return found


# -- which calls one serves


@pytest.mark.parametrize(("tokens", "strategy"), [(1, ONE), (8, ONE), (9, TWO), (16, TWO), (17, None)])
def test_the_row_says_how_a_call_is_carried_out(tokens: int, strategy: Strategy | None) -> None:
    assert workspace(1 << 20).strategy(tokens, 256, torch.bfloat16) is strategy


def test_what_a_workspace_does_not_serve() -> None:
    assert workspace(4 * 512).strategy(4, 256, torch.bfloat16) is ONE
    assert workspace(4 * 512).strategy(5, 256, torch.bfloat16) is None, "too large for the memory"
    assert workspace().strategy(4, 128, torch.float32) is None, "another dtype"
    half = workspace(passed={torch.bfloat16})
    assert half.strategy(4, 256, torch.float16) is None and half.planned(4, 256, torch.float16) is ONE, "not tested"
    one_shot = workspace(kernels=Kernels((ONE,)))
    assert one_shot.strategy(8, 256, torch.bfloat16) is ONE and one_shot.strategy(9, 256, torch.bfloat16) is None
    assert workspace().strategy(4, 260, torch.bfloat16) is None, "no whole warps"
    assert workspace(world_size=16, row=ROW).strategy(16, 256, torch.bfloat16) is None, "two-shot of too few tokens"


@pytest.mark.parametrize("given", [
    {}, {"capacity": 12 * 512}, {"kernels": Kernels((ONE,))}, {"world_size": 12}, {"world_size": 16}, {"passed": set()},
    {"row": dataclasses.replace(ROW, one_shot=0)}, {"row": dataclasses.replace(ROW, fused=ROW.one_shot)},
], ids=lambda given: " ".join(given) or "nothing")  # fmt: skip
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("hidden", [256, 260, 512])
def test_the_counts_that_are_served_are_those_of_each_call(given: dict[str, Any], alone: bool, hidden: int) -> None:
    one = workspace(**given)
    how = one.all_reduce_strategy if alone else one.strategy
    told = [n for counts in one.served(hidden, torch.bfloat16, alone=alone) for n in counts]
    assert told == [n for n in range(1, 40) if how(n, hidden, torch.bfloat16) is not None]


def test_an_all_reduce_alone_has_a_border_of_its_own() -> None:
    assert workspace().all_reduce_strategy(4, 256, torch.bfloat16) is ONE
    assert workspace().all_reduce_strategy(5, 256, torch.bfloat16) is None
    assert workspace().all_reduce_strategy(4, 128, torch.float32) is None


def test_workspaces_are_found_by_collective_device_dtype_and_size() -> None:
    small, large = workspace(512), workspace(4096)
    full = workspace(4096, dtypes=(torch.float32,))
    other = workspace(512, implementation=mnnvl.PEER)
    found = opened(small, large, full, other)
    assert found.open == (small, large, full, other)
    assert found.find("trtllm", CPU, torch.bfloat16, 512) is small
    assert found.find("trtllm", CPU, torch.float16, 513) is large
    assert found.find("trtllm", CPU, torch.float32, 1) is full
    assert found.find("mnnvl", CPU, torch.bfloat16, 512) is other
    assert found.find("trtllm", CPU, torch.bfloat16, 4097) is None
    assert found.find("trtllm", torch.device("cuda", 0), torch.bfloat16, 1) is None
    assert found.find("trtllm", CPU, torch.float64, 1) is None
    assert found.find("nccl", CPU, torch.bfloat16, 1) is None


# -- made by all or by none


@pytest.mark.parametrize("failing", [[0], [1], [0, 2], [0, 1, 2], []])
def test_one_is_made_on_every_rank_or_on_none(failing: list[int]) -> None:
    def body(rank: int) -> Any:
        found, kernels = Workspaces(), Kernels()
        channel = Channel(store, rank, 3, seconds=120)

        def make() -> Workspace:
            channel.exchange("handles", rank)
            if rank in failing:
                raise MemoryError(f"of rank {rank}")
            return workspace(kernels=kernels)

        made = found.create(channel, make, TRTLLM, "peer")
        channel.barrier("and the channel goes on")
        return made.workspace is not None, made.failure, kernels.closed, found.failed, len(found.open)

    store = dist.HashStore()
    why = "; ".join(f"rank {rank}: MemoryError: of rank {rank}" for rank in failing)
    said = f"its workspace could not be created ({why})"
    for rank, (made, failure, closed, failed, count) in enumerate(run_threaded(3, body)):
        if failing:
            assert not made and count == 0 and failure == said
            assert closed == (rank not in failing), "what was made is given back"
            assert failed == {(TRTLLM, "peer"): said}, "and not tried again"
        else:
            assert made and count == 1 and failure is None and closed == 0 and failed == {}


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    yield


@pytest.mark.usefixtures("capturing")
def test_none_is_made_inside_a_capture() -> None:
    found = Workspaces()
    with pytest.raises(WorkspaceError, match="inside a capture"):
        found.create(alone(), lambda: pytest.fail("made"), TRTLLM, "peer")
    assert found.failed == {} and found.open == ()


# -- closing


def test_closing_marks_every_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second = workspace(512), workspace(1024)
    found = opened(first, second)
    assert not first.closed and not second.closed
    monkeypatch.setattr(
        torch.cuda,
        "synchronize",
        lambda: waited.append(first.kernels.closed + second.kernels.closed),  # type: ignore[attr-defined]
    )
    found.close()
    assert waited == [0], "the device is waited for before the memory goes"
    assert (first.kernels.closed, second.kernels.closed) == (1, 1)  # type: ignore[attr-defined]
    assert first.closed and second.closed and found.open == ()
    assert found.find("trtllm", CPU, torch.bfloat16, 1) is None
    found.failed[TRTLLM, "peer"] = "no memory left"
    found.close()
    assert len(waited) == 1, "nothing was closed"
    assert found.failed == {}, "and what failed may be tried again, though nothing was open"
    third = workspace()
    assert found.create(alone(), lambda: third, TRTLLM, "peer").workspace is third
    assert not third.closed


def test_a_retired_workspace_is_closed_when_every_rank_is_there_and_not_made_again() -> None:
    kernels = [Kernels(), Kernels()]
    closed_before: list[int] = []
    store = dist.HashStore()

    def body(rank: int) -> Any:
        channel = Channel(store, rank, 2, seconds=120)
        bad, good = workspace(kernels=kernels[rank]), workspace(1 << 20)
        found = Workspaces()
        for one in (bad, good):
            found.create(channel, lambda one=one: one, TRTLLM, "peer")  # type: ignore[misc]
        if rank == 1:
            closed_before.append(kernels[0].closed)
        found.retire(bad, channel, "it is wrong")
        return found.open == (good,), (bad.closed, good.closed), found.failed, kernels[rank].closed

    for result in run_threaded(2, body):
        assert result == (True, (True, False), {(TRTLLM, "peer"): "it is wrong"}, 1)
    assert closed_before == [0]


@pytest.mark.parametrize("moe", [False, True])
def test_a_second_workspace_is_retired_though_it_is_like_the_first(moe: bool) -> None:
    """Leaving the list of open ones must not compare their tensors, which have no one truth."""

    def made(n: int) -> Workspace | MoeWorkspace:
        if not moe:
            one = workspace(kernels=kernels)
            one.constant("zeros", torch.empty(0, dtype=torch.bfloat16), 4)
            return one
        numbers = torch.zeros(2, n, dtype=torch.uint8), None, torch.zeros(4), {"FLAG_VAL": 0}, 0, 2
        pair = OneSided(None, *numbers, MoeSizes(4, 64, 64, 2), 128, n)
        return MoeWorkspace(pair, CPU, Situation(Collective.MOE_ALL_TO_ALL, world_size=2))

    found, kernels = Workspaces(), Kernels()
    first, second = (found.create(alone(), lambda n=n: made(n), "any", "peer").workspace for n in (1024, 4096))  # type: ignore[misc]
    found.retire(second, alone(), "it is wrong")  # type: ignore[arg-type]
    assert (found.moe if moe else list(found.open)) == [first]
    assert first is not None and second is not None and second.closed and not first.closed
    assert first != dataclasses.replace(first)


def test_control_words_of_all() -> None:
    assert opened(workspace(kernels=Kernels(words=3)), workspace(kernels=Kernels(words=7))).control_words() == (
        (3, 4),
        (7, 8),
    )


# -- whose they are


def test_workspaces_die_with_their_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    name = dist.group.WORLD.group_name
    found = workspaces_of(name)
    assert workspaces_of(name) is found and len(module._of_group) >= 1
    kernels = Kernels()
    found.create(alone(), lambda: workspace(kernels=kernels), TRTLLM, "peer")
    close_workspaces(name)
    assert kernels.closed == 1
    dead, before = weakref.ref(found), len(module._of_group)
    del found
    dist.destroy_process_group()
    gc.collect()
    assert dead() is None and len(module._of_group) == before - 1


def test_groups_have_workspaces_of_their_own() -> None:
    def body(rank: int) -> Any:
        name = dist.group.WORLD.group_name
        one = workspace()
        workspaces_of(name).create(Channel(dist.HashStore(), 0, 1), lambda: one, TRTLLM, "peer")
        return workspaces_of(name).open == (one,)

    assert run_threaded(2, body) == [True, True]


def test_a_group_that_does_not_exist() -> None:
    with pytest.raises(GroupError, match="no such group"):
        workspaces_of("no such group")


# -- constants


def test_constants_are_allocated_once() -> None:
    one, like = workspace(), torch.zeros(2, 256, dtype=torch.bfloat16)
    ones = one.constant("ones", like, 256)
    assert ones.tolist() == [1.0] * 256 and ones.dtype == torch.bfloat16
    assert one.constant("ones", like, 256).data_ptr() == ones.data_ptr()
    assert one.constant("zeros", like, 256).tolist() == [0.0] * 256
    assert one.constant("ones", like, 128).data_ptr() == ones.data_ptr(), "the first elements of one buffer"
    assert one.constant("ones", like, 128).shape == (128,)
    assert one.constant("ones", like.half(), 256).data_ptr() != ones.data_ptr()
    with torch.inference_mode():
        assert not one.constant("ones", like, 64).is_inference(), "a capture outside may read it too"


@pytest.mark.usefixtures("capturing")
def test_constants_are_not_allocated_inside_a_capture() -> None:
    like = torch.zeros(2, 256)
    one = workspace(device=torch.device("cuda", 0))
    with pytest.raises(WorkspaceError, match="ones for sites that have none would be allocated inside a capture"):
        one.constant("ones", like, 256)
    one.device = CPU
    ready = one.constant("ones", like, 256)
    one.device = torch.device("cuda", 0)
    assert one.constant("ones", like, 256).data_ptr() == ready.data_ptr(), "what is there already may be used"


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("wrong", ["no such group", 3])
def test_what_is_no_group_has_no_workspaces_to_close(wrong: Any) -> None:
    with pytest.raises(GroupError, match="is no process group of this process"):
        close_workspaces(wrong)
    for group in (dist.group.WORLD, None):  # nothing is open: nothing to do
        close_workspaces(group)


def test_waits_are_short_inside_and_as_was_said_last_after() -> None:
    one = workspace()
    found = opened(one)
    found.wait_for(30.0)
    with one.waits_at_most(5.0):
        assert one.kernels.seconds == 5.0  # type: ignore[attr-defined]
        for said, now in ((1800.0, 5.0), (2.0, 2.0), (60.0, 5.0)):
            found.wait_for(said)
            assert one.kernels.seconds == now  # type: ignore[attr-defined]
    assert one.kernels.seconds == 60.0  # type: ignore[attr-defined]


def test_what_serves_nothing_yet_is_not_lost_to_anybody() -> None:
    """A watchdog that looked in the midst of its self-test would end a process that goes on with another."""
    one = workspace(passed=set())
    one.kernels.check = mock.Mock(side_effect=HangError("in vain", (1,)))  # type: ignore[method-assign]
    found = opened(one)
    found.check_kernels()
    one.passed.add(torch.float16)
    with pytest.raises(HangError, match="in vain"):
        found.check_kernels()
