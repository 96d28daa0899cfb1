"""Split: each part of the graph becomes a module of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.graph_module import _assign_attr
from torch.fx.node import map_arg
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_flatten, tree_unflatten

from .fuse import SITE
from .given import check_each, check_graph
from .parts import GraphPart, part_name


@dataclass(frozen=True)
class Piece:
    """One part of the split graph, in the order of execution.

    ``name`` is the submodule's; ``island`` says that it runs eagerly, because of
    ``ops``; ``nodes`` counts its operations; ``sites`` are the fused sites in it. ``op_by_op``: why it runs as it is
    where Inductor compiles the others, or when it does.
    """

    index: int
    name: str
    island: bool
    ops: tuple[str, ...]
    nodes: int
    sites: tuple[int, ...]
    op_by_op: str | None = None


@dataclass(frozen=True)
class SplitPlan:
    """The pieces and islands of a graph, in the order of execution."""

    pieces: tuple[Piece, ...]


def split(gm: GraphModule, parts: Sequence[GraphPart]) -> tuple[SplitPlan, GraphModule]:
    """The plan, and a module that calls ``submod_0``, ``submod_1``, ... in its order.

    ``parts`` are those of :func:`~.parts.cut`, as :func:`~.in_place.write_in_place` left them.
    """
    check_graph(gm, "split")
    check_each(parts, GraphPart, "split", "cut(gm, verdicts)")
    index_of = {node: i for i, part in enumerate(parts) for node in part.nodes}
    pieces = tuple(
        Piece(
            index=i,
            name=part_name(i),
            island=part.island,
            ops=part.ops,
            nodes=len(part.nodes),
            sites=tuple(n.meta[SITE] for n in part.nodes if SITE in n.meta),
        )
        for i, part in enumerate(parts)
    )
    return SplitPlan(pieces), _split(gm, index_of)


def _split(gm: GraphModule, index_of: Mapping[Node, int]) -> GraphModule:
    """``split_module``, which knows only the attributes that some part reads: the others are returned beside it."""
    (output,) = gm.graph.find_nodes(op="output")
    returned = output.args
    unread = [n for n in output.all_input_nodes if n.op == "get_attr" and len(n.users) == 1]
    output.args = map_arg(returned, lambda n: None if n in unread else n)
    try:
        with _use_lazy_graph_module(True):  # code of a piece is written by whoever runs it, once
            whole = split_module(gm, gm, index_of.__getitem__, keep_original_order=True)
    finally:
        output.args = returned
    if unread:
        _return_attributes(gm, whole, returned, unread)
    return whole


def _return_attributes(
    gm: GraphModule, whole: GraphModule, returned: tuple[object, ...], attributes: Sequence[Node]
) -> None:
    """Let ``whole`` return what ``returned`` has of the attributes, where it returns None now."""
    (output,) = whole.graph.find_nodes(op="output")
    made: dict[Node, Node] = {}
    for node in attributes:
        _assign_attr(attrgetter(str(node.target))(gm), whole, str(node.target))
        with whole.graph.inserting_before(output):
            made[node] = whole.graph.create_node("get_attr", node.target)  # Graph.get_attr would warn
        made[node].meta = dict(node.meta)
    values, structure = tree_flatten(returned)
    now, _ = tree_flatten(output.args)
    output.args = tree_unflatten([made.get(v, n) for v, n in zip(values, now, strict=True)], structure)
    whole.recompile()
