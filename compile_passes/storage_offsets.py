"""Storage offsets: where a trace and Inductor count from different places.

A trace counts a strided view from the start of its storage. Inductor's code is given a pointer to the first element of
an input, and counts from there. Both are the same place until an input begins inside of other memory, as a slice of a
pool of caches does. Then Inductor reads and writes beside the tensor, and so do its own copies, which it lays out by
the trace. So :func:`begin_at_first_elements` has a piece traced as if each input began where its storage does.

Two more places count from nowhere that holds: :func:`fix_storage_offsets`, :func:`slices_of_their_base`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import clone_preserve_strides
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from .aliases import BY_PLACE, fake_call, root, views_by_place
from .functional import SECOND_FORM, is_functionalised, mutable_names
from .provenance import label
from .roles import aten, bound_arguments, same_size, tensor
from .symbols import Providers, as_node, expression, providers


def fix_storage_offsets(gm: GraphModule) -> None:
    """Say where a view begins by the trace, as strided views do. Inductor computes it of a buffer that begins anew."""
    known = providers(gm)
    for node in gm.graph.find_nodes(op="call_function", target=aten.sym_storage_offset.default):
        wanted = expression(node.meta["val"])
        if not wanted.free_symbols <= known.keys() or any(node <= known[s] for s in wanted.free_symbols):
            continue
        with gm.graph.inserting_before(node):
            value = as_node(gm.graph, wanted, known)
        if isinstance(value, Node):
            node.replace_all_uses_with(value)
        else:
            _put(node, value)
        gm.graph.erase_node(node)


@contextlib.contextmanager
def slices_of_their_base() -> Iterator[None]:
    """Let AOT name slices that an op writes only where their base begins its storage, and sizes tell which they are.

    AOT divides the slice's offset in the storage by a stride (``try_use_slice``), so of a base that begins inside of
    other memory it names later rows; and it gives up at a slice by a number of the data's, whose size it compares. Of
    both it says the offset itself instead.
    """
    from torch._higher_order_ops import auto_functionalize
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    named: Any = auto_functionalize.try_use_slice

    def slice_of(base: Tensor, tensor: Tensor) -> Any:
        if not same_size(base.storage_offset(), 0):
            return None
        try:
            return named(base, tensor)
        except GuardOnDataDependentSymNode:
            return None

    with mock.patch.object(auto_functionalize, "try_use_slice", slice_of):
        yield


def begin_at_first_elements(piece: GraphModule) -> GraphModule | str:
    """The piece, traced as if each input began where its storage does; a copy where that is another trace.

    Why not, where that cannot be said: something looks at what lies before an input, or asks for an offset; or an op of
    another library returns what begins inside of a storage, beside one that counts from there.
    """
    made = _made_inside(piece)
    if made is not None:
        return (
            f"what {label(made)} returns begins inside of a storage, and a view beside it counts from where one begins"
        )
    if not any(_is_inside(n.meta.get("val")) for n in piece.graph.find_nodes(op="placeholder")):
        _say_where_views_begin(piece)
        return piece
    for node in piece.graph.find_nodes(op="call_function", target=aten.sym_storage_offset.default):
        return f"{label(node)} asks for the place in a storage where an input begins"
    piece = GraphModule(piece, copy.deepcopy(piece.graph))
    was = {node: node.meta.get("val") for node in piece.graph.nodes}
    inside = [n for n in piece.graph.find_nodes(op="placeholder") if _is_inside(was[n])]
    for node in inside:
        node.meta["val"] = _begun_anew(tensor(node))
    known = providers(piece)
    for node in piece.graph.nodes:
        if node.op != "call_function" or all(n.meta.get("val") is was.get(n) for n in node.all_input_nodes):
            continue
        if not _count_anew(node, was, known):
            return f"{label(node)} looks at what lies before an input in its storage, or at a place that no size tells"
        if any(map(_is_inside, tree_leaves(was[node]))):
            node.meta["val"] = _value(node)
        if "eager_input_vals" in node.meta:  # Inductor looks at what it was traced with
            node.meta["eager_input_vals"] = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    _say_where_views_begin(piece)
    return piece


def unaligned_inputs(piece: GraphModule) -> frozenset[int]:
    """Which inputs were traced where Inductor's code for an accelerator may not load 16 bytes at once."""
    from torch._inductor.utils import tensor_is_aligned

    values = [node.meta.get("val") for node in piece.graph.find_nodes(op="placeholder")]
    return frozenset(i for i, v in enumerate(values) if isinstance(v, Tensor) and not tensor_is_aligned(v))


@contextlib.contextmanager
def told_unaligned(values: Sequence[Any]) -> Iterator[None]:
    """Let Inductor know of these inputs that they are off alignment, though they are traced from where they begin.

    It would take them for aligned, and copy each before every call, one that is written back again as well.
    """
    from torch._inductor import utils

    named, off = utils.tensor_is_aligned, {id(value) for value in values}

    def is_aligned(value: Tensor) -> bool:
        return id(value) not in off and named(value)

    with mock.patch.object(utils, "tensor_is_aligned", is_aligned):
        yield


def traced_offsets(piece: GraphModule) -> dict[int, int]:
    """Where inputs began in the trace, by index, of a piece that counts from the start of a storage.

    Nothing guards that: a graph is called again with a tensor that begins elsewhere, and its code holds the number.
    """
    if all(_said(node)[-1] is None for node in views_by_place(piece)):
        return {}
    values = (node.meta.get("val") for node in piece.graph.find_nodes(op="placeholder"))
    begins = {i: value.storage_offset() for i, value in enumerate(values) if isinstance(value, Tensor)}
    return {i: offset for i, offset in begins.items() if isinstance(offset, int)}


def _said(node: Node) -> list[Any]:
    """All arguments of a view by place, the last where it begins."""
    given, target = bound_arguments(node), node.target
    return [given[argument.name] for argument in target._schema.arguments]  # type: ignore[union-attr]


def _say_where_views_begin(piece: GraphModule) -> None:
    """A strided view of a view that does not say where it begins becomes one of what that is a view of.

    Inductor of torch 2.11 has it begin with the storage.
    """
    known = providers(piece)
    for node in piece.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        view, *layout, offset = _said(node)
        begins, owner = expression(tensor(view).storage_offset()), root(view)
        says_nothing = offset is None and owner is not view and tensor(owner).dtype == tensor(view).dtype
        if says_nothing and begins.free_symbols <= known.keys():
            with piece.graph.inserting_before(node):
                node.args, node.kwargs = (owner, *layout, as_node(piece.graph, begins, known)), {}
    piece.recompile()


def _made_inside(piece: GraphModule) -> Node | None:
    """An op that makes what begins inside of its storage, in a piece where a view says where in one it begins."""
    made = (
        n
        for n in piece.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
        and n.target.namespace not in ("aten", "prims")
        and any(map(_is_inside, tree_leaves(n.meta.get("val"))))
    )
    by_place = any(
        n.target in BY_PLACE or any(name.endswith("_storage_offset") for name in n.kwargs) for n in piece.graph.nodes
    )
    return next(made, None) if by_place else None


def _count_anew(node: Node, was: Mapping[Node, Any], known: Providers) -> bool:
    """Say where a node looks from where its base begins now; whether that can be said."""
    if node.target in BY_PLACE:
        *seen, offset = _said(node)
        offset = _moved(node, seen[0], offset, was, known)
        node.args, node.kwargs = (*seen, offset), {}
        return offset is not None
    if node.target is SECOND_FORM:
        bases: Any = node.kwargs["_all_bases"]
        for name in [n for n in node.kwargs if n.endswith("_storage_offset")]:
            base = bases[node.kwargs[name.removesuffix("_storage_offset") + "_base_index"]]
            offset = _moved(node, base, node.kwargs[name], was, known)
            if offset is None:
                return False
            node.kwargs = {**node.kwargs, name: offset}
    return True


def _moved(node: Node, base: Node, offset: Any, was: Mapping[Node, Any], known: Providers) -> Any:
    """An offset in the storage of ``base``, from where that begins now; None where it is before that or not known."""
    begins = tensor(base).storage_offset()
    counted = offset.meta["val"] if isinstance(offset, Node) else offset
    wanted = begins if counted is None else counted - was[base].storage_offset() + begins  # None: from where it begins
    known_now = wanted if isinstance(wanted, int) else wanted.node.hint
    if not expression(wanted).free_symbols <= known.keys() or (known_now is not None and known_now < 0):
        return None
    with node.graph.inserting_before(node):
        return as_node(node.graph, expression(wanted), known)


def _value(node: Node) -> Any:
    """What a node is now, as far as it shares or copies the layout of what it is given."""
    if not is_functionalised(node) or not isinstance(node.args[0], torch._ops.OpOverload):
        return fake_call(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]
    op, old = node.args[0], node.meta["val"]
    memory: Any = (
        node.kwargs["_all_bases"] if node.target is SECOND_FORM else [node.kwargs[n] for n in mutable_names(op)]
    )
    laid_out: Any = map_arg(memory, lambda n: clone_preserve_strides(tensor(n)))
    return (*old[: max(1, len(op._schema.returns))], *laid_out)


def _begun_anew(value: Tensor) -> Tensor:
    return value.new_empty_strided(value.size(), value.stride())


def _is_inside(value: Any) -> bool:
    """Whether a tensor begins, or may begin, inside of its storage."""
    return isinstance(value, Tensor) and not same_size(value.storage_offset(), 0)


def _put(node: Node, value: int) -> None:
    """A number in the place of a node, in all that read it."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)
