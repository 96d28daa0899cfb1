"""A platform for vLLM on a CPU on which its graphs look as they do on CUDA.

vLLM's own CPU platform leaves its compiler out, calls its all-reduce past the op that CUDA's graphs hold, and has that
return its input. This one keeps the compiler, and uses the op, over gloo.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


def platform() -> str:
    return "ringfence_engines.CompilingCpu"


class CompilingCpu(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        from vllm.config import CompilationMode

        compilation = vllm_config.compilation_config
        kept = {name: getattr(compilation, name) for name in ("mode", "backend", "ir_enable_torch_wrap")}
        super().check_and_update_config(vllm_config)
        if kept["mode"] == CompilationMode.VLLM_COMPILE:
            for name, value in kept.items():
                setattr(compilation, name, value)

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return True

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "ringfence_engines_parts.Communicator"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "ringfence_engines_parts.PassManager"
