"""Faults among kernels that end their waits: the ordinary verdict, with what a kernel said; nothing left on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from fake_flashinfer import FakeFlashInfer
from faults import gpus
from faults.catalogue import DEADLINE, HARD_END, Fault
from faults.own_kernels import BOUND, on_gpus, without_gpus
from faults.ranks import while_a_workspace_is_made
from faults.run import Ahead, run_fault

from ringfence.runtime.collectives import flashinfer, mnnvl, ringfence, table, trtllm

pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def ahead() -> Iterator[Ahead]:
    """The next test's ranks begin while this one's are at work; those that nobody needs are ended."""
    ranks = Ahead("cpu", 2)
    yield ranks
    ranks.close()
    assert all(one.process.exitcode is not None for one in ranks._next)


@pytest.mark.parametrize("fault", without_gpus(), ids=lambda fault: f"{fault.name} on rank {fault.rank}")
def test_the_verdict_is_the_watchs_and_the_kernels_words_are_its_evidence(fault: Fault, ahead: Ahead) -> None:
    assert "waited in vain" in str(fault.says)
    outcome = run_fault(fault, ahead)
    assert not outcome.problems()


def test_the_faults_of_two_gpus_hold_what_the_kernels_are_there_for() -> None:
    some = on_gpus("ringfence", 0)
    for name in ("killed", "stopped", "stuck", "skipped call", "late", "other size"):
        mine = [f for f in some if f.name == name and f.says is not None]
        assert mine and all("waited in vain" in str(f.says) and "kernel_wait_seconds" not in f.options for f in mine)
        assert all(f.settles > BOUND for f in mine), "kernels would still be patient with a rank that warmed up"
    within, beyond = (f for f in some if f.name == "late")
    assert within.says is None and within.late < BOUND < beyond.late < DEADLINE
    sizes = [f for f in some if f.name == "other size"]
    assert {f.blamed for f in sizes} == {(0, 1)} and {f.rank for f in sizes} == {0, 1}
    assert all(set(f.sizes[:7]) == {4, 8} and f.sizes[7 % len(f.sizes)] == 8 for f in sizes), "captured before"
    assert all(f.options["kernel_wait_seconds"] == HARD_END for f in some if f.name in ("slow", "paused"))
    assert {"other size", "late"}.isdisjoint(f.name for f in on_gpus("trtllm", 0))


def test_of_four_gpus_the_odd_one_alone_is_blamed() -> None:
    some = on_gpus("ringfence", 0, 4)
    (size,) = (f for f in some if f.name == "other size")
    assert size.ranks == 4 and not size.blamed
    assert re.search(str(size.says), "rank 1 came with 4 tokens, the others with 8; rank 0 waited in vain for the part")
    for fault in some:
        if fault.name in ("killed", "stopped", "stuck", "skipped call"):
            words = str(fault.says).rsplit(".*", 1)[1]
            for rank in range(4):
                said = f"rank {rank} waited in vain for the sum of rank {fault.rank} (call 3 of the workspace, token 0)"
                assert bool(re.search(words, said)) == (rank != fault.rank)


def test_a_fault_while_a_workspace_is_made_strikes_whatever_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[str] = []
    kept: tuple[tuple[Any, str], ...] = (
        *((FakeFlashInfer, "make"), (mnnvl, "create_peer"), (trtllm, "create"), (ringfence, "create")),
    )
    for owner, name in kept:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(flashinfer, "installed", lambda: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    while_a_workspace_is_made(lambda: struck.append("struck"))
    made = [one for one in table.ALL if one.make is not None and one.transport != "multicast"]
    for one in made:
        assert one.make is not None
        one.make(mock.Mock(), mock.Mock(), 8, 256, mock.Mock())
        assert len(struck) == made.index(one) + 1, str(one)
    assert {one.name for one in made} == {"ringfence", "mnnvl", "trtllm"}


def test_what_is_left_on_a_gpu_is_said_once_the_driver_had_time_to_give_it_back() -> None:
    answers = {"memory": iter([[520, 4], [9000, 30], [700, 40], [540, 4], [521, 4]])}
    processes: list[str] = []

    def ask(what: str, which: str) -> str:
        assert which == "--id=0,1"
        return "\n".join(processes) if "apps" in what else "\n".join(map(str, next(answers["memory"])))

    with mock.patch("torch.cuda._get_nvml_device_index", lambda device: device):
        before = gpus.used((0, 1), ask)
        assert before == gpus.Used({0: 520, 1: 4})
        assert gpus.left_behind(before, ask) == "", "at the third look it is given back"
        processes.append("GPU-1, 4711")
        answers["memory"] = iter([[521, 900]] * 9)
        said = gpus.left_behind(before, ask, 0.0)
    assert re.fullmatch(r"896 MiB of device 1; process GPU-1, 4711", said)
