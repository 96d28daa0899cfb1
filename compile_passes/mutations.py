"""Mutations: inputs that the model writes into, such as a key-value cache.

AOT makes the graph functional: a write becomes a new tensor, and the graph ends with a copy of
it into the input. Where the copy stands beside the op that made the tensor, Inductor turns both
into a write in place. Left at the end it would land in the last piece of a split graph, and the
whole cache would be copied twice in every step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from .roles import arguments, aten, calls


def hoist_writes(gm: GraphModule) -> frozenset[int]:
    """Move every copy into an input to where the input is last read; the indices of those inputs."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = []
    for copy in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, value = arguments(copy)[:2]
        if target not in placeholders:
            continue
        written.append(placeholders.index(target))
        last = value
        for reader in _readers(target):
            if reader is not copy and last < reader:
                last = reader
        if last.op == "call_function":  # not an output that looks at the old value, nor an input
            last.append(copy)
    return frozenset(written)


def read_in_place(whole: GraphModule) -> None:
    """Let later parts of a split graph read what an earlier one wrote into an input from the input."""
    for part in whole.graph.find_nodes(op="call_module"):
        module = whole.get_submodule(str(part.target))
        assert isinstance(module, GraphModule)
        (output,) = module.graph.find_nodes(op="output")
        several = isinstance(output.args[0], tuple | list)
        values = list(output.args[0]) if several else [output.args[0]]
        places = {node: i for i, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        inputs = {
            arguments(copy)[1]: part.args[places[arguments(copy)[0]]]
            for copy in module.graph.find_nodes(op="call_function", target=aten.copy_.default)
            if arguments(copy)[0] in places
        }
        readers = {i: node for i, node in _outputs_of(part, several)}
        for i, value in enumerate(values):
            if value in inputs and i in readers:
                readers[i].replace_all_uses_with(inputs[value], delete_user_cb=lambda user: user.op != "output")
        kept = [i for i in range(len(values)) if i not in readers or readers[i].users or values[i] not in inputs]
        if len(kept) == len(values):
            continue
        for i in readers:
            if i not in kept and several:
                whole.graph.erase_node(readers[i])
            elif several:
                readers[i].args = (part, kept.index(i))
        output.args = (tuple(values[i] for i in kept),)
        module.recompile()
    whole.recompile()


def _outputs_of(part: Node, several: bool) -> Iterator[tuple[int, Node]]:
    """What a part returns, by position."""
    if not several:
        yield 0, part
        return
    for user in part.users:
        if calls(user, operator.getitem):
            yield arguments(user)[1], user


def _readers(node: Node) -> Iterator[Node]:
    """Who reads a tensor's memory, through views of it as well."""
    for user in node.users:
        yield user
        if _is_view(user):
            yield from _readers(user)


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)
