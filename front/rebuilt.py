"""Inputs that share memory, of which one is written: AOT passes their storage, and rebuilds them from that.

Where they begin in it is a number of the trace that nothing guards, so a call whose inputs begin elsewhere would read
and write beside them (torch's own backends do). Such a call runs the graph as Dynamo made it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._functorch._aot_autograd.descriptors import SyntheticBaseAOTInput, ViewBaseAOTInput
from torch.fx import GraphModule

from .compile_passes.provenance import without_scope
from .runtime.errors import MovedInputWarning


def rebuilds_inputs(gm: GraphModule) -> bool:
    """Whether a graph of AOT's is given storages in place of inputs that share them."""
    given = (node.meta.get("desc") for node in gm.graph.find_nodes(op="placeholder"))
    return any(isinstance(desc, SyntheticBaseAOTInput | ViewBaseAOTInput) for desc in given)


def only_where_traced(
    run: Callable[..., Any], gm: GraphModule, example_inputs: Sequence[Any], names: Sequence[str]
) -> Callable[..., Any]:
    """``run``, which is Dynamo's ``gm`` compiled, for inputs that begin where they were traced; ``gm`` for others."""
    tensors = {i: value for i, value in enumerate(example_inputs) if isinstance(value, Tensor)}
    shared = Counter(value.untyped_storage()._cdata for value in tensors.values())
    begins = {
        i: offset
        for i, value in tensors.items()
        if shared[value.untyped_storage()._cdata] > 1 and isinstance(offset := value.storage_offset(), int)
    }
    told = False

    def call(*args: Any) -> Any:
        nonlocal told
        if all(args[i].storage_offset() == offset for i, offset in begins.items()):
            return run(*args)
        if not told:
            told = True
            which = ", ".join(f"'{without_scope(names[i])}'" for i in begins)
            warnings.warn(
                f"{which} share memory, one of them is written, and they begin elsewhere in it than when the graph was "
                "traced: such calls run uncompiled. Pass the whole tensor and slice it in the model, or compile with "
                "dynamic=True",
                MovedInputWarning,
                stacklevel=2,
            )
        return gm(*args)

    return call if begins else run
