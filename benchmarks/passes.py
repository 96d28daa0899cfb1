"""What find + fuse cost, in figures that a noisy machine leaves alone: `python benchmarks/passes.py --against COMMIT`.

Prints how many functions are called, which no load changes, and the least CPU time of many runs in processes that take
turns: the code of a commit beside the one that is installed. Imports torch alone, so that old commits can be asked.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def unpack(commit: str, folder: Path) -> None:
    """The package as it was at a commit, under its name; the folders were one until they became front/ and others."""
    tree, package = folder / "tree", folder / "ringfence"
    tree.mkdir()
    archive = subprocess.run(
        ["git", "archive", commit], capture_output=True, check=True, cwd=Path(__file__).parent.parent
    )
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive.stdout, check=True)
    if not (tree / "front").is_dir():
        tree.rename(package)
        return
    (tree / "front").rename(package)
    for name in ("compile_passes", "runtime", "docs"):
        shutil.move(tree / name, package / name)


def ask(folder: Path | None, repeats: int) -> dict[str, float]:
    """:func:`cost` in a process of its own, of the package in ``folder`` or of the one that is installed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(folder)} if folder else {})
    command = [sys.executable, __file__, "--here", "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--here", action="store_true", help="ask the package that this process imports, once")
    given = parser.parse_args()
    if given.here:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.set_num_threads(1)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        print(json.dumps(cost(given.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        packages: dict[str, Path | None] = {"this": None}
        if given.against:
            unpack(given.against, Path(folder))
            packages[given.against] = Path(folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in packages}
        for _ in range(given.processes):
            for name, at in packages.items():
                found[name].append(ask(at, given.repeats))
    for name, each in found.items():
        times = sorted(one["ms"] for one in each)
        print(
            f"{name}: {each[0]['calls']:,} calls, {times[0]:.1f} ms at least ({', '.join(f'{t:.1f}' for t in times)})"
        )


if __name__ == "__main__":
    main()
