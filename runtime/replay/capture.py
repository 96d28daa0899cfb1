"""The capture seam: what records a piece and replays it.

The runner speaks to :class:`GraphBackend` and :class:`CapturedPiece` only, so its logic
is the same over CUDA graphs and over the simulation, and is tested without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ..errors import CaptureError
from .buffers import copy_into, static_like, weak_memory


class CapturedPiece(Protocol):
    """A recorded piece. ``outputs`` live at fixed addresses and hold values after a replay."""

    outputs: tuple[Any, ...]

    def replay(self) -> None:
        """Run the piece again on whatever its inputs' addresses hold now."""

    def release(self) -> None:
        """Give the recording and its memory back."""


class GraphBackend(Protocol):
    """Records pieces. One instance owns one memory pool, shared by all its pieces."""

    name: str

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        """``call(*args)``, run where it is about to be captured: it loads modules and picks algorithms."""

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> CapturedPiece:
        """Record ``call(*args)`` without running it. The arguments' addresses are baked in."""

    def is_capturing(self) -> bool:
        """Whether this thread is inside a capture, of this backend or of anybody's."""


# -- CUDA ------------------------------------------------------------------------


class CudaGraphs:
    """CUDA graphs on one device: one pool, one side stream for warm-up and capture.

    control_words: the words that the collectives' protocols keep on this device. Recording runs
    nothing, so a capture that changes them launched something on the side, and its replays
    would be out of step with the other ranks (invariant I8).
    """

    name = "cuda"

    def __init__(self, device: torch.device, control_words: Callable[[], object] = lambda: None) -> None:
        self._control_words = control_words
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            outputs = call(*args)
        caller.wait_stream(self._stream)
        return outputs

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> CapturedPiece:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self._stream.device_index]
        state = generator.clone_state()
        before = self._control_words()
        try:
            # Only this thread is watched: NCCL's watchdog thread queries events meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = tuple(call(*args))
        except BaseException:
            # A capture that was invalidated never ends for the generator and for the pool: random
            # numbers and the next capture would raise. Graphs that exist keep the old pool.
            generator.graphsafe_set_state(state)
            self._pool = torch.cuda.graph_pool_handle()
            raise
        after = self._control_words()
        if before != after:
            graph.reset()
            raise CaptureError(f"the capture changed the control words of the collectives from {before} to {after}")
        return _CudaPiece(graph, outputs)

    def is_capturing(self) -> bool:
        with torch.cuda.device(self._stream.device):
            return torch.cuda.is_current_stream_capturing()


class _CudaPiece:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Any, ...]) -> None:
        self.outputs = outputs
        self._graph = graph
        self.replay = graph.replay  # bound once: it is called for every piece of every step

    def release(self) -> None:
        self.outputs = ()
        self._graph.reset()


# -- simulation ------------------------------------------------------------------


class SimulatedGraphs:
    """CUDA-graph semantics on any device, for tests and for machines without a GPU.

    What it keeps of the real thing: inputs are read from the addresses seen at capture
    and outputs land at fixed ones; a capture changes nothing, so outputs hold poison
    until the first replay; nesting, host syncs and host collectives inside a capture are
    errors; inputs are not kept alive. What it does not model: host code of a piece runs
    again at each replay, what a custom op does inside is not looked at, and nothing is
    faster.
    """

    name = "simulated"

    def __init__(self) -> None:
        self._capturing_thread: int | None = None

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        return call(*args)

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> CapturedPiece:
        self._capturing_thread = threading.get_ident()
        try:
            with _CaptureRules(), torch.random.fork_rng(devices=()):
                seen = call(*[_copy(a) if isinstance(a, Tensor) else a for a in args])
        finally:
            self._capturing_thread = None
        return _SimulatedPiece(call, args, tuple(_poisoned_like(o) if isinstance(o, Tensor) else o for o in seen))

    def is_capturing(self) -> bool:
        # The mode stack shows captures of other instances, and is empty inside a custom op.
        here = self._capturing_thread == threading.get_ident()
        return here or any(isinstance(m, _CaptureRules) for m in _get_current_dispatch_mode_stack())


class _SimulatedPiece:
    def __init__(self, call: Callable[..., Sequence[Any]], args: Sequence[Any], outputs: tuple[Any, ...]) -> None:
        self.outputs = outputs
        self._call = call
        self._args = [weak_memory(a) if isinstance(a, Tensor) else a for a in args]

    def replay(self) -> None:
        args = [a() if callable(a) else a for a in self._args]
        for landing, value in zip(self.outputs, self._call(*args), strict=True):
            if isinstance(landing, Tensor):
                copy_into(landing, value)

    def release(self) -> None:
        self.outputs = ()
        self._args = []


class _CaptureRules(TorchDispatchMode):
    """Raises on what a CUDA stream capture would reject or silently leave out."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        if torch.Tag.data_dependent_output in func.tags or _size_depends_on_data(func, args):
            raise CaptureError(f"{func} synchronises with the host and cannot be captured; add it to split_ops")
        if func.namespace in ("_c10d_functional", "c10d", "ringfence"):
            raise CaptureError(f"{func} runs on the host here and cannot be captured; add it to split_ops")
        return func(*args, **(kwargs or {}))


def _size_depends_on_data(func: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:  # tagged for its boolean indices only
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return True


def _copy(tensor: Tensor) -> Tensor:
    copy = static_like(tensor)
    copy_into(copy, tensor)
    return copy


def _poisoned_like(tensor: Tensor) -> Tensor:
    """A buffer of the same layout, full of what no computation could have written."""
    poison = static_like(tensor)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return poison.fill_(float("nan"))
    return poison.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)
