"""What the ranks of test_integrations_sglang.py do, each in a stand-in of SGLang."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fake_flashinfer import FakeFlashInfer, installed
from fake_sglang import FUSION, Coordinator, FakeSglang
from torch import Tensor

import ringfence
from ringfence.integrations import sglang
from ringfence.runtime.collectives.workspace import workspaces_of
from support import TOLERANCE, relative_error

H, LARGEST, EPS = 256, 8, 1e-5


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def in_sglang(asked: str, options: dict[str, Any], fake: FakeSglang) -> Lines:
    """Registered and applied, as SGLang does; what is logged."""
    logger, lines = logging.getLogger("ringfence.integrations"), Lines()
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    with mock.patch.dict(os.environ, {"RINGFENCE": asked, "RINGFENCE_OPTIONS": json.dumps(options)}):
        sglang.register()
    fake.apply_hooks()
    return lines


def drawn(rank: int, tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` is this rank's own, residual and weight are all ranks'."""
    mine, shared = torch.Generator().manual_seed(1000 * seed + rank), torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=mine).to(dtype)
    return x, torch.randn(tokens, H, generator=shared).to(dtype), torch.rand(H, generator=shared).to(dtype) + 0.5


def error_of(rank: int, ours: tuple[Tensor, Tensor], seed: int) -> float:
    """Relative to what is allowed, against float64 but for the sum's one rounding."""
    tokens, dtype = ours[0].shape[0], ours[0].dtype
    total = torch.stack([drawn(r, tokens, dtype, seed)[0] for r in range(2)]).double().sum(0)
    _, residual, weight = drawn(rank, tokens, dtype, seed)
    total = (total.to(dtype) + residual).double()
    norm = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
    return max(relative_error(a, b) for a, b in zip(ours, (norm, total), strict=True)) / TOLERANCE[dtype]


def serving(rank: int, folder: str) -> dict[str, Any]:
    """Prepared, asked by layers, replayed, and at last a replay that fails on rank 1."""
    torch.set_grad_enabled(False)
    fake = FakeSglang(Coordinator(dist.new_group([0, 1]), "tp:0", 2, rank))
    found: dict[str, Any] = {}
    with fake.loaded(), installed(FakeFlashInfer("0")) as package:
        watch = {"on_hang": "report", "step_seconds": 30, "journal_dir": folder, "agree_seconds": 30}
        lines = in_sglang("fuse", watch, fake)
        found["unprepared"] = _layer(fake, package, rank, 3, torch.bfloat16, 1)
        functions = fake.modules[FUSION].__dict__
        functions["pre_initialize_workspaces"](max_token_num=LARGEST, hidden_dim=H, dtype=torch.bfloat16)
        found["prepared"] = workspaces_of("tp:0").prepared[torch.bfloat16]
        found["lines"] = lines.lines
        found["served"] = _layer(fake, package, rank, 3, torch.bfloat16, 2)
        found["strided"] = _layer(fake, package, rank, 4, torch.bfloat16, 6, strided=True)
        found["large"] = _layer(fake, package, rank, LARGEST + 1, torch.bfloat16, 3)
        found["float32"] = _layer(fake, package, rank, 3, torch.float32, 4)
        x, residual, weight = drawn(rank, 3, torch.bfloat16, 5)
        direct = functions["flashinfer_allreduce_residual_rmsnorm"]
        found["mixed"] = direct(x, residual.float(), weight, EPS), direct(x, residual, weight.float(), EPS)
        fake.said.clear()
        for size in (4, 4, 2):
            fake.replay("FullCudaGraphBackend", size, lambda: fake.layer(x, residual, weight, EPS))
        fake.replay("BreakableCudaGraphBackend", 7, lambda: fake.layer(x, residual, weight, EPS), "EXTEND")
        found["replayed"] = list(fake.said)
        found["heard"] = _failing(fake, rank)
    return found


def _layer(
    fake: FakeSglang,
    package: FakeFlashInfer,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
    strided: bool = False,
) -> tuple[list[str], list[str], float]:
    """What SGLang did itself, which kernels ran, and the error."""
    fake.said.clear()
    package.calls.clear()
    x, residual, weight = drawn(rank, tokens, dtype, seed)
    if strided:
        x = x.repeat_interleave(2, dim=0)[::2]
    ours = fake.layer(x, residual, weight, EPS)
    return list(fake.said), [name for name, *_ in package.calls], error_of(rank, ours, seed)


def _failing(fake: FakeSglang, rank: int) -> str:
    """Rank 1 throws in a replay; rank 0 hears of it in one of its own."""

    def out_of_pages() -> None:
        raise ValueError("out of pages")

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            fake.replay("FullCudaGraphBackend", 4, out_of_pages if rank else lambda: time.sleep(0.1))
        except (ValueError, ringfence.GroupFailureError) as error:
            return f"{type(error).__name__}: {error}"
    return ""
