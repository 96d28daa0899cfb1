"""What the passes are given, checked where a user hands it over."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from ..runtime.errors import ArgumentError
from . import op_options
from .engine_ops import GroupOf
from .match import Candidate
from .norm_ops import NormOp, norm_ops_of
from .reasons import Reason
from .roles import aten

T = TypeVar("T")


def check_graph(gm: object, taker: str) -> None:
    """Raises :class:`ArgumentError` for what is no graph, with how to get one."""
    if isinstance(gm, GraphModule):
        return
    how = (
        "torch.compile(model, backend=ringfence.Backend()) traces a model and runs the passes"
        if isinstance(gm, nn.Module)
        else "aot_autograd(fw_compiler=...) of torch._dynamo.backends.common hands one to its compiler"
    )
    raise ArgumentError(
        f"{taker} takes the functional ATen graph of a model, a torch.fx.GraphModule, not {said(gm)}; {how}"
    )


def check_each(values: Iterable[T], kind: type[T], taker: str, source: str) -> tuple[T, ...]:
    """The values, each of that kind; an :class:`ArgumentError` otherwise. source: the call that returns them."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise ArgumentError(f"{taker} takes what {source} returned ({kind.__name__} values), not {said(values)}")
    found = tuple(values)
    for value in found:
        check_one(value, kind, taker, source)
    return found


def check_one(value: object, kind: type, taker: str, source: str) -> None:
    """Raises :class:`ArgumentError` for a value of another kind. source: the call that returns one."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{taker} takes what {source} returned ({kind.__name__}), not {said(value)}")


def said(value: object) -> str:
    """A value in a message: None, or of which type it is."""
    return "None" if value is None else f"what is of type {type(value).__name__}"


def named_ops(
    gm: GraphModule,
    all_reduce_ops: Collection[str] | Mapping[str, GroupOf] | None,
    norm_ops: Collection[str] | Mapping[str, NormOp | float | str] | None,
) -> tuple[dict[str, GroupOf], dict[str, NormOp | str] | None]:
    """Engines' ops by name, each of which torch knows and whose roles fit its schema. Raises :class:`OptionsError`."""
    all_reduces = op_options.all_reduce_ops(all_reduce_ops or {})
    reasons: dict[str, str] = {}
    if isinstance(norm_ops, Mapping):
        reasons = {name: said for name, said in norm_ops.items() if isinstance(said, str)}
        norm_ops = {name: said for name, said in norm_ops.items() if not isinstance(said, str)}
    norms = op_options.norm_ops(norm_ops if norm_ops is not None else ())
    for option, said in (("all_reduce_ops", all_reduces), ("norm_ops", {**norms, **reasons})):
        for name in said:
            op_options.check_roles(option, name, said, op_options.registered(option, name))
    if norm_ops is None:
        return all_reduces, None
    rows = norm_ops_of(gm, norms)
    of_all = {full: reasons[bare] for full in rows if (bare := full.rpartition(".")[0]) in reasons}
    return all_reduces, {**rows, **reasons, **of_all}


def with_what_writes(gm: GraphModule, candidates: list[Candidate]) -> list[Candidate]:
    """A norm that nothing recognised may be one that is written in place: then the graph is not what find reads."""
    if not any(c.site.decline is not None and c.site.decline.reason is Reason.NO_NORM for c in candidates):
        return candidates
    ops = (node.target for node in gm.graph.nodes if node.op == "call_function")
    aten_ops = (op for op in ops if isinstance(op, torch._ops.OpOverload) and op.namespace == "aten")
    write = next((op for op in aten_ops if op._schema.is_mutable and op is not aten.copy_.default), None)
    if write is None:
        return candidates
    told = f"; {write} writes in place, so the graph is not functional: trace it with aot_autograd or torch.export"
    return [
        replace(c, site=replace(c.site, decline=replace(d, message=d.message + told)))
        if (d := c.site.decline) is not None and d.reason is Reason.NO_NORM
        else c
        for c in candidates
    ]
