"""Functional writes: how AOT spells an op that writes, and what it wrote into.

A model that writes into a tensor reaches us without any write: the op that wrote returns a new tensor, and what
comes later reads that one. :func:`mutations` undoes ``auto_functionalized`` in both of its forms;
:func:`updated` says of an ATen op which tensor its result is a new version of.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .roles import aten, calls, first_node, is_tensor, same_shape, tensor

#: The two forms of an op that writes.
FIRST_FORM = torch.ops.higher_order.auto_functionalized
SECOND_FORM = torch.ops.higher_order.auto_functionalized_v2

#: ``scatter(base, src, ...)`` is ``base`` with ``src`` in the place that ``view(base, ...)`` looks at.
SCATTERS = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
    aten.as_strided_scatter.default: aten.as_strided.default,
}


@dataclass(frozen=True)
class View:
    """What of a written tensor an argument is: all of it, or ``target(tensor, *args)``."""

    target: torch._ops.OpOverload | None = None
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Written:
    """A tensor that a functionalised op writes into.

    old: the node that holds what was there before. output: the place of what is there afterwards among the
    values that the node returns. names: the arguments that look at it, each with its place in a list, or None, and
    what of the tensor it is.
    """

    old: Node
    output: int
    names: tuple[tuple[str, int | None, View], ...]


@dataclass(frozen=True)
class Mutation:
    """An op that writes into arguments, as AOT wraps it.

    arguments: those of the op by name, without the written ones. lengths: of its written lists.
    absent: written arguments, or elements of lists, that are None.
    """

    op: torch._ops.OpOverload
    arguments: dict[str, Any]
    written: tuple[Written, ...]
    lengths: dict[str, int]
    absent: tuple[tuple[str, int | None], ...]

    @property
    def returns(self) -> int:
        """How many values the op itself returns."""
        return len(self.op._schema.returns)


def is_write_back(node: Node) -> bool:
    """The copy into an input at the end of a functional graph: :mod:`.in_place` puts it where it belongs."""
    target = first_node(node)
    return calls(node, aten.copy_.default) and target is not None and target.op == "placeholder"


def return_inputs_themselves(gm: GraphModule) -> None:
    """An input that is written and returned is returned itself, where AOT returns the copy into it."""
    for copy in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target = first_node(copy)
        if is_write_back(copy) and target is not None:
            copy.replace_all_uses_with(target)


def written_inputs(gm: GraphModule) -> frozenset[int]:
    """The indices of the inputs that a functional graph writes into."""
    placeholders = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    copies = filter(is_write_back, gm.graph.find_nodes(op="call_function", target=aten.copy_.default))
    return frozenset(placeholders[first_node(copy)] for copy in copies)


def is_functionalised(node: Node) -> bool:
    return calls(node, FIRST_FORM, SECOND_FORM)


def mutation(node: Node) -> Mutation | None:
    """What a functionalised op does; None for other nodes, and for those that write nothing that exists."""
    if not is_functionalised(node) or not isinstance(node.args[0], torch._ops.OpOverload):
        return None
    return _second(node) if node.target is SECOND_FORM else _first(node)


def new_value(node: Node, output: int) -> Node | None:
    """The node that takes one of the values that a functionalised op returns."""
    return next((u for u in node.users if calls(u, operator.getitem) and u.args[1] == output), None)


def updated(node: Node) -> Node | None:
    """The tensor that an ATen op's result is a new version of: the same layout, with other values in it."""
    if not is_tensor(node) or not node.args or not is_tensor(node.args[0]):
        return None
    old = node.args[0]
    alike = same_shape(old, node) and tensor(old).dtype == tensor(node).dtype
    return old if alike and (node.target in SCATTERS or in_place_form(node) is not None) else None


def in_place_form(node: Node) -> torch._ops.OpOverload | None:
    """``aten.add_.Tensor`` of ``aten.add.Tensor``."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return None
    packet = getattr(aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    form = getattr(packet, target._overloadname, None) if packet is not None else None
    if form is None or not form._schema.arguments[0].alias_info or not form._schema.arguments[0].alias_info.is_write:
        return None
    names = [[a.name for a in op._schema.arguments] for op in (target, form)]
    return form if names[0] == names[1] and len(form._schema.returns) == 1 else None


def mutable_names(op: torch._ops.OpOverload) -> Iterator[str]:
    """The arguments that an op writes into."""
    for argument in op._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield argument.name


def _first(node: Node) -> Mutation:
    """``auto_functionalized``: written arguments are passed as they are, new values returned one by one."""
    op, given = node.args[0], dict(node.kwargs)
    assert isinstance(op, torch._ops.OpOverload)
    found: dict[Node, Written] = {}
    lengths: dict[str, int] = {}
    absent: list[tuple[str, int | None]] = []
    for i, name in enumerate(mutable_names(op)):
        value = given.pop(name)
        if isinstance(value, tuple | list):  # a list of new values is returned; not taken apart here
            return Mutation(op, dict(node.kwargs), (), {}, ())
        if value is None:
            absent.append((name, None))
            continue
        assert isinstance(value, Node)
        found[value] = Written(value, max(1, len(op._schema.returns)) + i, ((name, None, View()),))
    return Mutation(op, given, tuple(found.values()), lengths, tuple(absent))


def _second(node: Node) -> Mutation | None:
    """``auto_functionalized_v2``: tensors are passed once each, and arguments are described as views of them."""
    op, given = node.args[0], dict(node.kwargs)
    assert isinstance(op, torch._ops.OpOverload)
    bases: Any = given.pop("_all_bases")
    if not bases:
        return None
    names: dict[int, list[tuple[str, int | None, View]]] = {i: [] for i in range(len(bases))}
    lengths: dict[str, int] = {}
    absent: list[tuple[str, int | None]] = []
    for name in mutable_names(op):
        elements: list[tuple[int | None, str]] = [(None, f"_{name}")]
        if f"_{name}_length" in given:
            length: Any = given.pop(f"_{name}_length")
            if length is None:
                absent.append((name, None))
                continue
            lengths[name] = length
            elements = [(i, f"_{name}_{i}") for i in range(length)]
        for place, prefix in elements:
            base: Any = given.pop(f"{prefix}_base_index")
            if base is None:
                absent.append((name, place))
            else:
                names[base].append((name, place, _pop_view(given, prefix)))
    first = max(1, len(op._schema.returns))
    written = tuple(Written(base, first + i, tuple(names[i])) for i, base in enumerate(bases))
    return Mutation(op, given, written, lengths, tuple(absent))


def _pop_view(given: dict[str, Any], prefix: str) -> View:
    if f"{prefix}_storage_offset" in given:
        layout = tuple(given.pop(f"{prefix}_{key}") for key in ("size", "stride", "storage_offset"))
        return View(aten.as_strided.default, layout)
    if f"{prefix}_slice_dim" in given:
        return View(aten.slice.Tensor, tuple(given.pop(f"{prefix}_slice_{key}") for key in ("dim", "start", "end")))
    given.pop(f"{prefix}_alias", None)
    return View()
