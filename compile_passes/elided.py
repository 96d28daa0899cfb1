"""What Inductor may look through: a value that it finds to be another one is read where that lies.

A value that a piece computes of an input is read before the input is written. Where the compiler finds that it *is* the
input, it reads the input itself, and when, is its own affair.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .aliases import viewed
from .roles import aten

#: Ops that Inductor takes out where they change nothing (its ``remove_noop_ops`` and ``remove_no_ops``).
_ELIDED = {
    aten.add.Tensor,
    aten.cat.default,
    aten.ceil.default,
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.copy.default,
    aten.div.Tensor,
    aten.floor.default,
    aten.mul.Tensor,
    aten.pow.Tensor_Scalar,
    aten.repeat.default,
    aten.round.default,
    aten.slice_scatter.default,
    aten.sub.Tensor,
    aten.trunc.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.prims.device_put.default,
}


def keep_snapshots(piece: GraphModule) -> None:
    """Let copies of memory that a piece writes be copies, under a name that Inductor does not look for.

    Without it ``c[1:].copy_(c[:-1].clone())`` reads ``c`` while it is written, and the copy of a slice that is
    written later is a view of it.
    """
    for node in piece.graph.find_nodes(op="call_function", target=aten.clone.default):
        node.target, node.kwargs = aten.lift_fresh_copy.default, {}  # where it lies in memory, its value says
    piece.recompile()


def may_be_read_late(value: Node, written: set[Node]) -> bool:
    """Whether a compiler may find that ``value`` is one of other written inputs, and copy that instead."""
    seen, queue = set(), [value]
    while queue and written:
        node = queue.pop()
        if node in written:
            return True
        if node not in seen and (viewed(node) is not None or node.target in _ELIDED):
            queue.extend(node.all_input_nodes)
        seen.add(node)
    return False
