"""Spec: what holds of every part of a cut graph, checked before the parts are compiled.

- Every read sees the value of its place in the program, and every write lands: the graph that writes in place has the
  value numbers of the functional one (:mod:`.value_numbers`).
- What crosses a cut owns its memory: no part is given or returns a view, but for views that only the caller gets.
- Every size that an input of a piece depends on reaches that piece as an integer of its own.
- No tensor of a captured piece is on another device than the graph, but for constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..runtime.errors import PartSpecError
from .aliases import viewed
from .constants import is_constant
from .parts import GraphPart
from .provenance import source_of
from .symbols import expression, symbols_of
from .value_numbers import FunctionalNumbers, InPlaceNumbers


def check_parts(
    gm: GraphModule, parts: Sequence[GraphPart], before: FunctionalNumbers, device: torch.device | None, *, sizes: bool
) -> None:
    """Raises :class:`PartSpecError` for the first rule that does not hold.

    before: the numbers of ``gm`` from before it was rewritten. device: the one that pieces are captured on; None where
    nothing is captured. sizes: whether pieces are compiled for sizes that are
    symbols, so that they need each as an integer.
    """
    for problem in _problems(gm, parts, before, device, sizes):
        raise PartSpecError(
            f"the cut graph breaks a rule of its own, so it is not used: {problem}. Please report it; "
            "Backend(check_parts=False) uses the graph all the same"
        )


def _problems(
    gm: GraphModule, parts: Sequence[GraphPart], before: FunctionalNumbers, device: torch.device | None, sizes: bool
) -> Iterator[str]:
    place = {node: i for i, part in enumerate(parts) for node in part.nodes}
    yield from _wrong_values(gm, parts, before)
    for i, part in enumerate(parts):
        inputs = dict.fromkeys(a for n in part.nodes for a in n.all_input_nodes if place.get(a) != i)
        for node in inputs:
            if viewed(node) is not None:
                yield f"part {i} is given {_named(node)}, which shares the memory of another value"
        if part.island:
            continue
        if sizes:
            known = {expression(n.meta["val"]) for n in inputs if isinstance(n.meta.get("val"), torch.SymInt)}
            for node in inputs:
                if missing := symbols_of(node) - known:
                    yield f"part {i} is not given the sizes {sorted(map(str, missing))} of {_named(node)}"
        if device is not None and device.type not in ("cpu", "meta"):
            for node in part.nodes:
                value = node.meta.get("val")
                if isinstance(value, Tensor) and value.device != device and not is_constant(node):
                    yield f"{_named(node)} in piece {i} is on {value.device}, and the graph on {device}"


def _wrong_values(gm: GraphModule, parts: Sequence[GraphPart], before: FunctionalNumbers) -> Iterator[str]:
    now = InPlaceNumbers(gm, (node for part in parts for node in part.nodes), before)
    for i, (right, found) in enumerate(zip(before.returned, now.returned, strict=True)):
        if right is not None and found != right:
            yield f"output {i} is not what the functional graph returns"
    for node, right in before.left.items():
        if now.left[node] != right:
            yield f"{_named(node)} does not hold what the functional graph leaves in it"
    if now.effects != before.effects:
        yield "an op that writes, or that is not ATen's, is not given what it is given in the functional graph"


def _named(node: Node) -> str:
    source = source_of(node)
    return f"'{node.name}'{f' ({source})' if source else ''}"
