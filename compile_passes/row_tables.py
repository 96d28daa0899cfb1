"""Row tables: what a pointwise op makes of rows, and what of its value follows from the expert of a choice alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .provenance import label
from .roles import CASTS, as_number, aten, calls, is_tensor, same_size, tensor
from .rows import WHOLE, WITH_ROWS, NotRowWise, RowReading, TokenRows
from .rows import Arrangement as A

#: Zero stays zero, in each place.
_ZERO_STAYS = (*CASTS, aten.neg.default, aten.clone.default, aten.silu.default, aten.relu.default, aten.tanh.default)


def pointwise(reading: RowReading, node: Node, sources: list[Node]) -> TokenRows:
    first = reading.known[sources[0]]
    arrangements = {(reading.known[n].arrangement, reading.known[n].order) for n in sources}
    if first.arrangement is A.COUNTS and not calls(node, *CASTS):
        raise NotRowWise(node, "changes the experts' counts")
    if first.arrangement not in WITH_ROWS and calls(node, *CASTS) and tensor(node).dtype not in WHOLE:
        raise NotRowWise(node, "casts places or counts to a dtype that does not hold them")
    if calls(node, *CASTS) and len(sources) == 1:
        return replace(first, table=_evaluated(reading, node))
    if first.arrangement is A.ORDER and calls(node, aten.floor_divide.default, aten.div.Tensor_mode):
        return _token_of_order(reading, node, first)
    if len(arrangements) > 1 or first.arrangement not in WITH_ROWS:
        raise NotRowWise(node, "puts rows of different orders together")
    _check_broadcast(reading, node, sources)
    return replace(
        first.plain(),
        table=_evaluated(reading, node),
        zero=_zero(reading, node),
        silent=_silent(reading, node, sources),
    )


def _token_of_order(reading: RowReading, node: Node, order: TokenRows) -> TokenRows:
    floor = calls(node, aten.floor_divide.default) or node.kwargs.get("rounding_mode") in ("floor", "trunc")
    if node.args[1] != reading.choices or not floor:
        raise NotRowWise(node, "computes with the places of a sort")
    return TokenRows(A.ORDER_TOKEN, order.order)


def _check_broadcast(reading: RowReading, node: Node, sources: list[Node]) -> None:
    """Rows stand beside rows: what is broadcast along them is the same for each."""
    out = tensor(node)
    for value in node.all_input_nodes:
        if not is_tensor(value):
            continue
        shape = tensor(value).shape
        if value in sources:
            if len(shape) != out.ndim or not same_size(shape[0], out.shape[0]):
                raise NotRowWise(node, "does not put a row beside its own row")
        elif len(shape) == out.ndim and not same_size(shape[0], 1) and not _is_uniform(value):
            raise NotRowWise(node, f"reads another value of {label(value)} for each place of a row")


def _evaluated(reading: RowReading, node: Node) -> Tensor | None:
    """The value for each expert, where it follows from that alone: the op itself, run on all of their numbers."""
    found: dict[Node, Any] = {}
    for value in node.all_input_nodes:
        rows = reading.known.get(value)
        one = rows.table if rows is not None else _uniform(value)
        if one is None:
            return None
        found[value] = one
    args, kwargs = map_arg((node.args, _without_device(node.kwargs)), lambda n: found[n])
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an op that minds the shape: then nothing is known of its values
        return None
    return result if isinstance(result, Tensor) and result.shape == (reading.num_experts,) else None


def _zero(reading: RowReading, node: Node) -> Tensor | None:
    def of(value: object) -> Tensor | None:
        return _zero_of(reading, value)

    if calls(node, aten.mul.Tensor, aten.mul.Scalar):
        return _either(of(node.args[0]), of(node.args[1]))
    if calls(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _chosen(reading, node.args[1], of(node.args[2]), of(node.args[0]))
    if calls(node, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return _chosen(reading, node.args[0], of(node.args[1]), of(node.args[2]))
    if calls(node, aten.add.Tensor, aten.sub.Tensor):
        left, right = of(node.args[0]), of(node.args[1])
        return left & right if left is not None and right is not None else None
    if calls(node, *_ZERO_STAYS) or (calls(node, aten.div.Tensor) and not isinstance(node.args[1], Node)):
        return of(node.args[0])
    return None


def _zero_of(reading: RowReading, value: object) -> Tensor | None:
    if isinstance(value, Node) and value in reading.known:
        rows = reading.known[value]
        if rows.zero is None and rows.table is not None:
            return rows.table == 0
        return rows.zero
    number = as_number(value) if not isinstance(value, Node) else _uniform(value)
    if number is None:
        return None
    return torch.full((reading.num_experts,), bool(number == 0))


def _chosen(reading: RowReading, mask: object, if_set: Tensor | None, otherwise: Tensor | None) -> Tensor | None:
    table = reading.known[mask].table if isinstance(mask, Node) and mask in reading.known else None
    if table is None:
        return None
    nowhere = torch.zeros(reading.num_experts, dtype=torch.bool)
    set_ = nowhere if if_set is None else if_set
    other = nowhere if otherwise is None else otherwise
    return torch.where(table.bool(), set_, other)


def _silent(reading: RowReading, node: Node, sources: list[Node]) -> Tensor | None:
    kept = calls(node, *_ZERO_STAYS, aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.sub.Tensor)
    silents = [reading.known[n].silent for n in sources]
    if not kept or not silents:
        return None
    if calls(node, aten.mul.Tensor, aten.mul.Scalar):
        return next((s for s in silents if s is not None), None)
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    others = [_uniform(n) for n in tensors if n not in reading.known]  # zeros to begin a sum with add nothing
    if any(number is None or bool(number != 0) for number in others):
        return None
    if any(s is None for s in silents) or as_number(node.args[-1]) is not None:
        return None
    whole = silents[0]
    for other in silents[1:]:
        whole = whole & other  # type: ignore[operator]
    return whole


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a | b if a is not None and b is not None else a if a is not None else b


def _is_uniform(value: Node) -> bool:
    return calls(value, aten.full.default, aten.zeros.default, aten.ones.default, aten.full_like.default)


def _uniform(value: Node) -> Tensor | None:
    """The one number of a constant, in its dtype."""
    if calls(value, aten.full.default, aten.full_like.default):
        number = value.args[1]
    elif calls(value, aten.scalar_tensor.default):
        number = value.args[0]
    elif calls(value, aten.zeros.default, aten.ones.default):
        number = int(value.target is aten.ones.default)
    else:
        return None
    if isinstance(number, Node):
        return None
    return torch.full((), number, dtype=tensor(value).dtype)  # type: ignore[arg-type]


def _without_device(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout", "memory_format")}
