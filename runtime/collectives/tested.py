"""What a self-test tries of a workspace, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Which operands a fused site has beside its input: a residual, a weight.
Operands = tuple[bool, bool]
#: All that a site may have.
EVERY_OPERANDS: tuple[Operands, ...] = ((False, False), (False, True), (True, False), (True, True))


class Tested(NamedTuple):
    """What a self-test tries: token counts of one hidden size and dtype, eager and, where asked for, captured."""

    hidden: int
    dtype: torch.dtype
    tokens: tuple[int, ...]
    capture: bool
    operands: tuple[Operands, ...]
    alone: bool


@dataclass(frozen=True)
class SelfTest:
    """What a self-test found to fail, on any rank: ``eager`` and ``captured`` are None where nothing did."""

    eager: str | None
    captured: str | None
    calls: int
