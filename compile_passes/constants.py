"""Constants: values that are the same in every call of a graph.

In a graph on an accelerator they may be computed by the CPU inside a captured piece: what was recorded stays right.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from .aliases import viewed
from .op_calls import op_calls, regions, tensors_of, written_arguments
from .roles import calls

#: Key of ``node.meta`` under which a constant is known, also where it has become the input of a part.
_CONSTANT = "ringfence_constant"

#: Whose ops are known to compute the same from the same; an op of anybody else may count its calls.
_PURE = ("aten", "prims")


def mark_constants(gm: GraphModule) -> None:
    """Mark the nodes that no argument of the graph leads to, that nobody writes into, and that draw no random numbers.

    In a nested region they are those that nothing from outside leads to.
    """
    written = {node for writer in gm.graph.nodes for node in _writes(writer)}
    for node in gm.graph.nodes:
        node.meta.pop(_CONSTANT, None)
        if node not in written and _is_constant(node):
            node.meta[_CONSTANT] = True
        for region in regions(node):
            mark_constants(region)


def is_constant(node: Node) -> bool:
    """Whether :func:`mark_constants` found that its value is the same in every call."""
    return _CONSTANT in node.meta


def _is_constant(node: Node) -> bool:
    if node.op == "get_attr":
        return bool(tensors_of(node))
    if node.op != "call_function" or not all(map(is_constant, node.all_input_nodes)):
        return False
    if calls(node, operator.getitem):
        return True
    ops = list(op_calls(node))
    return len(ops) == 1 and all(
        isinstance(op.target, torch._ops.OpOverload)
        and op.target.namespace in _PURE
        and torch.Tag.nondeterministic_seeded not in op.tags
        for op in ops
    )


def _writes(node: Node) -> Iterator[Node]:
    """The nodes whose memory an op writes, through views of it as well."""
    if node.op != "call_function":
        return
    for written in written_arguments(node):
        source: Node | None = written
        while source is not None:
            yield source
            source = _looks_at(source)


def _looks_at(node: Node) -> Node | None:
    """Whose memory a node has: that of what it is a view of, or of what it has written in place and returns."""
    return viewed(node) or (next(written_arguments(node), None) if node.op == "call_function" else None)
