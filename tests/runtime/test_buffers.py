"""Which tensors share a byte."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ringfence.runtime.replay.buffers import StorageView, overlap


def bytes_of(tensor: Tensor) -> set[int]:
    """The addresses of a tensor's bytes, one by one."""
    indices = itertools.product(*map(range, tensor.shape))
    starts = (sum(i * s for i, s in zip(index, tensor.stride(), strict=True)) for index in indices)
    size = tensor.element_size()
    return {tensor.data_ptr() + start * size + byte for start in starts for byte in range(size)}


def test_views_of_one_layout_overlap_where_a_byte_is_in_both() -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(0, 2**31, ())))
    memory = torch.empty(400)
    told = {True: 0, False: 0}

    def draw(most: int) -> int:
        return int(torch.randint(0, most, (), generator=generator))

    for _ in range(1000):
        inner = 1 + draw(3)
        middle = inner * (1 + draw(4))
        strides = [middle * (1 + draw(4)), middle, inner]
        order = torch.randperm(3, generator=generator).tolist()
        sizes = [[1 + draw(4), 1 + draw(3), 1 + draw(3)] for _ in range(2)]
        a, b = (memory.as_strided(n, strides, draw(40)).permute(order) for n in sizes)
        meets = bool(bytes_of(a) & bytes_of(b))
        inside = [[sum((n[i] - 1) * strides[i] for i in range(k + 1, 3)) for k in range(3)] for n in sizes]
        nested = all(stride > sum(within) for stride, *within in zip(strides, *inside, strict=True))
        assert (overlap(a, b) == meets) if nested else (overlap(a, b) or not meets), (a.stride(), a.shape, b.shape)
        told[meets] += nested
    assert min(told.values()) > 20, told


def test_other_dtypes_and_strides_that_overlap_may_share() -> None:
    memory = torch.empty(64)
    assert overlap(memory[:8], memory[4:12].view(torch.int32).view(torch.uint8))
    windows = memory.as_strided((4, 8), (2, 1))
    assert overlap(windows, memory.as_strided((4, 8), (2, 1), 13))
    assert not overlap(memory[:0], memory) and not overlap(memory[:8], memory[8:])


@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.imag, lambda t: t.conj().imag, lambda t: t[1:].T])
def test_a_layout_makes_the_same_values_of_the_same_bytes(view: object) -> None:
    tensor = view(torch.randn(4, 6, dtype=torch.complex64))  # type: ignore[operator]
    again = StorageView.of(tensor).on(tensor.untyped_storage())
    assert torch.equal(again.resolve_conj().resolve_neg(), tensor.resolve_conj().resolve_neg())
