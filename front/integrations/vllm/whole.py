"""Backend mode: the whole graph of a model through ringfence, which cuts it and captures the pieces itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backend import Backend
from ...compile_passes.report import CompileReport
from .hooked import BACKEND
from .passes import ALL_REDUCES
from .request import Request

#: They write caches by a slot mapping that Python holds; vLLM adds them to its own list when it cuts a graph.
_UPDATE_CACHES = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")


def options_for(asked: Request, config: Any) -> dict[str, Any]:
    """The backend's options: those that were given, and what vLLM knows."""
    given = dict(asked.options)
    known = (*type(config.compilation_config)._attention_ops, *_UPDATE_CACHES)
    split = [name for name in known if _is_registered(name)]
    given["split_ops"] = [*dict.fromkeys((*split, *given.get("split_ops", ())))]
    given.setdefault("max_tokens", config.scheduler_config.max_num_batched_tokens)
    most = given["max_tokens"]
    given.setdefault("capture_sizes", [size for size in asked.sizes if most is None or size <= most])
    return given | {"all_reduce_ops": dict(ALL_REDUCES)}


def init_backend(
    asked: Request,
    on_report: Callable[[CompileReport], None],
    original: Callable[..., Any],
    compilation: Any,
    vllm_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around ``CompilationConfig.init_backend``: a backend with options, where its name stands for one without."""
    found = original(compilation, vllm_config, *args, **kwargs)
    if compilation.backend != BACKEND:
        return found
    return Backend(**options_for(asked, vllm_config), on_report=on_report)


def _is_registered(name: str) -> bool:
    namespace, _, op = name.partition("::")
    return hasattr(getattr(torch.ops, namespace), op)
