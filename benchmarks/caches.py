"""What a step costs whose op writes its cache between the pieces: four layers with a cache of 64 MB each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, SLOTS, HEADS, HIDDEN, TOKENS = 4, 64, 1024, 256, 4  # float32: 64 MB


def attention(q: Tensor, cache: Tensor, out: Tensor) -> None:
    """As an engine's op: it writes its rows of the cache, and its output into a buffer that it is given."""
    cache[0, : q.shape[0]].copy_(q)
    torch.mul(q, 2, out=out)


def register() -> torch.library.Library:
    """The op is there as long as the library is."""
    library = torch.library.Library("ringfence_bench", "DEF")
    library.define("attention(Tensor q, Tensor(a!) cache, Tensor(b!) out) -> ()")
    library.impl("attention", attention, "CPU")
    torch.library.register_fake("ringfence_bench::attention", lambda q, cache, out: None, lib=library)
    return library


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(LAYERS):
            self.register_buffer(f"cache{i}", torch.zeros(SLOTS, HEADS, HIDDEN))
        self.register_buffer("w", torch.eye(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(LAYERS):
            q = x @ self.w
            out = torch.empty_like(q)
            torch.ops.ringfence_bench.attention(q, getattr(self, f"cache{i}"), out)
            x = out + 1
        return x


def step_ms(backends: dict[str, Any], repeats: int = 400) -> dict[str, float]:
    """The median step of each backend, taken in turns. Each serves a model of its own, whose caches are checked."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    x = torch.randn(TOKENS, HIDDEN)
    for name, backend in backends.items():
        torch._dynamo.reset()
        model = Layers()
        calls[name] = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(calls[name](x), Layers()(x)), name
        assert torch.equal(model.cache0[0, :TOKENS], x), name
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(x)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(taken)[repeats // 2] for name, taken in times.items()}
