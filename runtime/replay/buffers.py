"""Buffers that stay where they are, and what may be copied into them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .program import taker


@dataclass(frozen=True)
class StorageView:
    """How a tensor reads its storage: all that makes another tensor on the same bytes the same values."""

    dtype: torch.dtype
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> StorageView:
        offset = int(tensor.storage_offset())
        bits = tensor.is_conj(), tensor.is_neg()
        return cls(tensor.dtype, tensor.device, tensor.size(), tensor.stride(), offset, *bits)

    def on(self, storage: torch.UntypedStorage, offset: int | None = None) -> Tensor:
        """A tensor on ``storage``, from ``offset`` elements on. A normal one also under inference mode."""
        with torch.inference_mode(False):
            made = torch.empty(0, dtype=self.dtype, device=self.device)
            made.set_(storage, self.offset if offset is None else offset, self.size, self.stride)
            torch._C._set_conj(made, self.conj)
            torch._C._set_neg(made, self.neg)
        return made


def static_like(tensor: Tensor) -> Tensor:
    """An uninitialised buffer with the layout of ``tensor``.

    A normal tensor also under inference mode: it will be written again, perhaps
    outside of it.
    """
    with torch.inference_mode(False):
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


#: What CUDA's kernel for lists has a case for, in every release that is served; it lacks some of the smaller types.
_COPIED_TOGETHER = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64))


class Loads:
    """:func:`copy_into` for the buffers of some arguments; one launch for those that allow it.

    A launch costs more than a small copy, and what can be known of buffers is asked once.
    """

    def __init__(self, buffers: Mapping[int, Tensor]) -> None:
        together = {i: b for i, b in buffers.items() if b.dtype in _COPIED_TOGETHER and b.is_contiguous()}
        if len(together) < 2:  # a copy of one alone is cheaper
            together = {}
        self.buffers = buffers
        self._apart = [(i, buffer) for i, buffer in buffers.items() if i not in together]
        self._together, self._take = list(together.values()), taker(list(together))

    def __call__(self, args: Sequence[Any]) -> None:
        for i, buffer in self._apart:
            copy_into(buffer, args[i])
        if self._together:
            torch._foreach_copy_(self._together, self._take(args))


def copy_into(buffer: Tensor, value: Tensor) -> None:
    """Copy between two tensors of one layout, which may be expanded (stride 0)."""
    if buffer.is_contiguous():  # the usual case, and this runs for every input and island of every step
        buffer.copy_(value)
    else:
        _first_of_repeats(buffer).copy_(_first_of_repeats(value))


def narrow(tensor: Tensor, dims: tuple[int, ...], size: int) -> Tensor:
    """The first ``size`` rows of a padded tensor, in each of its padded dimensions."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def weak_memory(tensor: Tensor) -> Callable[[], Tensor | None]:
    """A function that returns a tensor on the same memory while somebody keeps that alive.

    The memory counts, not the object: a captured graph knows addresses only, and
    ``nn.Parameter(p.data)`` is another object at the same one.
    """
    storage, layout = StorageWeakRef(tensor.untyped_storage()), StorageView.of(tensor)

    def revive() -> Tensor | None:
        alive = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        return None if alive is None else layout.on(alive)

    return revive


def same_memory(a: Tensor, b: Any) -> bool:
    """Whether two tensors begin at the same place."""
    return isinstance(b, Tensor) and a.device == b.device and a.data_ptr() == b.data_ptr()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may have a byte in common. Views that interleave, as keys and values of a cache, do not."""
    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    if not (a_begin < b_end and b_begin < a_end):
        return False
    apart, misaligned = divmod(b_begin - a_begin, a.element_size())
    if a.stride() != b.stride() or a.element_size() != b.element_size() or misaligned:
        return True
    dims = [(stride, 1 - m, n - 1) for stride, n, m in zip(a.stride(), a.shape, b.shape, strict=True) if stride]
    return _meet(apart, sorted(dims, reverse=True))


def _meet(distance: int, dims: Sequence[tuple[int, int, int]]) -> bool:
    """Whether steps of each stride, between two numbers of them, may add up to a distance. Largest stride first."""
    if not dims:
        return distance == 0
    (stride, least, most), *inner = dims
    low, high = (sum(s * bounds[i] for s, *bounds in inner) for i in (0, 1))
    steps = range(max(least, math.ceil((distance - high) / stride)), min(most, (distance - low) // stride) + 1)
    return len(steps) > 2 or any(_meet(distance - n * stride, inner) for n in steps)  # more: strides that overlap


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor's elements lie between."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def on_memory_of(tensor: Tensor, keeper: object) -> Tensor:
    """``tensor`` again, on a storage that keeps ``keeper`` alive instead of the memory."""
    storage = tensor.untyped_storage()
    memory = tensor_at(storage.data_ptr(), storage.nbytes(), tensor.device, keeper)
    return StorageView.of(tensor).on(memory.untyped_storage())


def tensor_at(address: int, nbytes: int, device: torch.device, keeper: object) -> Tensor:
    """Bytes at an address, as uint8 with a storage of their own. They keep ``keeper`` alive, and nothing else."""
    with torch.inference_mode(False):
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            return torch.as_tensor(_DeviceMemory(address, nbytes, keeper), device=device)
        memory = (ctypes.c_ubyte * nbytes).from_address(address)
        memory.keeper = keeper  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=torch.uint8)


class _DeviceMemory:
    """Memory of a GPU, in the words of numba's protocol, which torch reads."""

    def __init__(self, address: int, nbytes: int, keeper: object) -> None:
        self.keeper = keeper
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _first_of_repeats(tensor: Tensor) -> Tensor:
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses as spans that do not overlap, in order."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def mib(*tensors: Tensor) -> str:
    return f"{sum(t.numel() * t.element_size() for t in tensors) / 2**20:.1f} MiB"
