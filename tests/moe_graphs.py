"""Layers with experts on several ranks, as graphs have them: tokens are gathered, and their sum is scattered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

E, K, H, I = 8, 2, 32, 48  # noqa: E741
FORMS: dict[str, Callable[..., Tensor]] = {
    "grouped": grouped_mm_experts_forward,
    "batched": batched_mm_experts_forward,
}


class Experts(torch.nn.Module):
    """One rank's experts, in Hugging Face's form; ids and weights are masked as its expert-parallel router does."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, form: str, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.num_experts, self.rank, self._forward = E // ranks, rank, FORMS[form]
        mine = slice(rank * self.num_experts, (rank + 1) * self.num_experts)
        up, down = torch.randn(E, 2 * I, H, generator=g) / 8, torch.randn(E, H, I, generator=g) / 8
        self.gate_up_proj = torch.nn.Parameter(up[mine].to(dtype))
        self.down_proj = torch.nn.Parameter(down[mine].to(dtype))

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def mask(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        elsewhere = (ids // self.num_experts) != self.rank
        ids = torch.fmod(ids.masked_fill(elsewhere, -1), self.num_experts)
        return ids.masked_fill(ids == -1, self.num_experts), weights.masked_fill(elsewhere, 0.0)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._forward(self, x, *self.mask(ids, weights))


class Layer(torch.nn.Module):
    """``x`` and the sum of its experts. ``lean`` is added to the router's scores, ``live`` scales tokens' weights."""

    def __init__(
        self,
        form: str = "grouped",
        rank: int = 0,
        ranks: int = 2,
        *,
        group: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        experts: Any = None,
        k: int = K,
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.gate = torch.nn.Parameter((torch.randn(E, H, generator=g) / 4).to(dtype))
        self.experts = experts if experts is not None else Experts(form, rank, ranks, dtype)
        self.group, self.k = group if group is not None else dist.group.WORLD, k

    def route(self, x: Tensor, lean: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax((x @ self.gate.t()).float() + lean, -1)
        weights, ids = scores.topk(self.k, -1)
        return ids, (weights / weights.sum(-1, keepdim=True) * live).to(x.dtype)

    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        ids, weights = self.route(x, lean, live)
        rows = (funcol.all_gather_tensor(t, 0, self.group) for t in (x, ids, weights))
        return x + funcol.reduce_scatter_tensor(self.experts(*rows), "sum", 0, self.group)

    def excess(self, result: Tensor, x: Tensor, lean: Tensor, live: Tensor) -> float:
        """The largest |result - reference| in units of rounding; the reference sums over the ranks in float32."""
        rows = [funcol.all_gather_tensor(t, 0, self.group) for t in (x, *self.route(x, lean, live))]
        y = funcol.reduce_scatter_tensor(self.experts(*rows).float(), "sum", 0, self.group)
        rounding = torch.finfo(x.dtype).eps * (x.float().abs() + y.abs()) + 1e-30
        return float(((result.float() - (x.float() + y)).abs() / rounding).max())


def given(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, lean, live)`` of one rank: as the router would have it, and every token there."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, H, generator=g).to(dtype), torch.zeros(E), torch.ones(tokens, 1)
