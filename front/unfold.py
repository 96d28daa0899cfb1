"""Unfold: what was found in a few layers, said of all that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch.fx import Graph, GraphModule, Node

from .compile_passes.fuse import SITE
from .compile_passes.judge import Verdict
from .compile_passes.match import Site
from .compile_passes.moe_sites import MoeSite
from .compile_passes.provenance import module_of
from .compile_passes.split import Piece, SplitPlan
from .layers import Folding

T = TypeVar("T")
S = TypeVar("S", Site, MoeSite)

_NO_OPS = ("placeholder", "output", "get_attr")


@dataclass(frozen=True)
class Copied:
    """One of several that come of a thing of the traced graph. copy: None is what was traced itself.

    copy: (which cut, number of the block in it), from 0. shift: by how many layers it stands further down than its
    original.
    """

    copy: tuple[int, int] | None
    shift: int


_ITSELF = Copied(None, 0)


@dataclass(frozen=True)
class _Stretch:
    """Nodes of one piece in one layer, by its place among the traced ones. begins: they are the first of the piece."""

    piece: Piece
    begins: bool
    place: int
    nodes: int
    sites: tuple[int, ...]


class Unfolding:
    """How the traced graph becomes the whole one: blocks before each cut are repeated."""

    def __init__(self, folding: Folding) -> None:
        self._folding = folding
        self._layer = re.compile(rf"^{re.escape(folding.path)}\.(\d+)(?=\.|$)")

    def place_of(self, path: str | None) -> int | None:
        """The traced layer that a module's path is in."""
        found = self._layer.match(path) if path is not None else None
        return int(found[1]) if found else None

    def repeated(self, things: Iterable[tuple[T, int]]) -> list[tuple[T, Copied]]:
        """Things with the traced layer of each, in order, with those of the layers that were left out."""
        rest, result = list(things), []
        for number, cut in enumerate(self._folding.cuts):
            seam = sum(layer < cut.first for layer in self._folding.kept)
            before = [thing for thing in rest if thing[1] < seam]
            rest = [thing for thing in rest if thing[1] >= seam]
            block = [thing for thing, place in before if seam - cut.period <= place]
            result += [(thing, _ITSELF) for thing, _ in before]
            for i in range(cut.count // cut.period):
                result += [(thing, Copied((number, i), (i + 1) * cut.period)) for thing in block]
        return result + [(thing, _ITSELF) for thing, _ in rest]

    def sites(self, sites: Sequence[Site]) -> tuple[list[Site], Callable[[int, Copied], int]]:
        """All sites, with the paths of the whole model, and the new index of a traced site in a copy."""
        every = self.repeated(self._placed(sites))
        index = {(site.index, copied.copy): i for i, (site, copied) in enumerate(every)}

        def of(traced: int, copied: Copied) -> int:
            return index[traced, copied.copy]

        return [
            replace(
                site,
                index=of(site.index, copied),
                module=self._renamed(site.module, copied),
                merged_into=of(site.merged_into, copied) if site.merged_into is not None else None,
            )
            for site, copied in every
        ], of

    def moe_sites(self, sites: Sequence[MoeSite]) -> list[MoeSite]:
        """The same of MoE sites, which have numbers of their own."""
        every = self.repeated(self._placed(sites))
        return [replace(s, index=i, module=self._renamed(s.module, copied)) for i, (s, copied) in enumerate(every)]

    def _placed(self, sites: Sequence[S]) -> list[tuple[S, int]]:
        """With the traced layer of each: that of its module, or of the site before."""
        place, placed = -1, []
        for site in sites:
            own = self.place_of(site.module)
            place = max(place, own) if own is not None else place
            placed.append((site, place))
        return placed

    def _renamed(self, path: str | None, copied: Copied) -> str | None:
        place = self.place_of(path)
        if path is None or place is None:
            return path
        layer = self._folding.kept[place] + copied.shift
        return self._layer.sub(f"{self._folding.path}.{layer}", path)

    def verdicts(
        self, verdicts: Sequence[Verdict], places: dict[str, int], index: Callable[[int, Copied], int]
    ) -> list[Verdict]:
        """places: the traced layer of each node of the graph that was judged."""
        every = self.repeated([(verdict, places[verdict.node]) for verdict in verdicts])
        return [replace(v, site=index(v.site, c)) if v.site is not None else v for v, c in every]

    def places(self, graph: Iterable[Node]) -> dict[str, int]:
        """The traced layer of each node: that of its module, or of the node before; -1 is in front of all."""
        place, found = -1, {}
        for node in graph:
            own = self.place_of(module_of(node))
            place = max(place, own) if own is not None else place
            found[node.name] = place
        return found

    def plan(self, plan: SplitPlan, whole: GraphModule, index: Callable[[int, Copied], int]) -> SplitPlan:
        """The pieces of the whole model. whole: the graph after its split."""
        pieces: list[Piece] = []
        stretches = [(stretch, stretch.place) for stretch in self._of_parts(plan, whole)]
        for stretch, copied in self.repeated(stretches):
            sites = tuple(index(site, copied) for site in stretch.sites)
            if stretch.begins or not pieces:
                number = len(pieces)
                pieces.append(replace(stretch.piece, index=number, name=f"submod_{number}", nodes=0, sites=()))
            last = pieces[-1]
            pieces[-1] = replace(last, nodes=last.nodes + stretch.nodes, sites=(*last.sites, *sites))
        return SplitPlan(tuple(pieces))

    def _of_parts(self, plan: SplitPlan, whole: GraphModule) -> list[_Stretch]:
        found: list[_Stretch] = []
        place = -1
        for piece in plan.pieces:
            began = False
            for node in _graph(whole, piece).nodes:
                if node.op in _NO_OPS:
                    continue
                own = self.place_of(module_of(node))
                place = max(place, own) if own is not None else place
                sites = (node.meta[SITE],) if SITE in node.meta else ()
                last = found[-1] if began else None
                if last is not None and last.place == place:
                    found[-1] = replace(last, nodes=last.nodes + 1, sites=last.sites + sites)
                else:
                    found.append(_Stretch(piece, not began, place, 1, sites))
                began = True
        return found


def _graph(whole: GraphModule, piece: Piece) -> Graph:
    part = whole.get_submodule(piece.name)
    assert isinstance(part, GraphModule)
    return part.graph
