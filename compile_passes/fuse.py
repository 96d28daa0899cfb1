"""Fuse: rewrite every matched site into the fused op.

    input -> all_reduce -> wait -> + residual -> RMSNorm(weight, eps)

becomes

    norm, residual_out = ringfence.all_reduce_add_rms_norm(input, residual, weight, eps, ...)

and several all-reduces of one sum become the one of the sum of their inputs (:mod:`.sums`).

The fused op stands where the sum stood, because the residual may be computed
after the all-reduce was issued. What it replaces is erased explicitly:
``wait_tensor`` is registered as side-effectful, so dead-code elimination would
keep the old collective and double the communication without a word.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

# The ops must be registered before a graph can call them.
from ..runtime.collectives import ops, table
from ..runtime.errors import ArgumentError, GraphMetadataError, NotFusedWarning, OptionsError
from ..runtime.groups import AnyGroup, ByGroup, name_of_group, resolve_group, same_groups
from ..runtime.spelling import group_word
from .all_reduce import AllReduce
from .given import check_each, check_graph
from .match import Candidate, Match, Site
from .roles import aten, cast_input, first_node, is_contiguous, same_shape, tensor
from .sums import Parts

#: Key of ``node.meta`` under which a fused op keeps the index of its site.
SITE = "ringfence_site"
#: The same, for what the results of its all-reduces were multiplied by, where that is not one.
FACTORS = "ringfence_factors"
#: Of the nodes that a fused op replaces, what it keeps; Dynamo keeps the stream in "custom".
_PROVENANCE = ("stack_trace", "nn_module_stack", "custom")


def fuse(
    gm: GraphModule,
    candidates: Iterable[Candidate],
    *,
    collectives: Mapping[AnyGroup, str] | None = None,
) -> list[Site]:
    """Rewrite ``gm`` in place; return the sites, fused or declined, in their order.

    ``collectives`` maps process groups, or any of their names, to what carries out their sums: ``"prepared"`` for what
    :func:`ringfence.prepare` chose (:mod:`ringfence.runtime.collectives.ops`). Those of other groups are the
    reference's, with a :class:`NotFusedWarning` where a group that was named has no site to fuse.
    Raises :class:`GraphMetadataError` for candidates of another graph, :class:`ArgumentError` for what are none,
    :class:`GroupError` for a name that is no group's, and :class:`OptionsError` for who carries out nothing.
    """
    check_graph(gm, "fuse")
    candidates = check_each(candidates, Candidate, "fuse", "find(gm)")
    sites: list[Site] = []
    rewriter = _Rewriter(gm, _carriers(collectives or {}, candidates))
    for candidate in candidates:
        if candidate.match is not None:
            if candidate.match.end.graph is not gm.graph:
                raise GraphMetadataError(
                    f"site {candidate.site.index} was found in another graph; pass what find(gm) returns for this one"
                )
            if candidate.match.all_reduce.start._erased and candidate.site.merged_into is None:
                raise GraphMetadataError(f"site {candidate.site.index} is fused already; call find(gm) again")
            if candidate.site.merged_into is None:
                rewriter.rewrite(candidate.site.index, candidate.match)
        sites.append(candidate.site)
    rewriter.finish()
    gm.recompile()
    return sites


def _carriers(given: Mapping[AnyGroup, str], candidates: Iterable[Candidate]) -> ByGroup[str]:
    """Who carries out the sums of which group."""
    known = [ops.PREPARED, *dict.fromkeys(str(one.name) for one in table.ALL)]
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"collectives={given!r} is no mapping from groups to who carries out: {{'world': 'prepared'}}"
        )
    if wrong := [v for v in given.values() if not isinstance(v, str) or v.removesuffix(ops.NOT_CAPTURED) not in known]:
        raise OptionsError(f"collectives holds {wrong[0]!r}, which is none of {known}")
    sites = [c.site for c in candidates]
    there, fused = {site.group for site in sites}, {str(site.group) for site in sites if site.decline is None}
    named = {name_of_group(group) for group in given}
    for name in named - there:
        resolve_group(name)  # raises where it is a name of none
    left = fused - same_groups(fused, named)
    if left and (idle := named - same_groups(named, fused)):
        warnings.warn(
            f"collectives names {sorted(idle)}, over which this graph has no site to fuse; sites over "
            f"{sorted(map(group_word, left))} are the reference's",
            NotFusedWarning,
            stacklevel=3,
        )
    return ByGroup(given)


class _Rewriter:
    """Rewrites one match after the other, following nodes that earlier ones replaced."""

    def __init__(self, gm: GraphModule, collectives: ByGroup[str]) -> None:
        self.graph = gm.graph
        self.collectives_of = collectives
        self.replaced: dict[Node, Node] = {}
        self.sums: list[Node] = []
        self.owned: set[Node] = set()  # collectives and engines' norm ops, which go with what they were for

    def current(self, node: Node) -> Node:
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def rewrite(self, site: int, match: Match) -> None:
        norm, before, last = match.norm, match.sum, match.anchor
        group = str(match.all_reduce.group)
        for late in match.late_weight:
            last.append(late)
            last = late
        with self.graph.inserting_before(last.next):
            value, residual = Parts(self.graph, match.terms, self._input, self.current).write()
            weight = self.current(norm.weight) if norm.weight is not None else None
            operands = (value, weight) if residual is None else (value, residual, weight)
            # A plain string: a compiler writes its repr into code.
            collective = str(self.collectives_of.get(group, "reference"))
            op = getattr(ops, match.epilogue.op)
            fused = self.graph.call_function(op, (*operands, norm.eps, norm.weight_bias, group, collective))
            norm_out = self.graph.call_function(operator.getitem, (fused, 0))
            summed = self.graph.call_function(operator.getitem, (fused, 1))
        self._describe(fused, norm_out, summed, site, match, value)
        if not match.terms.plain and any(f != 1 for f in match.terms.factors):
            fused.meta[FACTORS] = match.terms.factors
        with self.graph.inserting_before(norm.out):
            self._replace(norm.out, self._through(norm.views, norm_out))
        if before is None:
            pass
        elif tensor(before).dtype == tensor(summed).dtype:
            self._replace(before, summed)
        else:  # the sum was taken in float32; its readers outside the norm round it
            for user in list(before.users):
                if cast_input(user) is before and tensor(user).dtype == tensor(summed).dtype:
                    self._replace(user, summed)
        self.sums.append(match.end)
        for merged in match.terms.all_reduces:
            self.owned.update(merged.chain)
        if norm.call is not None:
            self.owned.add(norm.call)
            self.sums.append(norm.call)

    def _input(self, all_reduce: AllReduce) -> Node:
        """What an all-reduce adds up, in the shape of its value."""
        return self._through(all_reduce.views, self.current(all_reduce.input))

    def _through(self, views: Iterable[Node], node: Node) -> Node:
        """``node`` seen through copies of ``views``."""
        for view in views:
            if not is_contiguous(tensor(node)):  # not every view can be taken of every layout
                node = self._contiguous_copy(node)
            moved = {view.args[0]: node}
            seen, node = node, self.graph.node_copy(view, lambda n, moved=moved: moved.get(n, n))  # type: ignore[misc]
            before = tensor(first_node(view) or view)
            if tensor(seen).dtype != before.dtype or tensor(seen).stride() != before.stride():
                # The view stood behind a cast, or saw another layout: its value has another dtype or other strides.
                node.meta["val"] = view.target(*map_arg(node.args, lambda n: n.meta["val"]))  # type: ignore[operator]
        return node

    def _contiguous_copy(self, node: Node) -> Node:
        copy = self.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        copy.meta = {"val": torch.empty_like(tensor(node), memory_format=torch.contiguous_format)}
        return copy

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def _describe(self, fused: Node, norm_out: Node, summed: Node, site: int, match: Match, like: Node) -> None:
        """Metadata of the new nodes: shapes for later passes, provenance for people."""
        values = (_contiguous(match.norm.out, like), _contiguous(match.sum or like, like, fresh=match.sum is None))
        start = match.all_reduce.start.meta
        provenance = {key: start[key] for key in _PROVENANCE if key in start}
        for node, value in ((fused, values), (norm_out, values[0]), (summed, values[1])):
            node.meta = {**provenance, "val": value}
        fused.meta[SITE] = site

    def finish(self) -> None:
        """Erase what was replaced and what only that needed, the collectives included."""
        dead = [*self.replaced, *self.sums]
        while dead:
            node = dead.pop()
            if node._erased or node.users or node.op == "placeholder":
                continue
            if node in self.owned or _is_pure(node):
                dead += node.all_input_nodes
                self.graph.erase_node(node)
        self.graph.lint()


def _is_pure(node: Node) -> bool:
    """Whether a node of a norm may go when nothing reads it. ``Node.is_impure`` knows more ops, and takes longer."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in ("aten", "prims") and not target._schema.is_mutable
    return node.op == "get_attr" or target is operator.getitem


def _contiguous(replaced: Node, like: Node, *, fresh: bool = False) -> torch.Tensor:
    """The fake tensor of a fused output: that of the node it replaces, unless that is wider or a view.

    :func:`find` takes contiguous ones only. Taking it over is much cheaper than making one,
    and no two nodes may share one: passes tell aliases by the storage of fake tensors.
    """
    value = tensor(replaced)
    if not fresh and value.dtype == tensor(like).dtype and same_shape(replaced, like):
        return value
    return torch.empty_like(tensor(like), memory_format=torch.contiguous_format)
