"""Expert rows: each node between the gathers and the sum is asked what it makes of the rows (:mod:`.rows`)."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from .op_calls import op_names
from .roles import CASTS, aten, calls, tensor
from .row_moves import RULES
from .row_tables import pointwise
from .rows import Arrangement as A
from .rows import NotRowWise, RowReading, TokenRows

_POINTWISE = frozenset({*CASTS, aten.floor_divide.default, aten.remainder.Scalar, aten.fmod.Scalar})


def silent_experts(
    partial: Node,
    region: Iterable[Node],
    gathered: Iterable[Node],
    ids: Node,
    num_experts: int,
    experts_ops: Iterable[str] = (),
    mine: range = range(0),
) -> frozenset[int] | None:
    """The experts of whom ``partial`` has nothing: a row is zero all of whose choices are among these.

    region: what is computed of ``gathered`` on the way to ``partial``, in graph order. None where nothing is shown.
    ids: which of these are the experts that a token asks for. experts_ops: an engine's own kernels, which are believed
    to take rows one by one, and to leave out choices of experts that are not ``mine``. Raises :class:`NotRowWise`.
    """
    tokens, choices = tensor(ids).shape
    reading = RowReading(tokens, choices, num_experts, frozenset(experts_ops), mine)
    with _disable_current_modes():  # AOT compiles under a fake mode, and numbers are computed here
        for node in gathered:
            reading.known[node] = TokenRows(A.TOKENS, table=torch.arange(num_experts) if node is ids else None)
        for node in region:
            _read(reading, node)
        rows = reading.known[partial]
        if rows.arrangement is not A.TOKENS:
            raise NotRowWise(partial, "is no row for each token")
        return frozenset(rows.silent.nonzero().flatten().tolist()) if rows.silent is not None else None


def _read(reading: RowReading, node: Node) -> None:
    sources = [n for n in node.all_input_nodes if n in reading.known]
    if not sources:
        return
    reading.known[node] = _rows(reading, node, sources)


def _rows(reading: RowReading, node: Node, sources: list[Node]) -> TokenRows:
    if calls(node, operator.getitem):
        return _item(reading, node, sources[0])
    names = op_names(node)
    if not reading.experts_ops.isdisjoint(names):
        return _opaque(reading, node, sources)
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(reading, node)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _POINTWISE:
        return pointwise(reading, node, sources)
    raise NotRowWise(node, "is not known to take each row by itself")


def _item(reading: RowReading, node: Node, source: Node) -> TokenRows:
    found = reading.known[source]
    if found.arrangement is A.INVERSE and node.args[1] == 0:  # of the places of a sort, sorted
        raise NotRowWise(node, "takes rows by their place")
    if calls(source, aten.sort.default, aten.sort.stable) and found.arrangement is not A.INVERSE:
        return found if node.args[1] == 0 else TokenRows(A.ORDER, source)
    return found


def _opaque(reading: RowReading, node: Node, sources: list[Node]) -> TokenRows:
    if any(reading.known[n].arrangement is not A.TOKENS for n in sources):
        raise NotRowWise(node, "is listed in experts_ops and takes something else than a row for each token")
    outside = torch.ones(reading.num_experts, dtype=torch.bool)
    outside[reading.mine.start : reading.mine.stop] = False
    return TokenRows(A.TOKENS, silent=outside)
