"""Returned views: what the graph returns of memory that is not the output's alone is looked at behind the graph.

AOT gives the caller a view of the input that was passed, and reads from the graph's output how that is laid out: its
strides, and where it begins in the storage. A captured graph works on memory of its own, so its view says nothing of
that. And two outputs that share memory have to share it when the caller has them, who may write into one; a graph
that returned both would have each copied out by itself. Such an output is therefore no value of the graph: it is taken
in each call, of the caller's arguments or of the output that owns the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node

from ..runtime.replay.program import ReturnedView
from .aliases import viewed
from .roles import aten, calls, is_tensor
from .versions import is_own, written_inputs_of


def take_returned_views(gm: GraphModule, of_inputs: Collection[int] = ()) -> dict[int, ReturnedView]:
    """Take the views out of what the graph returns, by position; what owns the memory is left in their place.

    of_inputs: the positions of which AOT says that they are views of inputs. A view of what was written into an input
    is one of them where the model wrote into the input and looked at it, and none where the input was given a copy of
    the value.
    """
    (output,) = gm.graph.find_nodes(op="output")
    placeholders = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    versions = {v: w.memory for w in written_inputs_of(gm, list(placeholders)) for v in w.versions[1:] if is_own(v)}
    returned = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    views = {}
    shared: dict[Node, list[int]] = {}
    for position, value in enumerate(returned):
        if not isinstance(value, Node):
            continue
        owner = _owner(value, versions if position in of_inputs else {})
        memory = versions.get(owner, owner) if position in of_inputs else owner
        if memory not in placeholders:
            shared.setdefault(owner, []).append(position)
            continue
        view = _view(gm, value, owner, memory, placeholders) if value is not memory else None
        if view is not None:
            views[position] = view
            returned[position] = memory
    for owner, positions in shared.items():
        views |= _views_of_an_output(gm, owner, positions, returned, placeholders)
    if views:
        output.args = (tuple(returned),)
    return views


def _views_of_an_output(
    gm: GraphModule, owner: Node, positions: Sequence[int], returned: list[Any], placeholders: Mapping[Node, int]
) -> dict[int, ReturnedView]:
    """Return the owner once, and all that shares its memory as views of that."""
    views = {p: _view(gm, returned[p], owner, owner, placeholders) for p in positions if is_tensor(owner)}
    taken = {p: v for p, v in views.items() if v is not None}
    if len(taken) < 2:
        return {}
    first = next((p for p in taken if returned[p] is owner), min(taken))
    done = {p: replace(v, of=first) for p, v in taken.items() if p != first or returned[p] is not owner}
    for p in taken:
        returned[p] = owner
    return done


def _owner(value: Node, versions: Mapping[Node, Node]) -> Node:
    """What a returned value looks at: a version of an input, or what owns its memory."""
    while value not in versions and (source := viewed(value)) is not None:
        value = source
    return value


def _view(
    gm: GraphModule, value: Node, owner: Node, memory: Node, placeholders: Mapping[Node, int]
) -> ReturnedView | None:
    """``value`` as a function of its memory and of the graph's inputs; None where that cannot be said.

    A view may take a number that the graph computes of data. A strided one counts on how an output of the graph is
    laid out, and the caller may be given a part of it.
    """
    needed: dict[Node, None] = {}
    queue = [value]
    while queue:
        node = queue.pop()
        if node not in needed and node is not owner:
            needed[node] = None
            queue.extend(node.all_input_nodes)
    if any(node.op == "call_function" and viewed(node) is None and not _is_size(node) for node in needed):
        return None
    if memory not in placeholders and any(calls(node, aten.as_strided.default) for node in needed):
        return None
    numbers = [node for node in needed if node in placeholders and node is not memory]
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in (memory, *numbers)}
    copies[owner] = copies[memory]
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[value])
    inputs = [node for node in copies if node in placeholders]
    return ReturnedView(GraphModule(gm, graph).forward, tuple(placeholders[node] for node in inputs))


def views_of_inputs() -> frozenset[int]:
    """The positions of the outputs that AOT takes for views of inputs, of the graph that it compiles now."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        return frozenset()
    first = metadata.num_mutated_inp_runtime_indices  # the graph returns those before what the model returns
    return frozenset(
        first + i for i, info in enumerate(metadata.output_info) if info.output_type is OutputType.alias_of_input
    )


def _is_size(node: Node) -> bool:
    """Whether a number is computed of sizes alone."""
    return not hasattr(node.meta.get("val"), "untyped_storage") and "local_scalar" not in str(node.target)
