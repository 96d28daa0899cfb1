"""Outer: what of a graph a capture may hold that somebody else makes around it.

The judge is asked as if every op were captured. A fused site that must not be goes to the reference there, where that
can be captured; its op is told by the name of its collective. For every other op the capture is refused, or broken in
two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from ..runtime.collectives.ops import NOT_CAPTURED, OPS
from ..runtime.hazards.situation import Collective
from .assignment import Assignment
from .judge import Decision, Verdict, captures_reference
from .roles import calls


@dataclass(frozen=True)
class OuterCapture:
    """barred: the ops that must not be captured, with the reason. by_reference: the same for sites that need not be."""

    barred: tuple[str, ...] = ()
    by_reference: tuple[str, ...] = ()


def outer_capture(gm: GraphModule, assigned: Assignment, verdicts: Sequence[Verdict]) -> OuterCapture:
    """Read verdicts on a capture, and let sites that it must not hold say so in the graph."""
    nodes = {node.name: node for node in gm.graph.nodes}
    barred, by_reference = [], []
    for verdict in verdicts:
        if verdict.decision is Decision.IN_GRAPH:
            continue
        node, told = nodes[verdict.node], f"'{verdict.node}' ({verdict.op}): {verdict.message}"
        if not calls(node, *OPS) or not captures_reference(assigned, verdict.group):
            barred.append(told)
            continue
        by_reference.append(told)
        if node.args[-1] != Collective.REFERENCE:
            node.args = (*node.args[:-1], f"{node.args[-1]}{NOT_CAPTURED}")
    return OuterCapture(tuple(barred), tuple(by_reference))
