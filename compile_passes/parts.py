"""Parts: where the graph is cut.

Rules of the cut:

- original order is kept; torch's default would reorder side effects silently;
- consecutive eager ops share an island, and a ``getitem`` stays with its producer;
- a run of nodes that launches no kernel (views, sizes) joins the island beside it,
  because a graph of nothing is not worth a replay;
- an attribute of the graph is no node of a part: whoever reads it is given it, as an input is;
- one op is one node, so a protocol of several launches is never cut in two.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..runtime.errors import RefusedError
from .aliases import viewed
from .functional import is_write_back
from .given import check_each, check_graph
from .judge import Decision, Verdict
from .roles import aten, c10d, calls, first_node
from .waits import keep_waits

#: Memory without values: nothing is launched for it.
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.empty_permuted.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


@dataclass(frozen=True)
class GraphPart:
    """A run of nodes that becomes one piece, or an ``island`` that runs eagerly because of ``ops``."""

    island: bool
    nodes: tuple[Node, ...]
    ops: tuple[str, ...] = ()


def part_name(index: int) -> str:
    """What the module of a part is called in the split graph."""
    return f"submod_{index}"


def cut(gm: GraphModule, verdicts: Sequence[Verdict]) -> tuple[GraphPart, ...]:
    """Where the verdicts cut the graph. Moves a ``getitem`` to its producer, and a wait to its collective.

    Raises :class:`RefusedError` for an op that is refused and that the reference cannot carry out instead.
    """
    check_graph(gm, "cut")
    check_each(verdicts, Verdict, "cut", "judge(gm, ...)")
    eager = _eager(verdicts)
    _gather(gm, eager)
    return _parts(gm, eager)


def foreseen(gm: GraphModule, verdicts: Sequence[Verdict]) -> tuple[GraphPart, ...]:
    """The parts that :func:`cut` would make, but for what it would move: the graph stays as it is.

    Raises what :func:`cut` raises.
    """
    return _parts(gm, _eager(verdicts))


def _eager(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """The ops that run between pieces, by the names of their nodes."""
    for verdict in verdicts:
        if verdict.decision is Decision.REFUSE and not verdict.op.startswith("ringfence::"):
            raise RefusedError(f"'{verdict.node}' ({verdict.op}) is refused: {verdict.message} ({verdict.source})")
    # A refused site falls back to the reference collective, of which nothing is known under capture here.
    return {v.node: v.op for v in verdicts if v.decision is not Decision.IN_GRAPH}


def _parts(gm: GraphModule, eager: Mapping[str, str]) -> tuple[GraphPart, ...]:
    return tuple(
        GraphPart(island, tuple(nodes), tuple(dict.fromkeys(eager[n.name] for n in nodes if n.name in eager)))
        for island, nodes in _runs(gm, eager)
    )


def _gather(gm: GraphModule, eager: Collection[str]) -> None:
    """Move each ``getitem`` to its producer, and each wait out of another part to its collective."""
    for node in list(gm.graph.nodes):
        source = first_node(node)
        if source is not None and calls(node, operator.getitem):
            source.append(node)
    keep_waits(gm, eager)


def _runs(gm: GraphModule, eager: Collection[str]) -> list[tuple[bool, list[Node]]]:
    """Maximal runs of nodes that are all eager or all not."""
    island: set[Node] = set()
    runs: list[tuple[bool, list[Node]]] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
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
    if isinstance(node.meta.get("val"), torch.SymInt | int):
        return False
    return viewed(node) is None and not calls(node, operator.getitem, *_EMPTY) and not is_write_back(node)
