"""Split: cut the graph at the ops that must run eagerly.

The graph becomes a line of pieces (compiled, captured) and islands (eager). Rules:

- original order is kept; torch's default would reorder side effects silently;
- consecutive eager ops share an island, and a ``getitem`` stays with its producer;
- a run of nodes that launches no kernel (views, sizes) joins the island beside it,
  because a graph of nothing is not worth a replay;
- one op is one node, so a protocol of several launches is never cut in two.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from ..runtime.errors import RefusedError
from .fuse import SITE
from .judge import Decision, Verdict
from .roles import VIEWS, aten, c10d, calls, first_node

_NO_KERNEL = VIEWS | {
    operator.getitem,
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}


@dataclass(frozen=True)
class Piece:
    """One part of the split graph, in the order of execution.

    ``name`` is the submodule's; ``island`` says that it runs eagerly, because of
    ``ops``; ``nodes`` counts its operations; ``sites`` are the fused sites in it.
    """

    index: int
    name: str
    island: bool
    ops: tuple[str, ...]
    nodes: int
    sites: tuple[int, ...]


@dataclass(frozen=True)
class SplitPlan:
    pieces: tuple[Piece, ...]


def split(gm: GraphModule, verdicts: Sequence[Verdict]) -> tuple[SplitPlan, GraphModule]:
    """The plan, and a module that calls ``submod_0``, ``submod_1``, ... in its order.

    Raises :class:`RefusedError` for an op that is refused and that the reference cannot carry out instead.
    """
    for verdict in verdicts:
        if verdict.decision is Decision.REFUSE and not verdict.op.startswith("ringfence::"):
            raise RefusedError(f"'{verdict.node}' ({verdict.op}) is refused: {verdict.message} ({verdict.source})")
    # A refused site falls back to the reference collective, of which nothing is known under capture here.
    eager = {v.node: v.op for v in verdicts if v.decision is not Decision.IN_GRAPH}
    _gather(gm, eager)
    runs = _runs(gm, eager)
    index_of = {node: i for i, (_, nodes) in enumerate(runs) for node in nodes}
    pieces = tuple(
        Piece(
            index=i,
            name=f"submod_{i}",
            island=island,
            ops=tuple(dict.fromkeys(eager[n.name] for n in nodes if n.name in eager)),
            nodes=len(nodes),
            sites=tuple(n.meta[SITE] for n in nodes if SITE in n.meta),
        )
        for i, (island, nodes) in enumerate(runs)
    )
    whole = split_module(gm, gm, lambda n: index_of[n], keep_original_order=True)
    return SplitPlan(pieces), whole


def _gather(gm: GraphModule, eager: Collection[str]) -> None:
    """Move each ``getitem`` to its producer, and each wait out of another piece to its collective.

    A captured collective whose wait is in another graph would be waited for by an event
    of the wrong capture.
    """
    part, part_of = 0, {}
    for node in list(gm.graph.nodes):
        part += node.name in eager
        part_of[node] = part
        source = first_node(node)
        if source is None:
            continue
        cut_off = calls(node, c10d.wait_tensor.default) and part_of[source] != part
        if calls(node, operator.getitem) or (cut_off and source.name not in eager):
            source.append(node)
            part_of[node] = part_of[source]


def _runs(gm: GraphModule, eager: Collection[str]) -> list[tuple[bool, list[Node]]]:
    """Maximal runs of nodes that are all eager or all not."""
    island: set[Node] = set()
    runs: list[tuple[bool, list[Node]]] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        follows = calls(node, operator.getitem, c10d.wait_tensor.default) and node.args[0] in island
        if node.name in eager or follows:
            island.add(node)
        if not runs or runs[-1][0] != (node in island):
            runs.append((node in island, []))
        runs[-1][1].append(node)
    merged: list[tuple[bool, list[Node]]] = []
    several = len(runs) > 1
    for is_island, nodes in runs:
        is_island = is_island or (several and not any(map(_launches, nodes)))
        if merged and merged[-1][0] == is_island:
            merged[-1][1].extend(nodes)
        else:
            merged.append((is_island, nodes))
    return merged


def _launches(node: Node) -> bool:
    if node.op == "get_attr" or isinstance(node.meta.get("val"), torch.SymInt | int):
        return False
    return not calls(node, *_NO_KERNEL)
