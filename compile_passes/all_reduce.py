"""The forms in which an all-reduce reaches an ATen graph.

_c10d_functional.all_reduce -> wait_tensor     functional collectives, DTensor
... -> aten.copy(dst, waited)                  in-place dist.all_reduce
namespace.op(x, group)                         an engine's own op
auto_functionalized[_v2](namespace.op_, ...)   the same, mutating its input
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from . import roles
from .provenance import label
from .reasons import Decline, Reason
from .roles import c10d, same_size, tensor

#: In place, or as Dynamo writes them: packets without an overload.
_NOT_FUNCTIONAL = (
    c10d.all_reduce_.default,
    torch.ops.c10d.allreduce_.default,
    c10d.all_reduce,
    c10d.all_reduce_,
    torch.ops.c10d.allreduce_,
)

#: What an option says of an engine's op: it takes the name of its process group as an argument (None), it runs over
#: this one, or the names that it takes are the engine's own and stand for these.
GroupOf = str | Mapping[str, str] | None

#: torch's own, in any form.
ALL_REDUCES = frozenset((c10d.all_reduce.default, *_NOT_FUNCTIONAL))

#: Names of a custom op's argument that says what it reduces with.
_REDUCE_OP_NAMES = ("reduce_op", "op")

#: And of the one that names its group.
_GROUP_NAMES = ("group_name", "group")


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
    return roles.calls(node, c10d.all_reduce.default, *_NOT_FUNCTIONAL) or _listed(node, all_reduce_ops) is not None


@dataclass(frozen=True)
class EngineCall:
    """A call of one of an engine's ops: its name in the option, and the process group that it runs over.

    ``overruled`` is what the call itself says of the group, where the option says another.
    """

    op: str
    group: object
    overruled: str | None = None


def engine_call(node: Node, all_reduce_ops: Mapping[str, GroupOf]) -> EngineCall | None:
    """How ``node`` calls one of an engine's ops; None where it does not."""
    name = _listed(node, all_reduce_ops)
    if name is None:
        return None
    arguments = dict(node.kwargs) if _is_functionalized(node) else roles.bound_arguments(node)
    argument, said = _group_argument(arguments), all_reduce_ops[name]
    if said is None:
        return EngineCall(name, argument)
    if not isinstance(said, str):
        return EngineCall(name, said.get(argument, argument) if isinstance(argument, str) else argument)
    by_name = next((str(arguments[n]) for n in _GROUP_NAMES if isinstance(arguments.get(n), str)), said)
    return EngineCall(name, said, None if by_name == said else by_name)


def _listed(node: Node, all_reduce_ops: Collection[str]) -> str | None:
    """The option's name for a custom op, also inside ``auto_functionalized``: with its overload, or without."""
    if node.op != "call_function" or not all_reduce_ops:
        return None
    target = node.args[0] if _is_functionalized(node) else node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    return next((n for n in (f"{name}.{target._overloadname}", name) if n in all_reduce_ops), None)


def _is_functionalized(node: Node) -> bool:
    return roles.calls(node, torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2)


def recognise_all_reduce(node: Node, all_reduce_ops: Mapping[str, GroupOf]) -> AllReduce | Decline | None:
    if roles.calls(node, c10d.all_reduce.default):
        bound = roles.bound_arguments(node)
        return _walk(node, bound["input"], str(bound["reduce_op"]), bound["group_name"], node)
    if roles.calls(node, *_NOT_FUNCTIONAL):
        return Decline(
            Reason.ALL_REDUCE_FORM,
            f"{label(node)} ({node.target}) is not functional; run the passes on a graph from aot_autograd",
        )
    call = engine_call(node, all_reduce_ops) if all_reduce_ops else None
    if call is None:
        return None
    name, group = call.op, call.group
    if _is_functionalized(node):
        return _functionalized(node, name, group)
    bound = roles.bound_arguments(node)
    tensors = _tensors(bound)
    if len(tensors) != 1 or not roles.is_tensor(node):
        given = f"{len(tensors)} tensors" if len(tensors) != 1 else "one tensor"
        made = "one tensor" if roles.is_tensor(node) else _kind(node.meta.get("val"))
        return Decline(
            Reason.ALL_REDUCE_FORM,
            f"'{name}' takes {given} and returns {made}; register an op that takes one tensor and returns its sum",
        )
    return _walk(node, tensors[0], _reduce_op(bound), group, node)


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


def _functionalized(node: Node, name: str, group: object) -> AllReduce | Decline:
    """An op that mutates its input, as AOT functionalises it."""
    arguments: dict[str, Any] = dict(node.kwargs)
    bases = arguments.pop("_all_bases", None)
    tensors = [*(bases or ()), *_tensors(arguments)]
    if len(tensors) != 1:
        return Decline(
            Reason.ALL_REDUCE_FORM,
            f"'{name}' takes {len(tensors)} tensors; register an op that takes one tensor and returns its sum",
        )
    values = [u for u in node.users if roles.calls(u, operator.getitem) and u.args[1] == 1]
    whole = bases is None or _covers_base(arguments, tensors[0])
    if len(values) != 1 or len(node.users) != 1 or not roles.is_tensor(values[0]) or not whole:
        return Decline(
            Reason.ALL_REDUCE_FORM,
            f"'{name}' mutates its input, and what it returns or which part it writes is not plain; "
            "register an op that returns the sum, or pass a whole tensor",
        )
    return _walk(node, tensors[0], _reduce_op(arguments), group, values[0])


def _tensors(arguments: Mapping[str, object]) -> list[Node]:
    """The tensors among the arguments of a call, also those in lists."""
    values = [v for given in arguments.values() for v in (given if isinstance(given, tuple | list) else (given,))]
    return [v for v in values if roles.is_tensor(v)]


def _kind(value: object) -> str:
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else "no tensor"


def _covers_base(arguments: Mapping[str, object], base: Node) -> bool:
    """Whether the mutated view is the whole of its base, element for element."""
    if any("_slice_" in key for key in arguments):
        return False
    sizes = [v for k, v in arguments.items() if k.endswith("_size")]
    if not sizes:
        return True
    offsets = [v for k, v in arguments.items() if k.endswith("_storage_offset")]
    dims = [d.meta["val"] if isinstance(d, Node) else d for d in sizes[0]]  # type: ignore[attr-defined]
    return offsets == [0] and is_contiguous_or_false(tensor(base)) and same_size(math.prod(dims), tensor(base).numel())


def _reduce_op(arguments: Mapping[str, object]) -> str:
    """What a custom op reduces with: it was registered as a sum, unless an argument of that name says otherwise."""
    return next((str(arguments[name]) for name in _REDUCE_OP_NAMES if name in arguments), "sum")


def _group_argument(arguments: Mapping[str, object]) -> object:
    """The group's name among a custom op's arguments: by name, else the only string."""
    for name in _GROUP_NAMES:
        if name in arguments:
            return arguments[name]
    strings = [v for k, v in arguments.items() if isinstance(v, str) and k not in _REDUCE_OP_NAMES]
    return strings[0] if len(strings) == 1 else None


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
