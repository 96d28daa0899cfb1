"""Groups: over which process group each collective of a graph runs.

torch's collectives and the fused ops name it in their arguments. An engine's own op may hold another name
(vLLM's ``"tp:0"``) or none; what it really runs over is written into its node once, and every later pass reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from ..runtime.collectives.ops import all_reduce
from ..runtime.errors import OptionsError
from ..runtime.groups import Group, describe_group, group_exists
from .all_reduce import EngineCall, GroupOf, engine_call
from .fuse import SITE
from .op_calls import nodes_of, op_arguments, op_names
from .roles import c10d, calls, first_node

#: Key of ``node.meta`` under which an engine's all-reduce keeps the name of its process group.
GROUP = "ringfence_group"

#: Whose ops name a process group in their arguments.
NAMESPACES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor", "symm_mem"})


def describe_groups(
    gm: GraphModule, device: torch.device, all_reduce_ops: Mapping[str, GroupOf] | None = None
) -> dict[str, Group]:
    """The process groups of the graph's collectives, by first use; each of an engine's ops keeps its own from now on.

    Raises :class:`GroupError` for a group that does not exist, and :class:`OptionsError` where the option
    ``all_reduce_ops`` does not tell which one an op runs over.
    """
    named: dict[str, str | None] = {}
    for node in nodes_of(gm):
        call = engine_call(node, all_reduce_ops) if all_reduce_ops and not is_ours_or_torchs(node) else None
        if call is not None and isinstance(call.group, str):  # if not, find declines it
            _check_engine_call(node, call, named.setdefault(call.op, call.overruled))
            node.meta[GROUP] = call.group
    return {name: describe_group(name, device) for name in groups_of(gm)}


def _check_engine_call(node: Node, call: EngineCall, first: str | None) -> None:
    """first: what the graph's first call of the op says of its group."""
    if dist.is_initialized() and not group_exists(str(call.group)):
        raise OptionsError(
            f"'{node.name}' ({call.op}) runs over '{call.group}', which is no name of a torch process group: say which "
            f"one it stands for, all_reduce_ops={{'{call.op}': tp_group.group_name}}"
        )
    if call.overruled is None:
        return
    if call.overruled != first or group_exists(call.overruled):
        raise OptionsError(
            f"all_reduce_ops says that {call.op} runs over '{call.group}', and '{node.name}' calls it with "
            f"'{call.overruled}'{'' if call.overruled == first else f', another with {first!r}'}: say for each name "
            f"which group it stands for, all_reduce_ops={{'{call.op}': {{'{call.overruled}': group.group_name, ...}}}}"
        )


def is_ours_or_torchs(node: Node) -> bool:
    """Whether it is a collective of which it is known how it is carried out."""
    return SITE in node.meta or calls(node, all_reduce) or op_names(node)[0].split("::")[0] in NAMESPACES


def groups_of(gm: GraphModule) -> list[str]:
    """The names of the process groups that the graph's collectives run over, by first use, also in nested regions.

    The order is the same on all ranks of a model; the names are each rank's own.
    """
    return list(dict.fromkeys(group for node in nodes_of(gm) if (group := find_group(node)) is not None))


def collectives_of(gm: GraphModule) -> list[Node]:
    """The collectives over known groups, in order, also in nested regions; a wait belongs to the one it waits for."""
    follow = (c10d.wait_tensor.default, operator.getitem)
    return [n for n in nodes_of(gm) if not calls(n, *follow) and find_group(n) is not None]


def group_of(node: Node) -> str:
    """The name of the process group of one of :func:`collectives_of`."""
    name = find_group(node)
    assert name is not None, f"'{node.name}' is no collective over a known group"
    return name


def find_group(node: Node) -> str | None:
    """The process group that ``node`` runs over; of a wait and of an item, that of the collective behind it.

    None where it is no collective or names none.
    """
    if calls(node, c10d.wait_tensor.default, operator.getitem):
        source = first_node(node)
        return find_group(source) if source is not None else None
    if GROUP in node.meta and node.op == "call_function":
        return str(node.meta[GROUP])
    if node.op != "call_function" or not is_ours_or_torchs(node):
        return None
    bound = op_arguments(node)
    group = bound.get("group_name", bound.get("group"))
    return group if isinstance(group, str) else None
