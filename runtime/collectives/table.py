"""Every collective that ringfence can carry sites out with, in order of preference. One's own is a file and a row."""

from __future__ import annotations

from . import mnnvl, reference, ringfence, trtllm
from .kernels import Implementation

#: Ringfence's own comes behind FlashInfer's until rows of the size table say where it is faster.
ALL: tuple[Implementation, ...] = (
    mnnvl.MULTICAST,
    mnnvl.PEER,
    trtllm.IMPLEMENTATION,
    ringfence.IMPLEMENTATION,
    reference.IMPLEMENTATION,
)
