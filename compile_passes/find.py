"""Find: every all-reduce of a graph becomes a :class:`Site`.

The walk starts at the collective, not at the norm, so that an all-reduce which
nothing fuses is still in the report, with the reason.

    partial -> all_reduce -> [wait, copy, views] -> [+ residual] -> RMSNorm

:func:`find` changes nothing. It returns one :class:`Candidate` per all-reduce: the
Site that the report prints and, where the site can be fused, the nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from . import roles
from .all_reduce import AllReduce, GroupOf, recognise_all_reduce
from .norms import Norm, recognise_rms_norm
from .provenance import module_of, source_of
from .reasons import Decline, Reason, Rounding
from .roles import aten, dtype_text, shape_text, tensor

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Kind(StrEnum):
    """What the fused op computes at a site."""

    ADD_NORM = "all_reduce_add_rms_norm"
    NORM = "all_reduce_rms_norm"


@dataclass(frozen=True)
class Site:
    """One all-reduce of the graph and what became of it.

    ``kind`` is None when no norm was recognised; ``decline`` is None when the site
    is fused. ``dtype`` is the activation dtype; ``hidden_size`` the length of the
    normalised dimension. ``source`` is ``file:line`` of the user's code, ``module``
    the path of the ``nn.Module``.
    """

    index: int
    node: str
    kind: Kind | None
    decline: Decline | None
    group: str | None
    dtype: str
    hidden_size: int | None
    eps: float | None
    has_residual: bool
    source: str | None
    module: str | None
    roundings: tuple[Rounding, ...] = ()

    @property
    def fused(self) -> bool:
        return self.decline is None

    @property
    def message(self) -> str:
        if self.decline is not None:
            return self.decline.message
        return "; ".join(self.roundings)


@dataclass(frozen=True)
class Match:
    """The nodes that one fused op replaces.

    ``sum`` is the node of the residual add, or the reduced value when there is no
    residual; ``residual`` is None in that case.
    """

    all_reduce: AllReduce
    sum: Node
    residual: Node | None
    norm: Norm

    @property
    def anchor(self) -> Node:
        """The node behind which the fused op will stand: the residual may be computed after the all-reduce."""
        return self.sum.prev if self.residual is not None else self.all_reduce.value

    @property
    def late_weight(self) -> list[Node]:
        """The weight and what it is computed from, as far as they stand behind :attr:`anchor`; in graph order."""
        late: set[Node] = set()
        queue = [self.norm.weight] if self.norm.weight is not None else []
        while queue:
            node = queue.pop()
            if node not in late and self.anchor < node:
                late.add(node)
                queue.extend(node.all_input_nodes)
        return sorted(late)


@dataclass(frozen=True)
class Candidate:
    site: Site
    match: Match | None


def find(
    gm: GraphModule,
    *,
    strict: bool = False,
    groups: Collection[str] | None = None,
    all_reduce_ops: Mapping[str, GroupOf] | None = None,
) -> list[Candidate]:
    """One candidate for every all-reduce of a functional ATen graph, in graph order.

    ``strict`` declines a site whose source rounds differently from the fused op.
    ``groups``, when given, are the names of the process groups to fuse over.
    ``all_reduce_ops`` maps an engine's own op (``"namespace::name"``) to the group it
    reduces over, to a mapping from the names that it takes to groups, or to None when the
    op takes the group's name as an argument.

    Raises :class:`GraphMetadataError` for nodes without ``val`` metadata.
    """
    recognised = {node: recognise_all_reduce(node, all_reduce_ops or {}) for node in gm.graph.nodes}
    all_reduces = {node: found for node, found in recognised.items() if found is not None}
    claimed: set[Node] = set()
    candidates: list[Candidate] = []
    for node, all_reduce in all_reduces.items():
        found = all_reduce if isinstance(all_reduce, Decline) else _match(all_reduce, groups)
        if isinstance(found, Match):
            found = _policy(found, strict, claimed, all_reduces)
        site = _site(len(candidates), node, all_reduce, found)
        match = found if isinstance(found, Match) else None
        if match is not None:
            claimed |= {match.sum, match.norm.out}
        candidates.append(Candidate(site, match))
    return candidates


def _site(index: int, node: Node, all_reduce: AllReduce | Decline, found: Match | Decline) -> Site:
    group = all_reduce.group if isinstance(all_reduce, AllReduce) else None
    value = all_reduce.input if isinstance(all_reduce, AllReduce) else node
    described = tensor(value) if roles.is_tensor(value) else None
    last = described.shape[-1] if described is not None and described.ndim else None
    match = found if isinstance(found, Match) else None
    return Site(
        index=index,
        node=node.name,
        kind=None if match is None else Kind.NORM if match.residual is None else Kind.ADD_NORM,
        decline=found if isinstance(found, Decline) else None,
        group=group if isinstance(group, str) else None,
        dtype=dtype_text(described.dtype) if described is not None else "unknown",
        hidden_size=last if isinstance(last, int) else None,
        eps=match.norm.eps if match is not None else None,
        has_residual=match is not None and match.residual is not None,
        source=source_of(node),
        module=module_of(node),
        roundings=match.norm.roundings if match is not None else (),
    )


# -- what surrounds it -----------------------------------------------------------


def _match(all_reduce: AllReduce, groups: Collection[str] | None) -> Match | Decline:
    declined = _usable(all_reduce, groups)
    if declined is not None:
        return declined
    value = all_reduce.value
    dtype = tensor(value).dtype
    users = list(value.users)
    add = users[0] if len(users) == 1 else None
    if add is not None and roles.cast_input(add) is value and roles.is_widening(add) and len(add.users) == 1:
        wide_add = next(iter(add.users))
        if roles.is_add(wide_add):  # the float32-residual spelling
            return _add_norm(all_reduce, wide_add, add, dtype)
    if add is not None and roles.is_add(add):
        return _add_norm(all_reduce, add, value, dtype)
    norm = recognise_rms_norm(value, dtype)
    if isinstance(norm, Norm):
        return Match(all_reduce, value, None, norm)
    if len(users) > 1 and any(map(roles.is_add, users)):
        others = ", ".join(f"'{u.name}' ({u.target})" for u in users if not roles.is_add(u))
        return Decline(
            Reason.VALUE_USED_ELSEWHERE,
            f"the reduced value '{value.name}' is also read by {others or 'a second add'}; "
            "the fused op returns only the sum with the residual",
        )
    if norm.reason is Reason.NO_NORM and add is not None:
        if roles.calls(add, aten.sub.Tensor):
            return Decline(Reason.OP_BETWEEN, f"'{add.name}' subtracts; the fused op adds the residual")
        return Decline(
            Reason.OP_BETWEEN, f"'{add.name}' ({add.target}) stands between the all-reduce and an add or RMSNorm"
        )
    return norm


def _usable(all_reduce: AllReduce, groups: Collection[str] | None) -> Decline | None:
    start, value = all_reduce.start, all_reduce.value
    if all_reduce.op.lower() != "sum":
        return Decline(Reason.REDUCE_OP, f"'{start.name}' reduces with '{all_reduce.op}'; the fused kernels sum")
    if not isinstance(all_reduce.group, str):
        return Decline(
            Reason.GROUP_KIND,
            f"the group of '{start.name}' is {type(all_reduce.group).__name__}, not a name; "
            "turn torch.distributed.config.compile_on_one_rank off, or name the group in all_reduce_ops",
        )
    if groups is not None and all_reduce.group not in groups:
        return Decline(
            Reason.OTHER_GROUP,
            f"'{start.name}' reduces over group '{all_reduce.group}', and only {sorted(groups)} are to be fused",
        )
    users = list(value.users)
    if not users:
        return Decline(Reason.UNUSED, f"nothing reads the reduced value '{value.name}'")
    if all(u.op == "output" for u in users):
        return Decline(
            Reason.ESCAPES_GRAPH,
            f"the reduced value '{value.name}' leaves the graph; if a norm follows in the model, a graph break "
            "separates them (TORCH_LOGS=graph_breaks shows it)",
        )
    shape = tensor(value).shape
    if not shape or not isinstance(shape[-1], int):
        return Decline(Reason.HIDDEN_SIZE_DYNAMIC, f"the last dimension of '{value.name}' is not a fixed size")
    if tensor(value).dtype not in _KERNEL_DTYPES:
        return Decline(
            Reason.ACTIVATION_DTYPE,
            f"'{value.name}' is {dtype_text(tensor(value).dtype)}; the kernels take float16, bfloat16 and float32",
        )
    if len(users) == 1 and roles.cast_input(users[0]) is value and not roles.is_widening(users[0]):
        return Decline(
            Reason.REDUCE_DTYPE,
            f"'{start.name}' reduces in {dtype_text(tensor(value).dtype)} and the model goes on in "
            f"{dtype_text(tensor(users[0]).dtype)}; reduce in the activation dtype to fuse",
        )
    return None


def _add_norm(all_reduce: AllReduce, add: Node, term: Node, dtype: torch.dtype) -> Match | Decline:
    residual = _residual(add, term, dtype)
    if isinstance(residual, Decline):
        return residual
    norm = recognise_rms_norm(add, dtype)
    if tensor(add).dtype != dtype:  # summed in float32; the norm reads that sum, or the rounded one
        rounded = [u for u in add.users if roles.cast_input(u) is add and tensor(u).dtype == dtype]
        if isinstance(norm, Norm):
            norm = replace(norm, roundings=(*norm.roundings, Rounding.FLOAT32_RESIDUAL))
        elif rounded:
            norm = recognise_rms_norm(rounded[0], dtype)
        stray = _escape(add, norm.out, rounded) if isinstance(norm, Norm) else None
        if stray is not None:
            return Decline(
                Reason.FLOAT32_SUM_USED_ELSEWHERE,
                f"the unrounded sum '{add.name}' also reaches '{stray.name}'; the fused op returns it "
                f"rounded to {dtype_text(dtype)}",
            )
    if isinstance(norm, Decline):
        return norm
    return Match(all_reduce, add, residual, norm)


def _escape(add: Node, out: Node, rounded: Collection[Node]) -> Node | None:
    """A node that depends on the sum, but neither through the norm nor through its rounding."""
    needed, queue = set(), [out]
    while queue:
        node = queue.pop()
        if node not in needed and node is not add:
            needed.add(node)
            queue.extend(node.all_input_nodes)
    seen, queue = set(), [add]
    while queue:
        for user in queue.pop().users:
            if user not in needed and user not in rounded:
                return user
            if user is not out and user not in rounded and user not in seen:
                seen.add(user)
                queue.append(user)
    return None


def _residual(add: Node, term: Node, dtype: torch.dtype) -> Node | Decline:
    """The other operand of the add, if the kernels can take it as the residual."""
    left, right = add.args[:2]
    if left is right:
        return Decline(
            Reason.RESIDUAL_IS_REDUCED, f"'{add.name}' adds the reduced value to itself; there is no residual"
        )
    other = right if left is term else left
    if roles.alpha(add) != 1:
        return Decline(Reason.ADD_ALPHA, f"'{add.name}' scales its second operand by alpha={roles.alpha(add)}")
    if not roles.is_tensor(other):
        return Decline(Reason.RESIDUAL_KIND, f"'{add.name}' adds {other!r}, which is no tensor")
    if tensor(add).dtype != dtype:  # float32 sum: the residual is the value before its exact upcast
        source = roles.cast_input(other)
        if source is not None and roles.is_widening(other):
            other = source
    if tensor(other).dtype != dtype:
        return Decline(
            Reason.RESIDUAL_DTYPE,
            f"residual '{other.name}' is {dtype_text(tensor(other).dtype)} and the reduced value {dtype_text(dtype)}; "
            "the kernels read both as one dtype",
        )
    if not (roles.same_shape(other, term) and roles.same_shape(other, add)):
        return Decline(
            Reason.RESIDUAL_SHAPE,
            f"residual '{other.name}' has shape {shape_text(other)} and the reduced value {shape_text(term)}; "
            "the kernels do not broadcast",
        )
    if tensor(other).device != tensor(term).device:
        return Decline(Reason.RESIDUAL_KIND, f"residual '{other.name}' is on {tensor(other).device}")
    return other


# -- policy ----------------------------------------------------------------------


def _policy(match: Match, strict: bool, claimed: Collection[Node], all_reduces: Collection[Node]) -> Match | Decline:
    if match.sum in claimed or match.norm.out in claimed:
        return Decline(
            Reason.CLAIMED, f"the norm at '{match.norm.out.name}' is fused with an earlier all-reduce of the same sum"
        )
    late = match.late_weight
    reduced = _ancestor_among(late, all_reduces)
    if reduced is not None:
        return Decline(
            Reason.WEIGHT_NOT_READY,
            f"weight '{late[-1].name}' is computed from '{reduced.name}', behind '{match.sum.name}', where the fused "
            "op needs it",
        )
    for node in (match.sum, match.norm.out):
        if not is_contiguous_or_false(tensor(node)):
            return Decline(
                Reason.LAYOUT,
                f"'{node.name}' has strides {list(tensor(node).stride())}, and what reads it was traced with them; the "
                "fused op returns contiguous tensors: make the residual contiguous",
            )
    if strict and match.norm.roundings:
        return Decline(Reason.ROUNDING_DIFFERS, f"{'; '.join(match.norm.roundings)} (numerics='strict')")
    mutation = _mutation_between(match.all_reduce.start, late[-1] if late else match.sum)
    if mutation is not None:
        return Decline(
            Reason.MUTATION_BETWEEN,
            f"'{mutation.name}' ({mutation.target}) mutates a tensor between the all-reduce and "
            f"'{match.norm.out.name}', so they may not move past it",
        )
    return match


def _ancestor_among(nodes: Collection[Node], wanted: Collection[Node]) -> Node | None:
    """The first of ``wanted`` that ``nodes`` are computed from."""
    seen, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node in wanted:
            return node
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return None


def _mutation_between(first: Node, last: Node) -> Node | None:
    node = first.next
    while node is not last and node.op != "root":
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return node
        node = node.next
    return None
