"""Versions: the chain from an input to what a functional graph puts back into it at last, and who reads each link."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from .aliases import readers, undoes, viewed
from .functional import SCATTERS, mutation, updated
from .roles import arguments, aten, calls, same_shape


@dataclass(frozen=True)
class WrittenInput:
    """An input that the graph writes into.

    memory: the input. copy: the ``copy_`` that puts the last version into it. versions: in order; the first is
    the input itself. reads: of each version, who reads it and what of it (the version or a view).
    """

    memory: Node
    copy: Node
    versions: tuple[Node, ...]
    reads: tuple[tuple[tuple[Node, Node], ...], ...]

    def at(self, k: int) -> Node:
        """The node that writes a version, if it is written in place."""
        version = self.versions[k]
        made = _made_through_view(version) if is_own(version) else None
        return made if made is not None else version


def written_inputs_of(gm: GraphModule, placeholders: Sequence[Node]) -> Iterator[WrittenInput]:
    """The inputs that the graph writes into, in the order of the writes."""
    claimed: set[Node] = set()
    inputs = set(placeholders)
    for copy in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        memory, value = arguments(copy)[:2]
        if memory not in inputs or not isinstance(value, Node):
            continue
        versions = [v for v in _versions(memory, value) if v not in claimed]
        claimed |= {v for v in versions if is_own(v)}
        reads = [
            [(r, n) for r, n in readers(v) if r is not copy and r not in versions and not (k == 0 and r.op == "output")]
            if k == 0 or is_own(v)
            else []
            for k, v in enumerate(versions)
        ]
        if len(versions) == 1:  # another input is given the same value, and owns it
            versions, reads = [memory, value], [reads[0], []]
        yield WrittenInput(memory, copy, tuple(versions), tuple(map(tuple, reads)))


def is_own(version: Node) -> bool:
    """Whether a version is a value of the graph, rather than another input or a constant that is written."""
    return version.op == "call_function"


def _versions(memory: Node, value: Node) -> list[Node]:
    """From the input to what is put into it at last; these two alone where the chain between them is not known."""
    chain, node = [value], value
    while (older := _previous(node)) is not None:
        if older is memory:
            return [memory, *reversed(chain)]
        chain.append(older)
        node = older
    return [memory, value]


def _previous(version: Node) -> Node | None:
    """The version that this one was made of."""
    if calls(version, operator.getitem) and isinstance(version.args[0], Node):
        change = mutation(version.args[0])
        if change is not None:
            return next((w.old for w in change.written if w.output == version.args[1]), None)
    made = _made_through_view(version)
    return viewed(arguments(made)[0]) if made is not None else updated(version)


def _made_through_view(version: Node) -> Node | None:
    """``write(view(old))`` of a version that is that, viewed back."""
    made = viewed(version)
    there = updated(made) if made is not None else None
    if made is None or there is None or len(made.users) != 1:
        return None
    old = viewed(there)
    whole = old is not None and undoes(version, there) and same_shape(old, version)
    return made if whole else None


def scatter_of(node: Node, value: Node | None) -> Node | None:
    """The scatter that puts what an op made of a view back into what was viewed."""
    if value is None or len(value.users) != 1:
        return None
    (scatter,) = value.users
    if scatter.target not in SCATTERS or arguments(scatter)[1] is not value:
        return None
    written = mutation(node)
    assert written is not None
    old = next(w.old for w in written.written if w.output == value.args[1])
    base = viewed(old)
    alike = old.target is SCATTERS[scatter.target] and arguments(old)[1:] == arguments(scatter)[2:]
    return scatter if base is arguments(scatter)[0] and alike and old.kwargs == scatter.kwargs else None
