"""Rewrite: gathers, experts and a reduce-scatter become a dispatch, the same experts, and a combine.

The experts are not touched: a dispatch returns rows of the shape that the gathers had, and an empty row asks for an
expert of another rank, so the experts' own mask leaves it out. The capacity is the number of tokens that a rank gives
to a gather, which is the same on all ranks, because a gather is even.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..runtime.collectives import moe
from ..runtime.collectives.moe_reference import counts_like
from ..runtime.groups import Group
from ..runtime.hazards.situation import Collective
from .moe_calls import EVEN, check_capacities
from .moe_choice import leave_alone
from .moe_sites import MoeCandidate, MoeMatch, MoeSite, find_moe, is_size
from .moe_verify import verify_experts
from .reasons import Decline, Reason
from .roles import arguments, aten, tensor

_PROVENANCE = ("stack_trace", "nn_module_stack", "custom")


def dispatch_experts(
    gm: GraphModule,
    groups: Mapping[str, Group],
    device: torch.device,
    *,
    rewrite: bool,
    experts_ops: Collection[str] = (),
    strict: bool = False,
    verify: bool = False,
    only: Collection[str] | None = None,
    skip_sites: Collection[str] = (),
    split_ops: Collection[str] = (),
    agree: Callable[[list[MoeCandidate]], list[MoeCandidate]] = list,
) -> list[MoeSite]:
    """Find the MoE sites of a graph and rewrite those where that is exact; the sites, in order.

    rewrite: where it is off, the sites say what is in the way, or that nothing is. verify: run the experts of each site
    that may be rewritten on generated inputs, and decline it where they see another row. only, skip_sites, split_ops:
    see :func:`~.moe_choice.leave_alone`. agree: what the ranks make of their candidates together. The others are
    :func:`find_moe`'s.

    Raises :class:`RefusedError` for a dispatch of the graph's own whose capacity ranks cannot have agreed on.
    """
    check_capacities(gm)
    candidates = find_moe(gm, groups, experts_ops=experts_ops, strict=strict)
    if not rewrite:
        off = Decline(Reason.SWITCHED_OFF, "moe_dispatch is not set; a dispatch and a combine would do the same")
        return [replace(c.site, decline=c.site.decline or off) for c in candidates]
    chosen = leave_alone(candidates, only=only, skip_sites=skip_sites, split_ops=split_ops)
    return rewrite_moe(gm, agree([_verified(c, device) for c in chosen] if verify else chosen))


def _verified(candidate: MoeCandidate, device: torch.device) -> MoeCandidate:
    why = verify_experts(candidate.match, device) if candidate.match is not None else None
    return candidate.declined(Decline(Reason.VERIFY_FAILED, why)) if why is not None else candidate


def rewrite_moe(gm: GraphModule, candidates: Iterable[MoeCandidate]) -> list[MoeSite]:
    """Rewrite ``gm`` in place; return the sites, rewritten or declined, in their order."""
    sites = []
    for candidate in candidates:
        if candidate.match is not None:
            _rewrite(gm, candidate.match)
        sites.append(candidate.site)
    gm.graph.lint()
    gm.recompile()
    return sites


def _rewrite(gm: GraphModule, match: MoeMatch) -> None:
    graph, group = gm.graph, match.group.name
    given = {wait: arguments(arguments(wait)[0])[0] for wait in match.gathers}
    for wait, value in given.items():
        _size_by_itself(graph, wait, value, match.group.size)
    start = max(arguments(wait)[0] for wait in match.gathers)  # here all that is gathered is known
    payloads = [given[wait] for wait in match.payloads]
    with graph.inserting_after(start):
        capacity = _tokens(graph, given[match.ids])
    with graph.inserting_after(capacity if isinstance(capacity, Node) else start):
        about = (capacity, match.num_experts, match.elsewhere, group, str(Collective.REFERENCE))
        call = graph.call_function(moe.moe_dispatch, (payloads, given[match.ids], *about))
    with graph.inserting_after(call):
        received, ids, route = (graph.call_function(operator.getitem, (call, i)) for i in range(3))
    rows = []
    with graph.inserting_after(received):
        rows = [graph.call_function(operator.getitem, (received, i)) for i in range(len(payloads))]
    _describe(match, call, received, rows, ids, route)
    call.append(received)
    last: Node = received
    for node in (*rows, ids, route, *(n for n in match.region if n < call)):
        last.append(node)  # what read a gather early stands behind the dispatch now
        last = node
    for wait, row in (*zip(match.payloads, rows, strict=True), (match.ids, ids)):
        wait.replace_all_uses_with(row)
    with graph.inserting_before(match.scatter):
        result = graph.call_function(moe.moe_combine, (match.partial, route, group, str(Collective.REFERENCE)))
    result.meta = {key: match.wait.meta[key] for key in ("val", *_PROVENANCE) if key in match.wait.meta}
    match.wait.replace_all_uses_with(result)
    for node in (match.wait, match.scatter, *(n for wait in match.gathers for n in (wait, arguments(wait)[0]))):
        graph.erase_node(node)


def _size_by_itself(graph: torch.fx.Graph, wait: Node, given: Node, ranks: int) -> None:
    """Whoever asks for the size of a gathered tensor is told by that of what is gathered."""
    for reader in [u for n in (wait, arguments(wait)[0]) for u in n.users if is_size(u)]:
        dim = arguments(reader)[1]
        with graph.inserting_before(reader):
            size = graph.call_function(aten.sym_size.int, (given, dim))
            size.meta = {"val": tensor(given).shape[dim]}
            if dim == 0:
                size = graph.call_function(operator.mul, (size, ranks))
                size.meta = {"val": reader.meta["val"]}
        reader.replace_all_uses_with(size)
        graph.erase_node(reader)


def _tokens(graph: torch.fx.Graph, ids: Node) -> Any:
    """The number of tokens of a rank: a number, or a node that tells it."""
    size = tensor(ids).shape[0]
    if isinstance(size, int):
        return size
    node = graph.call_function(aten.sym_size.int, (ids, 0))
    node.meta = {"val": size}
    return node


def _describe(match: MoeMatch, call: Node, received: Node, rows: list[Node], ids: Node, route: Node) -> None:
    """Shapes for later passes, provenance for people."""
    values = [tensor(wait) for wait in match.payloads]
    given = tensor(arguments(arguments(match.ids)[0])[0])
    way = given.new_empty((given.shape[0], match.group.size), dtype=torch.int32)
    start = arguments(match.ids)[0].meta
    about = {key: start[key] for key in _PROVENANCE if key in start}
    returned = (values, tensor(match.ids), way, counts_like(way))
    described: list[tuple[Node, Any]] = [(call, returned), (received, values)]
    described += [*zip(rows, values, strict=True), (ids, tensor(match.ids)), (route, way)]
    for node, value in described:
        node.meta = about | {"val": value}
    call.meta[EVEN] = True
