"""What a program is given: tensors by their spec, which says where in a storage they lie too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: How many rows or elements lie before a tensor: in each step others, which nothing guards.
_BEFORE = 4


def tensor(spec: str, sizes: Mapping[str, int], generator: torch.Generator, device: str = "cpu") -> Tensor:
    """``[LAYOUT ]KIND[DIMENSIONS]``: random data; the same for the same generator, whatever the device."""
    *words, last = spec.split(" ")
    kind, _, dims = last.partition("[")
    shape = tuple(sizes[d] if d in sizes else int(d) for d in dims[:-1].split(",") if d)

    def make(of: Sequence[int]) -> Tensor:
        if kind == "bool":
            return (torch.rand(of, generator=generator) < 0.5).to(device)
        if kind == "int64":
            return torch.randint(0, 4, tuple(of), generator=generator).to(device)
        return torch.randn(of, generator=generator).to(getattr(torch, kind)).to(device)

    if kind == "positions":
        return torch.randperm(8, generator=generator)[: shape[0]].to(device)
    before = int(torch.randint(0, _BEFORE + 1, (), generator=generator)) if words else 0
    return LAYOUTS[words[0]](make, shape, before) if words else make(shape)


def whole(value: Tensor) -> Tensor:
    """All of a tensor's storage."""
    return value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)


def _inside(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    return make((shape[0] + before + 1, *shape[1:]))[before : before + shape[0]]  # type: ignore[no-any-return]


def _odd(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    size = math.prod(shape)
    return make((size + before + 3,))[before : before + size].view(shape)  # type: ignore[no-any-return]


def _columns(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    return make((*shape[:-1], shape[-1] + 8))[..., before : before + shape[-1]]  # type: ignore[no-any-return]


def _gaps(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    return make((2 * shape[0], *shape[1:]))[before % 2 :: 2]  # type: ignore[no-any-return]


def _turned(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    return make((*reversed(shape[:2]), *shape[2:])).transpose(0, 1)  # type: ignore[no-any-return]


def _expanded(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    return make((1, *shape[1:])).expand(shape)  # type: ignore[no-any-return]


def _windows(make: Any, shape: tuple[int, ...], before: int) -> Tensor:
    return make((math.prod(shape),)).as_strided(shape, (1,) * len(shape))  # type: ignore[no-any-return]


#: Where in a storage a tensor lies. What the last two name holds an element at several places, and is not written.
LAYOUTS: Mapping[str, Callable[[Any, tuple[int, ...], int], Tensor]] = {
    "inside": _inside,
    "odd": _odd,
    "columns": _columns,
    "gaps": _gaps,
    "turned": _turned,
    "expanded": _expanded,
    "windows": _windows,
}
CONTIGUOUS, OVERLAPPING = ("inside", "odd"), ("expanded", "windows")
