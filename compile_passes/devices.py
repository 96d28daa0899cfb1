"""Devices: where the tensors of a graph are."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..runtime.errors import InputError
from .op_calls import nodes_of, tensors_of


def device_of(gm: GraphModule) -> torch.device:
    """The device of a graph's kernels: that of its accelerator tensors, whichever of its tensors comes first.

    A graph without an accelerator is on the CPU; one that is on ``meta`` as a whole, which holds no values, is on it.
    Raises :class:`InputError` for a graph on several accelerators, or on ``meta`` and another device.
    """
    found: dict[torch.device, Node] = {}
    for node in nodes_of(gm):
        for value in tensors_of(node):
            if value.device.type != "meta" or node.op == "placeholder":
                found.setdefault(value.device, node)
    others = [device for device in found if device.type != "cpu"]
    if len(others) > 1 or (len(found) > 1 and any(device.type == "meta" for device in found)):
        where = ", ".join(f"'{node.name}' on {device}" for device, node in found.items())
        raise InputError(
            f"the graph is on several devices: {sorted(map(str, found))} ({where}); move model and inputs to one. Only "
            "the CPU may be beside it"
        )
    return others[0] if others else torch.device("cpu")


def accelerators_of(gm: GraphModule) -> list[torch.device]:
    """The devices of the graph's tensors that are neither the CPU nor ``meta``, by first use; of a cut graph too."""
    modules = [gm, *(m for _, m in gm.named_children() if isinstance(m, GraphModule))]
    values = (value for module in modules for node in nodes_of(module) for value in tensors_of(node))
    return list(dict.fromkeys(v.device for v in values if v.device.type not in ("cpu", "meta")))
