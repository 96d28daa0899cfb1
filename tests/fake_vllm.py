"""Modules with the names and parameters of vLLM 0.32, as far as ringfence wraps, calls or sets something there.

What vLLM would do around them is as little as the tests need. `make engines` compares the parameters with vLLM's.
"""

from __future__ import annotations

import enum
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ringfence.integrations.targets import Target, resolve
from ringfence.integrations.vllm import hooked

if __name__ != "fake_vllm":  # of the clone's root, which is no package
    raise ImportError("import fake_vllm, with tests/ on the path")

#: As inspect prints them for vLLM 0.32.0.
SIGNATURES = {
    "vllm.config.vllm.VllmConfig.__post_init__": "self",
    "vllm.v1.worker.worker_base.WorkerWrapperBase.init_device": "self",
    "vllm.v1.worker.worker_base.WorkerWrapperBase.execute_model": "self, scheduler_output",
    "vllm.v1.worker.worker_base.WorkerBase.compile_or_warm_up_model": "self",
    "vllm.distributed.parallel_state.get_tp_group": "",
    "vllm.compilation.passes.pass_manager.PostGradPassManager.configure": "self, config",
    "vllm.compilation.passes.pass_manager.PostGradPassManager.__call__": "self, graph",
    "vllm.compilation.passes.pass_manager.PostGradPassManager.uuid": "self",
    "vllm.config.compilation.PassConfig.fuse_allreduce_rms": None,
    "vllm.config.compilation.CompilationConfig.compile_ranges_endpoints": None,
    "vllm.config.compilation.CompilationConfig.init_backend": "self, vllm_config, prefix='', is_encoder=False",
    "vllm.config.compilation.CompilationConfig._attention_ops": None,
    "vllm.config.compilation.PassConfig.flashinfer_max_size": "self, world_size",
    "vllm.distributed.device_communicators.flashinfer_all_reduce._create_workspace": (
        "backend, world_size, rank, max_token_num, hidden_dim, dtype, group"
    ),
    "vllm.distributed.device_communicators.flashinfer_all_reduce.get_fi_ar_workspace": (
        "world_size, rank, max_token_num, hidden_dim, dtype, group"
    ),
    "vllm.distributed.device_communicators.flashinfer_all_reduce.fi_ar_available": None,
}

#: As they are in 0.33.0, where they differ.
SIGNATURES_0_33 = {
    "vllm.config.compilation.CompilationConfig.init_backend": (
        "self, vllm_config, prefix='', is_encoder=False, use_aot_compile=True"
    ),
}


class CompilationMode(enum.IntEnum):
    NONE = 0
    STOCK_TORCH_COMPILE = 1
    DYNAMO_TRACE_ONCE = 2
    VLLM_COMPILE = 3


class CUDAGraphMode(enum.Enum):
    NONE = 0
    FULL_AND_PIECEWISE = 4


FLASHINFER = "vllm.distributed.device_communicators.flashinfer_all_reduce"


@dataclass
class Coordinator:
    """A group of vLLM's."""

    device_group: Any
    cpu_group: Any = None
    unique_name: str = "tp:0"
    world_size: int = 2
    rank_in_group: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class FakeVllm:
    """One process's vLLM, in ``sys.modules`` until the test ends. group: what its workers all-reduce over."""

    def __init__(self, patch: pytest.MonkeyPatch, group: Any = None) -> None:
        self.group = Coordinator(group)
        self.made: list[Any] = []
        self.steps: list[int] = []
        self.current: Any = None
        for name, members in self._modules().items():
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)

    def _modules(self) -> dict[str, dict[str, Any]]:
        fake = self

        class PassConfig:
            fuse_allreduce_rms = None

            def flashinfer_max_size(self, world_size: int) -> int:
                return 1024

        class CompilationConfig:
            compile_ranges_endpoints: list[int] | None = None
            _attention_ops = ("vllm::unified_attention_with_output", "vllm::nobody_registers_this")

            def __init__(self, mode: CompilationMode | None = None, backend: str = "inductor") -> None:
                self.mode, self.backend, self.pass_config = mode, backend, PassConfig()
                self.cudagraph_mode: CUDAGraphMode | None = None
                self.cudagraph_capture_sizes: list[int] | None = None
                self.max_cudagraph_capture_size: int | None = None

            def init_backend(self, vllm_config: Any, prefix: str = "", is_encoder: bool = False) -> Any:
                return self.backend

        class VllmConfig:
            def __init__(self, more: Any = None, eager: bool = False, device: str = "cpu", **compilation: Any) -> None:
                self.additional_config = {} if more is None else more
                self.compilation_config = CompilationConfig(**compilation)
                self.scheduler_config = types.SimpleNamespace(max_num_batched_tokens=32)
                self.model_config = types.SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 16)
                self.device_config = types.SimpleNamespace(device_type=device)
                self.parallel_config = types.SimpleNamespace(tensor_parallel_size=2)
                self.eager = eager
                self.__post_init__()

            def __post_init__(self) -> None:
                mine = self.compilation_config
                if mine.mode is None:
                    mine.mode = CompilationMode.VLLM_COMPILE
                if self.eager:
                    mine.mode = CompilationMode.NONE
                if mine.cudagraph_mode is None:
                    mine.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
                    mine.cudagraph_capture_sizes, mine.max_cudagraph_capture_size = [1, 2, 4, 8, 64], 64

        class WorkerBase:
            def __init__(self) -> None:
                self.model_runner = types.SimpleNamespace(_dummy_run=lambda tokens, **_: fake.steps.append(tokens))

            def compile_or_warm_up_model(self) -> str:
                return "warm"

        class WorkerWrapperBase:
            def __init__(self, config: Any) -> None:
                self.vllm_config = config

            def init_device(self) -> None:
                self.worker = WorkerBase()

            def execute_model(self, scheduler_output: Any) -> int:
                return int(scheduler_output.total_num_scheduled_tokens)

        class PostGradPassManager:
            def __init__(self) -> None:
                self.passes: list[Any] = []

            def configure(self, config: Any) -> None:
                self.passes += [_named("NoOpEliminationPass"), _named("AllReduceFusionPass")]

            def __call__(self, graph: Any) -> None:
                for one in self.passes:
                    one(graph)

            def uuid(self) -> str:
                return "".join(one.uuid() for one in self.passes)

        def get_tp_group() -> Coordinator:
            return fake.group

        def get_ep_group() -> Coordinator:
            raise AssertionError("expert parallel group is not initialized")

        def _create_workspace(
            backend: str,
            world_size: int,
            rank: int,
            max_token_num: int,
            hidden_dim: int,
            dtype: torch.dtype,
            group: Any,
        ) -> Any:
            raise NotImplementedError

        def get_fi_ar_workspace(
            world_size: int, rank: int, max_token_num: int, hidden_dim: int, dtype: torch.dtype, group: Any
        ) -> Any:
            fake.made.append((world_size, rank, max_token_num, hidden_dim, dtype, group))

        flashinfer = {
            "_create_workspace": _create_workspace,
            "get_fi_ar_workspace": get_fi_ar_workspace,
            "fi_ar_available": True,
        }
        hidden = {"_fused_ar_workspace_hidden_dim": lambda config: 2 * config.model_config.get_hidden_size()}
        configs = {
            "CompilationMode": CompilationMode,
            "CUDAGraphMode": CUDAGraphMode,
            "get_current_vllm_config": lambda: fake.current,
        }
        return {
            "vllm": {"__version__": "0.32.0"},
            "vllm.config": configs,
            "vllm.config.vllm": {"VllmConfig": VllmConfig},
            "vllm.config.compilation": {"CompilationConfig": CompilationConfig, "PassConfig": PassConfig},
            "vllm.v1": {},
            "vllm.v1.worker": {},
            "vllm.v1.worker.worker_base": {"WorkerBase": WorkerBase, "WorkerWrapperBase": WorkerWrapperBase},
            "vllm.distributed": {},
            "vllm.distributed.parallel_state": {"get_tp_group": get_tp_group, "get_ep_group": get_ep_group},
            "vllm.distributed.device_communicators": {},
            FLASHINFER: flashinfer,
            "vllm.compilation": {},
            "vllm.compilation.passes": {},
            "vllm.compilation.passes.fusion": {},
            "vllm.compilation.passes.fusion.allreduce_rms_fusion": hidden,
            "vllm.compilation.passes.pass_manager": {"PostGradPassManager": PostGradPassManager},
        }

    def config(self, more: Any = None, **others: Any) -> Any:
        return resolve("vllm.config.vllm.VllmConfig")(more, **others)

    def started(self, config: Any) -> Any:
        """A worker of this configuration, as far as its devices."""
        wrapper = resolve("vllm.v1.worker.worker_base.WorkerWrapperBase")(config)
        wrapper.init_device()
        return wrapper


def _named(name: str) -> Any:
    def __call__(self: Any, graph: Any) -> None:
        assert name != "AllReduceFusionPass", "it was to go"

    return type(name, (), {"uuid": lambda self: name, "__call__": __call__})()


def replaced(target: Target, by: Callable[..., Any] | None, patch: pytest.MonkeyPatch) -> None:
    """Another release: the function has other parameters, or is gone."""
    owner, _, name = target.path.rpartition(".")
    if by is None:
        patch.delattr(resolve(owner), name)
    else:
        patch.setattr(resolve(owner), name, by)


ALL_TARGETS = tuple(dict.fromkeys(t for targets in hooked.TARGETS.values() for t in targets))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    monkeypatch.delenv("RINGFENCE", raising=False)
    monkeypatch.delenv("RINGFENCE_OPTIONS", raising=False)
    return FakeVllm(monkeypatch)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged where vLLM shows it, by line."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("vllm.ringfence")
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    yield lines
    log.setLevel(before)
    log.removeHandler(handler)


def wrapped(*targets: Target) -> list[str]:
    """Which of vLLM's functions have something of ours around them."""
    return [t.path for t in targets or ALL_TARGETS if hasattr(resolve(t.path), "__ringfence_wraps__")]
