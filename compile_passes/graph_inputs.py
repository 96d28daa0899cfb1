"""Graph inputs: what a graph takes, as far as it decides how the graph may be compiled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import CompileContext, TracingContext
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._sympy.symbol import SymT, symbol_is_type

from ..runtime.errors import InputError
from .fuse import fuse
from .match import Candidate
from .roles import aten, calls

#: Of a float that a site takes in. Norms that share their code have an epsilon each, which is one or two.
_MANY_VALUES = 3
#: In place of a float: a product with it is exact in every dtype, and no overflow.
_ANY_NUMBER = 0.5


def needs_grad(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a Dynamo graph is called in grad mode with something that requires grad."""
    tensors = [*gm.parameters(), *(x for x in example_inputs if isinstance(x, Tensor))]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@dataclass(frozen=True)
class FloatInput:
    """A Python float that Dynamo made an input. symbol: what Dynamo knows it by. value: in this call."""

    symbol: str
    value: float | None


def float_inputs(gm: GraphModule) -> dict[str, FloatInput]:
    """The model's Python floats among the inputs of a Dynamo graph, by the names of their placeholders.

    Dynamo passes a float that changed, and under ``dynamic=True`` any, as a zero-dimensional CPU tensor. One that is
    computed from a size or read from data is none of them.
    """
    found = {}
    for node in gm.graph.find_nodes(op="call_method", target="item"):
        value, source = node.meta.get("example_value"), node.args[0]
        if not isinstance(value, torch.SymFloat) or not isinstance(source, Node) or source.op != "placeholder":
            continue
        symbol = value.node._expr  # what it was before a guard replaced it
        if isinstance(symbol, sympy.Symbol) and symbol_is_type(symbol, SymT.FLOAT):
            found[source.name] = FloatInput(str(symbol), value.node.hint)
    return found


def floats_that_fuse(
    gm: GraphModule, inputs: Collection[int], find_in: Callable[[GraphModule], Sequence[Candidate]]
) -> set[int]:
    """Those of ``inputs``, which are floats by position, that a fused site would take in if they were constants.

    The kernels take a norm's epsilon and a sum's factors as numbers. So each op that reads a float is given a number,
    and those that a fusion removes need theirs. The number is the same on all ranks, and exact: what the float is
    decides nothing. ``gm`` is a copy that is used up; ``find_in`` finds its candidates.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    floats = {placeholders[i]: {i} for i in inputs}  # and what is computed from them alone
    readers: dict[Node, set[int]] = {}
    for node in [n for n in gm.graph.nodes if n.op == "call_function"]:
        value, read = node.meta.get("val"), [n for n in node.all_input_nodes if n in floats]
        behind = set().union(*(floats[n] for n in read))
        if len(read) == len(node.all_input_nodes) and isinstance(value, Tensor) and value.ndim == 0:
            floats[node] = behind
        if not behind or node in floats:
            continue
        readers[node] = behind
        node.args = map_arg(node.args, lambda n: _ANY_NUMBER if n in floats else n)
        if calls(node, aten.pow.Tensor_Tensor):
            node.target = aten.pow.Tensor_Scalar
        for cast in [u for u in node.users if calls(u, torch.ops.prims.convert_element_type.default)]:
            if isinstance(value, Tensor) and cast.args[1] is value.dtype:  # AOT puts it there
                cast.replace_all_uses_with(node)
                gm.graph.erase_node(cast)
    fuse(gm, find_in(gm))
    left = set(gm.graph.nodes)
    return set().union(*(behind for node, behind in readers.items() if node not in left))


@dataclass
class Constants:
    """Which floats a backend had Dynamo make constants of.

    first: what each was in its first graph, by frame and name; values: all that it was as a constant. Dynamo keeps the
    symbols for good, in whatever graph; so they are taken back (once per graph, so that no two graphs of a frame can
    wait for each other).
    """

    first: dict[tuple[object, str], float | None] = field(default_factory=dict)
    values: dict[tuple[object, str], set[float | None]] = field(default_factory=dict)
    _told: bool = False
    _asked: set[str] = field(default_factory=set)
    _settled: object = None

    def is_first(self, name: str, value: float | None) -> bool:
        """Whether a float of the frame that is compiled has the value that it had first."""
        return self.first.setdefault((_frame(), name), value) == value

    def keeps_changing(self, name: str, value: float | None) -> bool:
        """This float becomes a constant. Whether it had so many values that it will have more; true of one, once."""
        values = self.values.setdefault((_frame(), name), set())
        values.add(value)
        if self._told or len(values) < _MANY_VALUES:
            return False
        self._told = True
        return True

    def specialise(self, floats: Collection[FloatInput]) -> None:
        """Have Dynamo trace anew with these as constants, each with a guard, where it has not done so already."""
        new = {f.symbol for f in floats if not TensorifyState.should_specialize(f.symbol)}
        for symbol in new:
            TensorifyState.specialize(symbol)
        self._asked |= new
        if new:
            raise TensorifyScalarRestartAnalysis
        compiled = CompileContext.current_compile_id()
        if self._asked and compiled != self._settled:
            TensorifyState.force_specializations.difference_update(self._asked)
            self._asked, self._settled = set(), compiled


def _frame() -> object:
    """Of the code that is compiled."""
    compiled = CompileContext.current_compile_id()
    return compiled.frame_id if compiled else None


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
