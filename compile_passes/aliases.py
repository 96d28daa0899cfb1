"""Which nodes share memory: what a view looks at, and who reads a value through views of it.

Each function answers a question about one or two nodes, as in :mod:`.roles`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .roles import VIEWS, arguments, aten, bound_arguments, calls, is_tensor

#: Views that keep the order of the elements: one undoes another where the shapes say so.
RESHAPES = frozenset(VIEWS)

#: Views that are said by places in the storage.
BY_PLACE = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)

#: Views of a whole tensor in another order of dimensions: the arguments that undo them.
INVERSES: dict[Any, Callable[[Any], Any]] = {
    aten.transpose.int: lambda args: args,
    aten.t.default: lambda args: args,
    aten.permute.default: lambda args: (sorted(range(len(args[0])), key=lambda d: args[0][d]),),
}


def viewed(node: Node) -> Node | None:
    """The node whose memory ``node`` looks at; None for a value with memory of its own.

    An item of a list of views looks at the list, which looks at what was split.
    """
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, Node) and viewed(source) is not None else None
    if node.target is aten._unsafe_view.default:  # its schema does not say so
        return arguments(node)[0]  # type: ignore[no-any-return]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    returned = [r.alias_info for r in node.target._schema.returns]
    if not returned or returned[0] is None or returned[0].is_write:
        return None
    bound = bound_arguments(node)
    for argument in node.target._schema.arguments:
        alias = argument.alias_info
        shares = alias is not None and (alias.before_set & returned[0].before_set or "*" in alias.after_set)
        if shares and isinstance(bound[argument.name], Node):
            return bound[argument.name]  # type: ignore[no-any-return]
    return None


def root(node: Node) -> Node:
    """The node that owns the memory: no view."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def views_by_place(gm: GraphModule) -> list[Node]:
    return [node for op in BY_PLACE for node in gm.graph.find_nodes(op="call_function", target=op)]


def read_by_place(gm: GraphModule) -> frozenset[int]:
    """The indices of the inputs that ``as_strided`` looks at: it counts from the start of their storage, so a copy of
    what they span would not do."""
    placeholders = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    roots = (root(arguments(node)[0]) for node in views_by_place(gm))
    return frozenset(placeholders[node] for node in roots if node in placeholders)


def ancestors(view: Node) -> set[Node]:
    """What a view is taken of, through other views, and the numbers that they are taken with."""
    found: set[Node] = set()
    queue = [view]
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found and (viewed(node) is not None or not is_tensor(node)):
                queue.append(node)
            found.add(node)
    return found


def readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Who reads the memory of a node, as ``(reader, what it reads of it)``: the node or a view of it."""
    for user in node.users:
        if viewed(user) is node:
            yield from readers(user)
        else:
            yield user, node


def undoes(back: Node, there: Node) -> bool:
    """Whether a view of a view is what was looked at first, element for element; shapes are not compared."""
    if back.target in RESHAPES and there.target in RESHAPES:
        return True
    if calls(there, aten.transpose.int) and calls(back, aten.transpose.int):
        rank = back.meta["val"].ndim
        first, second = ({d % rank for d in arguments(n)[1:3]} for n in (there, back))
        return first == second
    if calls(there, aten.permute.default) and calls(back, aten.permute.default):
        first, second = (arguments(n)[1] for n in (there, back))
        return [first[d] for d in second] == list(range(len(first)))
    return calls(there, aten.t.default) and calls(back, aten.t.default)


def fake_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call returns of the fake tensors of its arguments."""
    values, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    return target(*values, **named)
