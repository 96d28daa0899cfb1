"""Split: each part of the graph becomes a module of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule
from torch.fx.passes.split_module import split_module

from .fuse import SITE
from .given import check_each, check_graph
from .parts import GraphPart


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
            name=f"submod_{i}",
            island=part.island,
            ops=part.ops,
            nodes=len(part.nodes),
            sites=tuple(n.meta[SITE] for n in part.nodes if SITE in n.meta),
        )
        for i, part in enumerate(parts)
    )
    return SplitPlan(pieces), split_module(gm, gm, lambda n: index_of[n], keep_original_order=True)
