"""What the sizes of a call mean: token count, and which dimensions padding may grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import GraphModule, Node

from ..runtime.replay.program import Padding, SizeRule
from .devices import device_of
from .functional import written_inputs
from .given import check_each, check_graph
from .match import Candidate
from .moe_calls import is_dispatch
from .op_calls import op_arguments
from .returned_numbers import read_symbols
from .roles import first_node, is_tensor, tensor


def size_rule(gm: GraphModule, candidates: Sequence[Candidate], static_inputs: frozenset[int]) -> SizeRule:
    """Read before :func:`fuse`, while the all-reduces are in the graph.

    The token count is the number of rows of the first all-reduce that is to be fused, else the tokens of the first MoE
    dispatch, else the rows of the first all-reduce; in a graph without any, the leading dimension of the first input
    that is no parameter, and rather of one that the graph does not write into. Only sizes that the arguments tell
    count: without one, ``tokens`` is None and nothing can be captured by size. A size that nothing in the graph depends
    on is none.
    """
    check_graph(gm, "size_rule")
    candidates = check_each(candidates, Candidate, "size_rule", "find(gm)")
    placeholders = gm.graph.find_nodes(op="placeholder")
    symbols: dict[sympy.Symbol, tuple[int, int | None]] = {}
    read = read_symbols(gm)
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            _bind(symbols, value, (i, None))
        elif isinstance(value, torch.Tensor):
            for d, dim in enumerate(value.shape):
                _bind(symbols, dim, (i, d))
    symbols = {symbol: where for symbol, where in symbols.items() if symbol in read}
    for rows, leading in _row_counts(gm, candidates, placeholders, static_inputs):
        expression = rows.node.expr if isinstance(rows, torch.SymInt) else sympy.Integer(rows)
        if expression.free_symbols <= symbols.keys():
            return SizeRule(tuple(symbols.values()), _count(expression, tuple(symbols)), leading=leading)
    return SizeRule(tuple(symbols.values()), None)


def _count(expression: sympy.Expr, symbols: Sequence[sympy.Symbol]) -> Callable[[tuple[int, ...]], int]:
    def tokens(sizes: tuple[int, ...]) -> int:
        return int(expression.xreplace(dict(zip(symbols, map(sympy.Integer, sizes), strict=True))))

    return tokens


def _bind(symbols: dict[sympy.Symbol, tuple[int, int | None]], dim: object, where: tuple[int, int | None]) -> None:
    if isinstance(dim, torch.SymInt) and isinstance(dim.node.expr, sympy.Symbol):
        symbols.setdefault(dim.node.expr, where)


def _row_counts(
    gm: GraphModule, candidates: Sequence[Candidate], placeholders: Sequence[Node], static_inputs: frozenset[int]
) -> Iterator[tuple[int | torch.SymInt, int | None]]:
    """What may be the token count, the best first, with the input whose first dimension it is."""
    by_name = {n.name: n for n in gm.graph.nodes}
    matched = [c.match.all_reduce.value for c in candidates if c.match is not None]
    called = [first_node(by_name[c.site.node]) for c in candidates if c.called]
    matched += [node for node in called if node is not None]
    dispatched = [op_arguments(n)["topk_ids"] for n in gm.graph.nodes if is_dispatch(n)]
    others = [by_name[c.site.node] for c in candidates if not c.fuses]
    for node in (*matched, *dispatched, *others):
        if is_tensor(node) and tensor(node).ndim > 1:
            yield math.prod(tensor(node).shape[:-1]), None
    inputs = [i for i, n in enumerate(placeholders) if i not in static_inputs and is_tensor(n) and tensor(n).ndim]
    device, written = device_of(gm), written_inputs(gm)
    # Lengths on the CPU may come first, and so may a cache.
    for i in sorted(inputs, key=lambda i: (tensor(placeholders[i]).device != device, i in written)):
        yield tensor(placeholders[i]).shape[0], i


def padding(gm: GraphModule, rule: SizeRule, written: Collection[int] = ()) -> Padding | None:
    """Which dimensions to pad, or None when the graph cannot be padded.

    Padding needs exactly one size symbol, and every dynamic dimension of an input or
    an output to be that symbol itself: of a dimension like ``2 * s`` nobody knows which
    rows are the caller's. A graph that writes into an input (``written``), such as a cache, is not padded:
    the padded rows would be written too, at the position that zero stands for.
    """
    if len(rule.bindings) != 1 or written:
        return None
    (output,) = gm.graph.find_nodes(op="output")
    outputs = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    inputs = {i: _dynamic_dims(n) for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    returned = {i: _dynamic_dims(n) for i, n in enumerate(outputs) if isinstance(n, Node)}
    if any(isinstance(n, Node) and not is_tensor(n) for n in outputs):
        return None  # a size is returned as a number; the caller would get the padded one
    if None in inputs.values() or None in returned.values():
        return None
    return Padding({i: d for i, d in inputs.items() if d}, {i: d for i, d in returned.items() if d})


def _dynamic_dims(node: Node) -> tuple[int, ...] | None:
    """Dimensions that are a size symbol; None when one is an expression of it."""
    if not is_tensor(node):
        return ()
    shape: tuple[Any, ...] = tuple(tensor(node).shape)
    dims = [(d, n.node.expr) for d, n in enumerate(shape) if isinstance(n, torch.SymInt)]
    if any(not isinstance(expr, sympy.Symbol) and not expr.is_number for _, expr in dims):
        return None
    return tuple(d for d, expr in dims if isinstance(expr, sympy.Symbol))
