"""Engines' all-reduces by their own names and schemas, and a run of a model over them through the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.report import CompileReport
from support import TOLERANCE, relative_error

H = 16


@pytest.fixture
def tp(fake_group: None) -> dist.ProcessGroup:
    """An engine's group, which torch numbers."""
    group = dist.new_group([0, 1])
    assert group.group_name == "1"
    return group


def vllm(x: Tensor) -> Tensor:
    return engine_ops.op("vllm::all_reduce")(x * 2, "tp:0")


def sglang(x: Tensor) -> Tensor:
    return engine_ops.op("sglang::outplace_all_reduce")(x * 2, "tp:0", "auto")


def sglang_in_place(x: Tensor) -> Tensor:
    y = x * 2
    engine_ops.op("sglang::inplace_all_reduce")(y, "tp:0")
    return y


def trtllm(x: Tensor, op: int = 0, **tensors: Tensor) -> Tensor:
    given = [tensors.get(n) for n in ("residual", "norm_weight", "scale", "bias")]
    workspace = torch.zeros(8, dtype=torch.int64)
    return engine_ops.op("trtllm::allreduce")(x * 2, *given, workspace, [0, 1], 3, op, 1e-6, True)[0]


def auto_deploy(x: Tensor) -> Tensor:
    return engine_ops.op("auto_deploy::trtllm_dist_all_reduce")(x * 2, "AUTO")


LISTED = [engine_ops.name_of(schema) for schema in engine_ops.ALL_REDUCES]


def rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return F.rms_norm(h, (H,), w, 1e-6), h


def run(
    model: Callable[..., Any], *args: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[CompileReport, GraphModule]:
    """The report and the fused graph, whose results are compared with eager's."""
    given = args or tuple(torch.randn(shape).to(dtype) for shape in ((4, H), (4, H), (H,)))
    graphs: dict[str, GraphModule] = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("ringfence.backend.dump_graph", lambda stage, gm: graphs.__setitem__(stage, gm))
        backend = ringfence.Backend(piece_compiler="eager", **options)
        torch._dynamo.reset()
        ours = torch.compile(model, backend=backend, fullgraph=True)(*(a.clone() for a in given))
        wanted = model(*(a.clone() for a in given))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert relative_error(mine, theirs.double()) <= 2 * TOLERANCE[dtype]
    (report,) = backend.reports
    return report, graphs["fused"]


def fused_once(report: CompileReport) -> bool:
    (site,) = report.sites
    return site.fused
