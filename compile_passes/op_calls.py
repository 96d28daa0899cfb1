"""Op calls: which ops a node of the graph runs.

AOT wraps an op that writes into an argument (``auto_functionalized``) or that has another effect
(``with_effects``); control flow and ``invoke_subgraph`` keep graphs of their own. What must be known of an op holds
for the one that really runs, so every question about tags, names and arguments starts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from .roles import bound_arguments

_Op = OpOverload | OpOverloadPacket | HigherOrderOperator


@dataclass(frozen=True)
class OpCall:
    """One op that a node runs.

    ``node`` has its inputs and its value. It is the node that was asked about, unless the op is one of a nested
    region: then it is a node of that region.
    """

    target: Any
    node: Node

    @property
    def names(self) -> tuple[str, str]:
        """``"ns::name"`` and ``"ns::name.overload"``; what is no op is named as torch prints it."""
        if isinstance(self.target, OpOverload):
            schema = self.target._schema
            return schema.name, f"{schema.name}.{schema.overload_name or 'default'}"
        if isinstance(self.target, OpOverloadPacket):
            return self.target._qualified_op_name, f"{self.target._qualified_op_name}.default"
        return str(self.target), str(self.target)

    @property
    def tags(self) -> frozenset[torch.Tag]:
        """The tags of the overload; those of all, where the graph names none.

        ``cudagraph_unsafe`` is the author's word on the op, so that of the default overload holds for every other.
        """
        if isinstance(self.target, OpOverloadPacket):
            overloads = [getattr(self.target, name) for name in self.target.overloads()]
            return frozenset(tag for overload in overloads for tag in overload.tags)
        if not isinstance(self.target, OpOverload):
            return frozenset()
        default = getattr(self.target.overloadpacket, "default", None)
        unsafe = {torch.Tag.cudagraph_unsafe} & set(getattr(default, "tags", ()))
        return frozenset({*self.target.tags, *unsafe})


def op_calls(node: Node) -> Iterator[OpCall]:
    """The ops that ``node`` runs, from the inside out: what it wraps, itself, and what its nested regions run."""
    if node.op != "call_function":
        return
    for target in reversed(_targets(node)):
        yield OpCall(target, node)
    for region in regions(node):
        for inner in region.graph.nodes:
            yield from op_calls(inner)


def op_names(node: Node) -> tuple[str, str]:
    """:attr:`OpCall.names` of the op that ``node`` runs; of a node that wraps an op, of the op inside."""
    targets = _targets(node)
    return OpCall(targets[-1] if targets else node.target, node).names


def op_arguments(node: Node) -> dict[str, Any]:
    """The arguments by name, with their defaults, of the op that ``node`` runs or wraps; empty for what is no op."""
    targets = _targets(node)
    if len(targets) < 2:
        return bound_arguments(node)
    op = targets[-1]
    if not isinstance(op, OpOverload):
        return {}
    schema = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given = node.args[list(node.args).index(op) + 1 :] if op in node.args else ()
    return defaults | dict(zip([argument.name for argument in schema], given, strict=False)) | node.kwargs


def nodes_of(gm: GraphModule) -> Iterator[Node]:
    """The nodes of a graph, each followed by those of its nested regions."""
    for node in gm.graph.nodes:
        yield node
        for region in regions(node):
            yield from nodes_of(region)


def regions(node: Node) -> Iterator[GraphModule]:
    """The graphs that a higher-order op calls, in the order of its arguments."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return
    for source in node.all_input_nodes:
        module = attribute(source)
        if isinstance(module, GraphModule):
            yield module


def attribute(node: Node) -> Any:
    """What a ``get_attr`` node gets; None for another node."""
    owner = node.graph.owning_module
    return attrgetter(str(node.target))(owner) if node.op == "get_attr" and owner is not None else None


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The tensors that describe a node's value, or are it."""
    value = node.meta["val"] if "val" in node.meta else attribute(node)
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def written_arguments(node: Node) -> Iterator[Node]:
    """The arguments whose memory an op writes."""
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


def _targets(node: Node) -> list[Any]:
    """What a node calls, and what that calls in turn where it is given ops to call."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, HigherOrderOperator):
        return [node.target]
    return [node.target, *(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, _Op))]
