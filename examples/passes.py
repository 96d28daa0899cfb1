"""The passes alone, in a compiler of one's own: torchrun --nproc-per-node 2 examples/passes.py

`compiler` is what an engine would hold: it is given the functional ATen graph, and uses of ringfence what it likes.
Here that is everything, up to a runner that captures (simulated: on GPUs, ringfence.CudaGraphs). `ringfence docs api`
has each step with its types and errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import ringfence

HIDDEN = 64


def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    dist.all_reduce(y)
    residual = residual + y
    return F.rms_norm(residual, (HIDDEN,), weight, 1e-6), residual


def compiler(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    candidates = ringfence.find(gm)
    sizes = ringfence.size_rule(gm, candidates, static_inputs=frozenset())
    groups = ringfence.describe_groups(gm, torch.device("cpu"))
    written = ringfence.written_inputs(gm)
    # "prepared" is who ringfence.prepare chose for the group, the reference here; left out, it is always the reference.
    sites = ringfence.fuse(gm, candidates, collectives=dict.fromkeys(groups, "prepared"))
    verdicts = ringfence.judge(gm, ringfence.Assignment(groups=groups), capture=True)
    parts = ringfence.write_in_place(gm, ringfence.cut(gm, verdicts), eager_pieces=True)
    plan, whole = ringfence.split(gm, parts)
    names = [node.name for node in whole.graph.find_nodes(op="placeholder")]
    program = ringfence.lower(plan, whole, ringfence.eager_piece, names, frozenset(), written)
    runner = ringfence.PiecewiseRunner(program, sizes, ringfence.SimulatedGraphs(), capture_sizes=[4])
    if dist.get_rank() == 0:
        print(f"{sum(site.fused for site in sites)} of {len(sites)} all-reduces fused")
        for verdict in verdicts:
            print(f"{verdict.op}: {verdict.decision}, {verdict.message}")
        for piece in plan.pieces:
            print(f"{piece.name}: {'island' if piece.island else 'piece'} of {piece.nodes} ops")
    runners.append(runner)
    boxed: Callable[..., Any] = make_boxed_func(runner)
    return boxed


runners: list[ringfence.PiecewiseRunner] = []


def main() -> None:
    dist.init_process_group("gloo")
    prepared = ringfence.prepare(dist.group.WORLD, HIDDEN, torch.float32, max_tokens=16)
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=True)
    random = torch.Generator().manual_seed(dist.get_rank())  # each rank has its part
    shared = torch.Generator().manual_seed(9)
    worst = 0.0
    with torch.no_grad():
        for tokens in (4, 8, 4):
            x = torch.randn(tokens, HIDDEN, generator=random)
            residual = torch.randn(tokens, HIDDEN, generator=shared)
            weight = torch.randn(HIDDEN, generator=shared)
            pairs = zip(compiled(x, residual, weight), model(x, residual, weight), strict=True)
            worst = max(worst, *[(ours - eager).abs().max().item() for ours, eager in pairs])
    if dist.get_rank() == 0:
        print(f"carried out by {prepared.collective}; captured: {runners[0].captured_sizes}")
        print(f"passes: largest difference from eager {worst:.1e}")
    ringfence.close_workspaces("world")
    dist.destroy_process_group()
    if not worst < 1e-5:
        raise SystemExit(1)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("start its ranks: torchrun --nproc-per-node 2 examples/passes.py")
    main()
