"""Nothing is fused: said once, because a model runs all the same, and nobody would look into its report."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from .compile_passes.absent import GENERAL
from .compile_passes.reasons import Reason
from .compile_passes.report import CompileReport
from .runtime.errors import NotFusedWarning

_SHARD = (
    "Shard it before it is compiled: a Hugging Face model by from_pretrained(..., distributed_config="
    "DistributedConfig(tp_plan='auto', tp_size=N)), your own by row-parallel layers with an all-reduce"
)
_MORE = "reports[0] of the Backend (model.ringfence) says more"


def fuses(report: CompileReport) -> bool:
    """Whether anything is fused, or would be in smaller calls."""
    calls = any(verdict.op.startswith("ringfence::moe_") for verdict in report.verdicts)  # a model's own
    larger = any(s.decline is not None and s.decline.reason is Reason.BEYOND_TABLE for s in report.sites)
    return bool(report.fused) or any(site.rewritten for site in report.moe_sites) or calls or larger


def why_nothing_is_fused(reports: Sequence[CompileReport], ranks: int) -> str | None:
    """A sentence with its remedy; None where something is fused, or nothing was asked for. ranks: of the job."""
    if any(fuses(report) or report.passed_over is not None for report in reports):  # grad mode has a warning of its own
        return None
    # Of all-reduces: MoE sites are switched off by default, and nobody asked for that.
    declines = [site.decline for report in reports for site in report.sites if site.decline]
    if any(decline.reason is Reason.SWITCHED_OFF for decline in declines):
        return None
    if declines:
        counts = Counter(str(decline.reason) for decline in declines)
        said = ", ".join(f"{reason} {count} times" if count > 1 else reason for reason, count in counts.items())
        return f"none of {len(declines)} all-reduces is fused ({said}): {declines[0].message}. {_MORE}"
    if ranks < 2:
        alone = "this process is alone: start one for each rank, as by torchrun --nproc-per-node N"
        return f"nothing is fused, because no graph has an all-reduce, and {alone}. {_SHARD}"
    special = [note for report in reports for note in report.notes if note.startswith("the graph has no all-reduce")]
    said = next((note for note in special if note != GENERAL), "")
    return f"nothing is fused, because no graph has an all-reduce{f' ({said})' * bool(said)}. {_SHARD}. {_MORE}"


def say_if_nothing_is_fused(reports: Sequence[CompileReport]) -> None:
    """On one rank. Without a process group those count that torchrun has started."""
    if dist.is_available() and dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
    else:
        rank, ranks = _started("RANK", 0), _started("WORLD_SIZE", 1)
    why = why_nothing_is_fused(reports, ranks)
    if why is not None and rank == 0:
        warnings.warn(f"ringfence: {why}", NotFusedWarning, stacklevel=3)


def _started(variable: str, alone: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else alone
