"""What both collectives over FlashInfer take for granted: of the ranks, and of a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .kernels import Requirement
from .rank_facts import RankFacts, differ

REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement(
        "dtype",
        lambda c: c.dtype in (torch.float16, torch.bfloat16, torch.float32),
        "the kernels are built for float16, bfloat16 and float32",
        "DISPATCH_FLOATING_TYPES in csrc",
    ),
    Requirement(
        "hidden",
        lambda c: c.hidden * c.dtype.itemsize % 16 == 0,
        "a row must be a multiple of 16 bytes",
        "both kernels read 16 bytes at a time",
    ),
    Requirement(
        "cluster",
        lambda c: c.hidden * c.dtype.itemsize <= 16 * 1024 * 8,
        "a row must fit into 8 blocks of 1,024 threads",
        "the largest portable cluster; a row is normalised by one cluster",
    ),
    Requirement(
        "warp",
        lambda c: c.hidden * c.dtype.itemsize % (16 * 32) == 0,
        "a row must be a multiple of 512 bytes, so that warps are whole",
        "FI#3880 (hazard M13)",
    ),
)


def unfit(ranks: Sequence[RankFacts]) -> str | None:
    """Why no kernel of FlashInfer can run on these ranks."""
    missing = next((f.flashinfer_missing for f in ranks if f.flashinfer_missing), None)
    return missing or differ(ranks, "flashinfer", "capability", "multiprocessors")
