"""Which tensors share a byte; what is copied into buffers that stay, and by how many launches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringfence.runtime.replay.buffers import Loads, StorageView, overlap, static_like


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


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def inputs() -> list[Tensor]:
    d = torch.Generator().manual_seed(5)
    x = torch.randn(6, 4, generator=d)
    return [
        x,
        x.bfloat16(),
        torch.randint(9, (7,), generator=d),
        x.double(),
        x > 0,
        x.to(torch.float8_e4m3fn),
        x.T,
        x[:, :1].expand(6, 4),
        x[::2, 1:3],
        torch.view_as_complex(x.reshape(6, 2, 2)).conj(),
        torch.empty(0, 4),
        torch.tensor(2.5),
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_layout_and_type_arrives(mode: Any) -> None:
    given = inputs()
    buffers = [static_like(v) for v in given]
    for buffer in buffers:
        buffer.untyped_storage().fill_(0xEE)
    with mode():
        values = [v.clone(memory_format=torch.preserve_format) if v.is_contiguous() else v for v in given]
        Loads(dict(enumerate(buffers)))(values)
    for buffer, value in zip(buffers, given, strict=True):
        assert buffer.dtype == value.dtype and buffer.stride() == value.stride()
        assert torch.equal(
            buffer.double() if value.is_floating_point() else buffer,
            value.double() if value.is_floating_point() else value,
        )


def test_usual_inputs_are_one_launch() -> None:
    given = [v for v in inputs() if v.is_contiguous() and v.dtype in (torch.float32, torch.bfloat16, torch.int64)]
    buffers = [static_like(v) for v in given]
    with torch.no_grad(), Ops() as ops:
        Loads(dict(enumerate(buffers, 3)))(["not", "of", "these", *given])
    assert all(map(torch.equal, buffers, given))
    assert len(given) > 4 and ops.names == ["aten::_foreach_copy_"]
    with torch.no_grad(), Ops() as ops:
        Loads({})([])
        assert ops.names == []
        Loads({1: buffers[0]})(given[-1:] + given[:1])
    assert ops.names == ["aten::copy_"]
