"""What of vLLM is hooked: read in 0.32.0 and 0.33.0, and compared before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping

from ..targets import Target

#: Releases whose sources were read; another one is used if its targets are as they were, and the first line says so.
SUPPORTED = ("0.32", "0.34")

#: What ``-cc.backend`` names: vLLM resolves it to :func:`ringfence.integrations.vllm.backend`.
BACKEND = "ringfence.integrations.vllm.backend"

WORKER = "vllm.v1.worker.worker_base"
_PASSES = "vllm.compilation.passes.pass_manager.PostGradPassManager"
_COMPILATION = "vllm.config.compilation"

_FLASHINFER = "vllm.distributed.device_communicators.flashinfer_all_reduce"
_WORKSPACE = "world_size, rank, max_token_num, hidden_dim, dtype, group"

#: Where a configuration is complete, in the process that starts the engine.
POST_INIT = Target("vllm.config.vllm.VllmConfig.__post_init__", "self")
#: In each worker: where its groups exist, before memory is measured and the model is made; and each step.
INIT_DEVICE = Target(f"{WORKER}.WorkerWrapperBase.init_device", "self")
EXECUTE_MODEL = Target(f"{WORKER}.WorkerWrapperBase.execute_model", "self, scheduler_output")
#: Where the passes of a compiler are put together.
CONFIGURE = Target(f"{_PASSES}.configure", "self, config")
#: Where the name of a backend becomes a function.
INIT_BACKEND = Target(
    f"{_COMPILATION}.CompilationConfig.init_backend",
    "self, vllm_config, prefix='', is_encoder=False",
    also=("self, vllm_config, prefix='', is_encoder=False, use_aot_compile=True",),  # 0.33
)
#: Where vLLM makes the workspace of FlashInfer's fused all-reduce.
CREATE_WORKSPACE = Target(f"{_FLASHINFER}._create_workspace", f"backend, {_WORKSPACE}")

#: How far vLLM's own fusion goes, in bytes.
_MAX_SIZE = Target(f"{_COMPILATION}.PassConfig.flashinfer_max_size", "self, world_size")

_EVERYWHERE = (
    POST_INIT,
    INIT_DEVICE,
    EXECUTE_MODEL,
    Target(f"{WORKER}.WorkerBase.compile_or_warm_up_model", "self"),
    Target("vllm.distributed.parallel_state.get_tp_group", ""),
)
#: What each mode wraps, calls or sets.
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "pass": (
        *_EVERYWHERE,
        CONFIGURE,
        Target(f"{_PASSES}.__call__", "self, graph"),
        Target(f"{_PASSES}.uuid", "self"),
        Target(f"{_COMPILATION}.PassConfig.fuse_allreduce_rms"),
        _MAX_SIZE,
        Target(f"{_COMPILATION}.CompilationConfig.compile_ranges_endpoints"),
    ),
    "backend": (*_EVERYWHERE, INIT_BACKEND, Target(f"{_COMPILATION}.CompilationConfig._attention_ops")),
    "guard": (
        *_EVERYWHERE,
        CREATE_WORKSPACE,
        Target(f"{_FLASHINFER}.get_fi_ar_workspace", _WORKSPACE),
        Target(f"{_FLASHINFER}.fi_ar_available"),
        _MAX_SIZE,
    ),
}

#: What returns each of the groups whose names may stand in a graph.
GROUPS = ("get_tp_group", "get_ep_group", "get_dcp_group", "get_pcp_group", "get_dp_group", "get_pp_group")
