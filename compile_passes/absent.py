"""What a graph has instead of an all-reduce: said where a user expected one."""

from __future__ import annotations

import re

from torch.fx import GraphModule

from .moe_calls import is_moe
from .op_calls import op_names

_LOOKS_LIKE_ONE = re.compile(r"all_?reduce", re.IGNORECASE)
_TORCHS = ("_c10d_functional::", "c10d::", "_dtensor::")


#: Where nothing is seen that looks like one.
GENERAL = (
    "the graph has no all-reduce; if the model has, a graph break came between (TORCH_LOGS=graph_breaks), "
    "as from a backward hook (ringfence.hugging_face.remove_backward_hooks), or from "
    "torch.distributed.nn.functional, which Dynamo does not trace: call torch.distributed.all_reduce"
)


def why_no_all_reduce(gm: GraphModule) -> str | None:
    """A sentence or two about a graph in which :func:`find` finds none; None where it dispatches tokens instead."""
    if any(is_moe(node) for node in gm.graph.nodes):
        return None
    names = {op_names(node)[0]: None for node in gm.graph.nodes if node.op == "call_function"}
    likely = [n for n in names if "::" in n and not n.startswith(_TORCHS) and _LOOKS_LIKE_ONE.search(n.split("::")[1])]
    if likely:
        return (
            f"the graph has no all-reduce that is known; {', '.join(likely)} is called like one: if it is, list it, "
            f"all_reduce_ops={likely}"
        )
    collectives = [n.split("::")[1] for n in names if n.startswith(_TORCHS) and "wait_tensor" not in n]
    if any("reduce_scatter" in n for n in collectives):
        return (
            f"the graph has no all-reduce: it has {', '.join(collectives)}. Sequence parallelism, which reduces and "
            "scatters in front of the norm, is not fused; row-parallel layers with an all-reduce are"
        )
    if collectives:
        return f"the graph has no all-reduce: its collectives are {', '.join(collectives)}, and none of them is fused"
    return GENERAL
