"""What is found of dispatch and combine in the graph of a layer of :mod:`moe_graphs`, and what its rewrite leaves."""

from __future__ import annotations

from typing import Any

import torch
from moe_graphs import given
from torch.fx import GraphModule

from ringfence.compile_passes.moe_rewrite import dispatch_experts
from ringfence.compile_passes.moe_sites import MoeSite
from ringfence.compile_passes.op_calls import op_names
from ringfence.compile_passes.repeats import merge_repeats
from ringfence.compile_passes.waits import settle_waits
from ringfence.runtime.groups import Group
from support import aot_graph

GROUPS = {"0": Group("0", "fake", 2, 0)}
CPU = torch.device("cpu")


def sites_of(layer: Any, *, tokens: int = 6, **options: Any) -> tuple[list[MoeSite], GraphModule]:
    traced = {"inductor": options.pop("inductor", False), "dynamic": options.pop("dynamic", ())}
    gm = aot_graph(layer, *given(tokens, 0), **traced)
    merge_repeats(gm)
    settle_waits(gm)  # as for a graph that is captured
    return dispatch_experts(gm, options.pop("groups", GROUPS), CPU, **{"rewrite": True, **options}), gm


def collectives(gm: GraphModule) -> list[str]:
    names = [op_names(n)[0] for n in gm.graph.nodes if n.op == "call_function"]
    return [n.split("::")[1] for n in names if n.split("::")[0] in ("_c10d_functional", "ringfence")]


def reason(layer: Any, **options: Any) -> str | None:
    (site,), gm = sites_of(layer, **options)
    assert ("moe_dispatch" in collectives(gm)) == site.rewritten
    return str(site.decline.reason) if site.decline else None


def message(layer: Any, **options: Any) -> str:
    (site,), _ = sites_of(layer, **options)
    return site.message
