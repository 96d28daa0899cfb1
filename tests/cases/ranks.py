"""Programs for two real ranks, one after the other in one pair of processes. Each returns what its test looks at."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases.serve import Served, serve
from torch import Tensor, nn

H = 64
_BODIES: dict[str, Callable[[int], Any]] = {}


def program(body: Callable[[int], Any]) -> Callable[[int], Any]:
    _BODIES[body.__name__] = body
    return body


def run_all(rank: int) -> dict[str, Any]:
    """Results by name; the text of the error where a program raised. A group each, so that none disturbs the next."""
    store, world_size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    results: dict[str, Any] = {}
    for name in ("rank_fusions", "rank_work"):
        importlib.import_module(f"cases.{name}")  # it registers its programs
    for name, body in _BODIES.items():
        dist.destroy_process_group()
        own = dist.PrefixStore(f"program {name}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
        try:
            results[name] = body(rank)
        except Exception:
            results[name] = traceback.format_exc()
        torch._dynamo.reset()
    return results


def ranks_serve(
    model: nn.Module | Callable[..., Any], steps: Sequence[Sequence[Any]], **options: Any
) -> dict[str, Any]:
    """:func:`serve`, as plain values."""
    options = {"piece_compiler": "eager", "agree_seconds": 40.0, **options}
    return plain(serve(model, steps, **options))


def plain(served: Served) -> dict[str, Any]:
    report = served.reports[-1]
    return {
        "off": max(served.off),
        "sites": served.sites,
        "messages": [s.decline.message if s.decline else "" for s in report.sites],
        "roundings": [[str(r) for r in s.roundings] if hasattr(s, "roundings") else [] for s in report.sites],
        "notes": list(report.notes),
        "reports": len(served.reports),
        "fused": [len(r.fused) for r in served.reports],
        "all_sites": [len(r.sites) for r in served.reports],
    }


def all_reduced(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


class Layer(nn.Module):
    """Weights differ from rank to rank; norm and bias do not."""

    def __init__(self, experts: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.w = nn.ParameterList(nn.Parameter((torch.randn(H, H) / 8).to(dtype)) for _ in range(experts))
        torch.manual_seed(9)
        self.g = nn.Parameter((1 + torch.randn(H) / 4).to(dtype))
        self.b = nn.Parameter(torch.randn(H).to(dtype))
        self.requires_grad_(False)

    def norm(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(r, (H,), self.g, 1e-6), r


def data(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """The same on every rank: activations and a residual for each step."""
    torch.manual_seed(5)
    return [(torch.randn(n, H).to(dtype), torch.randn(n, H).to(dtype)) for n in sizes]


CAPTURED: dict[str, Any] = {"capture_sizes": [2, 4], "graphs": "simulated"}
