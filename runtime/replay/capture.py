"""The capture seam: what records a piece and replays it.

The runner speaks to :class:`GraphBackend` and :class:`CapturedPiece` only, so its logic
is the same over CUDA graphs and over the simulation, and is tested without a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import CaptureError, NestedCaptureError
from .buffers import on_memory_of
from .compiled import CompiledKernels
from .pool import Pool, shared_pool
from .tape import Tape


class CapturedPiece(Protocol):
    """A recorded piece. ``outputs`` live at fixed addresses and hold values after a replay.

    replay: run the piece again on whatever its inputs' addresses hold now.
    """

    outputs: tuple[Any, ...]
    replay: Callable[[], None]

    def release(self) -> None:
        """Give the recording and its memory back."""

    def free(self, position: int) -> Any:
        """Give an output's memory to whatever is captured later; returns what reads it without keeping it."""
        return self.outputs[position]

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Read tensors that lie where others lay that are gone. To a device an address is an address."""
        return None


class GraphBackend(Protocol):
    """Records pieces.

    by_owner: its pieces tell memory by its owner, so they are told to adopt what lies at the same addresses.
    """

    name: str
    by_owner: bool = False

    def pool_for(self, args: Sequence[Any] = (), own: bool = False) -> Pool | None:
        """The memory that its pieces share, on the device of ``args``, where the runner's buffers go too.

        With ``own`` no other backend uses it. None: each buffer has memory of its own.
        """
        return None

    def make_room(self) -> None:
        """Before a recording: give back the memory that an allocator keeps and nobody uses."""
        return None

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        """``call(*args)``, run where it is about to be captured: it loads modules and picks algorithms."""
        ...

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> CapturedPiece:
        """Record ``call(*args)`` without running it. The arguments' addresses are baked in."""
        ...

    def is_capturing(self) -> bool:
        """Whether this thread is inside a capture, of this backend or of anybody's."""
        ...


# -- CUDA ------------------------------------------------------------------------


class CudaPool(Pool):
    """The memory of CUDA graphs, and the side stream that warms up and captures: torch keeps free memory by stream.

    Two replays on two streams would overlap on the device, so a change of stream waits for the one before.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._handle = torch.cuda.graph_pool_handle()
        self._last = torch.cuda.current_stream(device)

    @property
    def handle(self) -> Any:
        """For the next capture. Torch's allocator refuses memory whose last graph is gone."""
        if not self.graphs:
            self.renew()
        return self._handle

    def enter(self) -> bool:
        if not super().enter():
            return False
        if torch._C._cuda_getCurrentRawStream(self.stream.device_index) != self._last.cuda_stream:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self._last)
            self._last = current
        return True

    def renew(self) -> None:
        """Leave the memory to the graphs that are there. A capture that was invalidated never ends for it."""
        self._handle = torch.cuda.graph_pool_handle()
        self.graphs.clear()


class CudaGraphs(GraphBackend):
    """CUDA graphs on one device, in the pool of this process.

    control_words: the words that the collectives' protocols keep on this device. Recording runs
    nothing, so a capture that changes them launched something on the side, and its replays
    would be out of step with the other ranks (invariant I8).
    """

    name = "cuda"

    def __init__(self, device: torch.device, control_words: Callable[[], object] = lambda: None) -> None:
        self._control_words = control_words
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._device = torch.device("cuda", index)
        self._pool: CudaPool | None = None

    def pool_for(self, args: Sequence[Any] = (), own: bool = False) -> CudaPool:
        if self._pool is None:
            self._pool = CudaPool(self._device) if own else shared_pool(self.name, self._device, CudaPool)
        return self._pool

    def make_room(self) -> None:
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        stream = self.pool_for().stream
        caller = torch.cuda.current_stream(self._device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            outputs = call(*args)
        caller.wait_stream(stream)
        return outputs

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> CapturedPiece:
        before = self._control_words()
        try:
            recorded = self._recorded(call, args)
        except torch.OutOfMemoryError:
            recorded = None  # and the error is let go, whose frames hold what was allocated so far
        if recorded is None:  # what the pieces' own runs left to the allocator is not given back inside of a capture
            self.make_room()
            recorded = self._recorded(call, args)
        (graph, outputs), pool, after = recorded, self.pool_for(), self._control_words()
        if before != after:
            graph.reset()
            raise CaptureError(f"the capture changed the control words of the collectives from {before} to {after}")
        pool.graphs.add(graph)
        return _CudaPiece(graph, outputs, pool)

    def _recorded(
        self, call: Callable[..., Sequence[Any]], args: Sequence[Any]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]:
        """Not by ``torch.cuda.graph``, which waits for the device and empties its allocator before each capture."""
        pool, graph, ended = self.pool_for(), torch.cuda.CUDAGraph(), False
        generator = torch.cuda.default_generators[self._device.index]
        state = generator.clone_state()
        try:
            with torch.cuda.stream(pool.stream):
                # Only this thread is watched: NCCL's watchdog thread queries events meanwhile.
                graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
                try:
                    return graph, tuple(call(*args))
                finally:
                    graph.capture_end()
                    ended = True
        except BaseException:
            # A capture that was invalidated never ends for the generator and for the pool: random
            # numbers and the next capture would raise. Graphs that exist keep the old pool.
            if not ended:
                generator.graphsafe_set_state(state)
                pool.renew()
            raise

    def is_capturing(self) -> bool:
        if torch.cuda.current_device() == self._device.index:  # nearly always, and to change it costs microseconds
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()


class _CudaPiece(CapturedPiece):
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Any, ...], pool: CudaPool) -> None:
        self.outputs = outputs
        self._graph, self._pool = graph, pool
        self.replay = graph.replay  # bound once: it is called for every piece of every step

    def free(self, position: int) -> Any:
        """The graph keeps the memory mapped, and the allocator may use it.

        What the host computed while the piece was captured is in memory that no graph keeps, so it stays.
        """
        output = self.outputs[position]
        if isinstance(output, Tensor) and output.is_cuda:
            output = on_memory_of(output, self._graph)
            self.outputs = (*self.outputs[:position], output, *self.outputs[position + 1 :])
        return output

    def release(self) -> None:
        self.outputs = ()
        self._pool.graphs.discard(self._graph)
        self._graph.reset()


# -- simulation ------------------------------------------------------------------


class SimulatedGraphs(GraphBackend):
    """CUDA-graph semantics on any device, for tests and for machines without a GPU.

    A capture runs the host code of a piece once and records the kernels that it launches (:class:`Tape`); a replay
    launches those again, on the same addresses, and nothing else. So Python, ops on the host's tensors and the
    inside of custom ops do not run again, outputs that are views stay views, and what a kernel writes stays written.
    A capture changes nothing on the device: memory and random state are given back as they were, and outputs hold
    poison until the first replay. What it may not capture raises :class:`CaptureError`, as nesting does.

    on_device: whether a tensor that a piece is given, or a factory makes, plays the device's memory; the others play
    the host's. Ops on the host's alone are not recorded, and a scalar of the host's is read once.
    """

    name = "simulated"
    by_owner = True

    def __init__(self, on_device: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        self._on_device = on_device
        self._capturing_thread: int | None = None
        self._kernels = CompiledKernels()
        self._pool: Pool | None = None

    def pool_for(self, args: Sequence[Any] = (), own: bool = False) -> Pool:
        if self._pool is None:
            device = max((a.device for a in args if isinstance(a, Tensor)), key=_rank, default=torch.device("cpu"))
            self._pool = Pool(device) if own else shared_pool(self.name, device, Pool)
        return self._pool

    def warm_up(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
        return call(*args)

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any]) -> CapturedPiece:
        if self.is_capturing():
            raise NestedCaptureError("a capture was started inside another one")
        pool = self.pool_for(args)
        tape = Tape(pool, self._on_device)
        self._capturing_thread = threading.get_ident()
        cuda = [pool.device.index] if pool.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(cuda), self._kernels.over(tape), tape, tape.host_reads, torch.no_grad():
                outputs = tuple(call(*args))
        finally:
            self._capturing_thread = None
            tape.undo()
        return _SimulatedPiece(tape, outputs, pool)

    def is_capturing(self) -> bool:
        # The mode stack shows captures of other instances, and is empty inside a kernel.
        here = self._capturing_thread == threading.get_ident()
        return here or any(isinstance(m, Tape) for m in _get_current_dispatch_mode_stack())


def _rank(device: torch.device) -> bool:
    return device.type != "cpu"


class _SimulatedPiece(CapturedPiece):
    def __init__(self, tape: Tape, outputs: tuple[Any, ...], pool: Pool) -> None:
        self.outputs = outputs
        self.replay = tape.replay
        self._pool, self._kept = pool, tape.kept
        for output in outputs:
            if isinstance(output, Tensor) and pool.block_of(output) in tape.used:
                _poison(output)

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        for place in self._kept:
            for tensor in tensors:
                place.adopt(tensor)

    def free(self, position: int) -> Any:
        output = self.outputs[position]
        block = self._pool.block_of(output) if isinstance(output, Tensor) else None
        if block is not None:
            output = block.like(output)
            self.outputs = (*self.outputs[:position], output, *self.outputs[position + 1 :])
        return output

    def release(self) -> None:
        self.outputs = ()
        self.replay = _released


def _released() -> None:
    raise CaptureError("a piece that was released cannot be replayed")


def _poison(output: Tensor) -> None:
    """Fill an output with what no computation could have written."""
    if output.dtype.is_floating_point or output.dtype.is_complex:
        output.fill_(float("nan"))
    else:
        output.fill_(True if output.dtype is torch.bool else torch.iinfo(output.dtype).max)
