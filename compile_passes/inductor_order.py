"""Reads that Inductor would put behind a write: what is computed of memory before an op writes it stays before.

Inductor computes a value where it is needed. A value that was computed of a cache is safe from what writes the cache
later because Inductor orders kernels by the buffers that they read. In two places it forgets to:

- an op that writes may be given a value that was computed of what it writes. Inductor makes a copy for the op, and what
  else reads the value computes it again, behind the write (``sin(c)`` in ``v = sin(c); append_(c, v); v + 1``);
- before torch 2.13 its C++ backend lost a node's place in the order where it changed the node's loops to fuse it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

from ..runtime.versions import in_range
from .aliases import root
from .roles import is_tensor

#: Part of the key of Inductor's cache. What is done here is in no graph, and where an input begins is in no key, so
#: code that was made without either has another.
CACHE_TAG = "ringfence: reads before writes, inputs from their first element"


def compute_in_time(piece: GraphModule) -> None:
    """Have what ops that may write are given computed before them, once, for all its readers."""
    for node in piece.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for given in map(root, node.all_input_nodes):
                if given.op == "call_function" and is_tensor(given):
                    given.meta["inductor_realize_to_strides"] = True  # the name that its lowering looks for


@contextlib.contextmanager
def order_kept() -> Iterator[None]:
    """Let Inductor keep the order of reads and writes while it compiles, and find nothing that it made without that."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=config.cache_key_tag + CACHE_TAG), _loops_keep_their_place():
        yield


def _loops_keep_their_place() -> contextlib.AbstractContextManager[Any]:
    if in_range(torch.__version__, "2.13", None):
        return contextlib.nullcontext()
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch._inductor.scheduler import SchedulerNode
    from torch.utils._ordered_set import OrderedSet

    changed = SchedulerNode.recompute_size_and_body

    def recompute(node: Any, *args: Any, **kwargs: Any) -> None:
        order = OrderedSet(read for read in node.read_writes.reads if isinstance(read, StarDep | WeakDep))
        changed(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.with_read(order).rename(node.mutation_renames))

    patched: contextlib.AbstractContextManager[Any] = mock.patch.object(
        SchedulerNode, "recompute_size_and_body", recompute
    )
    return patched
