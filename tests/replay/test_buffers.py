"""What is copied into buffers that stay, and by how many launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringfence.runtime.replay.buffers import copy_all, static_like


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
        copy_all(buffers, [v.clone(memory_format=torch.preserve_format) if v.is_contiguous() else v for v in given])
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
        copy_all(buffers, given)
    assert len(given) > 4 and ops.names == ["aten::_foreach_copy_"]
    with torch.no_grad(), Ops() as ops:
        copy_all([], [])
    assert ops.names == []
