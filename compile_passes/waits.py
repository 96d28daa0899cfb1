"""Waits: nothing that a collective still writes crosses a cut, or the border of the graph.

A functional collective returns at once, and its result is whole only after ``wait_tensor``. In one program that is a
matter of order. Where pieces are captured, what crosses their border is copied, and a copy of what nobody has waited
for is wrong for good: the wait is for the tensor that the collective returned.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from .aliases import root, viewed
from .functional import is_functionalised, is_write_back, mutation, updated
from .op_calls import op_names, regions, written_arguments
from .roles import asks_for_shape, c10d, calls, first_node

_FUNCTIONAL = ("_c10d_functional", "_c10d_functional_autograd")
#: What of a result's metadata is also true of the wait for it.
_KEPT = ("val", "stack_trace", "nn_module_stack", "custom")


def settle_waits(gm: GraphModule) -> None:
    """Let everything that looks at the result of a collective look at it through a wait, in nested regions too.

    A result that leaves the graph, that is seen through a view first, or that nobody waits for gets a wait of its
    own, as late as may be. A wait for a view is none any more: the result has been waited for before it is viewed.
    What a collective reads may be overwritten as soon as it was read, so where that happens the wait comes at once.
    """
    overwritten = _overwritten(gm)
    for node in list(gm.graph.nodes):
        for region in regions(node):
            settle_waits(region)
        at_once = _reads_later(node) and any(root(n) in overwritten for n in node.all_input_nodes)
        for result in _results(node):
            _settle(gm, result, node.next if at_once else None)
    gm.graph.lint()
    gm.recompile()


def keep_waits(gm: GraphModule, eager: Collection[str]) -> None:
    """Move each wait that the cut would separate from its collective to it.

    ``eager`` names the nodes that run between pieces. An event that is waited for belongs to the capture in which the
    collective was issued; and what an eager collective reads or writes must not be in the memory that the next piece
    uses again.
    """
    parts = _parts(gm, eager)
    moved: dict[Node, Node] = {}  # the last wait that was moved to a collective's result
    for wait in gm.graph.find_nodes(op="call_function", target=c10d.wait_tensor.default):
        result = first_node(wait)
        if result is None or result.op != "call_function" or parts[_producer(result)] == parts[wait]:
            continue
        if calls(result, operator.getitem):
            _producer(result).append(result)
        moved.get(result, result).append(wait)
        moved[result] = wait


def _settle(gm: GraphModule, result: Node, at_once: Node | None) -> None:
    """at_once: where the wait must stand, if not where the result is first looked at."""
    waits = [u for u in result.users if _is_wait(u)]
    early = [u for u in result.users if not _is_wait(u) and not asks_for_shape(u)]
    if not early and waits and at_once is None:
        return
    views = list(_views(result))
    anchor = at_once if at_once is not None else min(early, default=_output(gm))
    wait = next((w for w in waits if not anchor < w), None)
    if wait is None:
        with gm.graph.inserting_before(max(anchor, result.next)):
            wait = gm.graph.call_function(c10d.wait_tensor.default, (result,))
        wait.meta = {key: result.meta[key] for key in _KEPT if key in result.meta}
    for user in early:
        user.replace_input_with(result, wait)
    for settled in [u for view in views for u in view.users if _is_wait(u)]:
        settled.replace_all_uses_with(settled.args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(settled)


def _overwritten(gm: GraphModule) -> set[Node]:
    """The values whose memory a later value may be given: those that the graph's writes make new ones of."""
    queue = [n for n in gm.graph.nodes if is_functionalised(n) or is_write_back(n)]
    found: set[Node] = set()
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        change = mutation(node)
        older = [w.old for w in change.written] if change is not None else []
        older += node.all_input_nodes if is_write_back(node) or is_functionalised(node) else []
        older += [n for n in (viewed(node), updated(node)) if n is not None]
        queue += [node.args[0]] if calls(node, operator.getitem) else older
    return found


def _reads_later(node: Node) -> bool:
    """Whether a collective may read its inputs after it has returned: not one that copies them first."""
    name = op_names(node)[0]
    return name.split("::")[0] in _FUNCTIONAL and not any(word in name for word in ("all_reduce", "broadcast"))


def _results(node: Node) -> list[Node]:
    """The tensors that a collective returns before they are whole: its value, or the items of it.

    One in place returns what it was given; whoever looks at that from now on is given what it returned.
    """
    if node.op != "call_function" or op_names(node)[0].split("::")[0] not in _FUNCTIONAL or _is_wait(node):
        return []
    values = node.meta.get("val")
    results = [node] if isinstance(values, Tensor) else _items(node, values or ())
    for argument, result in zip(written_arguments(node), results, strict=False):
        for user in [user for user in argument.users if node < user]:
            user.replace_input_with(argument, result)
    return results


def _items(node: Node, values: Sequence[Any]) -> list[Node]:
    """An item for every tensor of a collective over several, whether it is used or not."""
    items = {u.args[1]: u for u in node.users if calls(u, operator.getitem)}
    for i, value in enumerate(values):
        if i not in items and isinstance(value, Tensor):
            with node.graph.inserting_after(node):
                items[i] = node.graph.call_function(operator.getitem, (node, i))
            items[i].meta["val"] = value
    return [items[i] for i, value in enumerate(values) if isinstance(value, Tensor)]


def _views(node: Node) -> Iterator[Node]:
    for user in node.users:
        if viewed(user) is node:
            yield user
            yield from _views(user)


def _parts(gm: GraphModule, eager: Collection[str]) -> dict[Node, int]:
    """Which nodes stay together in a cut between eager nodes and others."""
    parts: dict[Node, int] = {}
    part, between = 0, False
    for node in gm.graph.nodes:
        producer = _producer(node)
        if producer is not node:
            parts[node] = parts[producer]
            continue
        if node.op == "call_function" and (node.name in eager) is not between:
            part, between = part + 1, not between
        parts[node] = part
    return parts


def _producer(node: Node) -> Node:
    """The op of whose values ``node`` is one."""
    source = first_node(node)
    return _producer(source) if source is not None and calls(node, operator.getitem) else node


def _is_wait(node: Node) -> bool:
    return calls(node, c10d.wait_tensor.default)


def _output(gm: GraphModule) -> Node:
    output: Node
    (output,) = gm.graph.find_nodes(op="output")
    return output
