"""Mode ``guard`` in vLLM: its own workspace is kept where all ranks have made one that works, and no hazard bars it."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_vllm import said as said
from torch import Tensor

from ringfence.integrations.vllm import guard
from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import reference
from ringfence.runtime.errors import HazardError


class TheirWorkspace:
    """vLLM's, of two ranks that are threads. spoils: adds this to what it sums."""

    def __init__(self, rank: int, meeting: threading.Barrier, slots: list[Any], spoils: float = 0.0) -> None:
        self.rank, self.meeting, self.slots, self.spoils = rank, meeting, slots, spoils
        self.destroyed = False

    def sum(self, x: Tensor) -> Tensor:
        self.slots[self.rank] = x.clone()
        self.meeting.wait(120)
        total = self.slots[0] + self.slots[1] + self.spoils
        self.meeting.wait(120)
        return total

    def destroy(self) -> None:
        self.destroyed = True


def allreduce_fusion(
    input: Tensor,
    workspace: TheirWorkspace,
    pattern: str,
    residual_out: Tensor,
    norm_out: Tensor,
    residual_in: Tensor,
    rms_gamma: Tensor,
    rms_eps: float,
    **how: Any,
) -> None:
    assert pattern == "norm" and how["launch_with_pdl"] and how["trigger_completion_at_end"], "as vLLM calls it"
    residual_out.copy_(workspace.sum(input) + residual_in)
    norm_out.copy_(reference.rms_norm(residual_out, rms_gamma, rms_eps, 0.0))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    package, comm = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.comm")
    vars(comm).update(
        allreduce_fusion=allreduce_fusion, AllReduceFusionPattern=types.SimpleNamespace(kARResidualRMSNorm="norm")
    )
    vars(package).update(comm=comm, __version__="0.7.2.post1")
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.comm", comm)
    monkeypatch.setattr(guard, "own_opt_outs", lambda: ())
    monkeypatch.setattr(guard, "versions", lambda: {"flashinfer-python": "0.7.2.post1"})


def guarded_by_two(
    make: Callable[[int, TheirWorkspace], Any], backend: str = "trtllm", on_hazard: str = "refuse", **others: Any
) -> tuple[list[Any], list[TheirWorkspace], list[guard.Guarded]]:
    """What each rank gets of ``_create_workspace``, what it had made, and what it found."""
    store, meeting, slots = dist.HashStore(), threading.Barrier(2), [None, None]
    theirs = [TheirWorkspace(rank, meeting, slots) for rank in range(2)]
    found, results, errors = [guard.Guarded(), guard.Guarded()], [None, None], []
    dtype = others.get("dtype", torch.float32)

    def run(rank: int) -> None:
        channel = Channel(store, rank, 2, seconds=120)
        opened = lambda group: channel  # noqa: E731
        device = torch.device("cpu")
        try:
            results[rank] = guard.create_workspace(
                *(found[rank], opened, device, on_hazard, True, lambda *_: make(rank, theirs[rank])),
                *(backend, 2, rank, 8, 1024, dtype, None),
            )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads)
    if errors:
        raise errors[0]
    return results, theirs, found


def test_a_workspace_that_all_made_and_that_works_is_kept(flashinfer: None) -> None:
    results, theirs, found = guarded_by_two(lambda rank, mine: mine)
    assert results == theirs and not any(one.destroyed for one in theirs)
    assert [one.collective for one in found] == ["trtllm/peer"] * 2 and found[0].hazards == ()


def test_a_workspace_that_one_rank_lacks_is_given_back_by_all(flashinfer: None, said: list[str]) -> None:
    """vLLM by itself: rank 1 falls back alone, and rank 0 waits for it in the kernel for ever."""
    results, theirs, found = guarded_by_two(lambda rank, mine: mine if rank == 0 else None)
    assert results == [None, None] and [one.destroyed for one in theirs] == [True, False]
    assert len(said) == 2 and "rank 1: vLLM could not make it" in said[0] and found[0].collective == "none"


def test_a_workspace_that_sums_wrongly_on_one_rank_is_given_back_by_all(flashinfer: None, said: list[str]) -> None:
    def make(rank: int, mine: TheirWorkspace) -> TheirWorkspace:
        mine.spoils = float(rank)
        return mine

    results, theirs, _ = guarded_by_two(make)
    assert results == [None, None] and all(one.destroyed for one in theirs)
    assert "its self-test failed: rank 1: eager" in said[0]


def test_multicast_is_not_made_where_a_rank_forbids_it(
    flashinfer: None, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(guard, "own_opt_outs", lambda: ("NCCL_NVLS_ENABLE=0",))
    asked: list[int] = []
    results, _, _ = guarded_by_two(lambda rank, mine: asked.append(rank), backend="mnnvl")
    assert results == [None, None] and asked == [], "it must not even be tried"
    assert "rank 0 forbids NVLink multicast (NCCL_NVLS_ENABLE=0)" in said[0]


@pytest.mark.parametrize("other", [{"release": "0.6.10"}, {"capability": (9, 0), "release": "0.5.3"}])
def test_what_one_rank_alone_would_refuse_is_refused_by_all(
    flashinfer: None, monkeypatch: pytest.MonkeyPatch, said: list[str], other: dict[str, Any]
) -> None:
    """Or the one waits in a barrier for the other, which waits in the vote."""
    of_rank = [{"release": "0.7.2", "capability": (10, 0)}, {"release": "0.7.2", "capability": (10, 0)} | other]

    def mine(fact: str) -> Any:
        return of_rank[int(threading.current_thread().name)][fact]

    monkeypatch.setattr(guard, "versions", lambda: {"flashinfer-python": mine("release")})
    monkeypatch.setattr(guard, "_capability", lambda device: mine("capability"))
    asked: list[int] = []
    results, _, found = guarded_by_two(lambda rank, mine: asked.append(rank), backend="mnnvl")
    assert results == [None, None] and asked == [] and len(said) == 2
    assert found[0].hazards == found[1].hazards and "M1" in found[0].hazards
    assert ("M10" in found[0].hazards) is ("capability" in other)


@pytest.mark.parametrize("on_hazard", ["refuse", "raise"])
def test_a_hazard_bars_vllms_workspace(flashinfer: None, said: list[str], on_hazard: str) -> None:
    """M49: one-shot mnnvl squares in float16."""
    asked: list[int] = []

    def run() -> tuple[list[Any], list[TheirWorkspace], list[guard.Guarded]]:
        return guarded_by_two(lambda rank, mine: asked.append(rank), "mnnvl", on_hazard, dtype=torch.float16)

    if on_hazard == "raise":
        with pytest.raises(HazardError, match="M49"):
            run()
    else:
        results, _, found = run()
        assert results == [None, None] and found[0].hazards == ("M49",) and "M49" in said[0]
    assert asked == []
