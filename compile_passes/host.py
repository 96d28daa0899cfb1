"""What an op asks of the host: a replayed graph would not ask again.

Each function answers a question about one node, as in :mod:`.roles`.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .roles import calls, is_tensor, tensor

#: Control flow whose predicate the host reads.
_READS_A_PREDICATE = (torch.ops.higher_order.cond, torch.ops.higher_order.while_loop)


def op_names(node: Node) -> tuple[str, str]:
    """``"ns::name"`` and ``"ns::name.overload"``; for a higher-order wrapper, of the op inside."""
    inner = node.args[0] if node.args else None
    higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
    target = inner if higher_order and isinstance(inner, torch._ops.OpOverload) else node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        return schema.name, f"{schema.name}.{schema.overload_name or 'default'}"
    return str(target), str(target)


def sizes_given_as_data(gm: GraphModule) -> frozenset[object]:
    """Unbacked sizes that the caller gives; the others are born from data in this graph."""
    return frozenset(symbol for node in gm.graph.find_nodes(op="placeholder") for symbol in _unbacked(node))


def reads_data(node: Node, given: frozenset[object]) -> bool:
    """Whether a value or size that it reads or returns depends on data. ``given``: :func:`sizes_given_as_data`."""
    if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()) or calls(node, *_READS_A_PREDICATE):
        return True
    return any(_unbacked(n) - given for n in (node, *node.all_input_nodes))


def touches_host(node: Node) -> bool:
    """Whether an op of an accelerator reads a value on the CPU that a caller can change, or writes one there."""
    values = node.meta.get("val")
    outputs = [v for v in (values if isinstance(values, tuple | list) else [values]) if isinstance(v, torch.Tensor)]
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]
    devices = {v.device.type for v in outputs} | {tensor(n).device.type for n in inputs}
    if "cpu" not in devices or len(devices) == 1:
        return False
    if any(v.device.type == "cpu" for v in outputs):
        return True
    return any(tensor(n).device.type == "cpu" and not _is_constant(n) for n in inputs)


def waits_for_device(node: Node) -> bool:
    """Whether it is one of Dynamo's ops for ``torch.cuda.synchronize``, ``Event.synchronize``, ..."""
    return op_names(node)[0].startswith("streams::synchronize")


def stream_of(node: Node) -> int | None:
    """The index of the stream that Dynamo saw the op on; None for the stream of the call."""
    custom = node.meta.get("custom") or {}
    stream = custom.get("stream")
    return stream if isinstance(stream, int) else None


def _unbacked(node: Node) -> set[object]:
    values = node.meta.get("val")
    return set(free_unbacked_symbols(list(values) if isinstance(values, tuple | list) else values))


def _is_constant(node: Node) -> bool:
    """Whether a value is the same in every call: no argument of the graph leads to it."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current.op == "placeholder":
            return False
        if current not in seen:
            seen.add(current)
            queue.extend(current.all_input_nodes)
    return True
