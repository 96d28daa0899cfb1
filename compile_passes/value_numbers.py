"""Value numbers: what each node of a graph computes, as a number, whether the graph writes in place or not.

Two nodes have one number where the same op was applied to the same numbers. :class:`FunctionalNumbers` reads a
functional graph, in which a node is its value; :class:`InPlaceNumbers` walks a graph that writes in place, and knows
what each memory holds at each point. A rewrite is right where both find the same: in what the graph returns, in what
it leaves in its inputs, and in what ops that somebody may watch were given.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .aliases import INVERSES, RESHAPES, root, viewed
from .functional import SCATTERS, Mutation, is_write_back, mutable_names, mutation
from .roles import arguments, aten, calls

#: Key of ``node.meta``: the written arguments of a call, each with its place in a list or None, that are views taken
#: for it of what the functional graph says is written. The others are that itself, a view or not.
LOOKED = "ringfence_looked"

_PURE = ("aten", "prims")


class _Numbers:
    def __init__(self, table: dict[Hashable, int]) -> None:
        self._table = table
        self.of: dict[Node, int] = {}
        self.effects: Counter[int] = Counter()
        #: What a number that stands for a reshape is a reshape of, and the shape that a value was made with.
        self._reshaped: dict[int, int] = {}
        self._made_as: dict[int, str] = {}
        #: Of a number that stands for a transpose, the view and its arguments that undo it, and what it is one of.
        self._turned: dict[int, tuple[str, Hashable, int]] = {}
        self._calls: dict[Node, tuple[Mutation, int]] = {}

    def number(self, *key: Hashable) -> int:
        return self._table.setdefault(key, len(self._table))

    def read(self, node: Node) -> int:
        raise NotImplementedError

    def define(self, node: Node, number: int) -> None:
        self.of[node] = number
        self._made_as.setdefault(number, _shape(node))

    def frozen(self, value: Any) -> Hashable:
        if isinstance(value, Node):
            size = value.meta.get("val")
            if isinstance(size, torch.SymInt | int):
                return self.number("size", _size(size))
            return self.read(value)
        if isinstance(value, tuple | list):
            return tuple(map(self.frozen, value))
        if isinstance(value, dict):
            return tuple(sorted((k, self.frozen(v)) for k, v in value.items()))
        return str(value)

    def reshaped(self, number: int, shape: str) -> int:
        base = self._reshaped.get(number, number)
        if self._made_as.get(base) == shape:
            return base
        seen = self.number("reshape", base, shape)
        self._reshaped[seen] = base
        return seen

    def looked(self, view: Node, source: int) -> int:
        """The number of a view of what has the number ``source``."""
        if view.target in RESHAPES:
            return self.reshaped(source, _shape(view))
        if view.target in INVERSES:
            return self._turned_over(view.target, view.args[1:], source)
        return self.number("view", str(view.target), source, self.frozen((view.args[1:], view.kwargs)))

    def _turned_over(self, look: Any, args: Any, source: int) -> int:
        """A whole tensor with its dimensions in another order; turned back, it is itself."""
        key = str(look), self.frozen(args)
        if source in self._turned and self._turned[source][:2] == key:
            return self._turned[source][2]
        seen = self.number("view", *key, source)
        self._turned[seen] = str(look), self.frozen(INVERSES[look](args)), source
        return seen

    def put(self, view: Node, look: Any, args: Any, base: int, value: int, shape: str) -> int:
        """The number of what has ``base``, with ``value`` in the place that a view looks at."""
        if look in RESHAPES:
            return self.reshaped(value, shape)
        if look in INVERSES:
            return self._turned_over(look, INVERSES[look](args), value)
        return self.number("put", str(look), base, self.frozen((args, view.kwargs)), value)

    def copied(self, target: Node, source: Node) -> int:
        """What a copy leaves in its target."""
        values: list[Any] = [n.meta.get("val") for n in (target, source)]
        alike = all(isinstance(v, Tensor) for v in values) and values[0].dtype == values[1].dtype
        if alike and not _is_expanded(values[1], values[0]):
            return self.read(source)
        return self.number("copied", self.read(source), _shape(target), str(getattr(values[0], "dtype", None)))

    def result(self, node: Node) -> int:
        """What a call computes."""
        if calls(node, aten.clone.default):
            return self.read(arguments(node)[0])
        if calls(node, aten.copy.default):
            return self.copied(*arguments(node)[:2])
        if node.target in SCATTERS:
            base, source, *rest = arguments(node)
            return self.put(node, SCATTERS[node.target], tuple(rest), self.read(base), self.read(source), _shape(node))
        if node.op == "get_attr":
            return self.number("constant", str(node.target))
        name = _functional_name(node)
        number = self.number(name, self.frozen((node.args, node.kwargs)))
        namespace = getattr(node.target, "namespace", "operator" if node.target is operator.getitem else "")
        if namespace not in (*_PURE, "operator", ""):
            self.effects[number] += 1
        return number

    def called(self, op: Any, given: dict[str, Any], written: Iterable[tuple[str, int | None, int]]) -> int:
        """The number of a call of an op that writes into arguments."""
        held = tuple(sorted((name, str(place), number) for name, place, number in written))
        number = self.number("call", str(op), self.frozen(given), held)
        self.effects[number] += 1
        return number

    def functional(self, node: Node) -> int:
        """What a node computes that changes nothing, a functionalised op among them."""
        change = mutation(node)
        if change is not None and change.written:
            held = [(name, place, self.read(w.old)) for w in change.written for name, place, _ in w.names]
            call = self.called(change.op, change.arguments, held)
            self._calls[node] = change, call
            return call
        taken_of: Any = node.args[0] if calls(node, operator.getitem) else None
        if taken_of not in self._calls:
            return self.result(node)
        change, call = self._calls[taken_of]
        index = arguments(node)[1]
        for written in change.written:
            if written.output == index:
                return self.after(call, *written.names[0][:2])
        return self.returned_by(change.op, call, index)

    def returned_by(self, op: Any, call: int, index: int) -> int:
        """One of the values that an op returns that writes into arguments."""
        returned = op._schema.returns[index].alias_info
        if returned is not None and returned.is_write:  # the op returns what it wrote into
            return self.after(call, next(mutable_names(op)), None)
        return self.number("item", call, index)

    def after(self, call: int, name: str, place: int | None) -> int:
        """What a call leaves in the memory that an argument looks at."""
        return self.number("written", call, name, str(place))


class FunctionalNumbers(_Numbers):
    """Of a functional graph, as it is now: a later rewrite of the graph does not change them.

    returned: of the outputs, None for what shares memory with an input. left: of what the graph leaves in the inputs.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__({})
        self.left: dict[Node, int] = {}
        for i, node in enumerate(gm.graph.nodes):
            if node.op == "placeholder":
                self.define(node, self.number("input", i))
                self.left[node] = self.of[node]
            elif node.op == "output":
                self.returned = tuple(_returned(self, node))
            elif is_write_back(node):
                self.left[arguments(node)[0]] = self.copied(*arguments(node)[:2])
            else:
                self.define(node, self._value(node))

    def read(self, node: Node) -> int:
        return self.of[node]

    def _value(self, node: Node) -> int:
        source = viewed(node)
        if source is not None:
            return self.looked(node, self.of[source])
        return self.functional(node)


class InPlaceNumbers(_Numbers):
    """Of a graph that was rewritten after ``before`` was made of it, walked in the order of ``nodes``."""

    def __init__(self, gm: GraphModule, nodes: Iterable[Node], before: FunctionalNumbers) -> None:
        super().__init__(before._table)
        self._reshaped, self._made_as, self._turned = before._reshaped, before._made_as, before._turned
        #: Of calls that write in place and return several values: the op and the number of the call.
        self._several: dict[Node, tuple[Any, int]] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node in (*placeholders, *gm.graph.find_nodes(op="get_attr")):
            self.define(node, before.of[node])
        for node in nodes:
            if node.op != "get_attr" and viewed(node) is None:
                self._run(node)
        self.left = {node: self.of[node] for node in placeholders}
        (output,) = gm.graph.find_nodes(op="output")
        self.returned = tuple(_returned(self, output))

    def read(self, node: Node) -> int:
        source = viewed(node)
        return self.of[node] if source is None else self.looked(node, self.read(source))

    def _run(self, node: Node) -> None:
        target = node.target
        if calls(node, operator.getitem) and node.args[0] in self._several:
            self.define(node, self.returned_by(*self._several[arguments(node)[0]], arguments(node)[1]))
        elif not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            self.define(node, self.functional(node))
        elif target.namespace == "aten":
            memory = arguments(node)[0]
            is_copy = target is aten.copy_.default
            self._write(memory, self.copied(memory, arguments(node)[1]) if is_copy else self.result(node))
        else:
            self._call(node, target)

    def _call(self, node: Node, op: torch._ops.OpOverload) -> None:
        names = list(mutable_names(op))
        given = [(name, place, value) for name in names for place, value in _elements(node.kwargs[name])]
        written = [(name, place, self._memory(node, name, place, value)) for name, place, value in given]
        held = [(name, place, self.read(memory)) for name, place, memory in written]
        call = self.called(op, {k: v for k, v in node.kwargs.items() if k not in names}, held)
        seen: set[Node] = set()
        for name, place, memory in written:
            if memory not in seen:
                self._write(memory, self.after(call, name, place))
            seen.add(memory)
        if len(op._schema.returns) > 1:
            self._several[node] = op, call
        self.define(node, self.number("item", call, 0) if len(op._schema.returns) == 1 else call)

    def _memory(self, call: Node, name: str, place: int | None, value: Node) -> Node:
        looks = (name, place) in call.meta.get(LOOKED, ())
        source = viewed(value) if looks else None
        return value if source is None else source

    def _write(self, memory: Node, number: int) -> None:
        source = viewed(memory)
        if source is None:
            self.of[memory] = number
        else:
            put = self.put(memory, memory.target, memory.args[1:], self.read(source), number, _shape(source))
            self._write(source, put)


def _elements(value: Any) -> Iterable[tuple[int | None, Node]]:
    """The tensors of an argument, with their places in a list."""
    pairs = enumerate(value) if isinstance(value, tuple | list) else [(None, value)]
    return [(place, tensor) for place, tensor in pairs if isinstance(tensor, Node)]


def _returned(numbers: _Numbers, output: Node) -> Iterable[int | None]:
    for value in torch.utils._pytree.tree_leaves(output.args[0]):
        if isinstance(value, Node):
            yield None if root(value).op == "placeholder" else numbers.read(value)


def _functional_name(node: Node) -> str:
    name = str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        packet, _, overload = name.rpartition(".")
        return f"{packet.removesuffix('_')}.{overload}"
    return name


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    return str([_size(n) for n in value.shape]) if isinstance(value, Tensor) else ""


def _is_expanded(source: Tensor, target: Tensor) -> bool:
    """Whether a copy repeats elements. If not, a size may still have two spellings in a trace: ``4`` and ``s - 4``."""
    sizes = [list(map(_size, tensor.shape)) for tensor in (source, target)]
    return len(sizes[0]) != len(sizes[1]) or any(a != b and "1" in (a, b) for a, b in zip(*sizes, strict=True))


def _size(value: int | torch.SymInt) -> str:
    return str(value.node.expr) if isinstance(value, torch.SymInt) else str(value)
