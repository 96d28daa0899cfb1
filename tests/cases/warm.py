"""Models whose pieces know one of two sizes that a guard ties together, compiled by Inductor on a rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfence

H = 64


class Decoder(nn.Module):
    """Each layer's cache is one longer after the step; masks and keys have that length."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.w = nn.ParameterList(nn.Parameter(torch.randn(H, H) / 8, requires_grad=False) for _ in range(2))

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        length, r = given["caches"][0].shape[0] + 1, x
        for w, cache in zip(self.w, given["caches"], strict=True):
            keys = torch.cat([cache, x])
            a = torch.softmax(x @ keys.t() - 0.01 * torch.arange(length), -1) @ keys
            y = a @ w
            dist.all_reduce(y)
            r = r + y
            x = F.rms_norm(r, (H,), None, 1e-6)
        return x


class Joined(Decoder):
    """Rows that are the sum of two sizes."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        r = x = torch.cat([x, *given["caches"]])
        for w in self.w:
            y = torch.tanh(x) @ w
            dist.all_reduce(y)
            r = r + y
            x = F.rms_norm(r, (H,), None, 1e-6)
        return x[: given["caches"][0].shape[0]]


def hits_and_misses(rank: int) -> tuple[int, int]:
    """Of Inductor's cache, in a process that has compiled nothing by it before."""
    for kind, tokens in ((Decoder, [1]), (Joined, [7, 9])):
        torch._dynamo.reset()
        model = kind(rank).eval()
        backend = ringfence.Backend(
            capture_sizes=tokens, graphs="simulated", on_capture_failure="raise", agree_seconds=180
        )
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for past in (3, 4, 5):
                torch.manual_seed(past)
                x, caches = torch.randn(1, H), [torch.randn(past, H) for _ in range(2)]
                torch.testing.assert_close(compiled(x, caches=caches), model(x, caches=caches), rtol=1e-4, atol=1e-4)
        assert backend.reports[-1].fused
    counters = torch._dynamo.utils.counters["inductor"]
    return counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"]
