"""What find + fuse cost, in figures that a noisy machine leaves alone: `python benchmarks/passes.py --against COMMIT`.

Prints how many functions are called, which no load changes, and the least CPU time of many runs.
"""

from __future__ import annotations

import copy
import cProfile
import gc
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

import against
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

LAYERS, HIDDEN, TOKENS = 80, 64, 4


def all_reduce(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", "0"))


def site(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = all_reduce(x) + residual
    return summed * torch.rsqrt(summed.pow(2).mean(-1, keepdim=True) + 1e-6) * weight, summed


def eighty_layers() -> GraphModule:
    def model(x: Tensor, residual: Tensor, weight: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2 * LAYERS):
            x, residual = site(x @ linear, residual, weight)
        return x, residual

    return traced(model, [torch.randn(s) for s in ((TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,), (HIDDEN, HIDDEN))])


def traced(fn: Callable[..., Any], inputs: list[Tensor], **_: Any) -> GraphModule:
    """Also Inductor's ``trace_fn``: its own would decompose differently and match nothing."""
    with torch.no_grad():
        gm = make_fx(fn, tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def cost(repeats: int) -> dict[str, float]:
    """Function calls of find + fuse, and the least CPU time in ms of so many runs."""
    from ringfence.compile_passes.find import find
    from ringfence.compile_passes.fuse import fuse

    graph = eighty_layers()
    least = float("inf")
    for _ in range(repeats):
        gm = copy.deepcopy(graph)
        gc.collect()
        gc.disable()
        start = time.process_time()
        fused = sum(s.fused for s in fuse(gm, find(gm)))
        least = min(least, time.process_time() - start)
        gc.enable()
        assert fused == 2 * LAYERS, f"{fused} of {2 * LAYERS} sites were fused"
    gm, profile = copy.deepcopy(graph), cProfile.Profile()
    profile.runcall(lambda: fuse(gm, find(gm)))
    return {"calls": pstats.Stats(profile).total_calls, "ms": least * 1e3}


def measured(repeats: int) -> dict[str, float]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    return cost(repeats)


def shown(processes: Sequence[dict[str, float]]) -> str:
    times = sorted(one["ms"] for one in processes)
    return f"{processes[0]['calls']:,} calls, {times[0]:.1f} ms at least ({', '.join(f'{t:.1f}' for t in times)})"


if __name__ == "__main__":
    against.main(__file__, __doc__ or "", measured, shown, repeats=15)
