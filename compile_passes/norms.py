"""Recognise an RMSNorm by what its nodes do.

    y = x * rsqrt(mean(x ** 2, -1) + eps) * (bias + weight)

in any spelling: the whole op, or a chain with casts, views and operands in any
order. The walk starts at the value that is normalised and goes outwards to the
last node that is still part of the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from . import roles
from .norm_ops import NormCall
from .provenance import label
from .reasons import Decline, Reason, Rounding
from .roles import aten, dtype_text, same_size, shape_text, tensor


@dataclass(frozen=True)
class Norm:
    """A recognised RMSNorm. ``views`` lead from the value to the norm's input."""

    out: Node
    weight: Node | None
    weight_bias: float
    eps: float
    roundings: tuple[Rounding, ...]
    views: tuple[Node, ...]
    call: Node | None = None  # of the engine's op that computes it


@dataclass(frozen=True)
class _Reader:
    """A view or exact cast of the value, through which the norm may read it."""

    node: Node
    views: tuple[Node, ...]


def recognise_rms_norm(
    value: Node, dtype: torch.dtype, calls: Mapping[Node, NormCall | str] | None = None
) -> Norm | Decline:
    """The RMSNorm over the last dimension that reads ``value``.

    ``dtype`` is the activation dtype, in which the norm must leave. ``calls``: those of engines' norm ops. Of several
    norms the first in graph order is taken. When there is none, the answer is the
    near miss that says most.
    """
    misses: list[Decline] = []
    for reader in _readers(value):
        for user in reader.node.users:
            core = _engine_op(user, reader, calls or {}) or _whole_op(user, reader) or _chain(user, reader, value)
            found = _grow(core, reader, dtype) if isinstance(core, _Core) else core
            if isinstance(found, Norm):
                return found
            if found is not None:
                misses.append(found)
    if misses:
        return misses[0]
    if _less_its_mean(value):
        return Decline(Reason.LAYER_NORM, f"{label(value)} is read less its mean: a LayerNorm; the fused op is RMSNorm")
    users = ", ".join(sorted({str(u.target) for u in value.users})) or "nothing"
    return Decline(
        Reason.NO_NORM,
        f"no RMSNorm over the last dimension reads {label(value)}, in a spelling that is known; it is read by {users}",
    )


def _less_its_mean(value: Node) -> bool:
    """Whether a mean of the value is subtracted from it, as in a LayerNorm that is written out."""
    for reader in _readers(value):
        for user in reader.node.users:
            pair = roles.binary(user, aten.sub.Tensor)
            if pair and pair[0] is reader.node and roles.calls(pair[1], aten.mean.dim):
                return True
    return False


def _readers(value: Node) -> Iterator[_Reader]:
    queue = [_Reader(value, ())]
    while queue:
        reader = queue.pop(0)
        yield reader
        for user in reader.node.users:
            if roles.view_input(user) is reader.node:
                queue.append(_Reader(user, (*reader.views, user)))
            elif roles.cast_input(user) is reader.node and roles.is_widening(user):
                queue.append(_Reader(user, reader.views))


# -- the whole op ----------------------------------------------------------------


def _engine_op(node: Node, reader: _Reader, calls: Mapping[Node, NormCall | str]) -> _Core | Decline | None:
    call = calls.get(node)
    if isinstance(call, str):
        return Decline(Reason.NORM_OP, f"{label(node)}: {call}")
    if call is None or call.x is not reader.node or call.residual is not None:
        return None
    return _core_of(call)


def norm_of_call(call: NormCall, dtype: torch.dtype) -> Norm | Decline:
    """The norm of an engine's op that adds the residual itself."""
    core = _core_of(call)
    return _grow(core, _Reader(call.x, ()), dtype) if isinstance(core, _Core) else core


def _core_of(call: NormCall) -> _Core | Decline:
    if call.norm is None:
        return Decline(Reason.NO_NORM, f"nothing reads the norm of {label(call.node)}")
    return _Core(call.norm, call.eps, torch.float32, call.weight, True, call.row.weight_bias, call.node)


def _whole_op(node: Node, reader: _Reader) -> _Core | Decline | None:
    if roles.calls(node, aten.native_layer_norm.default, aten.layer_norm.default):
        return Decline(Reason.LAYER_NORM, f"{label(node)} is a LayerNorm; the fused kernels compute RMSNorm only")
    if roles.calls(node, aten.var_mean.correction) and node.kwargs.get("correction") == 0:
        return Decline(Reason.LAYER_NORM, f"{label(node)} is the variance of a decomposed LayerNorm, not an RMSNorm")
    if not roles.calls(node, aten.rms_norm.default, aten._fused_rms_norm.default) or node.args[0] is not reader.node:
        return None
    _, normalized_shape, weight, eps = (*roles.arguments(node), None, None)[:4]
    last = tensor(reader.node).shape[-1]
    if len(normalized_shape) != 1 or not same_size(normalized_shape[0], last):
        return Decline(
            Reason.NORM_DIMS, f"{label(node)} normalises over {list(normalized_shape)}, not over the last dimension"
        )
    compute = torch.float64 if tensor(reader.node).dtype is torch.float64 else torch.float32
    if eps is None:  # torch's default, of the dtype that it computes in
        eps = torch.finfo(compute).eps
    if roles.as_number(eps) is None:
        return _eps_of_the_graph(node)
    out = roles.first_output(node) if node.target is aten._fused_rms_norm.default else node
    if out is None or any(u is not out for u in node.users if node is not out):
        return Decline(Reason.NO_NORM, f"the reciprocal root of {label(node)} is used; the fused op does not return it")
    return _Core(out, roles.as_number(eps) or 0.0, compute, weight, weight_absorbed=True)


def _eps_of_the_graph(node: Node) -> Decline:
    return Decline(
        Reason.EPS_KIND,
        f"epsilon of the norm at {label(node)} is a tensor, or another value of the graph, and the kernels take a "
        "number: make it a Python float",
    )


# -- the chain -------------------------------------------------------------------


@dataclass(frozen=True)
class _Core:
    """``x * rsqrt(mean(x ** 2) + eps)``, before the weight unless it is absorbed."""

    out: Node
    eps: float
    compute_dtype: torch.dtype
    weight: object = None
    weight_absorbed: bool = False
    weight_bias: float = 0.0
    call: Node | None = None


@dataclass(frozen=True)
class _MeanSquare:
    """``mean(source ** 2, dims) + eps``; ``nodes`` are those on the way from the square to the factor."""

    source: Node
    dims: tuple[int, ...]
    eps: object
    nodes: tuple[Node, ...]


def _chain(node: Node, reader: _Reader, value: Node) -> _Core | Decline | None:
    x = reader.node
    factor_and_mean = _normalises(node, x)
    if factor_and_mean is None:
        return None
    factor, mean = factor_and_mean
    if roles.origin(mean.source) is not roles.origin(value):
        return Decline(
            Reason.MEAN_OF_OTHER_TENSOR,
            f"{label(node)} scales {label(x)} by the root mean square of {label(mean.source)}, another tensor",
        )
    ndim = tensor(mean.source).ndim
    # One root per row, broadcast over that row: without this, a mean that lost its
    # dimension would scale columns of a square activation.
    shape = tensor(factor).shape
    per_row = len(shape) == tensor(x).ndim and same_size(shape[-1], 1)
    one_per_row = roles.same_shape(mean.source, x) and roles.same_shape(node, x) and per_row
    if tuple(d % ndim for d in mean.dims) != (ndim - 1,) or not one_per_row:
        return Decline(
            Reason.MEAN_DIM,
            f"the mean square of {label(mean.source)} is over {list(mean.dims)} of {shape_text(mean.source)}, "
            f"not one per row of {label(x)}",
        )
    eps = roles.as_number(mean.eps)
    if eps is None:
        return _eps_of_the_graph(node)
    compute = roles.coarsest((mean.source, *mean.nodes, factor, node))
    if compute is None:
        return Decline(Reason.NO_NORM, f"the norm at {label(node)} is not computed in floating point throughout")
    return _Core(node, eps, compute)


def _normalises(node: Node, x: Node) -> tuple[Node, _MeanSquare] | None:
    """The factor of ``x * rsqrt(v)`` or divisor of ``x / sqrt(v)``, and what ``v`` is the mean square of."""
    product, quotient = roles.mul_operands(node), roles.binary(node, aten.div.Tensor)
    if product:
        factor, root_of = (product[1] if product[0] is x else product[0]), roles.reciprocal_root
    elif quotient and quotient[0] is x:
        factor, root_of = quotient[1], roles.square_root
    else:
        return None
    if not roles.is_tensor(factor) or factor is x:
        return None
    inner = roles.without_column(factor)
    inner = roles.without_column(roles.cast_input(inner) or inner)
    root = root_of(inner)
    mean = _mean_square(roles.without_column(root), inner) if root is not None else None
    return (factor, mean) if mean is not None else None


def _mean_square(node: Node, root: Node) -> _MeanSquare | None:
    """What ``root`` is the root of, where that is a mean square."""
    candidates: list[tuple[object, object]] = [(node, 0.0)]
    if roles.is_add(node):
        mean, addend = roles.arguments(node)[:2]
        scaled = roles.alpha(node) != 1
        candidates = [(mean, None if scaled else addend), (addend, None if scaled else mean)]
    for mean, eps in candidates:
        found = _mean(mean)
        if found is not None:
            source, dims, total = found
            return _MeanSquare(source, dims, eps, (total, node, root))
    return None


def _mean(node: object) -> tuple[Node, tuple[int, ...], Node] | None:
    """``(x, dims, reduction)`` of ``mean(x ** 2, dims)``, also spelled ``sum / H``."""
    if isinstance(node, Node):
        node = roles.without_column(node)
    if roles.calls(node, aten.mean.dim):
        square = roles.squared(node.args[0])
        return (square, _dims(node), node) if square is not None and _keeps_precision(node, square) else None
    for total, count in _scaled_sums(node):
        square = roles.squared(total.args[0])
        if square is None or not _keeps_precision(total, square):
            continue
        dims = _dims(total)
        shape = tensor(square).shape
        size = shape[dims[0]] if len(dims) == 1 else None
        if isinstance(size, int) and count == size:
            return square, dims, total
    return None


def _keeps_precision(reduction: Node, square: Node) -> bool:
    """Whether ``dtype=`` of a reduction, if given, is no coarser than what it reduces."""
    return tensor(reduction).dtype in (tensor(square).dtype, torch.float32)


def _dims(reduction: Node) -> tuple[int, ...]:
    """The dimensions that ``mean.dim`` or ``sum.dim_IntList`` reduces; None and [] mean all."""
    dims = roles.argument(reduction, 1, "dim")
    return tuple(dims) if dims else tuple(range(tensor(reduction.args[0]).ndim))  # type: ignore[arg-type]


def _scaled_sums(node: object) -> Iterator[tuple[Node, float]]:
    pair = roles.binary(node, aten.div.Tensor, aten.div.Scalar)
    if pair and roles.calls(pair[0], aten.sum.dim_IntList):
        count = roles.as_number(pair[1])
        if count is not None:
            yield pair[0], count
    pair = roles.mul_operands(node)
    for total, factor in (pair, pair[::-1]) if pair else ():
        inverse = roles.as_number(factor)
        if roles.calls(total, aten.sum.dim_IntList) and inverse and (1 / inverse).is_integer():
            yield total, 1 / inverse


# -- outwards: casts and the weight ----------------------------------------------


def _grow(core: _Core, reader: _Reader, dtype: torch.dtype) -> Norm | Decline:
    """Follow the only reader of the normalised value through casts and one weight.

    The norm ends at the last node that has the activation dtype.
    """
    hidden = tensor(reader.node).shape[-1]
    roundings: list[Rounding] = []
    if core.compute_dtype is not torch.float32:
        roundings.append(Rounding.COMPUTE_DTYPE)
    if core.call is not None:
        roundings.append(Rounding.NORM_OP)
    weight, bias, has_weight = None, core.weight_bias, core.weight_absorbed
    if core.weight is not None:
        found = _weight(core.weight, reader.node, hidden, dtype)
        if isinstance(found, Decline):
            return found
        if found is None:
            return Decline(Reason.WEIGHT_KIND, f"the weight of {label(core.out)} is not a tensor of {hidden} elements")
        weight = found.node

    best: tuple[Node, Node | None, float, tuple[Rounding, ...]] | None = None
    node, narrowed = core.out, False
    while True:
        if tensor(node).dtype == dtype:
            best = node, weight, bias, tuple(roundings)
            if weight is not None:
                break
        if len(node.users) != 1:
            break
        user = next(iter(node.users))
        if roles.cast_input(user) is node:
            if not roles.is_widening(user):
                if tensor(user).dtype not in (dtype, torch.float32):
                    break  # it loses what the fused op would keep: an int, a float8, the other half dtype
                narrowed = True
            node = user
            continue
        pair = roles.mul_operands(user)
        if has_weight or pair is None or pair[0] is pair[1] or not roles.same_shape(user, node):
            break
        found = _weight(pair[1] if pair[0] is node else pair[0], reader.node, hidden, dtype)
        if isinstance(found, Decline) and best is None:
            return found
        if not isinstance(found, _Weight):
            break  # it ends at a gate, a modulation, a weight that the fused op cannot take: what reads it is no norm
        weight, bias, has_weight = found.node, found.bias, True
        if found.bias_rounded:
            roundings.append(Rounding.WEIGHT_BIAS)
        if narrowed or tensor(user).dtype != torch.float32:
            roundings.append(Rounding.BEFORE_WEIGHT)
        node = user
    if best is None:
        return Decline(
            Reason.NORM_DTYPE,
            f"the norm leaves as {dtype_text(tensor(node).dtype)} at {label(node)}; "
            f"the fused op returns {dtype_text(dtype)}",
        )
    out, weight, bias, so_far = best
    return Norm(out, weight, bias, core.eps, so_far, reader.views, core.call)


@dataclass(frozen=True)
class _Weight:
    node: Node
    bias: float
    bias_rounded: bool


def _weight(factor: object, x: Node, hidden: int | torch.SymInt, dtype: torch.dtype) -> _Weight | Decline | None:
    """What multiplies the normalised value, or None when it is no weight (a gate, a scale)."""
    if not roles.is_tensor(factor):
        return None
    node, bias, rounded = factor, 0.0, False
    while True:
        source = roles.view_input(node)
        if source is None and roles.is_widening(node):
            source = roles.cast_input(node)
        if source is None and roles.is_add(node) and not bias and roles.alpha(node) == 1:
            for term, number in (node.args[:2], node.args[1::-1]):
                if isinstance(term, Node) and roles.as_number(term) is None and roles.as_number(number) is not None:
                    source, bias = term, roles.as_number(number) or 0.0
                    rounded = tensor(node).dtype not in (torch.float32, torch.float64)
                    break
        if source is None:
            break
        node = source
    value = tensor(node)
    if value.ndim == 0 or roles.same_shape(node, x):
        return None
    if value.ndim != 1 or not same_size(value.shape[0], hidden):
        return Decline(Reason.WEIGHT_SHAPE, f"weight {label(node)} has shape {shape_text(node)}, not [{hidden}]")
    if value.dtype != dtype:
        return Decline(
            Reason.WEIGHT_DTYPE,
            f"weight {label(node)} is {dtype_text(value.dtype)} and the activations are {dtype_text(dtype)}; "
            "the kernels read both as one dtype",
        )
    return _Weight(node, bias, rounded)
