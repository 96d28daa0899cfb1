"""Graph inputs: what a graph takes, as far as it decides how the graph may be compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.utils._sympy.symbol import SymT, symbol_is_type

from ..runtime.errors import InputError
from .match import Candidate


def needs_grad(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a Dynamo graph is called in grad mode with something that requires grad."""
    tensors = [*gm.parameters(), *(x for x in example_inputs if isinstance(x, Tensor))]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def specialise_floats(gm: GraphModule) -> None:
    """Make the model's Python floats constants of the graph, with a guard each.

    Under ``dynamic=True`` Dynamo passes a float such as a norm's epsilon as a zero-dimensional
    CPU tensor. The kernels take epsilon as a number, and a capture would bake in what a CPU
    tensor held. Reading the value guards it; AOT then restarts the trace with the constant.
    A float that is computed from a size stays as it is.
    """
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.SymFloat):
            continue
        expression = value.node.expr
        if isinstance(expression, sympy.Symbol) and symbol_is_type(expression, SymT.FLOAT):
            float(value)


def static_inputs(example_inputs: Sequence[Any]) -> frozenset[int]:
    """The inputs that Dynamo knows to stay in place: parameters and buffers.

    Only tensors count: a DTensor parameter is unwrapped into its local tensor and its
    mesh, and the mesh is marked too.
    """
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    marked = (metadata.static_input_indices or ()) if metadata is not None else ()
    return frozenset(i for i in marked if isinstance(example_inputs[i], Tensor))


def check_not_empty(gm: GraphModule, candidates: Sequence[Candidate]) -> None:
    """Raises :class:`InputError` for an all-reduce of no tokens. Other empty tensors, as a cache's, are legal."""
    by_name = {n.name: n for n in gm.graph.nodes}
    for candidate in candidates:
        value = by_name[candidate.site.node].meta.get("val")
        if isinstance(value, Tensor) and 0 in [n for n in value.shape if isinstance(n, int)]:
            raise InputError(
                f"the all-reduce at {candidate.site.source or candidate.site.node} is of an empty tensor "
                f"(shape {list(value.shape)}); a rank that skips a collective leaves the others waiting: pad to at "
                "least one token on every rank"
            )
