"""ringfence in SGLang: entry point ``sglang.srt.plugins``, loaded in each of its processes.

    RINGFENCE=fuse python -m sglang.launch_server ... --flashinfer-allreduce-fusion-backend auto

SGLang hands an all-reduce that a residual add and an RMSNorm follow to one function,
``flashinfer_allreduce_residual_rmsnorm``, and does the three by itself where that returns ``(None, None)``. ``fuse``
puts the fused op there, prepared where SGLang would make its workspaces, and watches the replays of its graphs;
``guard`` leaves SGLang's kernels and only watches. ``RINGFENCE_OPTIONS`` is a JSON object of options.

Whether a call is served is decided by values that are equal on all ranks: what they prepared together, shapes and
dtypes, and whether SGLang captures. A rank that went another way than its peers would wait for them for ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import environment
from .targets import Target, moved, resolve, version_of

#: Releases of SGLang whose functions were read and compared with the targets below.
TESTED = ("0.5.23",)

_FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
_GRAPHS = "sglang.srt.model_executor.runner_backend"
_FUSED = Target(
    f"{_FUSION}.flashinfer_allreduce_residual_rmsnorm",
    "input_tensor, residual, weight, eps=1e-06, max_token_num=2048, use_oneshot=None, "
    "trigger_completion_at_end=False, fp32_acc=True, use_attn_tp_group=True",
)
_PREPARE = Target(f"{_FUSION}.pre_initialize_workspaces", "max_token_num, hidden_dim, dtype, use_oneshot=None")
GROUP = Target(f"{_FUSION}.resolve_fusion_group", "*, use_attn_tp_group")
PARALLEL = Target("sglang.srt.runtime_context.get_parallel", "")
_REGISTER = Target(
    "sglang.srt.plugins.hook_registry.HookRegistry.register",
    "target, hook, hook_type=<HookType.AFTER: 'after'>, *, source=None",
)
_SEAM = Target(  # called by runtime/seams.py
    "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph.eager_on_graph",
    "fn=None, capture_stub=None, *, enable=None",
)
_REPLAYS = tuple(
    Target(f"{_GRAPHS}.{module}.{name}.replay", "self, shape_key, static_forward_batch, **kwargs")
    for module, name in (
        ("full_cuda_graph_backend", "FullCudaGraphBackend"),
        ("breakable_cuda_graph_backend", "BreakableCudaGraphBackend"),
    )
)
#: What each mode calls or replaces.
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "fuse": (_REGISTER, PARALLEL, GROUP, _SEAM, _PREPARE, _FUSED, *_REPLAYS),
    "guard": (_REGISTER, PARALLEL, *_REPLAYS),
}

_MODES = {"1": "fuse", "fuse": "fuse", "guard": "guard"}
_OF_PREPARE = ("collective", "transport", "size_table", "on_hazard")
_OF_WATCH = ("on_hang", "step_seconds", "warm_up_seconds", "journal_dir", "check_every_step")
_OF_BOTH = ("agree_seconds",)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. mode: of :data:`TARGETS`; prepare, watch: options of these functions."""

    mode: str
    prepare: Mapping[str, Any] = field(default_factory=dict)
    watch: Mapping[str, Any] = field(default_factory=dict)


def register() -> None:
    """What SGLang calls in each of its processes. Ends the process, with one line, where the options are wrong."""
    if environment.is_off(os.environ) or environment.is_silent(os.environ):
        return
    from ..runtime.errors import OptionsError

    try:
        settings = settings_of(os.environ)
    except OptionsError as error:
        raise SystemExit(f"ringfence: {error}") from None
    if found := moved(TARGETS[settings.mode]):
        _log.warning(
            "ringfence does nothing in SGLang %s, which is not the one that it was written for (%s): %s",
            version_of("sglang"),
            ", ".join(TESTED),
            "; ".join(found),
        )
        return
    registry, kinds = (resolve(f"sglang.srt.plugins.hook_registry.{name}") for name in ("HookRegistry", "HookType"))
    if hasattr(registry, "ringfence"):  # called again: a replay in two steps would be counted twice
        return
    from .sglang_hooks import Adapter

    adapter = registry.ringfence = Adapter(settings)
    for target in _REPLAYS:
        registry.register(target.path, adapter.replay, kinds.AROUND)
    if settings.mode == "fuse":
        registry.register(_PREPARE.path, adapter.pre_initialize_workspaces, kinds.REPLACE)
        registry.register(_FUSED.path, adapter.all_reduce_residual_rms_norm, kinds.REPLACE)


def settings_of(given_by: Mapping[str, str]) -> Settings:
    """What is asked for. Raises :class:`OptionsError`."""
    from ..options import Options
    from ..runtime.errors import OptionsError

    asked, given = environment.asked_in(given_by, tuple(_MODES))
    mode = _MODES[asked]
    known = (*_OF_WATCH, *_OF_BOTH, *(_OF_PREPARE if mode == "fuse" else ()))
    if unknown := [name for name in given if name not in known]:
        raise OptionsError(
            f"RINGFENCE_OPTIONS holds {', '.join(unknown)}; with RINGFENCE={mode} it takes {', '.join(known)}"
        )
    if given.get("on_hazard") == "clean":
        raise OptionsError("on_hazard='clean' rewrites a graph, and SGLang has none; use 'split', 'refuse' or 'raise'")
    Options.parse(given)
    parts = (tuple(n for n in names if n in given) for names in ((*_OF_PREPARE, *_OF_BOTH), (*_OF_WATCH, *_OF_BOTH)))
    of_prepare, of_watch = ({name: given[name] for name in names} for names in parts)
    return Settings(mode, of_prepare, of_watch)
