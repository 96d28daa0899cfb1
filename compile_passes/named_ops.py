"""Named ops: whether the ops that options name are in a graph, and what became of those that are not."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.fx import GraphModule

from ..runtime.errors import OptionsError
from .match import Candidate
from .op_calls import nodes_of, op_names


def ops_in(gm: GraphModule) -> set[str]:
    """Both names of every op in a graph and in the regions that it calls."""
    return {name for node in nodes_of(gm) for name in op_names(node)}


def ops_replaced(candidates: Iterable[Candidate]) -> set[str]:
    """Both names of every op that fusing takes out of the graph; to be asked before."""
    matches = [c.match for c in candidates if c.match is not None and c.fuses]
    nodes = [a.start for m in matches for a in m.terms.all_reduces]
    nodes += [m.norm.call for m in matches if m.norm.call is not None]
    return {name for node in nodes for name in op_names(node)}


def check_not_decomposed(gm: GraphModule, option: str, names: Collection[str]) -> None:
    """Raises :class:`OptionsError` for an op that the model calls and that was taken apart before the cut."""
    there = ops_in(gm)
    for name in names:
        if name in there:
            continue
        parts = list(dict.fromkeys(op_names(n)[0] for n in nodes_of(gm) if name in _names(n.meta.get("original_aten"))))
        if parts:
            raise OptionsError(
                f"{option} names '{name}', which the model calls, but Inductor's decompositions have taken it apart "
                f"before the graph is cut: it is now {', '.join(parts)}. Use piece_compiler='eager', which leaves it "
                "whole, or name one of these"
            )


def is_taken_apart(name: str) -> bool:
    """Whether torch replaces the op by others before any backend sees it (``aten::linear``): no graph has it."""
    namespace, _, op = name.partition("::")
    packet_name, _, overload = op.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name)
    overloads = [overload] if overload else [o for o in packet.overloads() if not o.endswith("out")]
    full = [f"{namespace}::{packet_name}{'' if o == 'default' else f'.{o}'}" for o in overloads]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CompositeImplicitAutograd") for n in full)


def _names(op: object) -> tuple[str, ...]:
    if not isinstance(op, torch._ops.OpOverload):
        return ()
    return op._schema.name, f"{op._schema.name}.{op._schema.overload_name or 'default'}"
