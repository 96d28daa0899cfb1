"""One emulated rank hangs on one GPU, and a thread probes its memory. Run in a child (:mod:`.children`)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from gpu import emulate
from gpu.children import progress
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives import probe as module
from ringfence.runtime.collectives.kernels import KernelMemory, Launched
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.watch.journal import CudaMarks

RELEASE = "0.6.18.post1"
HIDDEN = 8192
DTYPE = torch.bfloat16
ROW = HIDDEN * DTYPE.itemsize
WARM_UP, TOKENS = 4, 16


def asked(probe: module.GroupProbe) -> tuple[Any, float]:
    """What the probe says to a thread of its own, and how long that took."""
    answer: list[Any] = []

    def ask() -> None:
        CudaMarks(torch.device("cuda"), 0).watch_from_here()
        began = time.monotonic()
        answer.extend((probe(), time.monotonic() - began))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    return (answer[0], answer[1]) if answer else ("the probe did not come back", 10.0)


def written(paths: Sequence[Path]) -> list[dict[str, Any]] | None:
    """The journals of all ranks, once each holds what its probes found; before that a file says that its rank began."""
    values = [json.loads(path.read_text()) for path in paths if path.exists()]
    return values if len(values) == len(paths) and all(value.get("probes") for value in values) else None


def memory_of(workspace: emulate.Mnnvl | emulate.Trtllm, rank: int, calls: set[Launched]) -> KernelMemory:
    words = workspace.control[rank].data_ptr()
    if isinstance(workspace, emulate.Mnnvl):
        lamport = workspace._buffers[rank].data_ptr()
        return KernelMemory(
            mnnvl.LAYOUT, rank, emulate.RANKS, words, lamport, workspace.buffer_bytes, 4, False, calls=calls
        )
    shared = [tensor.data_ptr() for tensor in workspace._shared]  # data, flags, Lamport buffers; each by rank
    flags, lamport = shared[emulate.RANKS + rank], shared[2 * emulate.RANKS + rank]
    return KernelMemory(
        trtllm.LAYOUT, rank, emulate.RANKS, words, lamport, workspace.buffer_bytes, 2, True, flags, calls
    )


def make_probe(memory: KernelMemory) -> module.GroupProbe:
    """Of that memory. What is patched stays so: the process is the test's."""
    kernels = SimpleNamespace(memory=memory)
    workspace = SimpleNamespace(collective="emulated", transport="emulated", closed=False, kernels=kernels)
    mock.patch.object(module, "workspaces_of", lambda name: SimpleNamespace(open=(workspace,), moe=())).start()
    mock.patch.object(module, "ranks_of", lambda name: (0, 1)).start()
    return module.GroupProbe("emulated", module.CudaReader(torch.device("cuda", torch.cuda.current_device())))


def run(item: dict[str, Any]) -> dict[str, Any]:
    """Both ranks call once; then each as the item says, by tokens; 0: it does not. Rank 0 is probed."""
    two_shot, tokens = item["two_shot"], item["tokens"]
    torch.cuda.set_device(0)
    weight = torch.ones(HIDDEN, dtype=DTYPE, device="cuda")
    workspace = emulate.make(item["collective"], RELEASE, weight, TOKENS)
    strategy = Strategy.TWO_SHOT if two_shot else Strategy.ONE_SHOT
    calls = {Launched(strategy, n, ROW) for n in (1, WARM_UP, TOKENS, 3)}
    probe = make_probe(memory_of(workspace, 0, calls))

    def step(count: int) -> emulate.Step:
        return emulate.Step(two_shot, *(torch.randn(count, HIDDEN, device="cuda").to(DTYPE) for _ in range(4)))

    warm_up = [[step(WARM_UP)] for _ in range(emulate.RANKS)]
    then = [[step(n)] if n else [] for n in tokens]
    torch.cuda.synchronize()
    emulate.eager(workspace, warm_up)
    if not all(emulate.returned(5)):
        return {"kind": "the warm-up never returned", "stuck": True}
    idle, _ = asked(probe)
    progress(idle=idle)
    emulate.eager(workspace, then)
    returned = emulate.returned(0.5)
    # Somebody waits for the device, as a main thread does.
    waiting = threading.Thread(target=emulate.streams()[0].synchronize, daemon=True)
    waiting.start()
    value, seconds = asked(probe)
    return {
        "idle": idle,
        "value": value,
        "seconds": seconds,
        "returned": returned,
        "size": workspace.buffer_bytes,
        "stuck": True,
    }


def capture(item: dict[str, Any]) -> dict[str, Any]:
    """A probe is asked while the main thread captures in the mode that forbids other threads most."""
    words = torch.tensor([0, 2, 1 << 20, 0, 0, 0, 0, 0, 0], dtype=torch.int32, device="cuda")
    buffers = torch.full((3, 1 << 18), -(2**31), dtype=torch.int32, device="cuda")
    memory = KernelMemory(mnnvl.LAYOUT, 0, 2, words.data_ptr(), buffers.data_ptr(), 1 << 20, 4, False)
    memory.calls.add(Launched(Strategy.ONE_SHOT, 32, ROW))
    probe = make_probe(memory)
    x = torch.ones(8, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="global")
        y = x * 2
        value, seconds = asked(probe)
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return {"value": value, "seconds": seconds, "sum": float(y.sum())}
