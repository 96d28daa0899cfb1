"""What is called or replaced in SGLang, and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .targets import Target

#: Releases of SGLang whose functions were read and compared with the targets below.
TESTED = ("0.5.23",)

_FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
_GRAPHS = "sglang.srt.model_executor.runner_backend"
FUSED = Target(
    f"{_FUSION}.flashinfer_allreduce_residual_rmsnorm",
    "input_tensor, residual, weight, eps=1e-06, max_token_num=2048, use_oneshot=None, "
    "trigger_completion_at_end=False, fp32_acc=True, use_attn_tp_group=True",
)
PREPARE = Target(f"{_FUSION}.pre_initialize_workspaces", "max_token_num, hidden_dim, dtype, use_oneshot=None")
GROUP = Target(f"{_FUSION}.resolve_fusion_group", "*, use_attn_tp_group")
PARALLEL = Target("sglang.srt.runtime_context.get_parallel", "")
REGISTER = Target(
    "sglang.srt.plugins.hook_registry.HookRegistry.register",
    "target, hook, hook_type=<HookType.AFTER: 'after'>, *, source=None",
)
SEAM = Target(  # called by runtime/seams.py
    "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph.eager_on_graph",
    "fn=None, capture_stub=None, *, enable=None",
)
REPLAYS = tuple(
    Target(f"{_GRAPHS}.{module}.{name}.replay", "self, shape_key, static_forward_batch, **kwargs")
    for module, name in (
        ("full_cuda_graph_backend", "FullCudaGraphBackend"),
        ("breakable_cuda_graph_backend", "BreakableCudaGraphBackend"),
    )
)
#: What each mode calls or replaces.
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "fuse": (REGISTER, PARALLEL, GROUP, SEAM, PREPARE, FUSED, *REPLAYS),
    "guard": (REGISTER, PARALLEL, *REPLAYS),
}


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. mode: of :data:`TARGETS`; prepare, watch: options of these functions."""

    mode: str
    prepare: Mapping[str, Any] = field(default_factory=dict)
    watch: Mapping[str, Any] = field(default_factory=dict)
