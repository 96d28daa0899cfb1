"""Symbols: every size that a part's inputs depend on reaches it as an integer of its own.

Inductor binds a size to an input that is that size, and its cache looks a piece's guards up by the integers among
the inputs. A dimension such as ``past + 1``, or a sum of two sizes, tells neither: the piece would not compile, or a
second start could not look it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .parts import GraphPart
from .roles import aten

_OP = "aten::sym_size"

#: Size symbols, and the nodes that are them.
Providers = Mapping[sympy.Symbol, Node]


def expression(value: Any) -> sympy.Expr:
    """What an integer of a trace is, in the symbols that hold now: one that was replaced is gone."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def providers(gm: GraphModule) -> dict[sympy.Symbol, Node]:
    """The first node that is a size symbol itself."""
    found: dict[sympy.Symbol, Node] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(expression(value), sympy.Symbol):
            found.setdefault(expression(value), node)
    return found


def as_node(graph: Graph, wanted: sympy.Expr, known: Providers) -> Any:
    """A node, or a number, for an expression of symbols; inserted where the graph inserts."""
    if wanted.is_Integer:
        return int(wanted)
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)  # one for all: a minimum of two sizes asks for it
    proxies = {symbol: torch.fx.Proxy(known[symbol], tracer) for symbol in wanted.free_symbols}
    result = sympy_interp(PythonReferenceAnalysis, proxies, wanted)
    for node in graph.nodes:
        if node not in before:
            values = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*values[0], **values[1])
    return result.node


def give_sizes(gm: GraphModule, parts: Sequence[GraphPart]) -> tuple[GraphPart, ...]:
    """Pass to every piece the sizes that its inputs depend on; a part that asks an input for one may go first."""
    known = providers(gm)
    place = {node: i for i, part in enumerate(parts) for node in part.nodes}
    nodes = [list(part.nodes) for part in parts]
    first: list[Node] = []
    for i, part in enumerate(parts):
        if part.island:
            continue
        inputs = dict.fromkeys(a for n in part.nodes for a in n.all_input_nodes if place.get(a) != i)
        needed = sorted({s for a in inputs for s in symbols_of(a)}, key=str)
        for symbol in needed:
            if symbol not in known:
                _measure(gm, symbol, inputs, known, place, nodes, first)
        wanted = [known[s] for s in needed if s in known and place.get(known[s]) != i]
        if wanted:
            with gm.graph.inserting_before(nodes[i][0]):
                nodes[i].insert(0, gm.graph.call_function(_sizes, tuple(wanted)))
    done = [GraphPart(p.island, tuple(n), p.ops) for p, n in zip(parts, nodes, strict=True)]
    return (GraphPart(True, tuple(first), (_OP,)), *done) if first else tuple(done)


def forget_sizes(part: GraphModule) -> None:
    """Take what :func:`give_sizes` put into a part's graph out again: its inputs stay. Its code is made later."""
    for node in part.graph.find_nodes(op="call_function", target=_sizes):
        part.graph.erase_node(node)


def _sizes(*sizes: int) -> None:
    """Stands in a part for the sizes that it is given."""


def _measure(
    gm: GraphModule,
    symbol: sympy.Symbol,
    inputs: Mapping[Node, None],
    known: dict[sympy.Symbol, Node],
    place: dict[Node, int],
    nodes: list[list[Node]],
    first: list[Node],
) -> None:
    """Ask a tensor for a size that no node is. One that an input hides is asked for before anything else runs."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for tensor_node in (*placeholders, *inputs):
        value = tensor_node.meta.get("val")
        for d, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if expression(size) != symbol:
                continue
            given = tensor_node.op == "placeholder"
            with gm.graph.inserting_after(placeholders[-1] if given else tensor_node):
                node = gm.graph.call_function(aten.sym_size.int, (tensor_node, d))
            node.meta["val"] = size
            known[symbol] = node
            if given:
                first.append(node)
            else:
                place[node] = place[tensor_node]
                nodes[place[node]].insert(nodes[place[node]].index(tensor_node) + 1, node)
            return


def symbols_of(node: Node) -> set[sympy.Symbol]:
    """The size symbols that a value's layout depends on, or an integer."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        numbers = [*value.shape, *value.stride(), value.storage_offset()]
        return {s for n in numbers for s in expression(n).free_symbols}
    return set(expression(value).free_symbols) if isinstance(value, torch.SymInt) else set()
