"""A tensor-parallel model for the tests of the backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ringfence.runtime.errors import (
    RingfenceError,
)

H = 16


class Layer(nn.Module):
    """A column-parallel and a row-parallel linear, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, H, bias=False), nn.Linear(H, H, bias=False)
        self.norm = nn.RMSNorm(H, eps=1e-5)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(F.silu(self.up(x)))
        dist.all_reduce(y)
        residual = residual + y
        return self.norm(residual), residual


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


def cause(error: BaseException) -> BaseException:
    """What ringfence raised, below what torch.compile wraps around errors of a backend."""
    assert isinstance(error, BackendCompilerFailed)
    assert isinstance(error.inner_exception, RingfenceError)
    return error.inner_exception


def rows(n: int) -> Tensor:
    return torch.randn(n, H)
