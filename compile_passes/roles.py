"""The role each ATen op plays around an all-reduce.

Recognition is by role, not by traced pattern: the same residual add and
RMSNorm reach us as ``aten._to_copy`` or ``prims.convert_element_type``, as
``pow``, ``square`` or ``x * x``, as ``mean`` or ``sum / H``. This module is the
vocabulary; :mod:`norms` and :mod:`find` are the grammar. Every function answers
one question about one node and never looks further than its arguments.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime.errors import GraphMetadataError

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional

_OF_SHAPE = (
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
    aten._assert_tensor_metadata.default,
)

#: Ops that hand on the values of their first argument, perhaps in another shape, and launch nothing.
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.detach.default,
}
#: A view too, where it keeps the dtype: vLLM's embedding ends with one.
SAME_DTYPE = aten.view.dtype
#: Ops that hand on the values of their first argument in memory of their own.
COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
}
CASTS = {aten._to_copy.default, prims.convert_element_type.default, aten.to.dtype}
_HANDING_ON = (*VIEWS, *COPIES)

#: Bits of mantissa; a cast that does not lower them keeps every value exactly.
_MANTISSA = {
    torch.bfloat16: 7,
    torch.float16: 10,
    torch.float32: 23,
    torch.float64: 52,
}


def calls(node: object, *targets: object) -> TypeGuard[Node]:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments, whose types the op's schema says and FX's union does not."""
    return node.args


def argument(node: Node, index: int, name: str) -> Any:
    """One argument that the schema has no default for, wherever it was written. To read a whole schema takes longer."""
    return node.args[index] if len(node.args) > index else node.kwargs[name]


def asks_for_shape(node: Node) -> bool:
    """Whether it asks about the shape of a tensor, which none of its elements decides, and is no work of its device."""
    return calls(node, *_OF_SHAPE)


def first_node(node: Node) -> Node | None:
    """The first positional argument, if it is a node."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, Node) else None


def bound_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an op's call by the names in its schema, with its defaults; empty for what is no op."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | dict(zip([argument.name for argument in schema], node.args, strict=False)) | node.kwargs


def tensor(node: Node) -> torch.Tensor:
    """The fake tensor that describes ``node``'s value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise GraphMetadataError(
            f"node '{node.name}' ({node.target}) has no tensor in meta['val']; run the passes on a graph "
            "from aot_autograd or make_fx, or propagate fake tensors through it first"
        )
    return value


def is_tensor(node: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equality that never adds a guard: unknown counts as different."""
    if type(a) is int and type(b) is int:
        return a == b
    return statically_known_true(a == b)


def same_shape(a: Node, b: Node) -> bool:
    first, second = tensor(a), tensor(b)
    left, right = first.shape, second.shape
    if not (first._has_symbolic_sizes_strides or second._has_symbolic_sizes_strides):
        return left == right
    return len(left) == len(right) and all(map(same_size, left, right))


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a fake tensor is contiguous, without a guard: unknown counts as not."""
    return is_contiguous_or_false(value) if value._has_symbolic_sizes_strides else value.is_contiguous()


def shape_text(node: Node) -> str:
    return "[" + ", ".join(str(d) for d in tensor(node).shape) + "]"


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def view_input(node: object) -> Node | None:
    """The input of a reshape-like op that keeps rows whole (same last dimension)."""
    if not _hands_on(node):
        return None
    source = node.args[0]
    if not is_tensor(source) or tensor(source).ndim == 0 or tensor(node).ndim == 0:
        return None
    keeps_rows = same_size(tensor(source).shape[-1], tensor(node).shape[-1])
    return source if keeps_rows else None


def reshaped(node: object) -> Node | None:
    """The input of a view or copy, whatever shape it gives the same elements."""
    if not _hands_on(node):
        return None
    source = node.args[0]
    return source if is_tensor(source) else None


def _hands_on(node: object) -> TypeGuard[Node]:
    if not calls(node, SAME_DTYPE):
        return calls(node, *_HANDING_ON)
    source = node.args[0]
    return is_tensor(source) and tensor(source).dtype == tensor(node).dtype


def cast_input(node: object) -> Node | None:
    """The input of a dtype conversion on the same device."""
    if not calls(node, *CASTS):
        return None
    source = node.args[0]
    if is_tensor(source) and tensor(source).device == tensor(node).device:
        return source
    return None


def coarsest(nodes: Iterable[Node]) -> torch.dtype | None:
    """The dtype with the fewest bits of mantissa among the nodes'; None if one is no plain float."""
    dtypes = {tensor(node).dtype for node in nodes}
    return min(dtypes, key=_MANTISSA.__getitem__) if dtypes <= _MANTISSA.keys() else None


def is_widening(node: Node) -> bool:
    """Whether a cast keeps every value (bfloat16 or float16 to float32, say)."""
    source = cast_input(node)
    if source is None:
        return False
    old, new = tensor(source).dtype, tensor(node).dtype
    if old == new:
        return True
    if {old, new} == {torch.bfloat16, torch.float16}:
        return False  # neither range nor precision contains the other
    return old in _MANTISSA and new in _MANTISSA and _MANTISSA[old] < _MANTISSA[new]


def copied_value(node: object) -> Node | None:
    """``src`` of ``aten.copy(dst, src)`` when it is no broadcast and no cast.

    In-place ``dist.all_reduce`` leaves this node behind when AOT makes the graph
    functional.
    """
    if not calls(node, aten.copy.default):
        return None
    source = node.args[1]
    if is_tensor(source) and same_shape(source, node) and tensor(source).dtype == tensor(node).dtype:
        return source
    return None


def origin(node: Node) -> Node:
    """``node`` without the views and exact casts on top of it."""
    while True:
        source = view_input(node) or copied_value(node)
        if source is None and is_widening(node):
            source = cast_input(node)
        if source is None:
            return node
        node = source


def as_number(value: object) -> float | None:
    """A Python number, or the one in a constant tensor whose dtype is wide enough to keep it."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if calls(value, aten.scalar_tensor.default, aten.full.default):
        if tensor(value).dtype not in (torch.float32, torch.float64):
            return None
        return as_number(value.args[-1] if value.target is aten.full.default else value.args[0])
    return None


def binary(node: object, *targets: object) -> tuple[object, object] | None:
    """Both operands of an unscaled binary op (``alpha`` must be 1)."""
    if not calls(node, *targets) or len(node.args) < 2 or alpha(node) != 1:
        return None
    return node.args[0], node.args[1]


def alpha(node: Node) -> object:
    """What an add scales its second operand by: a keyword of ``add.Tensor``, positional in ``add.Scalar``."""
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)


def factor(node: Node) -> float | None:
    """What an add or a subtraction scales its second operand by; None when that is a value of the graph."""
    number = as_number(alpha(node))
    return -number if number is not None and is_sub(node) else number


def is_add(node: object) -> TypeGuard[Node]:
    return calls(node, aten.add.Tensor, aten.add.Scalar)


def is_sub(node: object) -> TypeGuard[Node]:
    return calls(node, aten.sub.Tensor, aten.sub.Scalar)


def scaled(node: object) -> tuple[Node, float] | None:
    """``(x, c)`` of ``x * c``, ``x / c`` or ``-x``, where c is a number and the dtype is kept."""
    if calls(node, aten.neg.default):
        return (node.args[0], -1.0) if is_tensor(node.args[0]) else None
    pair = mul_operands(node)
    pairs = (pair, pair[::-1]) if pair else ()
    quotient = binary(node, aten.div.Tensor, aten.div.Scalar)
    for x, c in (*pairs, *((quotient,) if quotient else ())):
        number = constant(c)
        if number is not None and is_tensor(x) and tensor(x).dtype == tensor(node).dtype:  # type: ignore[arg-type]
            if quotient is None:
                return x, number
            return x, 1 / number if number else math.inf
    return None


def constant(value: object) -> float | None:
    """A number, or the one in a constant tensor without dimensions, of any floating dtype."""
    if calls(value, aten.scalar_tensor.default, aten.full.default) and tensor(value).ndim == 0:
        number = value.args[-1] if value.target is aten.full.default else value.args[0]
        return as_number(number)
    if calls(value, aten.lift_fresh_copy.default, *CASTS) and is_tensor(value) and tensor(value).ndim == 0:
        return constant(value.args[0])
    if isinstance(value, Node) and value.op == "get_attr":
        held = getattr(value.graph.owning_module, str(value.target), None)
        if isinstance(held, torch.Tensor) and held.ndim == 0 and held.is_floating_point() and held.device.type == "cpu":
            with _disable_current_modes():  # AOT compiles under a fake mode, and this is the number itself
                return float(held) if type(held) is torch.Tensor else None
        return None
    return as_number(value)


def mul_operands(node: object) -> tuple[object, object] | None:
    return binary(node, aten.mul.Tensor, aten.mul.Scalar)


def squared(node: object) -> Node | None:
    """``x`` of ``x ** 2``, ``square(x)`` or ``x * x``."""
    if calls(node, aten.pow.Tensor_Scalar) and as_number(node.args[1]) == 2.0:
        return first_node(node)
    if calls(node, aten.square.default):
        return first_node(node)
    pair = mul_operands(node)
    if pair and is_tensor(pair[0]) and is_tensor(pair[1]) and same_value(pair[0], pair[1]):
        return pair[0]
    return None


def same_value(a: Node, b: Node) -> bool:
    """Whether two nodes hold the same tensor, perhaps through separate exact casts of it."""
    return a is b or (origin(a) is origin(b) and same_shape(a, b) and tensor(a).dtype == tensor(b).dtype)


def without_column(node: Node) -> Node:
    """``node`` before ``unsqueeze(-1)``, which only gives a row statistic its column back."""
    if calls(node, aten.unsqueeze.default) and is_tensor(node.args[0]):
        inner = node.args[0]
        if node.args[1] in (-1, tensor(inner).ndim):
            return inner
    return node


def square_root(node: object) -> Node | None:
    if calls(node, aten.sqrt.default):
        return first_node(node)
    if calls(node, aten.pow.Tensor_Scalar) and as_number(node.args[1]) == 0.5:
        return first_node(node)
    return None


def reciprocal_root(node: object) -> Node | None:
    """``v`` of ``rsqrt(v)``, ``v ** -0.5``, ``reciprocal(sqrt(v))`` or ``1 / sqrt(v)``."""
    if calls(node, aten.rsqrt.default):
        return first_node(node)
    if calls(node, aten.pow.Tensor_Scalar) and as_number(node.args[1]) == -0.5:
        return first_node(node)
    if calls(node, aten.reciprocal.default):
        return square_root(node.args[0])
    pair = binary(node, aten.div.Tensor)
    if pair and as_number(pair[0]) == 1.0:
        return square_root(pair[1])
    pair = mul_operands(node)
    if pair:  # how `1 / t` on a Python one is traced: reciprocal(t) * 1
        for one, other in (pair, pair[::-1]):
            if as_number(one) == 1.0 and calls(other, aten.reciprocal.default):
                return square_root(other.args[0])
    return None


def first_output(node: Node) -> Node | None:
    """The one ``getitem(node, 0)`` of a multi-output op."""
    items = [u for u in node.users if calls(u, operator.getitem) and u.args[1] == 0]
    return items[0] if len(items) == 1 else None
