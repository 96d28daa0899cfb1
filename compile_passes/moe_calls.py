"""MoE calls: what a graph's dispatches and combines must keep to, whoever carries them out.

The capacity of a dispatch decides where each rank's rows lie in the memory of every other. So it must be the same
number on all ranks: one of the engine's that they agreed on, an int among the inputs, and not what a rank counts or
reads by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

from ..runtime.collectives import moe
from ..runtime.errors import RefusedError
from .op_calls import nodes_of, op_arguments, op_names
from .provenance import label
from .roles import tensor

#: Key of ``node.meta`` of a dispatch whose capacity is the same on all ranks because a gather of it would be even.
EVEN = "ringfence_even"
_NAMES = frozenset(f"ringfence::{op.name().split('::')[1].split('.')[0]}" for op in moe.MOE_OPS)
_REMEDY = (
    "ranks that pass different capacities write over each other's rows, and nothing tells; pass a number that they "
    "agreed on (the largest token count that any of them has) as an int input of the graph"
)


def is_moe(node: Node) -> bool:
    """Whether it is a dispatch or a combine, also one that AOT wraps because it writes."""
    return node.op == "call_function" and op_names(node)[0] in _NAMES


def capacity_of(dispatch: Node) -> int | torch.SymInt:
    """The capacity of a dispatch, as far as the graph tells it."""
    value: Any = op_arguments(dispatch)["capacity"]
    return value.meta["val"] if isinstance(value, Node) else value  # type: ignore[no-any-return]


def check_capacities(gm: GraphModule) -> None:
    """Raises :class:`RefusedError` for a dispatch whose capacity is a rank's own number, or read from data."""
    given = {s for node in gm.graph.find_nodes(op="placeholder") for s in free_unbacked_symbols(node.meta.get("val"))}
    for node in nodes_of(gm):
        if not is_moe(node) or op_names(node)[0] != "ringfence::moe_dispatch" or EVEN in node.meta:
            continue
        capacity = capacity_of(node)
        if free_unbacked_symbols(capacity) - given:
            raise RefusedError(f"the capacity of {label(node)} is read from data on the host: {_REMEDY}")
        ids: Any = op_arguments(node)["topk_ids"]
        if free_symbols(capacity) & free_symbols(tensor(ids).shape[0]):
            raise RefusedError(f"the capacity of {label(node)} is {capacity}, this rank's own token count: {_REMEDY}")
