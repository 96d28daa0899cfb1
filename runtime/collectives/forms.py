"""Forms: the kernels of ringfence's own collective as values, and what the host has to know of each.

A form is a strategy for one shape of row and one epilogue. Its source is a file of ``cuda/`` with these as template
arguments; the geometry here is that of ``cuda/common.cuh``.
"""

from __future__ import annotations

import functools
from ctypes import Structure, c_float, c_uint, c_ulonglong
from dataclasses import dataclass
from pathlib import Path

import torch

from ..hazards.situation import Strategy

_SOURCES = Path(__file__).parent / "cuda"
_FILES = {Strategy.ONE_SHOT: "one_shot", Strategy.TWO_SHOT: "two_shot"}
_TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}

#: Bytes of a half vector, of the lines that a warp carries at a time (a granule), and of what they hold of a row.
HALF = 8
GRANULE = 512
GRANULE_DATA = 480
MOST_WARPS = 31

#: The name of a kernel in its instructions.
ENTRY = "entry"


class CallArguments(Structure):
    """``struct Call`` of ``cuda/protocol.cuh``: addresses, then sizes."""

    _fields_ = (
        *((name, c_ulonglong) for name in ("input", "residual", "weight", "norm", "out", "inbox")),
        ("peers", c_ulonglong * 7),
        *((name, c_ulonglong) for name in ("begun", "received", "broken", "bound", "report", "buffer_bytes")),
        *((name, c_uint) for name in ("tokens", "rank")),
        *((name, c_float) for name in ("eps", "weight_bias")),
    )


@dataclass(frozen=True)
class Form:
    """A kernel. row_bytes: of a token. blocks: how many share a token. most_warps: of a block that carry something."""

    strategy: Strategy
    dtype: torch.dtype
    world_size: int
    row_bytes: int
    residual: bool
    norm: bool
    weight: bool
    blocks: int
    most_warps: int = MOST_WARPS

    @property
    def granules(self) -> int:
        """Of a row."""
        return granules_of(self.row_bytes)

    @property
    def rounds(self) -> int:
        """In how many rounds the warps of a block carry their share of a row."""
        return -(-self._share // self.most_warps)

    @property
    def warps(self) -> int:
        return -(-self._share // self.rounds)

    @property
    def threads(self) -> int:
        """Of a block: one warp carries nothing."""
        return 32 * (self.warps + 1)

    @property
    def _share(self) -> int:
        return -(-self.granules // self.blocks)

    @property
    def source(self) -> str:
        """CUDA C++, whole."""
        cluster = f"__cluster_dims__({self.blocks}, 1, 1) " if self.norm and self.blocks > 1 else ""
        entry = (
            f'extern "C" __global__ void {cluster}__launch_bounds__({self.threads})\n'
            f"{ENTRY}(const __grid_constant__ Call call) {{ {self.body}(call); }}\n"
        )
        files = ("instructions.cuh", "elements.cuh", "protocol.cuh", "common.cuh", f"{_FILES[self.strategy]}.cu")
        return "\n".join((*map(_text, files), entry))

    @property
    def body(self) -> str:
        """The function of the file, with its template arguments."""
        options = [self.residual, self.norm, self.weight]
        numbers = [self.blocks, self.warps, self.rounds]
        arguments = [
            *(_TYPES[self.dtype], self.world_size, self.row_bytes // HALF),
            *(str(option).lower() for option in options),
            *numbers,
        ]
        return f"{_FILES[self.strategy]}<Form<{', '.join(map(str, arguments))}>>"


def granules_of(row_bytes: int) -> int:
    """How many granules a row fills, the last one perhaps in part."""
    return -(-row_bytes // GRANULE_DATA)


def granules_of_token(strategy: Strategy, row_bytes: int, world_size: int) -> int:
    """How many granules of an inbox a token needs."""
    granules = granules_of(row_bytes)
    if strategy is Strategy.ONE_SHOT:
        return (world_size - 1) * granules
    return (world_size - 1) * -(-granules // world_size) + granules


@functools.cache
def _text(name: str) -> str:
    return (_SOURCES / name).read_text()
