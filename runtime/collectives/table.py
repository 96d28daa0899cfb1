"""Every collective that ringfence can carry sites out with, in order of preference. One's own is a file and a row."""

from __future__ import annotations

from . import mnnvl, reference, ringfence, trtllm
from .kernels import Implementation

ALL: tuple[Implementation, ...] = (
    mnnvl.MULTICAST,
    ringfence.IMPLEMENTATION,
    mnnvl.PEER,
    trtllm.IMPLEMENTATION,
    reference.IMPLEMENTATION,
)
