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
from .find import Candidate, Match
from .reasons import Decline, Reason
from .roles import tensor

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
    key = f"{_without_names(subgraph.graph)}{likes}{match.norm.eps}{match.norm.weight_bias}"
    if key not in known:
        # AOT compiles under a fake mode, and here real numbers are wanted.
        with _disable_current_modes(), torch.no_grad():
            known[key] = _compare(match, subgraph, inputs, device)
    return known[key]


def _compare(match: Match, subgraph: GraphModule, likes: list[Tensor], device: torch.device) -> Decline | None:
    generator = torch.Generator().manual_seed(0)
    dtype = likes[0].dtype
    for magnitude in _MAGNITUDES:
        drawn = [torch.randn(x.shape, generator=generator).to(x.dtype).to(device) for x in likes]
        drawn[0], rest = drawn[0] * magnitude, drawn[1:]
        residual = rest.pop(0) * magnitude if match.residual is not None else None
        weight = rest.pop(0) if match.norm.weight is not None else None
        try:
            source = subgraph(*(x for x in (drawn[0], residual, weight) if x is not None))
        except Exception as error:  # whatever the model's own ops raise on sizes or values that are not its own
            return Decline(
                Reason.VERIFY_FAILED,
                f"what leads to '{match.norm.out.name}' cannot be run by itself: {type(error).__name__}: {error}",
            )
        eps, bias = match.norm.eps, match.norm.weight_bias
        if residual is None:
            replacement: tuple[Tensor, ...] = (reference.rms_norm(drawn[0], weight, eps, bias),)
        else:
            replacement = reference.add_rms_norm(drawn[0], residual, weight, eps, bias)
        for name, ours, theirs in zip(("norm", "sum"), replacement, source, strict=False):
            theirs = theirs.reshape(ours.shape).to(torch.float64)
            excess = (ours.double() - theirs).abs() / (theirs.abs() * torch.finfo(dtype).eps + _ABSOLUTE)
            # A comparison that NaN fails: not (excess <= bound).
            if not bool((excess <= _BOUND[dtype]).all()):
                return Decline(
                    Reason.VERIFY_FAILED,
                    f"the replacement of '{match.norm.out.name}' differs in its {name} by {excess.max():.3g} times "
                    f"the rounding of {dtype} on inputs of magnitude {magnitude:g}; {_BOUND[dtype]:g} are allowed",
                )
    return None


def _subgraph(match: Match) -> tuple[GraphModule, list[Tensor]]:
    """The nodes from the reduced value to the norm as a module, and tensors like its inputs."""
    boundary = [n for n in (match.all_reduce.value, match.residual, match.norm.weight) if n is not None]
    graph, likes = Graph(), []
    env: dict[Node, Node] = {}
    for node in boundary:
        env[node] = graph.placeholder(f"x{len(env)}")
        likes.append(torch.empty([_concrete(d) for d in tensor(node).shape], dtype=tensor(node).dtype, device="meta"))

    def copy(node: Node) -> Any:
        if node not in env:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt | int):
                return _concrete(value)
            arguments = [copy(n) for n in node.all_input_nodes]
            mapped = dict(zip(node.all_input_nodes, arguments, strict=True))
            env[node] = graph.node_copy(node, lambda n: mapped[n])
        return env[node]

    outputs = [copy(match.norm.out)] + ([copy(match.sum)] if match.residual is not None else [])
    graph.output(tuple(outputs))
    return GraphModule({}, graph), likes


def _without_names(graph: Graph) -> list[str]:
    """The operations of a graph, each node named by its position."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    calls = [(node.target, *map_arg((node.args, node.kwargs), lambda n: position[n])) for node in graph.nodes]
    return [str(call) for call in calls]


def _concrete(dim: int | torch.SymInt) -> int:
    """A size with every symbol in it replaced: by what it stood for when traced, or by a small number."""
    if isinstance(dim, int):
        return dim
    hints = dim.node.shape_env.backed_var_to_val
    return int(dim.node.expr.xreplace({s: hints.get(s, _UNKNOWN_SIZE) for s in dim.node.expr.free_symbols}))
