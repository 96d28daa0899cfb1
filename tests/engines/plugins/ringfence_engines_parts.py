"""What the platform has in place of vLLM's: vLLM imports it late, once its configuration exists."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Communicator(CpuCommunicator):
    """gloo, which sleeps while it waits; two ranks that spin in shared memory starve each other on two cores."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dist_module = dist
        self.supports_tensor_dict = False

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        result = input_.clone()
        dist.all_reduce(result, group=self.device_group)
        return result


class PassManager(PostGradPassManager):
    def configure(self, config: Any) -> None:
        super().configure(config)
        self.fix_functionalization = _Nothing()  # vLLM's names ops that only CUDA's build has


class _Nothing:
    def __call__(self, graph: Any) -> None:
        pass

    def uuid(self) -> str:
        return "nothing"
