"""The fused op as a function, and compiled models, inside CUDA graphs that somebody else captures: two ranks, two GPUs.

The integrator's to run; ``tests/test_callable.py`` and ``tests/test_outer_capture.py`` show the same logic without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import engine_ops
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from support import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, {GPUS} here"),
]
H, TOKENS, REPLAYS = 1024, 16, 20
DTYPE = torch.bfloat16
#: Two roundings to bfloat16, of the sum and of the norm, and that of the residual's sum.
BOUND = 2.0**-6
CONTEXT = {"scale": 1.0}


@torch.library.custom_op("vllm::unified_attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    """By its name known to read what Python knows in this step."""
    return x * CONTEXT["scale"]


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def error(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    worst = 0.0
    for a, b in zip(ours, wanted, strict=True):
        rms = b.square().mean(-1, keepdim=True).sqrt()
        worst = max(worst, float(((a.float() - b).abs() / (b.abs() + rms)).max()))
    return worst


def exact(x: Tensor, r: Tensor, w: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """In float32."""
    total = x.float()
    dist.all_reduce(total)
    total = total + r.float()
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * w.float(), total


class Segments:
    """An engine's breakable CUDA graph."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], Any]] = []
        self.breaks = 0
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self, call: Callable[..., Any], *args: Tensor) -> Any:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                result = call(*args)
            finally:
                self._end()
        torch.cuda.synchronize()
        return result

    def replay(self) -> None:
        for action in self.actions:
            action()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self.actions.append(self._graph.replay)

    def _end(self) -> None:
        assert self._graph is not None
        self._graph.capture_end()
        self._graph = None

    def eager(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            if self._graph is None:
                return function(*args)
            self._end()
            self.breaks += 1
            result = function(*args)
            self.actions.append(lambda: function(*args))
            self._begin()
            return result

        return wrapper


@contextlib.contextmanager
def engine(segments: Segments) -> Iterator[None]:
    path = "vllm.compilation.breakable_cudagraph"
    module = types.ModuleType(path)
    module.__dict__["eager_break_during_capture"] = segments.eager
    with mock.patch.dict(sys.modules, {"vllm": types.ModuleType("vllm"), path: module}):
        yield


def captured(call: Callable[..., Any], *args: Tensor) -> tuple[Callable[[], None], Any]:
    """In one CUDA graph, after a call on its stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = call(*args)
    torch.cuda.synchronize()
    return graph.replay, outputs


def replays(
    rank: int, replay: Callable[[], None], outputs: Any, x: Tensor, rest: tuple[Tensor, ...], scaled: bool
) -> float:
    worst, generator = 0.0, torch.Generator("cuda").manual_seed(100 + rank)
    for step in range(REPLAYS if not scaled else 100):
        CONTEXT["scale"] = 1.0 + step % 7 if scaled else 1.0
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda").to(DTYPE))
        for out in outputs:
            out.fill_(float("nan"))
        replay()
        worst = max(worst, error(outputs, exact((x * CONTEXT["scale"]), *rest)))
    return worst


def serve(rank: int, collective: str) -> dict[str, Any]:
    import ringfence
    from ringfence.runtime.collectives.workspace import workspaces_of

    torch.set_grad_enabled(False)
    torch.manual_seed(7)
    made = ringfence.prepare(None, H, DTYPE, 64, collective=collective)
    x, r, w = (torch.randn(s, device="cuda").to(DTYPE) for s in ((TOKENS, H), (TOKENS, H), (H,)))
    found: dict[str, Any] = {"collective": made.collective, "captured": made.captured, "nbytes": made.nbytes}

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return ringfence.all_reduce_add_rms_norm(x, r, w, 1e-5)

    x.copy_(torch.randn(TOKENS, H, generator=torch.Generator("cuda").manual_seed(rank), device="cuda"))
    found["eager"] = error(call(x), exact(x, r, w))
    found["whole"] = replays(rank, *captured(call, x), x, (r, w), False)
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    found["traced"] = replays(rank, *captured(traced, x), x, (r, w), False)
    prepared = workspaces_of("world").prepared
    prepared[DTYPE] = dataclasses.replace(made, captured=False)  # as where a hazard forbids it
    if collective != "reference":  # which then is refused
        found["by NCCL"] = replays(rank, *captured(call, x), x, (r, w), False)
    segments = Segments()
    with engine(segments):
        outputs = segments.record(call, x)
        found["between segments"] = replays(rank, segments.replay, outputs, x, (r, w), False)
    found["breaks"] = segments.breaks
    prepared[DTYPE] = made

    def summed(x: Tensor) -> tuple[Tensor]:
        return (ringfence.all_reduce(x),)

    replay, (total,) = captured(summed, x)
    replay()
    wanted = x.float()
    dist.all_reduce(wanted)
    found["sum"] = error((total,), (wanted,))
    ringfence.close_workspaces("world")
    return found


@pytest.mark.parametrize("collective", ["mnnvl", "trtllm", "ringfence", "reference"])
def test_the_callable_in_graphs_of_somebody_else(collective: str) -> None:
    for found in run_ranks(2, serve, collective, backend="nccl", timeout=300):
        assert found["collective"] == collective and found["captured"], found
        for way in ("eager", "whole", "traced", "by NCCL", "between segments", "sum"):
            if way == "by NCCL" and collective == "reference":
                continue
            assert found[way] <= BOUND, (way, found)
        assert found["breaks"] == 1 and (found["nbytes"] > 0 or collective == "reference"), found


def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.ops.vllm.unified_attention(x)
    dist.all_reduce(y)
    r = r + y
    return F.rms_norm(r, (H,), w, 1e-5), r


def compiled_model(rank: int) -> dict[str, Any]:
    import ringfence

    torch.set_grad_enabled(False)
    torch.manual_seed(7)
    x, r, w = (torch.randn(s, device="cuda").to(DTYPE) for s in ((TOKENS, H), (TOKENS, H), (H,)))
    found: dict[str, Any] = {}
    for name, options in (("outer", {"outer_capture": True}), ("own", {"capture_sizes": [TOKENS]}), ("none", {})):
        torch._dynamo.reset()
        backend = ringfence.Backend(**options)
        call = torch.compile(model, backend=backend, fullgraph=True)
        call(x, r, w)
        if name == "outer":
            segments = Segments()
            with engine(segments):
                outputs = segments.record(call, x, r, w)
                found[name] = replays(rank, segments.replay, outputs, x, (r, w), True)
            found["breaks"] = segments.breaks
        elif name == "own":
            worst = 0.0
            for step in range(100):
                CONTEXT["scale"] = 1.0 + step % 7
                x.copy_(torch.randn(x.shape, device="cuda"))
                worst = max(worst, error(call(x, r, w), exact(x * CONTEXT["scale"], r, w)))
            found[name] = worst
        else:
            try:
                captured(call, x, r, w)
            except ringfence.CaptureError as refused:
                found[name] = str(refused)
        CONTEXT["scale"] = 1.0
        found[f"{name} islands"] = [p.island for p in backend.reports[0].pieces]
    return found


def test_a_compiled_model_with_attention_that_python_knows_about() -> None:
    for found in run_ranks(2, compiled_model, backend="nccl", timeout=300):
        assert found["outer"] <= BOUND and found["own"] <= BOUND, found
        assert any(found["outer islands"]) and any(found["own islands"]) and not any(found["none islands"])
        assert "vllm::unified_attention" in found["none"], found
        assert found["breaks"] >= 1


def engine_norms(rank: int) -> dict[str, float]:
    """In-place norms as vLLM's, stand-ins, captured by ringfence."""
    import ringfence

    libraries = engine_ops.define()
    torch.set_grad_enabled(False)
    torch.manual_seed(7)
    x, r, w = (torch.randn(s, device="cuda").to(DTYPE) for s in ((TOKENS, H), (TOKENS, H), (H,)))
    found = {}
    for name in ("_C::fused_add_rms_norm", "vllm_ir::fused_add_rms_norm"):

        def body(x: Tensor, r: Tensor, w: Tensor, name: str = name) -> tuple[Tensor, Tensor]:
            y, r = x.clone(), r.clone()
            dist.all_reduce(y)
            if name.startswith("_C"):
                engine_ops.op(name)(y, r, w, 1e-5)
                return y, r
            return engine_ops.op(name)(y, r, w, 1e-5)  # type: ignore[no-any-return]

        torch._dynamo.reset()
        backend = ringfence.Backend(capture_sizes=[TOKENS])
        call = torch.compile(body, backend=backend, fullgraph=True)
        worst = 0.0
        for _ in range(10):
            x.copy_(torch.randn(x.shape, device="cuda"))
            worst = max(worst, error(call(x, r, w), exact(x, r, w)))
        ringfence.assert_fused(backend.reports[0], count=1)
        found[name] = worst
    del libraries
    return found


def test_engines_norms_in_captured_pieces() -> None:
    for found in run_ranks(2, engine_norms, backend="nccl", timeout=300):
        assert max(found.values()) <= BOUND, found
