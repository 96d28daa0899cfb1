"""A layer with experts on several ranks, in plain torch: tokens are gathered, and their sum is scattered."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS, TOP_K, H, WIDE = 8, 2, 256, 384


class Layer(nn.Module):
    """``x`` and the sum of its experts. ``lean`` is added to the router's scores; ``live`` scales tokens' weights."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.count = rank * (EXPERTS // ranks), EXPERTS // ranks
        mine = slice(self.first, self.first + self.count)
        sizes = {"gate": (EXPERTS, H), "up": (EXPERTS, WIDE, H), "down": (EXPERTS, H, WIDE)}
        drawn = {name: torch.randn(*size, generator=g) / size[-1] ** 0.5 for name, size in sizes.items()}
        self.gate = nn.Parameter(drawn["gate"].to(dtype), requires_grad=False)
        self.up = nn.Parameter(drawn["up"][mine].to(dtype), requires_grad=False)
        self.down = nn.Parameter(drawn["down"][mine].to(dtype), requires_grad=False)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(self.count):
            asked = torch.where(ids == self.first + e, weights, 0.0).sum(-1, keepdim=True)
            y = y + asked * (F.silu(x @ self.up[e].t()) @ self.down[e].t())
        return y

    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        scores = torch.softmax((x @ self.gate.t()).float() + lean, -1)
        weights, ids = scores.topk(TOP_K, -1)
        weights = (weights / weights.sum(-1, keepdim=True) * live).to(x.dtype)
        rows = (funcol.all_gather_tensor(t, 0, dist.group.WORLD) for t in (x, ids, weights))
        return x + funcol.reduce_scatter_tensor(self.experts(*rows), "sum", 0, dist.group.WORLD)


def given(tokens: int, seed: int) -> list[Tensor]:
    """``[x, lean, live]`` of one rank: as the router would have it, and every token there."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=g).bfloat16()
    return [t.to("cuda") for t in (x, torch.zeros(EXPERTS), torch.ones(tokens, 1))]
