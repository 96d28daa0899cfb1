"""Returned numbers: what the graph returns of its sizes is computed behind the graph, in each call.

A model may count on the host (the tokens that a sliding cache holds) and return the new count, which nothing
in the graph reads. As a value of a captured piece it would be a number of that capture; and as a size of the
call it would make every step a step of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Graph, GraphModule, Node

from ..runtime.replay.program import ReturnedView
from .roles import asks_for_shape, is_tensor


def take_returned_numbers(gm: GraphModule) -> dict[int, ReturnedView]:
    """Take the numbers that follow from inputs alone out of what the graph returns, by position.

    An input is left in their place.
    """
    (output,) = gm.graph.find_nodes(op="output")
    placeholders = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    returned = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    numbers = {}
    for position, value in enumerate(returned):
        if not _is_number(value) or value in placeholders:
            continue
        cone = _cone(value)
        inputs = [node for node in cone if node in placeholders]
        if not inputs or any(node not in placeholders and not _is_size(node) for node in cone):
            continue
        graph = Graph()
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node in gm.graph.nodes:
            if node in cone and node not in copies:
                copies[node] = graph.node_copy(node, lambda n, copies=copies: copies[n])  # type: ignore[misc]
        graph.output(copies[value])
        numbers[position] = ReturnedView(GraphModule(gm, graph).forward, tuple(placeholders[n] for n in inputs))
        returned[position] = inputs[0]
    if numbers:
        output.args = (tuple(returned),)
        gm.graph.eliminate_dead_code()
    return numbers


def read_symbols(gm: GraphModule) -> set[sympy.Symbol]:
    """The size symbols on which anything in the graph depends: shapes, and numbers that an op reads."""
    symbols: set[sympy.Symbol] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and not is_tensor(node) and not _readers(node):
            continue
        symbols |= set(_symbols(node.meta.get("val")))
    return symbols


def _readers(node: Node) -> list[Node]:
    return [user for user in node.users if user.op != "output"]


def _cone(value: Node) -> dict[Node, None]:
    cone: dict[Node, None] = {}
    queue = [value]
    while queue:
        node = queue.pop()
        if node not in cone:
            cone[node] = None
            queue.extend(node.all_input_nodes if node.op != "placeholder" else ())
    return cone


def _is_number(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.SymInt)


def _is_size(node: Node) -> bool:
    """A number that is computed of numbers, or read of a tensor's shape. What is read of its data is none."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), int | torch.SymInt):
        return False
    return asks_for_shape(node) or not any(is_tensor(n) for n in node.all_input_nodes)


def _symbols(value: Any) -> Iterator[sympy.Symbol]:
    if isinstance(value, torch.SymInt):
        yield from value.node.expr.free_symbols
    elif isinstance(value, torch.Tensor) and value.layout is torch.strided:
        for n in (*value.shape, *value.stride(), value.storage_offset()):
            yield from _symbols(n)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _symbols(one)
