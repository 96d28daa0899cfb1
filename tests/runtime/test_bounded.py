"""Kernels that end a wait by themselves: how long they wait, and what follows when one has given up."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import FakeFlashInfer, installed
from torch import Tensor, nn

import ringfence
from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of
from ringfence.runtime.errors import HangError, RingfenceError
from ringfence.runtime.watch.bounded import BoundedWaits
from ringfence.runtime.watch.position import UNCAPTURED, PieceNote, Position, ProgramNote
from ringfence.runtime.watch.supervisor import Supervisor
from support import BoundedKernels, run_ranks


def at(phase: str) -> Position:
    return Position(1, phase, 0)


def test_kernels_wait_the_least_that_was_asked_for_and_longer_while_somebody_warms_up() -> None:
    now = [100.0]
    waits, kernels, device = BoundedWaits(lambda: now[0]), BoundedKernels(), [True]
    waits.add("group", kernels, 5.0)
    waits.add("group", kernels, 30.0)
    assert kernels.seconds == 5.0, "another graph of the group asked for more"
    waits.begins(True, 1800.0, lambda: device[0])
    assert kernels.seconds == 1800.0, "a first step, to which ranks come minutes apart"
    late = BoundedKernels()
    waits.add("other", late, 9.0)
    assert late.seconds == 1800.0
    waits.begins(False, 0.0, lambda: device[0])
    assert kernels.seconds == 1800.0, "the first step still runs on the device"
    waits.hears([at("step"), at("compile")], 600.0)
    device[0] = False
    waits.begins(False, 0.0, lambda: device[0])
    assert (kernels.seconds, late.seconds) == (600.0, 600.0), "another rank compiles"
    waits.hears([at("idle"), at("step")], 600.0)
    now[0] += 10.0
    waits.hears([at("idle"), at("step")], 600.0)
    assert (kernels.seconds, late.seconds) == (5.0, 9.0)
    waits.add("group", again := BoundedKernels(), 30.0)
    assert again.seconds == 30.0, "what was asked of kernels that are gone says nothing of new ones"


def test_a_kernel_that_waited_for_a_compilation_gives_the_rank_its_own_bound_to_come() -> None:
    """It has waited for longer already, so at its next look it would give up for a rank that lives."""
    now = [0.0]
    waits, kernels = BoundedWaits(lambda: now[0]), BoundedKernels()
    waits.add("group", kernels, 30.0)
    for seconds, phases, bound in (
        (0.0, ["compile"], 1800.0),
        (40.0, ["compile"], 1800.0),
        (40.3, ["idle"], 1800.0),  # guards are built
        (69.9, ["idle"], 1800.0),
        (70.0, ["step"], 30.0),  # 30 after the last that was heard of it
        (71.0, ["idle", "warm-up"], 1800.0),
        (90.0, ["warm-up"], 1800.0),
        (91.0, [], 1800.0),  # it holds Python's lock, and is silent
        (119.9, [], 1800.0),
        (120.0, [], 30.0),
        (121.0, ["step"], 30.0),
    ):
        now[0] = seconds
        waits.hears(map(at, phases), 1800.0)
        assert kernels.seconds == bound, f"at {seconds} s, where others are in {phases}"


def test_what_is_gone_is_not_asked() -> None:
    waits, kernels = BoundedWaits(), BoundedKernels()
    waits.add("group", kernels, 5.0)
    assert waits.lost() is None
    kernels.lost = HangError("rank 0 waited in vain for rank 1", (1,))
    assert waits.lost() is kernels.lost
    del kernels
    gc.collect()
    assert waits.lost() is None
    waits.begins(True, 60.0, lambda: False)


def test_a_step_that_is_captured_asks_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query of an event would end the capture."""
    supervisor, kernels = Supervisor(), BoundedKernels()
    supervisor.waits.add("group", kernels, 5.0)
    supervisor.begins(first=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(supervisor.journal, "position", lambda: pytest.fail("the device is asked"))
    supervisor.begins(first=False)
    assert kernels.seconds == 1800.0
    monkeypatch.undo()
    supervisor.begins(first=False)
    assert kernels.seconds == 5.0


def test_patience_ends_with_the_first_step_though_a_later_one_always_runs() -> None:
    """As in an engine that hands the device a step before the last has ended."""

    class Device:
        ended = -1

        def record(self, slot: int) -> bool:
            return True

        def done(self, slot: int) -> bool:
            return slot <= self.ended

        def watch_from_here(self) -> None: ...

    supervisor, kernels, device = Supervisor(), BoundedKernels(), Device()
    supervisor.waits.add("group", kernels, 5.0)
    supervisor.journal.use(device)
    number = supervisor.journal.register(ProgramNote((PieceNote("step", False, ("group",)),)))
    found = []
    for at, ended in enumerate((-1, -1, 0, 1, 1, 3)):
        device.ended = ended  # of the steps 0 to 5, of which 0 and 3 are the first of their kind
        supervisor.begins(first=at in (0, 3))
        found.append(kernels.seconds)
        marks = supervisor.journal.begin(number, (4,), UNCAPTURED)
        marks.enter()
        marks.leave()
        marks.end()
    assert found == [1800.0, 1800.0, 5.0, 1800.0, 1800.0, 5.0]


def test_patience_after_a_preparation_ends_with_a_step_or_in_time() -> None:
    """Replays of an engine's own graphs tell nobody of a step."""
    waits, kernels, busy = BoundedWaits(), BoundedKernels(), [True]
    waits.prepared(1800.0)
    assert _timers() == [], "no kernels wait"
    waits.add("group", kernels, 5.0)
    waits.prepared(1800.0)
    waits.prepared(900.0)
    assert kernels.seconds == 900.0
    for first, runs, bound in ((True, True, 1800.0), (False, True, 1800.0), (False, False, 5.0)):
        busy[0] = runs
        waits.begins(first, 1800.0, lambda: busy[0])
        assert kernels.seconds == bound
    _until(lambda: _timers() == [], "a timer that has nothing to end")
    waits.prepared(0.2)
    waits.begins(True, 600.0, lambda: False)
    _until(lambda: _timers() == [], "it is over in time")
    assert kernels.seconds == 600.0, "a first step is another reason"
    waits.begins(False, 0.0, lambda: False)
    waits.prepared(2.0)
    assert kernels.seconds == 5.0, "the bound is longer than that patience"
    waits.add("group", again := BoundedKernels(), 0.1)
    assert again.seconds == 2.0
    _until(lambda: again.seconds == 0.1, "the bound that was asked for")
    waits.prepared(1800.0)
    assert len(_timers()) == 1
    del waits
    gc.collect()
    _until(lambda: _timers() == [], "whose patience it is")


def _timers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "patience of ringfence"]


def _until(is_so: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < until, what
        time.sleep(0.02)


# -- through a backend, on ranks whose kernels are torch ----------------------------------------------


H = 256
OPS = ["ringfence::all_reduce_add_rms_norm", "ringfence::all_reduce"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        dist.all_reduce(y)
        y = self.norm(x + y)
        return self.norm(y.sigmoid())


def _job(rank: int, package: FakeFlashInfer, folder: str, captured: bool) -> dict[str, Any]:
    """Rank 0's kernels give up waiting for rank 1 in the fourth step. Then all compile anew."""
    model, x = Layer(), torch.randn(4, H, generator=torch.Generator().manual_seed(3))
    found: dict[str, Any] = {}

    def backend() -> ringfence.Backend:
        torch._dynamo.reset()
        given: dict[str, Any] = {"capture_sizes": [4], "graphs": "simulated", "split_ops": OPS} if captured else {}
        given |= {"kernel_wait_seconds": 2 + rank, "warm_up_seconds": 900, "on_hang": "raise", "journal_dir": folder}
        return ringfence.Backend(piece_compiler="eager", collective="trtllm", max_tokens=8, agree_seconds=180, **given)

    def step(call: Any) -> tuple[bool, float]:
        wanted = model(x)
        return bool((call(x) - wanted).abs().max() < 1e-5), package.kernels[-1].seconds

    first = backend()
    call = torch.compile(model, backend=first, fullgraph=True)
    found["steps"] = [step(call) for _ in range(3)]
    until = time.monotonic() + 120
    while package.kernels[-1].seconds > 100 and time.monotonic() < until:  # until this rank has heard of the other
        time.sleep(0.05)
    found["steady"] = package.kernels[-1].seconds
    found["check"] = first.supervisor.check()
    package.missing = (1,) if rank == 0 else ()
    found["lost"] = raised(lambda: call(x))
    package.missing = ()
    until = time.monotonic() + 120
    while first.supervisor.health.poisoned is None and time.monotonic() < until:
        time.sleep(0.05)
    found["next"], found["asked"] = raised(lambda: call(x)), raised(first.supervisor.check)
    found["journal"] = json.loads((Path(folder) / f"journal-rank{rank}.json").read_text())
    first.close()
    dist.barrier()
    second = backend()
    found["anew"] = step(torch.compile(model, backend=second, fullgraph=True))
    found["invalid"] = workspaces_of(package.group).invalid
    second.close()
    return found


def raised(call: Any) -> tuple[str, tuple[int, ...], str]:
    try:
        call()
    except RingfenceError as error:
        return type(error).__name__, error.ranks, str(error)
    return "", (), ""


def _jobs(rank: int, folder: str) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    package = FakeFlashInfer(dist.group.WORLD.group_name)
    found = {}
    with installed(package):
        for captured in (False, True):
            name = "captured" if captured else "uncaptured"
            found[name] = _job(rank, package, f"{folder}/{name}", captured)
        close_workspaces(package.group)
    return found | {"closed": [k.closed for k in package.kernels]}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    yield run_ranks(2, _jobs, str(tmp_path_factory.mktemp("journals")))


@pytest.mark.parametrize("name", ["uncaptured", "captured"])
def test_nobody_is_given_what_a_lost_wait_has_left(jobs: list[dict[str, Any]], name: str) -> None:
    mine, peer = (found[name] for found in jobs)
    kind, ranks, text = mine["lost"]
    assert (kind, ranks) == ("HangError", (1,)) and "rank 0 waited in vain for rank 1; the outputs since" in text
    for found in (mine, peer):
        assert found["check"] is None and found["next"][:2] == found["asked"][:2] == ("PoisonedError", (1,))
        assert "rank 0 waited in vain for rank 1" in found["next"][2]
        report = found["journal"]["report"]
        assert (report["kind"], report["finding"]["ranks"]) == ("hang", [1]), "the verdict names who did not come"


@pytest.mark.parametrize("name", ["uncaptured", "captured"])
def test_its_workspace_is_made_anew_with_the_bound_that_was_asked_for(jobs: list[dict[str, Any]], name: str) -> None:
    for rank, found in enumerate(jobs):
        assert [right for right, _ in found[name]["steps"]] == [True] * 3 and found[name]["anew"] == (True, 900)
        assert found[name]["steps"][0][1] == 900, "the patience of a warm-up"
        assert found[name]["steady"] == 2 + rank, "kernel_wait_seconds, which may be each rank's own"
        assert found[name]["invalid"] is None and found["closed"] == [True] * 3
