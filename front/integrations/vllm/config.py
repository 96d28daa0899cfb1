"""vLLM's configuration: what a mode changes in it, once, in the process that starts the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...runtime.errors import OptionsError
from ..environment import warn
from ..targets import moved
from . import hooked, request, worker
from .digest import digest_of
from .hooked import BACKEND
from .request import KEY, Request

log = logging.getLogger("vllm.ringfence")


def configure(original: Callable[[Any], None], config: Any) -> None:
    """Around ``VllmConfig.__post_init__``. Ends the process, with one line, where the request means nothing.

    The request is kept in ``additional_config``: it reaches the workers with it, and vLLM's caches tell by it what was
    compiled with which mode, options and release.
    """
    try:
        asked = _asked(config)
        if asked is None or not _may_act(asked):
            _keep(config, None)
            original(config)
            return
        asked = _before(config, asked)
    except OptionsError as error:  # whose traceback would hide it
        raise SystemExit(f"ringfence: {error}") from None
    original(config)
    _keep(config, _after(config, asked))
    worker.install()  # where the worker is of this process


def _asked(config: Any) -> Request | None:
    by_environment = request.of_environment()
    if by_environment == "off":
        return None
    in_config = request.of_config(config)
    if isinstance(by_environment, Request):
        if in_config is None:
            return by_environment
        # vLLM copies configurations, in workers too
        return replace(by_environment, sizes=in_config.sizes, up_to=in_config.up_to, prepared=in_config.prepared)
    if in_config is None and config.compilation_config.backend == BACKEND:
        return Request("backend")
    return in_config


def _may_act(asked: Request) -> bool:
    """Whether vLLM is as its hooks expect it; one warning where it is not."""
    gone = list(moved(hooked.TARGETS[asked.mode]))
    if gone:
        warn_moved(gone)
    return not gone


def warn_moved(gone: Sequence[str]) -> None:
    """One line, and nothing else is done."""
    import vllm

    low, high = hooked.SUPPORTED
    warn(
        log,
        "ringfence does nothing in vLLM %s, which is not the one that it was written for (%s to before %s): %s",
        vllm.__version__,
        low,
        high,
        "; ".join(gone),
    )


def _keep(config: Any, asked: Request | None) -> None:
    more = config.additional_config
    if not isinstance(more, dict):
        if asked is not None:
            raise OptionsError(
                f"additional_config is a {type(more).__name__}, and ringfence keeps its request in a dict"
            )
        return
    kept = {name: value for name, value in more.items() if name != KEY}
    config.additional_config = kept | ({KEY: asked.for_config()} if asked is not None else {})


def _before(config: Any, asked: Request) -> Request:
    compilation = config.compilation_config
    if asked.mode == "pass":
        compilation.pass_config.fuse_allreduce_rms = False  # ours is in its place; vLLM makes no workspace for it
        if asked.prepared is None:
            asked = replace(asked, up_to=_fused_up_to(config, asked))
        if asked.up_to is not None:  # larger steps have a graph of their own, and its all-reduces stay vLLM's
            compilation.compile_ranges_endpoints = [*(compilation.compile_ranges_endpoints or ()), asked.up_to]
    if asked.mode == "backend":
        from vllm.config import CompilationMode

        if compilation.mode not in (None, CompilationMode.DYNAMO_TRACE_ONCE):
            raise OptionsError(
                f"RINGFENCE=backend compiles whole graphs, and -cc.mode is {compilation.mode.name}: leave it out, or 2"
            )
        if compilation.backend not in ("", "inductor", "ringfence", BACKEND):
            raise OptionsError(f"RINGFENCE=backend, and -cc.backend is '{compilation.backend}': leave it out")
        compilation.mode, compilation.backend = CompilationMode.DYNAMO_TRACE_ONCE, BACKEND
    return asked


def _fused_up_to(config: Any, asked: Request) -> int | None:
    """Tokens: as the option says, or as far as vLLM's own fusion goes on this device; None where that is not known."""
    given: int | None = asked.options.get("max_tokens")
    if given is not None:
        return given
    if config.device_config.device_type != "cuda" or config.model_config is None:
        return None
    most = config.compilation_config.pass_config.flashinfer_max_size(config.parallel_config.tensor_parallel_size)
    row = config.model_config.get_hidden_size() * config.model_config.dtype.itemsize
    return int(most // row) if most else None


def _after(config: Any, asked: Request) -> Request | None:
    """What is kept of the request: None where vLLM does not compile in a way that it can work in."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = config.compilation_config
    needs = {"pass": CompilationMode.VLLM_COMPILE, "backend": CompilationMode.DYNAMO_TRACE_ONCE}.get(asked.mode)
    if needs is not None and compilation.mode != needs:
        warn(
            log,
            "ringfence does nothing: RINGFENCE=%s needs vLLM's compilation mode %s, and for this model and platform "
            "it is %s; RINGFENCE=guard works without",
            asked.mode,
            needs.name,
            compilation.mode.name,
        )
        return None
    if asked.mode == "backend":
        sizes = tuple(compilation.cudagraph_capture_sizes or ()) or asked.sizes
        asked = replace(asked, sizes=tuple(sorted(sizes)))
        compilation.cudagraph_mode = CUDAGraphMode.NONE  # ringfence captures, and vLLM around it must not
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [], 0
    return replace(asked, digest=digest_of(asked))
