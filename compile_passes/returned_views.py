"""Returned views: what the graph returns of an input's memory is looked at by the caller's own tensor.

AOT gives the caller a view of the input that was passed, and reads from the graph's output how that is laid out: its
strides, and where it begins in the storage. A captured graph works on memory of its own, so its view says nothing of
that. Such an output is therefore no value of the graph: it is taken of the arguments of each call.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Graph, GraphModule, Node

from ..runtime.replay.program import ReturnedView
from .aliases import root, viewed


def take_returned_views(gm: GraphModule) -> dict[int, ReturnedView]:
    """Take the views of inputs out of what the graph returns, by position; the input itself is left in their place."""
    (output,) = gm.graph.find_nodes(op="output")
    placeholders = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    returned = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    views = {}
    for position, value in enumerate(returned):
        if not isinstance(value, Node) or viewed(value) is None or root(value) not in placeholders:
            continue
        view = _view(gm, value, placeholders)
        if view is not None:
            views[position] = view
            returned[position] = root(value)
    if views:
        output.args = (tuple(returned),)
    return views


def _view(gm: GraphModule, value: Node, placeholders: Mapping[Node, int]) -> ReturnedView | None:
    """``value`` as a function of the graph's inputs; None where it takes a number that the graph computes of data."""
    needed: dict[Node, None] = {}
    queue = [value]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed[node] = None
            queue.extend(node.all_input_nodes)
    inputs = [node for node in needed if node in placeholders]
    if any(node.op == "call_function" and viewed(node) is None and not _is_size(node) for node in needed):
        return None
    graph, copies = Graph(), {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[value])
    return ReturnedView(GraphModule(gm, graph).forward, tuple(placeholders[node] for node in inputs))


def _is_size(node: Node) -> bool:
    """Whether a number is computed of sizes alone."""
    return not hasattr(node.meta.get("val"), "untyped_storage") and "local_scalar" not in str(node.target)
