"""Bases: an op that writes into views, or into lists of tensors, says into which tensors, and what of them it looks at.

AOT has two forms for an op that writes. ``auto_functionalized`` passes what the op is given: of a view that it writes
into comes a tensor, which scatters put into what was viewed, by as many steps as there are views.
``auto_functionalized_v2`` passes the whole tensors (the *bases*), once each, and says where in them an argument lies.
:func:`name_bases` writes the first as the second where it has views or lists, so that all that comes later knows one
form of them: what lies in an input is written in place, and Inductor sees how little is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import clone_preserve_strides
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .aliases import BY_PLACE, fake_call, readers, root, undoes, viewed
from .functional import FIRST_FORM, SCATTERS, SECOND_FORM, mutable_names
from .roles import arguments, calls, is_tensor, same_shape, same_size, tensor
from .symbols import Providers, as_node, expression, providers


@dataclass(frozen=True)
class _Argument:
    """A written argument, or an element of a list, under the name that the second form has for it.

    old: what it is before; None where nothing is given. new: what the first form returns for it, if that is read.
    """

    name: str
    old: Node | None
    new: Node | None

    @property
    def looks(self) -> list[Node]:
        """The tensors on the way from the argument to its base: the views, the outermost first."""
        return [n for n in _views(self.old) if is_tensor(n)] if self.old is not None else []


@dataclass(frozen=True)
class _Call:
    """A call in the first form. lengths: of its lists; None for one that is not given."""

    node: Node
    arguments: tuple[_Argument, ...]
    lengths: dict[str, int | None]

    @property
    def op(self) -> torch._ops.OpOverload:
        op = self.node.args[0]
        assert isinstance(op, torch._ops.OpOverload)
        return op

    @property
    def bases(self) -> list[Node]:
        return list(dict.fromkeys(root(a.old) for a in self.arguments if a.old is not None))


def name_bases(gm: GraphModule) -> None:
    """Write each ``auto_functionalized`` with views or lists as ``auto_functionalized_v2``; one that does not say how
    its tensors come together again stays as it is. Changes ``gm``.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=FIRST_FORM)
    sizes = {s: n for s, n in providers(gm).items() if n.op == "placeholder"}
    for node in nodes:
        call = _read(node)
        if call is not None and _can_be_written(call, sizes):
            steps = _steps(call)
            if steps is not None:
                _write(gm.graph, call, sizes, *steps)
    if nodes:
        gm.graph.lint()
        gm.recompile()


def _views(node: Node) -> Iterator[Node]:
    """From a view to its base, without that; a list of views is one of them."""
    while (source := viewed(node)) is not None:
        yield node
        node = source


def _read(node: Node) -> _Call | None:
    op = node.args[0]
    if not isinstance(op, torch._ops.OpOverload):
        return None
    found: list[_Argument] = []
    lengths: dict[str, int | None] = {}
    for i, name in enumerate(mutable_names(op)):
        given, new = node.kwargs[name], _item(node, max(1, len(op._schema.returns)) + i)
        kind = next(a.type for a in op._schema.arguments if a.name == name)
        if "[]" not in str(kind) and "List" not in str(kind):
            found.append(_Argument(f"_{name}", given, new))  # type: ignore[arg-type]
            continue
        elements: Sequence[Any] = given or ()  # type: ignore[assignment]
        lengths[f"_{name}_length"] = len(elements) if given is not None else None
        found += [_Argument(f"_{name}_{j}", e, _item(new, j)) for j, e in enumerate(elements)]
    return _Call(node, tuple(found), lengths)


def _item(node: Node | None, index: int) -> Node | None:
    """The one node that takes an item of what a node returns; equal ones become one."""
    items = [u for u in node.users if calls(u, operator.getitem) and u.args[1] == index] if node is not None else []
    for other in items[1:]:
        other.replace_all_uses_with(items[0])
    return items[0] if items else None


def _can_be_written(call: _Call, sizes: Providers) -> bool:
    """Whether there is something to say, and the second form can say it."""
    given = [a for a in call.arguments if a.old is not None]
    plain = not call.lengths and len(call.bases) == len(given) and not any(a.looks for a in given)
    returned = any(r.alias_info is not None for r in call.op._schema.returns)
    alike = all(tensor(n).dtype == tensor(root(n)).dtype for a in given for n in a.looks)
    numbers = [n for a in given if a.looks for n in _place_of(tensor(a.old))]  # type: ignore[arg-type]
    known = all(expression(n).free_symbols <= sizes.keys() for n in numbers)
    return not plain and not returned and alike and known


# -- how new values come together ----------------------------------------------------------


def _steps(call: _Call) -> tuple[dict[Node, Node], set[Node]] | None:
    """What is the new value of each base, and the nodes on the way to it; None where that is not known."""
    whole: dict[Node, Node] = {}
    steps: set[Node] = set()
    partial: list[Node] = []
    left = [a for a in call.arguments if a.old is not None and a.new is not None]
    while left:
        for argument in left:
            base = root(argument.old)  # type: ignore[arg-type]
            way = _put_back(argument, base, whole.get(base, base))
            if way is not None:
                partial += [whole[base]] if base in whole else []
                whole[base] = way[-1]
                steps |= {*way}
                left.remove(argument)
                break
        else:
            break
    missing = [a for a in call.arguments if a.new is None and a.looks]
    if any(root(a.old) in whole for a in missing):  # type: ignore[arg-type]
        return None
    for argument in left:  # what is read of the argument alone may be read of the base
        base, users = root(argument.old), argument.new.users  # type: ignore[arg-type, union-attr]
        if base in whole or any(u.target in SCATTERS and arguments(u)[1] is argument.new for u in users):
            return None
    seen_in_part = any(reader not in steps for value in partial for reader, _ in readers(value))
    read = [a for a in call.arguments if a.new is not None and a.old is not None and set(a.new.users) - steps]
    replaced: list[Any] = [*((value, base) for base, value in whole.items()), *((a.new, a.old) for a in read)]
    return (whole, steps) if not seen_in_part and all(_may_stand_for(old, new) for new, old in replaced) else None


def _put_back(argument: _Argument, base: Node, latest: Node) -> list[Node] | None:
    """The nodes that make the new value of a base of that of an argument, which is the first of them.

    latest: the base with what the other arguments put into it before.
    """
    assert argument.new is not None
    way = [argument.new]
    for look in argument.looks:
        value = way[-1]
        if value is not argument.new and len(value.users) != 1:
            return None  # somebody reads the whole with this argument's part alone
        step = next((u for u in value.users if _undoes(u, value, look, base, latest)), None)
        if step is None:
            return None
        way.append(step)
    return way


def _undoes(user: Node, value: Node, look: Node, base: Node, latest: Node) -> bool:
    """Whether ``user`` puts ``value`` where ``look`` looks at."""
    if user.target in SCATTERS:
        into, put, *rest = arguments(user)
        if put is not value or not isinstance(into, Node) or root(into) is not latest:
            return False
        seen = fake_call(SCATTERS[user.target], (into, *rest), dict(user.kwargs))
        return _same_place(seen, tensor(latest), tensor(look), tensor(base))
    inner = viewed(look)
    return viewed(user) is value and undoes(user, look) and is_tensor(inner) and same_shape(user, inner)


def _same_place(one: torch.Tensor, its_base: torch.Tensor, other: torch.Tensor, others_base: torch.Tensor) -> bool:
    places = [
        (*_place_of(seen)[:-1], seen.storage_offset() - base.storage_offset())
        for seen, base in ((one, its_base), (other, others_base))
    ]
    return len(places[0]) == len(places[1]) and all(map(same_size, *places))


def _place_of(seen: torch.Tensor) -> tuple[Any, ...]:
    return (*seen.shape, *seen.stride(), seen.storage_offset())


def _may_stand_for(old: Node, new: Node) -> bool:
    """Whether what is laid out as ``old`` may be read instead of ``new``, which may begin elsewhere in its storage."""
    alike = same_shape(new, old) and all(map(same_size, tensor(new).stride(), tensor(old).stride()))
    begins_there = same_size(tensor(new).storage_offset(), tensor(old).storage_offset())
    return alike and (begins_there or not any(view.target in BY_PLACE for view in _views_of(new)))


def _views_of(node: Node) -> Iterator[Node]:
    """The views of a node, each behind what it is taken of."""
    for user in node.users:
        if viewed(user) is node:
            yield user
            yield from _views_of(user)


# -- the second form ------------------------------------------------------------------------


def _write(graph: Graph, call: _Call, sizes: Providers, whole: dict[Node, Node], steps: set[Node]) -> None:
    """Put the call in its second form, and let the readers of new values read the bases."""
    node, bases, first = call.node, call.bases, max(1, len(call.op._schema.returns))
    given: dict[str, Any] = {
        k: v for k, v in node.kwargs.items() if k not in set(mutable_names(call.op))
    } | call.lengths
    with graph.inserting_before(node):
        for argument in call.arguments:
            given |= _place(graph, argument, bases, sizes)
        second = graph.call_function(SECOND_FORM, (call.op,), {**given, "_all_bases": bases})
        new = [graph.call_function(operator.getitem, (second, first + i)) for i in range(len(bases))]
    for value, base in zip(new, bases, strict=True):
        value.meta["val"] = clone_preserve_strides(tensor(base))
    returned: Any = node.meta["val"]
    vals = (*returned[:first], *(value.meta["val"] for value in new))
    second.meta = {**node.meta, "val": vals}
    if "eager_input_vals" in node.meta:  # Inductor looks at what it was traced with
        second.meta["eager_input_vals"] = map_arg((second.args, second.kwargs), lambda n: n.meta["val"])
    value_of = dict(zip(bases, new, strict=True))
    for argument in call.arguments:
        if argument.old is not None and argument.new is not None and set(argument.new.users) - steps:
            seen = _taken_anew(graph, argument.old, value_of[root(argument.old)], node)
            _replace(argument.new, seen, lambda user: user not in steps)
    for base, value in whole.items():
        _replace(value, value_of[base])
    for user in list(node.users):
        if user.args[1] in range(len(call.op._schema.returns)):
            user.replace_input_with(node, second)
    _erase(graph, [*whole.values(), *(a.new for a in call.arguments if a.new is not None), *node.users, node])


def _replace(value: Node, new: Node, where: Callable[[Node], bool] = lambda user: True) -> None:
    """Let readers read ``new``; what they look at begins where that begins."""
    value.replace_all_uses_with(new, where)
    if not same_size(tensor(new).storage_offset(), tensor(value).storage_offset()):
        for view in _views_of(new):
            view.meta["val"] = fake_call(view.target, view.args, dict(view.kwargs))  # type: ignore[arg-type]


def _place(graph: Graph, argument: _Argument, bases: list[Node], sizes: Providers) -> dict[str, Any]:
    """Where an argument lies, in the words of the second form."""
    if argument.old is None:
        return {f"{argument.name}_base_index": None}
    said: dict[str, Any] = {f"{argument.name}_base_index": bases.index(root(argument.old))}
    if argument.looks:
        value = tensor(argument.old)
        for key, numbers in (("size", value.shape), ("stride", value.stride())):
            said[f"{argument.name}_{key}"] = tuple(as_node(graph, expression(n), sizes) for n in numbers)
        said[f"{argument.name}_storage_offset"] = as_node(graph, expression(value.storage_offset()), sizes)
    return said


def _taken_anew(graph: Graph, view: Node, base: Node, anchor: Node) -> Node:
    """The view of another base, taken before ``anchor``."""
    moved = {root(view): base}
    for look in reversed(list(_views(view))):
        with graph.inserting_before(anchor):
            moved[look] = graph.node_copy(look, lambda n: moved.get(n, n))
        taken = moved[look]
        value = fake_call(taken.target, taken.args, dict(taken.kwargs))  # type: ignore[arg-type]
        taken.meta = {**look.meta, "val": value}
    return moved[view]


def _erase(graph: Graph, nodes: list[Node]) -> None:
    """Erase what nothing reads any more, and the views that only it read."""
    known = set(nodes)
    while nodes:
        node = nodes.pop()
        if node._erased or node.users or node.op != "call_function":
            continue
        if node in known or node.target in SCATTERS or viewed(node) is not None:
            nodes += node.all_input_nodes
            graph.erase_node(node)
