"""Two tensor-parallel layers by hand, served from captured graphs: torchrun --nproc-per-node 2 examples/torchrun.py

Prints the report of rank 0: which collective was chosen and why, and what became of each all-reduce. Runs on
CUDA devices where there are any, and on the CPU, with gloo and without a capture, where there are none.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfence

HIDDEN = 2048


class Layer(nn.Module):
    """A feed-forward layer of which each rank holds a slice; the sum over ranks feeds a residual and a norm."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN // ranks, bias=False)
        self.down = nn.Linear(4 * HIDDEN // ranks, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(F.silu(self.up(x)))
        dist.all_reduce(y)
        residual = residual + y
        return self.norm(residual), residual


class Model(nn.Module):
    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(ranks) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(dist.get_rank())
    model = Model(dist.get_world_size()).to(device, torch.bfloat16)
    backend = ringfence.Backend(capture_sizes=[1, 16])
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    inputs = torch.Generator(device).manual_seed(0)  # the same on every rank
    with torch.no_grad():
        for tokens in (16, 1, 16, 5, 16):
            compiled(torch.randn(tokens, HIDDEN, generator=inputs, device=device).to(torch.bfloat16))
    if dist.get_rank() == 0:
        for report in backend.reports:
            print(report)
    backend.close()
    ringfence.close_workspaces(dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("start its ranks: torchrun --nproc-per-node 2 examples/torchrun.py")
    main()
