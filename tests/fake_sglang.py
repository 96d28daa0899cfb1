"""Modules with the names and parameters of SGLang 0.5.23, as far as ringfence calls or replaces something there.

What SGLang's kernels would do is written down; its own all-reduce and norm are plain ops. ``tests/engines/sglang.py``
compares the parameters with those of the real package.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from segments import Segments
from torch import Tensor

_RUNNER = "sglang.srt.model_executor"
FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
BACKENDS = {
    "FullCudaGraphBackend": f"{_RUNNER}.runner_backend.full_cuda_graph_backend",
    "BreakableCudaGraphBackend": f"{_RUNNER}.runner_backend.breakable_cuda_graph_backend",
}
SEAM = f"{_RUNNER}.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph"


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


@dataclass
class Coordinator:
    """A group of SGLang's."""

    device_group: Any
    unique_name: str
    world_size: int
    rank_in_group: int


@dataclass
class FakeSglang:
    """One process's SGLang. said: what it did by itself; segments: its breakable capture."""

    tp: Coordinator | None = None
    said: list[str] = field(default_factory=list)
    segments: Segments = field(default_factory=Segments)
    modules: dict[str, types.ModuleType] = field(default_factory=dict)
    hooks: list[tuple[str, Callable[..., Any], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self

        class HookRegistry:
            @classmethod
            def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):  # type: ignore[no-untyped-def]
                outer.hooks.append((target, hook, hook_type))

        def flashinfer_allreduce_residual_rmsnorm(  # type: ignore[no-untyped-def]
            input_tensor,
            residual,
            weight,
            eps=1e-6,
            max_token_num=2048,
            use_oneshot=None,
            trigger_completion_at_end=False,
            fp32_acc=True,
            use_attn_tp_group=True,
        ):
            outer.said.append("fused")
            return None, None

        def pre_initialize_workspaces(max_token_num, hidden_dim, dtype, use_oneshot=None):  # type: ignore[no-untyped-def]
            outer.said.append("workspaces")

        def resolve_fusion_group(*, use_attn_tp_group):  # type: ignore[no-untyped-def]
            assert outer.tp is not None
            return outer.tp.world_size, outer.tp.rank_in_group, outer.tp

        def eager_on_graph(fn=None, capture_stub=None, *, enable=None):  # type: ignore[no-untyped-def]
            assert fn is True, "the form that ringfence uses"
            return outer.segments.eager

        def get_parallel():  # type: ignore[no-untyped-def]
            return types.SimpleNamespace(tp_group=outer.tp)

        def replay(self, shape_key, static_forward_batch, **kwargs):  # type: ignore[no-untyped-def]
            outer.said.append(f"{type(self).__name__} {shape_key.size}")
            return static_forward_batch.body()

        self.put("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
        self.put("sglang.srt.runtime_context", get_parallel=get_parallel)
        self.put(SEAM, eager_on_graph=eager_on_graph)
        for one in (flashinfer_allreduce_residual_rmsnorm, pre_initialize_workspaces, resolve_fusion_group):
            self.put(FUSION, **{one.__name__: one})
        for name, path in BACKENDS.items():
            self.put(path, **{name: type(name, (), {"replay": replay})})

    def put(self, path: str, **attributes: Any) -> None:
        """Modules of that path, with these attributes in the last."""
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            module = self.modules.setdefault(name, types.ModuleType(name))
            module.__dict__.setdefault("__path__", [])
            if end > 1:
                setattr(self.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        self.modules[path].__dict__.update(attributes)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[FakeSglang]:
        with mock.patch.dict(sys.modules, self.modules):
            yield self

    def apply_hooks(self) -> None:
        """As SGLang does after all plugins."""
        for target, hook, kind in self.hooks:
            path, _, name = target.rpartition(".")
            owner = _owner(path)
            original = getattr(owner, name)
            if kind is HookType.AROUND:

                def around(*a: Any, hook: Any = hook, original: Any = original, **k: Any) -> Any:
                    return hook(original, *a, **k)

                setattr(owner, name, around)
            else:
                assert kind is HookType.REPLACE

                def replaced(*a: Any, hook: Any = hook, **k: Any) -> Any:
                    return hook(*a, **k)

                setattr(owner, name, replaced)

    def layer(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """What SGLang does at a norm behind an all-reduce."""
        fused = self.modules[FUSION].__dict__["flashinfer_allreduce_residual_rmsnorm"](
            input_tensor=x,
            residual=residual,
            weight=weight,
            eps=eps,
            max_token_num=max(x.shape[0], 2048),
            use_attn_tp_group=True,
        )
        if fused[0] is not None:
            return fused  # type: ignore[no-any-return]
        self.said.append("by itself")
        assert self.tp is not None
        x = x.clone()
        dist.all_reduce(x, group=self.tp.device_group)
        total = x + residual
        return torch.nn.functional.rms_norm(total.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype), total

    def replay(self, backend: str, size: int, body: Callable[[], Any], mode: str = "DECODE") -> Any:
        """One replay by a backend's method."""
        one = getattr(self.modules[BACKENDS[backend]], backend)()
        batch = types.SimpleNamespace(body=body, forward_mode=types.SimpleNamespace(name=mode))
        return one.replay(types.SimpleNamespace(size=size), batch)


def _owner(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)
