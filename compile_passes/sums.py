"""What a norm reads, as a sum of terms.

    r + AR(x)      r + (AR(x) + bias)      r + 0.22 * AR(x)      (r + AR(a)) + AR(b)      (AR(x) + y) + r

are sums of two parts: what the ranks add up, and what each adds to that. An all-reduce is linear, so a factor of
its result can be a factor of its input, two of them over one group are one of the sum of their inputs, and what is
added behind them can be added in any order. All of that is true up to rounding, and each change of it is a
:class:`Rounding`.

:func:`last_step` walks from a reduced value to the sum, :func:`read_sum` reads the sum's terms, and :class:`Parts`
writes both parts into a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from . import roles
from .all_reduce import AllReduce
from .norm_ops import NormCall
from .provenance import label
from .reasons import Decline, Reason, Rounding
from .roles import aten, dtype_text, same_shape, shape_text, tensor


@dataclass(frozen=True)
class Sum:
    """The terms of ``node``.

    all_reduces: those that are merged into one, over one group, in graph order.
    steps: the adds, scalings, views and casts between them and ``node``, with ``node`` unless it is a reduced value.
    residuals: what is added to them, in the order of the source.
    call: the engine's op that adds the last of them and normalises the sum, which ``node`` is then a call of.
    plain: nothing is scaled and nothing broadcast.
    """

    node: Node
    all_reduces: tuple[AllReduce, ...]
    steps: frozenset[Node]
    residuals: tuple[Node, ...]
    roundings: tuple[Rounding, ...]
    call: NormCall | None = None
    plain: bool = False

    @property
    def value(self) -> Node | None:
        """The tensor of the sum; None where an engine's op keeps it to itself."""
        return self.node if self.call is None else self.call.sum

    @property
    def factors(self) -> tuple[float, ...]:
        """What each all-reduce's result is multiplied by: in front of the sum, it must be equal on all ranks."""
        return tuple(1.0 if self.plain else self._factor(a.value) for a in self.all_reduces)

    def _factor(self, node: Node) -> float:
        product, end = 1.0, self.node
        while node is not end:
            user = next(iter(node.users))
            if roles.is_add(user) or roles.is_sub(user):
                if user.args[1] is node:
                    product *= roles.factor(user) or 1.0
            elif (scaled := roles.scaled(user)) is not None:
                product *= scaled[1]
            node = user
        return product


def last_step(value: Node, calls: Mapping[Node, NormCall]) -> Node:
    """The last node to which adds and scalings alone lead from ``value``; itself where none does.

    Nothing else reads what lies between, and nothing but views and exact casts stands between two steps. A sum in a
    wider dtype ends the walk, and so does one that an engine's op takes in front of its norm (``calls``).
    """
    last = node = value
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user in calls:
            return user if calls[user].residual is not None else last
        if _is_step(user, node):
            last = user
            if tensor(user).dtype != tensor(value).dtype:
                return last
        elif roles.reshaped(user) is not node and roles.copied_value(user) is not node and not _cast_of_term(user):
            return last
        node = user
    return last


def _is_step(node: Node, term: Node) -> bool:
    if roles.is_add(node) or roles.is_sub(node):
        return True
    scaled = roles.scaled(node)
    return scaled is not None and scaled[0] is term


def _cast_of_term(node: Node) -> bool:
    """Whether a node is an exact cast that only an add reads: a term of a sum in float32."""
    return roles.is_widening(node) and len(node.users) == 1 and roles.is_add(next(iter(node.users)))


def read_sum(node: Node, all_reduces: Sequence[AllReduce], call: NormCall | None = None) -> Sum | Decline:
    """The terms of ``node``, to which :func:`last_step` led from each of ``all_reduces``; or why it has none."""
    reader = _Terms({a.value: a for a in all_reduces}, node, call)
    part = reader.read(node)
    if isinstance(part, Decline):
        return part
    roundings = tuple(dict.fromkeys(reader.roundings))
    return Sum(
        node, tuple(all_reduces), frozenset(reader.steps), tuple(reader.residuals), roundings, call, reader.plain
    )


@dataclass(frozen=True)
class _Part:
    """What a node is made of: something reduced, something added to it, and whether that is broadcast."""

    reduced: bool
    here: bool
    broadcast: bool = False


class _Terms:
    """Reads a sum from its end; what leads to no all-reduce of ``values`` is a term of its own."""

    def __init__(self, values: Mapping[Node, AllReduce], end: Node, call: NormCall | None) -> None:
        self.values, self.call, self.plain = values, call, True
        self.dtype = tensor(next(iter(values))).dtype
        self.steps: set[Node] = set()
        for node in values:
            while node is not end:
                node = next(iter(node.users))
                self.steps.add(node)
        self.residuals: list[Node] = []
        self.roundings: list[Rounding] = []

    def read(self, node: Node) -> _Part | Decline:
        if node in self.values:
            return _Part(reduced=True, here=False)
        if self.call is not None and node is self.call.node:
            return self._add(node, self.call.x, self.call.residual, 1.0, like=self.call.x)
        if roles.is_add(node) or roles.is_sub(node):
            left, right = roles.arguments(node)[:2]
            return self._add(node, left, right, roles.factor(node), like=node)
        scaled = roles.scaled(node)
        self.plain = self.plain and scaled is None
        if scaled is None:
            return self.read(node.args[1] if roles.calls(node, aten.copy.default) else node.args[0])  # type: ignore[arg-type]
        part = self.read(scaled[0])
        declined = self._scale(node, scaled[1]) if isinstance(part, _Part) else None
        return declined or part

    def _add(self, node: Node, left: object, right: object, factor: float | None, *, like: Node) -> _Part | Decline:
        if left is right:
            return Decline(
                Reason.RESIDUAL_IS_REDUCED, f"{label(node)} adds the reduced value to itself; there is no residual"
            )
        parts = []
        for operand in (left, right):
            part = self._operand(node, operand, like)
            if isinstance(part, Decline):
                return part
            parts.append(part)
        first, second = parts
        self.plain = self.plain and factor == 1 and not any(p.here and p.broadcast for p in parts)
        if factor is None:
            return Decline(Reason.ADD_ALPHA, f"{label(node)} scales an operand by a value of the graph")
        if second.reduced:
            declined = self._scale(node, factor)
            if declined is not None:
                return declined
        elif not _is_exact(factor, self.dtype):
            self.roundings.append(Rounding.SCALED)
        if first.reduced and second.reduced:
            self.roundings.append(Rounding.MERGED)
        if first.here and second.here:
            bias = first.broadcast or second.broadcast
            self.roundings.append(Rounding.BIAS if bias else Rounding.RESIDUALS)
        return _Part(True, first.here or second.here, not any(p.here and not p.broadcast for p in parts))

    def _operand(self, node: Node, operand: object, like: Node) -> _Part | Decline:
        if not roles.is_tensor(operand):
            return Decline(Reason.RESIDUAL_KIND, f"{label(node)} adds {operand!r}, which is no tensor")
        wide = tensor(like).dtype != self.dtype
        if operand in self.steps or operand in self.values:
            part = self.read(operand)
            if isinstance(part, _Part) and not same_shape(operand, like):
                return Decline(
                    Reason.RESIDUAL_SHAPE,
                    f"{label(node)} has shape {shape_text(like)} and the reduced value {shape_text(operand)}; "
                    "the kernels do not broadcast",
                )
            return part
        source = roles.cast_input(operand) if wide and roles.is_widening(operand) else None
        leaf = source if source is not None else operand  # of a float32 sum: the value before its exact upcast
        if tensor(leaf).dtype != self.dtype:
            return Decline(
                Reason.RESIDUAL_DTYPE,
                f"residual {label(leaf)} is {dtype_text(tensor(leaf).dtype)} and the reduced value "
                f"{dtype_text(self.dtype)}; the kernels read both as one dtype",
            )
        if tensor(leaf).device != tensor(like).device:
            return Decline(Reason.RESIDUAL_KIND, f"residual {label(leaf)} is on {tensor(leaf).device}")
        self.residuals.append(leaf)
        return _Part(reduced=False, here=True, broadcast=not same_shape(leaf, like))

    def _scale(self, node: Node, factor: float) -> Decline | None:
        """Notes that a reduced term is scaled, or says why the input of its all-reduce may not be."""
        if not math.isfinite(factor) or (self.dtype is torch.float16 and abs(factor) > 1):
            return Decline(
                Reason.SCALE_RANGE,
                f"{label(node)} scales the reduced value by {factor:g}; scaled before the sum, partial values could "
                f"overflow {dtype_text(self.dtype)}",
            )
        if not _is_exact(factor, self.dtype):
            self.roundings.append(Rounding.SCALED)
        return None


def _is_exact(factor: float, dtype: torch.dtype) -> bool:
    """Whether a product with ``factor`` is exact; float16 is seldom far from its subnormals."""
    return abs(factor) == 1 or (dtype is not torch.float16 and math.frexp(abs(factor))[0] == 0.5)


class Parts:
    """Writes a sum's two parts into ``graph``, at its insertion point.

    reduced: the node for the input of an all-reduce, in the shape of its value. other: the node, or the number, for
    any other that is read: a residual, a size. Every node has ``val`` metadata, and every new one gets some.
    """

    def __init__(
        self, graph: Graph, summed: Sum, reduced: Callable[[AllReduce], Node], other: Callable[[Node], Node]
    ) -> None:
        self.graph, self.sum = graph, summed
        self.values = {a.value: a for a in summed.all_reduces}
        self.reduced, self.other = reduced, other

    def write(self) -> tuple[Node, Node | None]:
        """``(what the ranks add up, what is added to it)``, both in the shape of the sum; None: nothing is."""
        over_ranks, here = self._of(self.sum.node)
        assert over_ranks is not None, "a sum has an all-reduce"
        return over_ranks, self._whole(here, over_ranks)

    def _of(self, node: Node) -> tuple[Node | None, Node | None]:
        if node in self.values:
            return self.reduced(self.values[node]), None
        if node not in self.sum.steps:
            return None, self.other(node if node in self.sum.residuals else roles.cast_input(node) or node)
        call = self.sum.call
        if call is not None and node is call.node:
            left, right = self._of(call.x), self._of(call.residual)  # type: ignore[arg-type]
            return self._added(None, left[0], right[0]), self._added(None, left[1], right[1])
        if roles.is_add(node) or roles.is_sub(node):
            left, right = (self._of(operand) for operand in roles.arguments(node)[:2])
            return self._added(node, left[0], right[0]), self._added(node, left[1], right[1])
        if roles.calls(node, aten.copy.default) or roles.cast_input(node) is not None:
            return self._of(roles.arguments(node)[roles.calls(node, aten.copy.default)])
        scaled = roles.scaled(node)
        source = scaled[0] if scaled is not None else roles.arguments(node)[0]
        over_ranks, here = self._of(source)
        if scaled is None and over_ranks is not None:
            here = self._whole(here, over_ranks)
        return tuple(p if p is None else self._applied(node, source, p) for p in (over_ranks, here))  # type: ignore[return-value]

    def _added(self, add: Node | None, left: Node | None, right: Node | None) -> Node | None:
        """``add`` of other operands; None: the plain add of an engine's op."""
        factor = roles.factor(add) if add is not None else 1
        if right is None:
            return left
        if left is None:
            if factor == 1:
                return right
            return self._call(aten.neg.default, right) if factor == -1 else self._call(aten.mul.Tensor, right, factor)
        return self._call(add.target if add else aten.add.Tensor, left, right, **(add.kwargs if add else {}))

    def _applied(self, step: Node, source: Node, part: Node) -> Node:
        """A view or a scaling of the source, of ``part`` instead."""
        if roles.scaled(step) is None and not tensor(part).is_contiguous():  # not every view can be taken
            part = self._call(aten.clone.default, part, memory_format=torch.contiguous_format)
        args = map_arg(step.args, lambda n: part if n is source else self.other(n))
        return self._call(step.target, *args, **step.kwargs)

    def _whole(self, part: Node | None, like: Node) -> Node | None:
        """``part`` in the shape of ``like``: a bias is broadcast over the tokens."""
        if part is None or self.sum.plain or same_shape(part, like):
            return part
        sizes = [
            d if isinstance(d, int) else self._call(aten.sym_size.int, like, i)
            for i, d in enumerate(tensor(like).shape)
        ]
        return self._call(aten.expand.default, part, sizes)

    def _call(self, target: object, *args: object, **kwargs: object) -> Node:
        node = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        values: Any = map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[type-var]
        node.meta["val"] = target(*values[0], **values[1])  # type: ignore[operator]
        return node
