"""Verify experts: run what stands between the gathers and the sum, to see that it takes each row by itself.

A trial only refuses: what it does not see at the sizes of one trace may be in the way at others. So it comes after what
was read of the graph, and never in its place.

Tokens and weights are drawn at random. Then the rows are put into another order, and those that a dispatch would not
bring are replaced by rubbish that asks for an expert of another rank: every other row must come out as it did. And a
token that asks for no expert of this rank must come out as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from .moe_sites import MoeMatch
from .roles import dtype_text, tensor
from .verify import concrete

#: Largest |difference| / |largest value of the row|, in units of the dtype's epsilon: another order of a sum.
_BOUND = 8.0
_TRIALS = 3
#: Of weights, so that what they make of a token stays within the range of half precision.
_SMALL = 0.05


def verify_experts(match: MoeMatch, device: torch.device) -> str | None:
    """Why the experts of a site are no row-wise function on generated inputs of ``device``; None where none is seen.

    A trial that had nothing to compare is a reason too.
    """
    module, inputs = _experts(match)
    generator = torch.Generator().manual_seed(0)
    here = away = 0
    with _disable_current_modes(), torch.no_grad():
        for _ in range(_TRIALS):
            try:
                tried = _tried(match, module, inputs, generator, device)
            except Exception as error:  # whatever the model's own ops raise on values that are not its own
                return f"what leads to '{match.partial.name}' cannot be run by itself: {type(error).__name__}: {error}"
            if isinstance(tried, str):
                return tried
            here, away = here + tried[0], away + tried[1]
    if not here:
        return f"nothing was compared: no token that was tried at '{match.partial.name}' is for this rank's experts"
    others = match.num_experts - len(match.mine)
    if not away and others >= concrete(tensor(match.ids).shape[1]):
        return f"nothing was compared: every token that was tried at '{match.partial.name}' is for this rank's experts"
    return None


def _tried(
    match: MoeMatch, module: GraphModule, inputs: list[Node], generator: torch.Generator, device: torch.device
) -> str | tuple[int, int]:
    """Why not; or how many rows were compared: of this rank's experts, and of others' alone."""
    values = {node: _drawn(match, node, generator) for node in inputs}
    rows = values[match.ids].shape[0]
    order = torch.randperm(rows, generator=generator)
    kept = torch.rand(rows, generator=generator) < 0.5
    kept[:1], kept[1:2] = True, False  # one of this rank's, beside another one: see _drawn
    away = ~_asks_for(values[match.ids], match.mine)
    other = {}
    for node in inputs:
        other[node] = values[node]
        if node in match.gathers:
            rubbish = torch.full_like(values[node], match.elsewhere) if node is match.ids else None
            rubbish = _drawn(match, node, generator) if rubbish is None else rubbish
            shape = (rows, *[1] * (rubbish.ndim - 1))
            other[node] = torch.where(kept.view(shape), values[node], rubbish)[order]
    one, two = (module(*(v.to(device) for v in given.values())).cpu().double() for given in (values, other))
    if bool((one[away] != 0).any()):
        return f"'{match.partial.name}' is not zero for a token that asks for experts of other ranks only"
    back = torch.empty_like(two)
    back[order] = two
    dtype = tensor(match.partial).dtype
    size = one.abs().amax(-1, keepdim=True)
    excess = ((one - back).abs() / (size * torch.finfo(dtype).eps + 1e-30))[kept & ~away]
    if not bool((excess <= _BOUND).all()):  # a comparison that NaN fails
        return (
            f"with other rows beside it a row of '{match.partial.name}' differs by {excess.max():.3g} times the "
            f"rounding of {dtype_text(dtype)}; {_BOUND:g} are allowed"
        )
    return int((kept & ~away).sum()), int(away.sum())


def _asks_for(ids: Tensor, mine: range) -> Tensor:
    return ((ids >= mine.start) & (ids < mine.stop)).any(1)


def _drawn(match: MoeMatch, node: Node, generator: torch.Generator) -> Tensor:
    like = tensor(node)
    shape = [concrete(d) for d in like.shape]
    if node is match.ids:
        scores = torch.rand(shape[0], match.num_experts, generator=generator)
        mine = slice(match.mine.start, match.mine.stop)
        scores[::3, mine] += 1  # some ask for this rank's first, and some for none of them
        scores[1::3, mine] -= 1
        return scores.topk(shape[1], dim=-1).indices.to(like.dtype)
    if not like.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(like.dtype)
    scale = 1.0 if node in match.gathers else _SMALL
    return (torch.randn(shape, generator=generator) * scale).to(like.dtype)


def _experts(match: MoeMatch) -> tuple[GraphModule, list[Node]]:
    """What leads from gathered values and inputs of the graph to the partial sum; and these values, in order."""
    needed: set[Node] = set()
    queue = [match.partial]
    while queue:
        node = queue.pop()
        if node not in needed and not isinstance(node.meta.get("val"), torch.SymInt | int):
            needed.add(node)
            queue += [] if _is_input(match, node) else node.all_input_nodes
    graph = Graph()
    inputs = [node for node in sorted(needed) if _is_input(match, node)]
    env: dict[Node, Any] = {node: graph.placeholder(f"x{i}") for i, node in enumerate(inputs)}

    def value(node: Node) -> Any:
        return env[node] if node in env else concrete(node.meta["val"])

    for node in sorted(needed - set(inputs)):
        args, kwargs = map_arg((node.args, node.kwargs), value)
        env[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output(env[match.partial])
    return GraphModule(match.partial.graph.owning_module or {}, graph), inputs


def _is_input(match: MoeMatch, node: Node) -> bool:
    return node in match.gathers or node.op == "placeholder"
