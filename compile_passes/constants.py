"""Constants: values that are the same in every call of a graph.

In a graph on an accelerator they may be computed by the CPU inside a captured piece: what was recorded stays right.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from .op_calls import op_calls, regions, tensors_of
from .roles import calls, first_node

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
    for written in _written_arguments(node):
        source: Node | None = written
        while source is not None:
            yield source
            source = first_node(source) if _is_view(source) else None


def _written_arguments(node: Node) -> Iterator[Node]:
    if getattr(node.target, "__name__", "") == "triton_kernel_wrapper_mutation":
        yield from node.all_input_nodes
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
    for argument in schema:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            yield from (n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, Node))


def _is_view(node: Node) -> bool:
    if calls(node, operator.getitem):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)
