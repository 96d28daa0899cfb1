"""Groups: over which process group each collective of a graph runs.

torch's collectives and the fused ops name it in their arguments. An engine's own op may hold another name
(vLLM's ``"tp:0"``), a list of ranks or none; the name of what it runs over is written into its node once, and every
later pass reads it.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from ..runtime.collectives.moe import MOE_OPS
from ..runtime.collectives.ops import OPS
from ..runtime.errors import GroupError, OptionsError
from ..runtime.groups import Group, describe_group, group_exists, register_group, resolve_group
from .engine_ops import GROUP, EngineCall, GroupOf, engine_call
from .fuse import SITE
from .given import check_graph
from .op_calls import nodes_of, op_arguments, op_names
from .roles import c10d, calls, first_node

#: Whose ops name a process group in their arguments.
NAMESPACES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor", "symm_mem"})


def describe_groups(
    gm: GraphModule,
    device: torch.device | str,
    all_reduce_ops: Mapping[str, GroupOf] | None = None,
    said: dict[str, str] | None = None,
) -> dict[str, Group]:
    """The process groups of the graph's collectives, by first use; each of an engine's ops keeps its own from now on.

    An engine's own name of a group stays in the graph: it stands for the torch group that the option tells. said: by
    op, what calls of earlier graphs said of the one group that an option gives it for all calls; it is added to.

    Raises :class:`GroupError` for a group that does not exist, and :class:`OptionsError` where the option
    ``all_reduce_ops`` does not tell which one an op runs over.
    """
    check_graph(gm, "describe_groups")
    device = torch.device(device)
    said = said if said is not None else {}
    for node in nodes_of(gm):
        call = engine_call(node, all_reduce_ops) if all_reduce_ops and not is_ours_or_torchs(node) else None
        if call is not None and isinstance(call.group, str):  # if not, find declines it
            node.meta[GROUP] = _group_of_engine_call(node, call, device, said)
    return {name: describe_group(name, device) for name in groups_of(gm)}


def _group_of_engine_call(node: Node, call: EngineCall, device: torch.device, said: dict[str, str]) -> str:
    """The name under which a call's group is known from now on: the engine's own, where it has one."""
    if not dist.is_initialized():  # which describe_group tells
        return str(call.group)
    try:
        group = resolve_group(str(call.group), device)
    except GroupError as error:
        raise OptionsError(
            f"'{node.name}' ({call.op}) runs over '{call.group}', which is no name of a torch process group: say which "
            f"one it stands for, ringfence.register_group('{call.group}', process_group), or "
            f"all_reduce_ops={{'{call.op}': tp_group.group_name}} ({error})"
        ) from error
    if call.said is None or call.said == call.group:
        return str(call.group)
    there = resolve_group(call.said, device) if group_exists(call.said) else None
    if call.whole and (said.setdefault(call.op, call.said) != call.said or (there is not None and there is not group)):
        other = said[call.op]
        raise OptionsError(
            f"all_reduce_ops says that {call.op} runs over '{call.group}', and '{node.name}' calls it with "
            f"'{call.said}'{'' if call.said == other else f', another with {other!r}'}: say for each name "
            f"which group it stands for, ringfence.register_group('{call.said}', process_group), or "
            f"all_reduce_ops={{'{call.op}': {{'{call.said}': group.group_name, ...}}}}"
        )
    if there is None:
        register_group(call.said, group)
    elif there is not group:  # torch happens to call another group so
        return str(call.group)
    return call.said


def is_ours_or_torchs(node: Node) -> bool:
    """Whether it is a collective of which it is known how it is carried out."""
    return SITE in node.meta or _is_ours(node) or op_names(node)[0].split("::")[0] in NAMESPACES


def _is_ours(node: Node) -> bool:
    return calls(node, *OPS, *MOE_OPS) or op_names(node)[0] == "ringfence::moe_combine_into"  # which AOT may wrap


def groups_of(gm: GraphModule) -> list[str]:
    """The names of the process groups that the graph's collectives run over, by first use, also in nested regions.

    The order is the same on all ranks of a model; the names are each rank's own.
    """
    return list(dict.fromkeys(group for node in nodes_of(gm) if (group := find_group(node)) is not None))


def groups_there(gm: GraphModule, device: torch.device) -> list[Group]:
    """Those of the graph's collectives that this process has, whatever else may be wrong."""
    found = []
    for name in groups_of(gm):
        with contextlib.suppress(GroupError):
            found.append(describe_group(name, device))
    return found


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
