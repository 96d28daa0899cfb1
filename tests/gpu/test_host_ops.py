"""Ops on the host's tensors in a graph of a device's: a CUDA graph records nothing of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ringfence

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 1, reason=f"needs a CUDA device, {GPUS} here"),
]


def log_message(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x + 1, y + 2


def there_and_back(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a = x + 1
    on_host = a.cpu() + 1
    return a + x @ x + on_host.to("cuda"), y


def lengths(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x * 2, torch.cumsum(y + 1, 0)


def host_index(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x * 2)[(y % 4) * 0 + 1], x - 1


def host_first(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    most = y.max()
    return x + most, y - 1


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("function", [log_message, there_and_back, lengths, host_index, host_first])
def test_the_host_s_part_runs_in_every_step(function: Callable[..., Any], compiler: str) -> None:
    backend = ringfence.Backend(capture_sizes=[4], piece_compiler=compiler, graphs="cuda")
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with torch.no_grad():
        for step in range(5):
            x, y = torch.randn(4, 4, device="cuda"), torch.arange(4) + 10 * step
            for seen, right in zip(compiled(x, y), function(x, y), strict=True):
                assert seen.device == right.device
                torch.testing.assert_close(seen, right)
    assert backend.reports[-1].graphs == "cuda"
