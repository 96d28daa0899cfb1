"""Verify: run each matched subgraph beside what replaces it.

The all-reduce is taken as done: both sides get the same reduced value, residual and
weight, drawn at random. Two magnitudes are tried, one at which epsilon matters, so a
wrong epsilon, weight or dimension shows as plainly as a wrong formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime.collectives import reference
from .match import Candidate, Match
from .reasons import Decline, Reason
from .roles import tensor
from .sums import Parts

#: Largest |difference| / |value|, in units of the dtype's epsilon: two roundings at
#: another place in half precision; the order of a float32 sum over the hidden size.
_BOUND = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 16.0}
_ABSOLUTE = 1e-5
_MAGNITUDES = (1.0, 1e-3)
_UNKNOWN_SIZE = 4  # rows, where the graph has only a symbol


def verify(candidates: Iterable[Candidate], device: torch.device) -> list[Candidate]:
    """The candidates, with a :class:`Decline` for each whose replacement computes something else on ``device``."""
    known: dict[str, Decline | None] = {}
    checked = []
    for candidate in candidates:
        if candidate.match is not None:
            declined = _check(candidate.match, device, known)
            if declined is not None:
                candidate = Candidate(replace(candidate.site, decline=declined), None)
        checked.append(candidate)
    return checked


def _check(match: Match, device: torch.device, known: dict[str, Decline | None]) -> Decline | None:
    subgraph, inputs = _subgraph(match)
    # Layers repeat: the same operations on inputs of the same kind are the same computation.
    likes = [(tuple(x.shape), x.dtype) for x in inputs]
    key = f"{_without_names(subgraph.graph)}{likes}{match.epilogue}"
    if key not in known:
        # AOT compiles under a fake mode, and here real numbers are wanted.
        with _disable_current_modes(), torch.no_grad():
            known[key] = _compare(match, subgraph, inputs, device)
    return known[key]


def _compare(match: Match, subgraph: GraphModule, likes: list[Tensor], device: torch.device) -> Decline | None:
    generator = torch.Generator().manual_seed(0)
    dtype = likes[0].dtype
    weights = int(match.norm.weight is not None)
    for magnitude in _MAGNITUDES:
        drawn = [torch.randn(x.shape, generator=generator).to(x.dtype).to(device) for x in likes]
        values = [x if i >= len(drawn) - weights else x * magnitude for i, x in enumerate(drawn)]
        try:
            ((norm, summed), (value, residual)) = subgraph(*values)
        except Exception as error:  # whatever the model's own ops raise on sizes or values that are not its own
            return Decline(
                Reason.VERIFY_FAILED,
                f"what leads to '{match.norm.out.name}' cannot be run by itself: {type(error).__name__}: {error}",
            )
        weight, eps, bias = values[-1] if weights else None, match.norm.eps, match.norm.weight_bias
        ours: tuple[Tensor, ...]
        if residual is None:
            ours = (reference.rms_norm(value, weight, eps, bias), value)
        else:
            ours = reference.add_rms_norm(value, residual, weight, eps, bias)
        roundings = 1.0 + len(match.terms.roundings)
        for name, mine, theirs in zip(("norm", "sum"), ours, (norm, summed), strict=True):
            if theirs is None:
                continue  # an engine's op keeps it to itself
            theirs = theirs.reshape(mine.shape).to(torch.float64)
            # A term that cancels leaves its rounding behind: what counts is the size of the row.
            size = theirs.abs() if not match.terms.roundings else theirs.abs().amax(-1, keepdim=True)
            excess = (mine.double() - theirs).abs() / (size * torch.finfo(dtype).eps + _ABSOLUTE)
            # A comparison that NaN fails: not (excess <= bound).
            if not bool((excess <= _BOUND[dtype] * roundings).all()):
                return Decline(
                    Reason.VERIFY_FAILED,
                    f"the replacement of '{match.norm.out.name}' differs in its {name} by {excess.max():.3g} times "
                    f"the rounding of {dtype} on inputs of magnitude {magnitude:g}; {_BOUND[dtype]:g} are allowed",
                )
    return None


def _subgraph(match: Match) -> tuple[GraphModule, list[Tensor]]:
    """The nodes from the inputs of the all-reduces to the norm beside the two parts of the replaced sum, as a module.

    It returns ``(norm, sum), (what the ranks add up, residual or None)``; an all-reduce gives back what it gets. With
    it, tensors like its inputs: those of the all-reduces, the residuals, the weight.
    """
    terms = match.terms
    boundary = [*(a.input for a in terms.all_reduces), *terms.residuals]
    if match.norm.weight is not None:
        boundary.append(match.norm.weight)
    graph, likes = Graph(), []
    env: dict[Node, Node] = {}
    for i, node in enumerate(boundary):
        placeholder = graph.placeholder(f"x{i}")
        placeholder.meta["val"] = _like(tensor(node))
        likes.append(placeholder.meta["val"])
        env[node] = placeholder

    def copy(node: Node) -> Any:
        if node not in env:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt | int):
                return concrete(value)
            arguments = [copy(n) for n in node.all_input_nodes]
            mapped = dict(zip(node.all_input_nodes, arguments, strict=True))
            env[node] = graph.node_copy(node, lambda n: mapped[n])
            if isinstance(value, Tensor):
                env[node].meta["val"] = torch.empty(
                    [concrete(d) for d in value.shape], dtype=value.dtype, device="meta"
                )
        return env[node]

    for all_reduce in terms.all_reduces:
        reduced = env[all_reduce.input]
        for node in all_reduce.chain:
            env[node] = reduced = copy(node) if node in all_reduce.views else reduced
    source = (copy(match.norm.out), copy(match.sum) if match.sum is not None else None)
    graph.output((source, Parts(graph, terms, lambda a: env[a.value], copy).write()))
    return GraphModule(match.end.graph.owning_module or {}, graph), likes


def _like(value: Tensor) -> Tensor:
    """A tensor without memory, whose sizes are numbers."""
    return torch.empty([concrete(d) for d in value.shape], dtype=value.dtype, device="meta")


def _without_names(graph: Graph) -> list[str]:
    """The operations of a graph, each node named by its position."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    calls = [(node.target, *map_arg((node.args, node.kwargs), lambda n: position[n])) for node in graph.nodes]
    return [str(call) for call in calls]


def concrete(dim: int | torch.SymInt) -> int:
    """A size with every symbol in it replaced: by what it stood for when traced, or by a small number."""
    if isinstance(dim, int):
        return dim
    hints = dim.node.shape_env.backed_var_to_val
    return int(dim.node.expr.xreplace({s: hints.get(s, _UNKNOWN_SIZE) for s in dim.node.expr.free_symbols}))
