"""Collectives: who is named in the graph for an all-reduce, after the sites are fused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch.fx import GraphModule, Node

from ..runtime.collectives import ops
from ..runtime.collectives.epilogue import DTYPES
from ..runtime.errors import RefusedError
from ..runtime.hazards.situation import Collective
from ..runtime.spelling import group_word
from .judge import Decision, Verdict
from .moe_calls import calls_of, in_pairs, name_collective
from .roles import arguments, bound_arguments, c10d, calls, tensor

#: What of a node's metadata is also true of the op that replaces it: not, for one, what its arguments were.
_KEPT = ("val", "stack_trace", "nn_module_stack", "custom")


def refuse_sites(gm: GraphModule, verdicts: Sequence[Verdict]) -> int:
    """Give the sites that are refused to the reference collective; how many.

    A dispatch and a combine go together: where one is refused, all of the group are the reference's. Raises
    :class:`RefusedError` where the other half is not in this graph.
    """
    refused = {v.node for v in verdicts if v.decision is Decision.REFUSE}
    nodes = [n for n in gm.graph.nodes if n.name in refused and calls(n, ops.all_reduce, *ops.FUSED)]
    halves = 0
    for group, of_group in calls_of(gm).items():
        if refused.isdisjoint(node.name for node in of_group):
            continue
        if not in_pairs(of_group):
            why = next(v.message for v in verdicts if v.node in refused and v.group == group)
            raise RefusedError(
                f"the other half of a dispatch or combine over group '{group_word(group)}' is not in this graph, so "
                f"the reference cannot have this one alone: {why} Compile both halves as one graph"
            )
        for node in of_group:
            name_collective(node, str(Collective.REFERENCE))
        halves += len(of_group)
    for node in nodes:
        node.args = (*node.args[:-1], str(Collective.REFERENCE))
    return len(nodes) + halves


def replace_plain_all_reduces(
    gm: GraphModule,
    group: str,
    collective: str,
    keep: Collection[str] = (),
    *,
    worth: Callable[[torch.Tensor], bool] = lambda value: True,
) -> list[str]:
    """Let ``collective`` carry out the sums over ``group`` that no norm was fused with; the new nodes' names.

    The op falls back to torch's own all-reduce for sizes where that is faster
    (:class:`~ringfence.runtime.collectives.size_table.SizeRow`). ``keep`` names nodes to leave alone;
    ``worth``: whether the collective wins at what is summed, in this graph.
    """
    replaced = []
    for wait in gm.graph.find_nodes(op="call_function", target=c10d.wait_tensor.default):
        start = wait.args[0]
        if not isinstance(start, Node) or start.name in keep or not _is_sum_over(start, group):
            continue
        if len(start.users) != 1:  # somebody else looks at the unfinished sum
            continue
        if not worth(tensor(start)):
            continue
        with gm.graph.inserting_before(wait):
            node = gm.graph.call_function(ops.all_reduce, (arguments(start)[0], group, collective))
        node.meta = {key: wait.meta[key] for key in _KEPT if key in wait.meta}
        wait.replace_all_uses_with(node)
        gm.graph.erase_node(wait)
        gm.graph.erase_node(start)
        replaced.append(node.name)
    if replaced:
        gm.graph.lint()
        gm.recompile()
    return replaced


def carried_groups(gm: GraphModule) -> set[str]:
    """The groups over which the graph calls an op of ours that names another collective than the reference."""
    nodes = (n for n in gm.graph.nodes if calls(n, *ops.OPS))
    return {str(n.args[-2]) for n in nodes if n.args[-1] != str(Collective.REFERENCE)}


def _is_sum_over(node: Node, group: str) -> bool:
    if not calls(node, c10d.all_reduce.default):
        return False
    bound = bound_arguments(node)
    value = tensor(node)
    return (
        bound.get("reduce_op") == "sum"
        and bound.get("group_name") == group
        and value.ndim >= 1
        and value.dtype in DTYPES
    )
