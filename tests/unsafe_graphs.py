"""Graphs over fake tensors of a GPU and of the CPU, and which of their ops must not be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ringfence.compile_passes.facts import facts_of
from ringfence.compile_passes.judge import Decision
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.split import split
from ringfence.runtime.hazards.situation import Fact
from support import judge

H = 4
GPU = torch.device("cuda", 0)


def empty(*shape: int, device: torch.device | str = GPU, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype)


def on_the_gpu(fn: Callable[..., Any], *arguments: tuple[Any, ...]) -> GraphModule:
    """The graph of ``fn`` over fake tensors; each argument is the shape, and where else than on a GPU it is."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(fn)(*(empty(*shape, **options) for *shape, options in arguments))


X: tuple[Any, ...] = (H, H, {})  # on the GPU
LENGTHS: tuple[Any, ...] = (H, {"device": "cpu", "dtype": torch.int64})
NUMBER: tuple[Any, ...] = ({"device": "cpu"},)


def decided(gm: GraphModule, **options: Any) -> list[tuple[str, str]]:
    """The ops that are cut out, and by which rules; no fact of the plan speaks against what stays."""
    verdicts = judge(gm, backends={"0": "nccl"}, capture=True, **options)
    parts = cut(gm, verdicts)
    plan, _ = split(gm, parts)
    assert [e for e in facts_of(gm, parts) if e.fact is Fact.HOST_SYNC_IN_PIECE] == []
    islands = {op for p in plan.pieces if p.island for op in p.ops}
    split_off = [v for v in verdicts if v.decision is Decision.SPLIT]
    assert islands == {v.op for v in split_off} and all(v.message and v.source for v in split_off)
    return [(v.op, v.rule) for v in split_off]
