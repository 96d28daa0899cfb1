"""All-reduce ops of engines: which argument is what, over which group a call runs, and what it sums.

    op(x, group_name) -> sum                          vllm::all_reduce
    op(x, group_name, how) -> sum                     sglang::outplace_all_reduce
    op(x!, group_name)                                sglang::inplace_all_reduce
    op(x, ..., workspace, [ranks], ...) -> [sum]      trtllm::allreduce
    op(x, strategy) -> sum                            auto_deploy::trtllm_dist_all_reduce: over all ranks

A user lists the ops that are all-reduces. Their form follows from the schema, where :data:`KNOWN` or the user says
nothing else. An engine's name of a group stays in the graph (:mod:`ringfence.runtime.groups`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Node

from ..runtime.groups import group_exists, name_of_ranks
from ..runtime.spelling import WORLD
from . import roles
from .functional import View, is_functionalised, mutation
from .op_calls import op_arguments
from .reasons import Decline, Reason
from .roles import aten, same_size, tensor

#: Key of ``node.meta`` under which an engine's all-reduce keeps the name of its process group.
GROUP = "ringfence_group"


@dataclass(frozen=True)
class AllReduceOp:
    """Which argument of an engine's all-reduce op is what, by name.

    input: what is summed, a tensor or a list of one. group: the name of its process group or a list of global ranks;
    None where it takes none. ignored: tensors that do not count, such as a workspace. only: arguments that may ask for
    more than a sum, each with the value that does not. over: see :data:`GroupOf`.
    """

    input: str
    group: str | None = None
    ignored: tuple[str, ...] = ()
    only: Mapping[str, object] = field(default_factory=dict)
    over: str | dist.ProcessGroup | Mapping[str, str | dist.ProcessGroup] | None = None


#: What an option says of an engine's op: it takes the name of its process group as an argument (None), it runs over
#: this one, or the names that it takes are the engine's own and stand for these; or all of its roles. Where the option
#: was read, names stand in place of process groups.
GroupOf = str | dist.ProcessGroup | Mapping[str, str | dist.ProcessGroup] | AllReduceOp | None

#: Where the schema does not tell all.
KNOWN: Mapping[str, AllReduceOp] = {
    "trtllm::allreduce": AllReduceOp("input", "group", ("workspace",), only={"op": 0}),
    "auto_deploy::trtllm_dist_all_reduce": AllReduceOp("t", over=WORLD),
    "auto_deploy::torch_dist_all_reduce": AllReduceOp("t", over=WORLD),
}

#: Names of an argument that says what is reduced with. 0 is the sum, of torch and of NCCL.
_REDUCE_OP_NAMES = ("reduce_op", "op")
#: And what its name says of an argument that tells how, and never over which group.
_HOW = ("strategy", "method", "algo", "mode")
#: Names of tensors that are no part of the sum.
_MEMORY = ("workspace", "buffer", "scratch")


@dataclass(frozen=True)
class EngineCall:
    """A call of one of an engine's ops: its name in the option, its roles, and the process group that it runs over.

    ``said`` is what the call itself says of the group, ``whole`` that the option names one group for all calls.
    """

    op: str
    row: AllReduceOp
    arguments: Mapping[str, Any]
    group: object
    said: str | None
    whole: bool


@dataclass(frozen=True)
class SumOf:
    """What a call sums, with which operation, and the node that holds the result."""

    input: Node
    op: str
    value: Node


def engine_call(node: Node, all_reduce_ops: Mapping[str, GroupOf]) -> EngineCall | None:
    """How ``node`` calls one of an engine's ops; None where it does not."""
    name = listed(node, all_reduce_ops)
    if name is None:
        return None
    arguments = _arguments(node)
    row = row_of(_op(node), all_reduce_ops[name], arguments)
    said = arguments.get(row.group) if row.group is not None else None
    if isinstance(said, list | tuple) and said and all(isinstance(rank, int) for rank in said):
        said = name_of_ranks(said)
    group, whole = said, isinstance(row.over, str)
    if isinstance(row.over, str):
        group = row.over
    elif isinstance(row.over, Mapping) and isinstance(said, str):
        group = row.over.get(said, said)
    return EngineCall(name, row, arguments, node.meta.get(GROUP, group), said if isinstance(said, str) else None, whole)


def listed(node: Node, all_reduce_ops: Collection[str]) -> str | None:
    """The option's name for a custom op, also inside ``auto_functionalized``: with its overload, or without."""
    if node.op != "call_function" or not all_reduce_ops:
        return None
    target = node.args[0] if is_functionalised(node) else node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    return next((n for n in (f"{name}.{target._overloadname}", name) if n in all_reduce_ops), None)


def row_of(op: torch._ops.OpOverload, said: GroupOf, given: Mapping[str, Any]) -> AllReduceOp:
    """The roles of an op's arguments: as the user says, as is known, or as its schema and a call look.

    given: the arguments of a call by name. A string that is no group's name (a strategy) is not taken for one.
    """
    if isinstance(said, AllReduceOp):
        return said
    known = KNOWN.get(op._schema.name)
    if known is not None:
        return known if said is None else replace(known, over=said)
    arguments = op._schema.arguments
    tensors = [a.name for a in arguments if "Tensor" in str(a.type)]
    ignored = tuple(name for name in tensors if any(word in name.lower() for word in _MEMORY))
    first = next((name for name in tensors if name not in ignored), "")
    groups = [a.name for a in arguments if "group" in a.name and str(a.type) in ("str", "Optional[str]", "List[int]")]
    exact = [name for name in ("group_name", "group") if name in groups]
    group = next(iter((*exact, *groups)), None)
    if group is None:
        strings = [n for n, v in given.items() if isinstance(v, str) and n not in _REDUCE_OP_NAMES]
        named = [n for n in strings if given[n] in said] if isinstance(said, Mapping) else []
        groups_of = [n for n in strings if not any(how in n for how in _HOW) and group_exists(given[n])]
        named = named or ([] if said is not None else groups_of)
        group = named[0] if len(named) == 1 else None
    return AllReduceOp(first, group, ignored, over=said)


def check_row(row: AllReduceOp, schema: torch.FunctionSchema) -> str | None:
    """Why an op of this schema cannot have the roles that are said of it; None where it can."""
    kinds = {a.name: str(a.type) for a in schema.arguments}
    roles_of = {"input": (row.input,), "group": (row.group,), "ignored": row.ignored, "only": tuple(row.only)}
    for role, names in roles_of.items():
        for name in names:
            if name is not None and name not in kinds:
                return f"{role} names '{name}', which is no argument of {schema}"
    if "Tensor" not in kinds[row.input]:
        return f"input='{row.input}' is {kinds[row.input]} of {schema}"
    return None


def read_sum_of(node: Node, call: EngineCall) -> SumOf | Decline:
    """What a call sums, and where the result is; or why it is no plain all-reduce."""
    name, row, arguments = call.op, call.row, call.arguments
    for argument, plain in row.only.items():
        if arguments.get(argument, plain) != plain:
            return _odd(f"'{name}' is called with {argument}={arguments[argument]!r}, and does more than a sum then")
    op = next((str(arguments[n]) for n in _REDUCE_OP_NAMES if n in arguments and n not in row.only), "sum")
    if op == "0":
        op = "sum"
    if is_functionalised(node):
        return _functionalized(node, call, op)
    summed, others = _tensors(arguments, row)
    value = _result(node)
    if len(summed) != 1 or others or value is None:
        count = len(summed) + len(others)
        given = f"{count} tensors" if count != 1 else "one tensor"
        made = "one tensor" if value is not None else _kind(node.meta.get("val"))
        also = f" ({', '.join(others)} too; of a workspace say so by ringfence.AllReduceOp)" if others else ""
        return _odd(
            f"'{name}' takes {given}{also} and returns {made}; register an op that takes one tensor and returns its sum"
        )
    return SumOf(summed[0], op, value)


def _odd(message: str) -> Decline:
    return Decline(Reason.ALL_REDUCE_FORM, message)


def _functionalized(node: Node, call: EngineCall, op: str) -> SumOf | Decline:
    """An op that mutates its input, as AOT functionalises it."""
    name, row = call.op, call.row
    found = mutation(node)
    inside, others = _tensors(found.arguments if found is not None else {}, row)
    written = found.written if found is not None else ()
    mine = [w for w in written if any(argument == row.input for argument, _, _ in w.names)]
    others += [n for w in written if w not in mine for n, _, _ in w.names if n not in row.ignored]
    if len(mine) != 1 or inside or others:
        count = len(mine) + len(inside) + len(others)
        return _odd(f"'{name}' takes {count} tensors; register an op that takes one tensor and returns its sum")
    (looks,) = mine[0].names if len(mine[0].names) == 1 else ((None, None, None),)
    values = [u for u in node.users if roles.calls(u, operator.getitem) and u.args[1] == mine[0].output]
    plain = len(values) == 1 and len(node.users) == 1 and roles.is_tensor(values[0])
    if not plain or looks[2] is None or not _covers(looks[2], mine[0].old):
        return _odd(
            f"'{name}' mutates its input, and what it returns or which part it writes is not plain; "
            "register an op that returns the sum, or pass a whole tensor"
        )
    return SumOf(mine[0].old, op, values[0])


def _result(node: Node) -> Node | None:
    """The node of the one tensor that a call returns, alone or in a list."""
    if roles.is_tensor(node):
        return node
    value, users = node.meta.get("val"), list(node.users)
    if not isinstance(value, list | tuple) or len(value) != 1 or len(users) != 1:
        return None
    item = users[0]
    return item if roles.calls(item, operator.getitem) and item.args[1] == 0 and roles.is_tensor(item) else None


def _tensors(arguments: Mapping[str, object], row: AllReduceOp) -> tuple[list[Node], list[str]]:
    """The tensors of the input, also those in a list, and the names of other arguments that are tensors."""
    summed: list[Node] = []
    others = []
    for name, given in arguments.items():
        values = [v for v in (given if isinstance(given, tuple | list) else (given,)) if roles.is_tensor(v)]
        if name == row.input:
            summed += values
        elif values and name not in row.ignored:
            others.append(name)
    return summed, others


def _kind(value: object) -> str:
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else "no tensor"


def _covers(view: View, base: Node) -> bool:
    """Whether the mutated view is the whole of its base, element for element."""
    if view.target is None:
        return True
    if view.target is not aten.as_strided.default:
        return False
    size, _, offset = view.args
    dims = [d.meta["val"] if isinstance(d, Node) else d for d in size]
    return offset == 0 and roles.is_contiguous(tensor(base)) and same_size(math.prod(dims), tensor(base).numel())


def _op(node: Node) -> torch._ops.OpOverload:
    op = node.args[0] if is_functionalised(node) else node.target
    assert isinstance(op, torch._ops.OpOverload), "it is listed"
    return op


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by name; inside ``auto_functionalized``, without those that are written."""
    names = {a.name for a in _op(node)._schema.arguments}
    return {name: value for name, value in op_arguments(node).items() if name in names}
