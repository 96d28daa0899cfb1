"""Merge what a graph computes twice: the same add, scaling, cast, view or wait of the same values.

``aux.append(h + res)`` beside ``res = h + res`` reads the reduced value a second time, which would keep its
all-reduce from being fused. Only ops that compute the same whenever they run are merged, and none across a mutation.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.fx import GraphModule, Node

from .roles import CASTS, VIEWS, aten, c10d

_COMMUTES = {aten.add.Tensor, aten.mul.Tensor}
_COMPUTED = {*_COMMUTES, aten.sub.Tensor, aten.div.Tensor, *CASTS}
_ALIASES = VIEWS | {c10d.wait_tensor.default}
_REPEATABLE = _COMPUTED | _ALIASES


def merge_repeats(gm: GraphModule) -> int:
    """Let readers of a repeated value read the first; how many were merged.

    Two outputs that eager returns as two tensors stay two: the second becomes a copy.
    """
    seen: dict[Hashable, Node] = {}
    merged = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target not in _REPEATABLE:
            if _writes(node):
                seen.clear()
            continue
        key = (node.target, _arguments(node), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node and _same_metadata(first, node) and _merge(first, node):
            merged += 1
    if merged:
        gm.graph.lint()
        gm.recompile()
    return merged


def _merge(first: Node, node: Node) -> bool:
    if any(_writes(user) for user in (*first.users, *node.users) if user.op == "call_function"):
        return False
    if not (_leaves(first) and _leaves(node)):
        node.replace_all_uses_with(first)
        node.graph.erase_node(node)
        return True
    if node.target in _ALIASES:
        return False
    node.target, node.args, node.kwargs = aten.clone.default, (first,), {}
    return True


def _leaves(node: Node) -> bool:
    """Whether its memory is an output's."""
    return any(user.op == "output" or (user.target in VIEWS and _leaves(user)) for user in node.users)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _same_metadata(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    same = [(t.dtype, t.device, *map(str, t.shape), *map(str, t.stride())) for t in (x, y)]
    return same[0] == same[1] and a.meta.get("custom") == b.meta.get("custom")  # where Dynamo keeps the stream


def _arguments(node: Node) -> Hashable:
    """Those that the order makes no difference to have none: ``h + res`` is ``res + h``, bit by bit."""
    if node.target in _COMMUTES and not node.kwargs and all(isinstance(a, Node) for a in node.args):
        return frozenset(node.args) if len(set(node.args)) == 2 else node.args
    return _frozen(node.args)


def _frozen(value: object) -> Hashable:
    """Arguments as a key: 1, 1.0 and True are three, and so are the two zeros."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(map(_frozen, value))
    return repr(value)
