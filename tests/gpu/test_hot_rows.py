"""Rows of a residual stream with one large element: a norm in the activation's own dtype would lose them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from support import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, {GPUS} here"),
]
H = 4096
#: One element of the residual, by row: within float16's range, and far beyond 256, whose square is not.
HOT = {1: 300.0, 2: -5000.0, 3: 60000.0, 4: 1e-4, 5: 0.0}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1.0
        dist.all_reduce(y)
        total = residual + y
        return F.rms_norm(total, (H,), self.weight, 1e-6), total


def rows(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(8, H, device="cuda", generator=generator)
    residual = torch.randn(8, H, device="cuda", generator=torch.Generator("cuda").manual_seed(9))
    for row, value in HOT.items():
        residual[row, 7 * row] = value
    x[4], residual[4] = x[4] * 1e-3, residual[4] * 1e-3  # tiny throughout
    x[5], residual[5] = 0.0, 0.0
    return x.to(dtype), residual.to(dtype)


def serve(rank: int, dtype_name: str, collective: str) -> dict[str, Any]:
    import ringfence

    dtype = getattr(torch, dtype_name)
    model = Model(dtype).cuda()
    backend = ringfence.Backend(collective=collective, capture_sizes=[8])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, residual = rows(rank, dtype)
    off = []
    with torch.no_grad():
        for _ in range(4):
            norm, total = compiled(x.clone(), residual)
            right = F.rms_norm(total.double(), (H,), model.weight.double(), 1e-6)
            off.append(float(((norm.double() - right).abs() / (right.abs() + 1e-2)).amax(1).max()))
    return {"off": off, "collective": backend.reports[-1].collective, "text": str(backend.reports[-1])}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("collective", ["auto", "trtllm"])
def test_no_row_is_lost(collective: str, dtype: str) -> None:
    for result in run_ranks(2, serve, dtype, collective, backend="nccl", timeout=150):
        assert max(result["off"]) < {"float16": 4e-3, "bfloat16": 3e-2}[dtype], result


def test_mnnvl_is_refused_or_right_in_float16() -> None:
    """Asked for by name: the rows are right, or the error says why it cannot be had."""
    try:
        results = run_ranks(2, serve, "float16", "mnnvl", backend="nccl", timeout=150)
    except AssertionError as error:
        assert "CollectiveUnavailableError" in str(error) and "float16" in str(error)
        return
    assert all(max(result["off"]) < 4e-3 for result in results), results
