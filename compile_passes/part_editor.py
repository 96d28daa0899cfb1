"""Edit a graph whose nodes belong to parts: each new node belongs to one, and reads what that part can see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .aliases import fake_call, viewed
from .op_calls import op_names
from .parts import GraphPart


class PartEditor:
    """Keeps the place of each node, and what stands for a value of another part.

    home: where a value lies, if not in memory of its own. saved: what a reader takes instead of something that is
    overwritten before it reads. Nodes are inserted before an *anchor*, or at the end of a part where that is None.
    """

    def __init__(self, graph: Graph, parts: Sequence[GraphPart]) -> None:
        self.graph = graph
        self.parts = list(parts)
        self.place = {node: i for i, part in enumerate(parts) for node in part.nodes}
        self.home: dict[Node, Node] = {}
        self.saved: dict[tuple[Node, Node], Node] = {}
        #: Nodes that are not part of the piece they were made for, which is their number here, but follow it.
        self._tails: dict[Node, int] = {}
        self._last = {i: part.nodes[-1] for i, part in enumerate(parts)}
        #: Views taken anew, by part and the view that they are.
        self._taken: dict[tuple[int, Node], Node] = {}
        #: Views of another value than they were traced with.
        self._moved: set[Node] = set()

    def localise(self, node: Node, p: int) -> None:
        moved = False
        for argument in node.all_input_nodes:
            local = self.local(argument, node, p)
            if local is not argument:
                node.replace_input_with(argument, local)
            moved = moved or local is not argument or local in self._moved
        if moved and viewed(node) is not None:  # passes tell aliases by the storage of fake tensors
            node.meta["val"] = fake_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
            self._moved.add(node)

    def local(self, value: Node, reader: Node | None, p: int) -> Node:
        """What a reader in part ``p`` takes for ``value``."""
        if reader is not None and (reader, value) in self.saved:
            return self.saved[reader, value]
        if value in self.home:
            return self.home[value]
        source = viewed(value)
        if source is None or self.place.get(value) == p:
            return value
        if (p, value) not in self._taken:
            anchor = reader if reader is not None and self.place.get(reader) == p else None
            of = {a: self.local(a, reader, p) for a in value.all_input_nodes}
            with self._inserting(anchor, p):
                copy = self.graph.node_copy(value, lambda n: of[n])
            copy.meta = dict(value.meta)
            copy.meta["val"] = fake_call(copy.target, copy.args, copy.kwargs)  # type: ignore[arg-type]
            self._moved.add(copy)
            self.put(copy, anchor, p)
            self._taken[p, value] = copy
        return self._taken[p, value]

    def local_at(self, value: Node, anchor: Node | None, p: int) -> Node:
        """A value as it is at ``anchor``: views are taken there."""
        if value in self.home:
            return self.home[value]
        source = viewed(value)
        if source is None or (self.place.get(value) == p and (anchor is None or value < anchor)):
            return value
        of = {a: self.local_at(a, anchor, p) for a in value.all_input_nodes}
        args, kwargs = map_arg((value.args, value.kwargs), lambda n: of[n])
        return self.new(anchor, p, value.target, args, kwargs)  # type: ignore[arg-type]

    def new(
        self,
        anchor: Node | None,
        p: int,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Any = None,
        like: Node | None = None,
    ) -> Node:
        with self._inserting(anchor, p):
            node = self.graph.call_function(target, args, kwargs or {})
        if like is not None:
            node.meta = {k: v for k, v in like.meta.items() if k != "val"}
        if not (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable):
            node.meta["val"] = fake_call(target, args, kwargs or {})
        self.put(node, anchor, p)
        return node

    def put(self, node: Node, anchor: Node | None, p: int) -> None:
        self.place[node] = p
        if anchor is None:
            self._last[p] = node

    def _inserting(self, anchor: Node | None, p: int) -> Any:
        """Before a node, or else at the end of a part."""
        return self.graph.inserting_before(anchor) if anchor is not None else self.graph.inserting_after(self._last[p])

    def leave_to_an_island(self, node: Node) -> None:
        """Take a node out of its part: it runs behind that, eagerly."""
        self._tails[node] = self.place.pop(node)

    def regrouped(self) -> tuple[GraphPart, ...]:
        """The parts anew, in the order of the graph. One without nodes is gone."""
        nodes: dict[int, list[Node]] = {i: [] for i in range(len(self.parts))}
        after: dict[int, list[Node]] = {i: [] for i in range(len(self.parts))}
        for node in self.graph.nodes:
            if node in self._tails:
                after[self._tails[node]].append(node)
            elif node in self.place:
                nodes[self.place[node]].append(node)
        parts = []
        for i, part in enumerate(self.parts):
            parts.append(GraphPart(part.island, tuple(nodes[i]), part.ops))
            parts.append(GraphPart(True, tuple(after[i]), tuple(dict.fromkeys(op_names(n)[0] for n in after[i]))))
        return tuple(part for part in parts if part.nodes)
