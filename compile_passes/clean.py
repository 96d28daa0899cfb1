"""Clean: keep words that a faulty receiver takes for "not arrived" from being sent.

MNNVL kernels before FlashInfer 0.6.12 compare a received 32-bit word with the sentinel
-0.0 as float32, with flush-to-zero: every word with sign 1 and exponent 0 looks as if it
had not arrived, and the receiver polls for ever (FI#3053). Such a word is

- for float32 a negative subnormal, above -2**-126;
- for bfloat16 a pair whose second element is one, above -2**-126;
- for float16 a pair whose second element lies above -2**-17: its upper bits are the
  word's exponent.

So an element with these bits is replaced by +0.0, in any column, by one comparison of
integers: one of floats would be flushed as well. That is enough for one-shot, where only
inputs are sent; in two-shot a sum of clean values may be such a word again. No element changes by more than
:data:`LARGEST_CHANGE`, and the sum over R ranks by no more than R times that.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from .fuse import SITE
from .roles import aten, first_node, tensor

#: By dtype: elements are changed by less than this.
LARGEST_CHANGE = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-17}

#: By dtype: the integer type of the same width, and the first integer that is not replaced.
_BITS = {
    torch.float32: (torch.int32, -(2**31) + 0x800000),
    torch.bfloat16: (torch.int16, -(2**15) + 0x80),
    torch.float16: (torch.int16, -(2**15) + 0x80),
}


def clean_payload(gm: GraphModule, sites: Collection[int]) -> None:
    """Put the replacement in front of the fused ops of these sites, in place.

    Inductor fuses it into the kernel that produces the input.
    """
    if not sites:
        return
    for node in list(gm.graph.nodes):
        if node.meta.get(SITE) not in sites:
            continue
        source = first_node(node)
        assert source is not None, "a fused op takes its input first"
        with gm.graph.inserting_before(node):
            cleaned = _cleaned(gm, source)
        node.args = (cleaned, *node.args[1:])
    gm.recompile()


def _cleaned(gm: GraphModule, source: Node) -> Node:
    dtype = tensor(source).dtype
    integers, first_kept = _BITS[dtype]
    call = gm.graph.call_function
    bits = call(aten.view.dtype, (source, integers))
    absent = call(aten.lt.Scalar, (bits, first_kept))
    zeroed = call(aten.masked_fill.Scalar, (bits, absent, 0))
    cleaned = call(aten.view.dtype, (zeroed, dtype))
    for node in (bits, absent, zeroed, cleaned):
        arguments = [tensor(a) if isinstance(a, Node) else a for a in node.args]
        node.meta["val"] = node.target(*arguments)  # type: ignore[operator]
    return cleaned
