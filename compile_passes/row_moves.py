"""Row moves: what ops make of rows that view them, move them, sum within them or multiply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from .roles import as_number, aten, bound_arguments, calls, is_tensor, prims, same_size, tensor
from .rows import WHOLE, WITH_ROWS, NotRowWise, RowReading, TokenRows, alike, unit
from .rows import Arrangement as A

_COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step, prims.iota.default)


def _view(reading: RowReading, node: Node) -> TokenRows:
    source, rows = reading.source(node)
    old, new = tensor(source).shape, tensor(node).shape
    if rows.arrangement not in WITH_ROWS:
        return _same_rows(reading, node, source, rows)
    pairs = reading.tokens * reading.choices
    by_choice = rows.arrangement is A.TOKENS and len(old) > 1 and same_size(old[1], reading.choices)
    if by_choice and new and same_size(new[0], pairs) and alike(old[2:], unit(new[1:])):
        return TokenRows(A.CHOICES, table=rows.table, zero=rows.zero)
    by_token = len(new) > 1 and same_size(new[0], reading.tokens) and same_size(new[1], reading.choices)
    if rows.arrangement is A.CHOICES and by_token and alike(unit(old[1:]), new[2:]):
        return TokenRows(A.TOKENS, table=rows.table, zero=rows.zero)
    return _same_rows(reading, node, source, rows)


def _same_rows(reading: RowReading, node: Node, source: Node, rows: TokenRows) -> TokenRows:
    """A view that leaves the rows where they are; what is known by choice stays, if these do."""
    old, new = tensor(source).shape, tensor(node).shape
    if not old or not new or not same_size(old[0], new[0]):
        raise NotRowWise(node, "takes rows apart")
    per_row = rows.arrangement is A.TOKENS
    if per_row and rows.silent is not None and alike(unit(old), unit(new)):
        return rows
    keeps = alike(unit(old[1:]), unit(new[1:])) and (
        not per_row or (len(old) > 1 and len(new) > 1 and same_size(old[1], new[1]))
    )
    return replace(rows, silent=None) if keeps else rows.plain()


def _copy(reading: RowReading, node: Node) -> TokenRows:
    return reading.source(node)[1]


def _expand(reading: RowReading, node: Node) -> TokenRows:
    source, rows = reading.source(node)
    if len(tensor(source).shape) != tensor(node).ndim:
        raise NotRowWise(node, "adds a dimension in front of the rows")
    return _same_rows(reading, node, source, rows)


def _turned(reading: RowReading, node: Node) -> TokenRows:
    """permute, transpose: the rows stay in front."""
    _, rows = reading.source(node)
    dims = bound_arguments(node)
    n = tensor(node).ndim
    moved = dims.get("dims") or [dims.get("dim0"), dims.get("dim1")]
    stays = moved[0] % n == 0 if "dims" in dims else all(d is not None and d % n for d in moved)
    if not stays or rows.arrangement not in WITH_ROWS:
        raise NotRowWise(node, "moves the rows from the first dimension")
    return rows.plain()


def _along_columns(reading: RowReading, node: Node) -> TokenRows:
    """An op with an argument ``dim`` that is not the rows'."""
    source, rows = reading.source(node)
    dim = bound_arguments(node).get("dim", 0)
    if not isinstance(dim, int) or dim % tensor(source).ndim == 0 or rows.arrangement not in WITH_ROWS:
        raise NotRowWise(node, "works along the rows")
    return rows.plain()


def _cat(reading: RowReading, node: Node) -> TokenRows:
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if dim % tensor(node).ndim == 0:
        raise NotRowWise(node, "puts rows behind rows")
    return _together(reading, node, [n for n in parts if isinstance(n, Node)])


def _together(reading: RowReading, node: Node, values: list[Node]) -> TokenRows:
    rows = [reading.known.get(n) for n in values]
    first = next(r for r in rows if r is not None)
    alike = all(r is not None and (r.arrangement, r.order) == (first.arrangement, first.order) for r in rows)
    if not alike or first.arrangement not in WITH_ROWS:
        raise NotRowWise(node, "puts rows of different orders together")
    return first.plain()


def _reduced(reading: RowReading, node: Node) -> TokenRows:
    source, rows = reading.source(node)
    given = bound_arguments(node)
    dims, ndim = given.get("dim"), tensor(source).ndim
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or any(d % ndim == 0 for d in dims) or rows.arrangement not in WITH_ROWS:
        raise NotRowWise(node, "reduces over the rows")
    choices = rows.arrangement is A.TOKENS and [d % ndim for d in dims] == [1]
    summed = calls(node, aten.sum.dim_IntList) and choices and same_size(tensor(source).shape[1], reading.choices)
    return replace(rows.plain(), silent=rows.zero if summed else None)


def _matmul(reading: RowReading, node: Node) -> TokenRows:
    """A row times a matrix that all rows share."""
    *bias, left, right = _operands(node)
    rows = reading.known.get(left)
    if rows is None or rows.arrangement not in WITH_ROWS or right in reading.known or tensor(left).ndim != 2:
        raise NotRowWise(node, "multiplies something else than rows by one matrix")
    if any(b in reading.known or tensor(b).ndim > 1 for b in bias):
        raise NotRowWise(node, "adds a matrix of all rows")
    by_choice = rows.arrangement in (A.CHOICES, A.SORTED)  # the columns of a token are choices, and this mixes them
    return replace(rows.plain(), zero=rows.zero if by_choice and not bias else None)


def _batched(reading: RowReading, node: Node) -> TokenRows:
    return _together(reading, node, _operands(node))


def _operands(node: Node) -> list[Node]:
    return [a for a in node.args if is_tensor(a)]


def _grouped(reading: RowReading, node: Node) -> TokenRows:
    """Rows in the order of their experts, each by its expert's matrix."""
    given = bound_arguments(node)
    left, right, offsets = node.args[0], node.args[1], given.get("offs")
    rows = reading.known.get(left) if isinstance(left, Node) else None
    counts = reading.known.get(offsets) if isinstance(offsets, Node) else None
    if rows is None or counts is None or right in reading.known or given.get("bias") is not None:
        raise NotRowWise(node, "is no product of rows in the order of their experts")
    if rows.arrangement is not A.SORTED or counts.arrangement is not A.COUNTS or rows.order is not counts.order:
        raise NotRowWise(node, "goes by the counts of another order")
    if counts.zero is None:  # its counts, and not yet their sums
        raise NotRowWise(node, "goes by counts, and not by their sums")
    return rows.plain()


def _sort(reading: RowReading, node: Node) -> TokenRows:
    source, rows = reading.source(node)
    given = bound_arguments(node)
    if rows.arrangement is A.ORDER and tensor(source).ndim == 1:
        return TokenRows(A.INVERSE, rows.order)
    ascending = not given.get("descending")
    if rows.arrangement is not A.CHOICES or rows.table is None or tensor(source).ndim != 1 or not ascending:
        raise NotRowWise(node, "sorts something else than the choices, by their experts")
    return TokenRows(A.SORTED, node, rows.table)


def _argsort(reading: RowReading, node: Node) -> TokenRows:
    rows = _sort(reading, node)
    return rows if rows.arrangement is A.INVERSE else TokenRows(A.ORDER, node)


def _histogram(reading: RowReading, node: Node) -> TokenRows:
    """How many choices each group has: its number is what the choices are sorted by, those of none here the last."""
    _, rows = reading.source(node)
    given = bound_arguments(node)
    bins = given.get("bins")
    key = _sorted_by(reading, rows)
    if key is None or rows.table is None or not torch.equal(rows.table.double(), key):
        raise NotRowWise(node, "counts something else than what the choices are sorted by")
    if float(key.min()) < 0 or not torch.equal(key, key.floor()):
        raise NotRowWise(node, "counts values that are no numbers of groups")
    if not isinstance(bins, int) or given.get("min") != 0 or given.get("max") != bins - 1:
        raise NotRowWise(node, "counts into bins that are not one expert each")
    return TokenRows(A.COUNTS, rows.order)


def _sorted_by(reading: RowReading, rows: TokenRows) -> torch.Tensor | None:
    """By expert, the key of the sort whose order rows are in; None where they are in none."""
    if rows.arrangement is not A.SORTED or rows.order is None:
        return None
    key = reading.known[rows.order.args[0]].table  # type: ignore[index]
    return key.double() if key is not None else None


def _cumulated(reading: RowReading, node: Node) -> TokenRows:
    _, rows = reading.source(node)
    if rows.arrangement is A.COUNTS and tensor(node).dtype not in WHOLE:
        raise NotRowWise(node, "sums counts in a dtype that does not hold them")
    if rows.arrangement is A.COUNTS and rows.zero is None:
        return replace(rows, zero=torch.zeros(0))  # sums of counts from now on
    return _along_columns(reading, node)


def _indexed(reading: RowReading, node: Node) -> TokenRows:
    indices: Any = node.args[1]
    if not isinstance(indices, list | tuple) or len(indices) != 1 or not isinstance(indices[0], Node):
        raise NotRowWise(node, "takes values from several places at once")
    return _taken(reading, node, node.args[0], indices[0])


def _selected(reading: RowReading, node: Node) -> TokenRows:
    if node.args[1] != 0:
        return _along_columns(reading, node)
    return _taken(reading, node, node.args[0], node.args[2])


def _looked_up(reading: RowReading, node: Node) -> TokenRows:
    return _taken(reading, node, node.args[0], node.args[1])


def _taken(reading: RowReading, node: Node, of: Any, at: Any) -> TokenRows:
    """``of[at]``: a row for each index."""
    rows, index = reading.known.get(of), reading.known.get(at)
    if index is None:
        raise NotRowWise(node, "takes rows by their place")
    if rows is None:  # of what all rows share, as the matrices of the experts
        if index.arrangement not in WITH_ROWS:
            raise NotRowWise(node, "takes values by the place of a row")
        return index.plain()
    moves = (rows.arrangement, index.arrangement)
    if moves == (A.TOKENS, A.ORDER_TOKEN):
        return TokenRows(A.SORTED, index.order)
    if moves == (A.CHOICES, A.ORDER):
        return TokenRows(A.SORTED, index.order, rows.table, rows.zero)
    if moves == (A.SORTED, A.INVERSE) and rows.order is index.order:
        return TokenRows(A.CHOICES, None, rows.table, rows.zero)
    raise NotRowWise(node, "takes rows in an order that is not known")


def _inverted(reading: RowReading, node: Node) -> TokenRows:
    """``empty[order] = arange``: the way back from a sort."""
    into, indices, values = node.args[0], node.args[1], node.args[2]
    index = reading.known.get(indices[0]) if isinstance(indices, list | tuple) and len(indices) == 1 else None  # type: ignore[arg-type]
    if index is None or index.arrangement is not A.ORDER or not calls(values, *_COUNTING) or node.args[3:]:
        raise NotRowWise(node, "writes rows to places that are not known")
    start = bound_arguments(values).get("start", 0)
    if start != 0 or tensor(into).ndim != 1:  # type: ignore[arg-type]
        raise NotRowWise(node, "writes something else than the places of a sort")
    return TokenRows(A.INVERSE, index.order)


def _shaped_like(reading: RowReading, node: Node) -> TokenRows:
    """Memory, or one number, in the shape of rows: no value of theirs."""
    _, rows = reading.source(node)
    number = as_number(node.args[1]) if calls(node, aten.full_like.default) else 0
    if calls(node, aten.empty_like.default) or number is None or rows.arrangement not in WITH_ROWS:
        return rows.plain()
    value = number if calls(node, aten.full_like.default) else float(calls(node, aten.ones_like.default))
    table = torch.full((reading.num_experts,), value, dtype=tensor(node).dtype)
    return replace(rows.plain(), table=table, silent=table == 0 if not value else None)


_Rule = Callable[[RowReading, Node], TokenRows]
RULES: Mapping[Any, _Rule] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _view),
    **dict.fromkeys((aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _view),
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.detach.default), _copy),
    aten.contiguous.default: _copy,
    aten.expand.default: _expand,
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _turned),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _along_columns),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten._softmax.default), _along_columns),
    aten.cat.default: _cat,
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default), _reduced),
    **dict.fromkeys((aten.mm.default, aten.addmm.default), _matmul),
    **dict.fromkeys((aten.bmm.default, aten.baddbmm.default), _batched),
    aten._grouped_mm.default: _grouped,
    **dict.fromkeys((aten.sort.default, aten.sort.stable), _sort),
    aten.argsort.default: _argsort,
    aten.histc.default: _histogram,
    aten.cumsum.default: _cumulated,
    aten.index.Tensor: _indexed,
    aten.index_select.default: _selected,
    aten.embedding.default: _looked_up,
    aten.index_put.default: _inverted,
    **dict.fromkeys(
        (aten.full_like.default, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default),
        _shaped_like,
    ),
}
