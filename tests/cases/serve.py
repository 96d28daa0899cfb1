"""What the cases share: a model compiled by the backend beside its eager twin, step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ringfence

_CAPTURE: dict[str, Any] = {"capture_sizes": [2, 4], "graphs": "simulated", "on_capture_failure": "raise"}

#: How pieces are compiled, and whether they are captured. What runs uncaptured and eagerly is compared elsewhere.
SETTINGS: list[dict[str, Any]] = [
    {"piece_compiler": "eager", **_CAPTURE},
    {"piece_compiler": "inductor"},
    {"piece_compiler": "inductor", **_CAPTURE},
]


def name_of(setting: dict[str, Any]) -> str:
    return f"{setting.get('piece_compiler', 'inductor')}{'-captured' if setting.get('capture_sizes') else ''}"


@dataclass(frozen=True)
class Served:
    """off: the largest difference from eager, of an output or of an argument after the call, per step."""

    off: list[float]
    reports: list[ringfence.CompileReport]

    @property
    def sites(self) -> list[str]:
        """Of each all-reduce of the last graph: ``fused``, or the reason."""
        return ["fused" if s.fused else str(s.decline.reason) for s in self.reports[-1].sites if s.fused or s.decline]


def attend(q: Tensor, cache: Tensor, out: Tensor) -> None:
    """What an op of an engine does that writes a cache and an output."""
    cache[: q.shape[0]].mul_(0.5).add_(q)
    out.copy_(q + cache[:4].mean(0))


def write_each(x: Tensor, caches: Sequence[Tensor]) -> None:
    for i, cache in enumerate(caches):
        cache[: x.shape[0]].copy_(x + i)


def serve(
    model: nn.Module | Callable[..., Any],
    steps: Iterable[Sequence[Any]],
    *,
    dynamic: bool | None = True,
    fullgraph: bool = True,
    **options: Any,
) -> Served:
    """Run each step's arguments through the compiled model and, as copies, through an eager twin.

    Arguments that several steps share by identity live on in the twin's world too.
    """
    torch._dynamo.reset()
    twin = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    backend = ringfence.Backend(**options)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    worlds: dict[int, tuple[Any, Any]] = {}
    off = []
    with torch.no_grad():
        for ours in steps:
            pairs = [worlds.setdefault(id(a), (a, copy.deepcopy(a))) for a in ours]
            theirs = [right for _, right in pairs]
            seen, right = compiled(*ours), twin(*theirs)
            off.append(difference([seen, *ours], [right, *theirs]))
            if isinstance(model, nn.Module) and isinstance(twin, nn.Module):
                off[-1] = max(off[-1], difference(list(model.buffers()), list(twin.buffers())))
    return Served(off, backend.reports)


def difference(seen: Any, right: Any) -> float:
    """The largest difference of nested values, relative to the largest right value; infinite for other shapes."""
    if isinstance(right, Tensor):
        if not isinstance(seen, Tensor) or (seen.shape, seen.dtype) != (right.shape, right.dtype):
            return float("inf")
        if not right.numel():
            return 0.0
        off = float((seen.double() - right.double()).abs().max()) / (1 + float(right.double().abs().max()))
        return off if off == off else float("inf")
    if isinstance(right, list | tuple):
        if len(seen) != len(right):
            return float("inf")
        return max([difference(s, r) for s, r in zip(seen, right, strict=True)], default=0.0)
    return 0.0 if seen == right else float("inf")


def whole_copies(call: Callable[..., Any], arguments: Sequence[Any], elements: int) -> list[str]:
    """The copies and clones of caches, of at least so many elements, that one call makes.

    By the profiler: a dispatch mode would bypass what is compiled. What the simulation copies to play a compiled
    kernel are bytes in one dimension, and no work of the runner's.
    """
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        call(*arguments)
    shapes = [(e.name, e.input_shapes[0]) for e in profile.events() if e.input_shapes]
    assert shapes
    return [n for n, s in shapes if n in ("aten::copy_", "aten::clone") and len(s) > 1 and math.prod(s) >= elements]
