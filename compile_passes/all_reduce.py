"""The forms in which an all-reduce reaches an ATen graph.

_c10d_functional.all_reduce -> wait_tensor     functional collectives, DTensor
... -> aten.copy(dst, waited)                  in-place dist.all_reduce
ringfence.all_reduce(x)                        called by the model itself
namespace.op(x, group)                         an engine's own op: :mod:`.engine_ops`
auto_functionalized[_v2](namespace.op_, ...)   the same, mutating its input
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..runtime.collectives import ops
from . import roles
from .engine_ops import GroupOf, engine_call, listed, read_sum_of
from .provenance import label
from .reasons import Decline, Reason
from .roles import c10d

#: In place, or as Dynamo writes them: packets without an overload.
_NOT_FUNCTIONAL = (
    c10d.all_reduce_.default,
    torch.ops.c10d.allreduce_.default,
    c10d.all_reduce,
    c10d.all_reduce_,
    torch.ops.c10d.allreduce_,
)

#: torch's own, in any form.
ALL_REDUCES = frozenset((c10d.all_reduce.default, ops.all_reduce, *_NOT_FUNCTIONAL))


@dataclass(frozen=True)
class AllReduce:
    """A collective and the chain of nodes that only hand its value on.

    ``value`` is the last of ``chain``; ``views`` are those of the chain that
    reshape, so that they can be applied to ``input`` instead: a sum over ranks is
    elementwise, so a view of it is the sum of the views.
    """

    start: Node
    input: Node
    op: str
    group: object
    chain: tuple[Node, ...]
    views: tuple[Node, ...]

    @property
    def value(self) -> Node:
        return self.chain[-1]


def is_all_reduce(node: Node, all_reduce_ops: Collection[str]) -> bool:
    """Whether ``node`` starts an all-reduce in any of the forms that :func:`find` knows."""
    return roles.calls(node, c10d.all_reduce.default, *_NOT_FUNCTIONAL) or listed(node, all_reduce_ops) is not None


def recognise_all_reduce(node: Node, all_reduce_ops: Mapping[str, GroupOf]) -> AllReduce | Decline | None:
    if roles.calls(node, c10d.all_reduce.default):
        named = enumerate(("input", "reduce_op", "group_name"))
        source, reduce_op, group = (roles.argument(node, i, name) for i, name in named)
        return _walk(node, source, str(reduce_op), group, node)
    if roles.calls(node, *_NOT_FUNCTIONAL):
        return Decline(
            Reason.ALL_REDUCE_FORM,
            f"{label(node)} ({node.target}) is not functional; run the passes on a graph from aot_autograd",
        )
    source = roles.first_node(node)
    if roles.calls(node, ops.all_reduce) and node.args[-1] == ops.PREPARED and source is not None:  # the model's own
        return _walk(node, source, "sum", node.args[1], node)
    call = engine_call(node, all_reduce_ops) if all_reduce_ops else None
    if call is None:
        return None
    read = read_sum_of(node, call)
    return read if isinstance(read, Decline) else _walk(node, read.input, read.op, call.group, read.value)


def nested_all_reduces(
    gm: GraphModule, all_reduce_ops: Mapping[str, GroupOf]
) -> Iterator[tuple[Node, Node, AllReduce | Decline]]:
    """For each in a subgraph (of ``invoke_subgraph``, ...): its call, the node in it, and what was recognised."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
        for inner in (getattr(gm, str(n.target), None) for n in attributes):
            if not isinstance(inner, GraphModule):
                continue
            found = ((n, recognise_all_reduce(n, all_reduce_ops)) for n in inner.graph.nodes)
            yield from ((node, n, all_reduce) for n, all_reduce in found if all_reduce is not None)
            yield from ((node, n, a) for _, n, a in nested_all_reduces(inner, all_reduce_ops))


def _walk(start: Node, source: Node, op: str, group: object, value: Node) -> AllReduce:
    """Follow the value through everything that only hands it on."""
    chain, views = [start] if value is start else [start, value], []
    while len(value.users) == 1:
        user = next(iter(value.users))
        if roles.calls(user, c10d.wait_tensor.default) or roles.copied_value(user) is value:
            pass
        elif roles.reshaped(user) is value:
            views.append(user)
        else:
            break
        chain.append(user)
        value = user
    # A wait belongs to its collective whatever else reads the unwaited value.
    return AllReduce(start, source, op, group, tuple(chain), tuple(views))
