"""The journal's marks on a device."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ringfence.runtime.watch.journal import REPLAY, CudaMarks, Journal, PieceNote, ProgramNote

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Of torch.cuda._sleep: a good part of a second.
CYCLES = 1_000_000_000


def journal() -> Journal:
    j = Journal(0, pieces=64, steps=16)
    j.register(ProgramNote((PieceNote("submod_0", False, ("tp",)),)))
    j.use(CudaMarks(torch.device("cuda", torch.cuda.current_device()), j.slots))
    return j


def step(j: Journal, cycles: int = 0) -> None:
    marks = j.begin(0, (4,), REPLAY)
    marks.enter()
    if cycles:
        torch.cuda._sleep(cycles)
    marks.leave()
    marks.end()


def test_a_step_is_outstanding_until_the_device_is_done() -> None:
    j = journal()
    step(j)
    torch.cuda.synchronize()
    assert j.position().phase == "idle"
    step(j, CYCLES)
    step(j)
    position = j.position()  # the host has left both
    assert (position.phase, position.step, position.stuck_in_piece) == ("step", 1, True)
    assert (position.submitted, position.completed) == ({"tp": 3}, {"tp": 1})
    torch.cuda.synchronize()
    assert j.position().phase == "idle" and j.position().completed == {"tp": 3}


def test_asking_from_a_watching_thread_does_not_break_a_capture_of_another() -> None:
    j = journal()
    step(j, CYCLES)
    seen: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        j.watch_from_here()
        while not stop.is_set():
            seen.append(j.position().phase)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        x = torch.ones(8, device="cuda")
        side = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="global")
            y = x * 2
            time.sleep(0.1)  # the watcher asks meanwhile
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        assert y.sum().item() == 16
    finally:
        stop.set()
        watcher.join()
    assert "step" in seen


def test_a_step_inside_a_capture_of_the_caller_is_not_marked() -> None:
    j = journal()
    step(j)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(j)
    assert j.position().phase == "idle"
    step(j)
    torch.cuda.synchronize()
    assert j.position().completed == {"tp": 3}
