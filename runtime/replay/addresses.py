"""Where arguments lie, by which a capture is found. That is asked of every parameter in every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .program import taker

_address, _size, _stride, _dtype = Tensor.data_ptr, Tensor.size, Tensor.stride, attrgetter("dtype")

#: ``(tensors, addresses, indices)``: whether these of a list are at those addresses of another. In torch for CUDA.
_are_at: Callable[[list[Any], list[int], list[int]], bool] | None = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", None
)


class Addresses:
    """Of the arguments ``kept``. Nearly always they are where they were, which torch may tell in one go."""

    def __init__(self, kept: list[int]) -> None:
        self._kept, self._take = kept, taker(kept)
        self._before: tuple[int, ...] = ()
        self._listed: list[int] = []  # the same, by position among all arguments

    def of(self, args: list[Any]) -> tuple[int, ...]:
        """In the order of ``kept``."""
        if _are_at is not None and self._before and _are_at(args, self._listed, self._kept):
            return self._before
        self._before = tuple(map(_address, self._take(args)))
        if _are_at is not None:
            self._listed = [0] * len(args)
            for i, address in zip(self._kept, self._before, strict=True):
                self._listed[i] = address
        return self._before


def layouts(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What else tells tensors apart that begin at the same addresses."""
    return tuple(map(_size, tensors)), tuple(map(_stride, tensors)), tuple(map(_dtype, tensors))
