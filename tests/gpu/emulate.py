"""Two ranks of FlashInfer's fused all-reduce on ONE GPU, with the real kernels and without multicast.

A rank is a stream, a control block and, where the layout allows it, buffers of its own. The
kernels cannot tell: they are given addresses. Three layouts:

- mnnvl, peer: the other rank's buffer stands for the multicast address. Right for one-shot from
  FlashInfer 0.6.13 on, which polls only what the other rank sent.
- mnnvl, aliased: one buffer is own buffer, peer's buffer and multicast address at once. For
  releases that also poll their own slot. Both ranks clear it, so they join after every call.
- trtllm: as on two GPUs; it never needed multicast.

MNNVL's two-shot cannot be had in this way: the owner of a token must see its own broadcast.

The kernels of both ranks must be on the GPU at once, so keep sizes small. And once a kernel of
one rank is launched, nothing may be allocated, loaded or synchronised until the other rank's is.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

RANKS = 2
EPSILON = 1e-6
LIBRARIES = {"mnnvl": "trtllm_mnnvl_comm.so", "trtllm": "trtllm_comm.so", "moe": "mnnvl_moe_alltoall.so"}

#: By release: how many optional arguments (weight bias, quantisation) follow the fifteen that all releases have.
MNNVL_OPTIONAL_ARGUMENTS = {"0.6.10.post1": 0, "0.6.13": 6, "0.6.18.post1": 6}

#: -0.0, which a receiver takes for "not arrived", as an integer of the element's width.
NEGATIVE_ZERO = {
    torch.bfloat16: (torch.int16, -(2**15)),
    torch.float16: (torch.int16, -(2**15)),
    torch.float32: (torch.int32, -(2**31)),
}

_ALL_REDUCE_RESIDUAL_RMS_NORM = 1  # kARResidualRMSNorm
_BARRIER_FLAGS = 256


def missing(release: str, collective: str) -> str | None:
    """Why the kernels cannot be run here; None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi, which loads the kernels, is not installed"
    folder = os.environ.get("RINGFENCE_KERNELS")
    if not folder:
        return "RINGFENCE_KERNELS is not set: build kernels with tests/gpu/build_kernels.py and name the folder in it"
    library = Path(folder) / release / LIBRARIES[collective]
    if not library.is_file():
        option = f" --modules {library.stem}"
        return f"{library} is not there: tests/gpu/build_kernels.py {release} --into {folder}{option}"
    return None


@functools.cache
def load(release: str, collective: str) -> Any:
    """The module with the kernels."""
    import tvm_ffi

    return tvm_ffi.load_module(str(Path(os.environ["RINGFENCE_KERNELS"]) / release / LIBRARIES[collective]))


@functools.cache
def streams() -> tuple[torch.cuda.Stream, ...]:
    """The stream of each rank."""
    return tuple(torch.cuda.Stream() for _ in range(RANKS))


@dataclass(frozen=True)
class Step:
    """One call of one rank: tensors of (tokens, hidden), and where to copy the control words afterwards."""

    two_shot: bool
    input: Tensor
    residual: Tensor
    norm_out: Tensor
    residual_out: Tensor
    words: Tensor | None = None


class Emulation(Protocol):
    """A workspace of two ranks. ``lockstep``: ranks must join after every call."""

    lockstep: bool
    control: list[Tensor]
    weight: Tensor

    def launch(self, rank: int, step: Step) -> None:
        """Launch on the current stream."""


class Mnnvl:
    """``tokens``: of the largest call."""

    def __init__(self, release: str, weight: Tensor, tokens: int, aliased: bool) -> None:
        self.lockstep, self.weight = aliased, weight
        self._function = load(release, "mnnvl").trtllm_mnnvl_allreduce_fusion
        self._more = (None,) * MNNVL_OPTIONAL_ARGUMENTS[release]
        size = -(-tokens * RANKS * weight.nbytes // 32) * 32
        buffers = [torch.full((3 * size // 4,), -(2**31), dtype=torch.int32, device="cuda") for _ in range(2 - aliased)]
        self._buffers = buffers * RANKS if aliased else buffers
        self._pointers = torch.tensor([b.data_ptr() for b in self._buffers], dtype=torch.int64, device="cuda")
        words = [0, 2, size, 0, 0, 0, 0, 0, 0]
        self.control = [torch.tensor(words, dtype=torch.int32, device="cuda") for _ in range(RANKS)]
        self.buffer_bytes = size

    def launch(self, rank: int, step: Step) -> None:
        assert not step.two_shot, "MNNVL's two-shot cannot be emulated"
        self._function(
            step.input,
            self._buffers[1 - rank].data_ptr(),  # in place of the multicast address
            self._pointers.data_ptr(),
            self._buffers[rank].data_ptr(),
            self.control[rank],
            RANKS,
            rank,
            True,  # with residual and RMSNorm
            False,  # without programmatic dependent launch
            True,  # one-shot
            step.norm_out,
            step.residual_out,
            step.residual,
            self.weight,
            EPSILON,
            *self._more,
        )


class Trtllm:
    """``tokens``: of the largest call. The layout that `trtllm_ar.py` of FlashInfer sets up, per rank."""

    lockstep = False

    def __init__(self, release: str, weight: Tensor, tokens: int) -> None:
        self.weight = weight
        self._function = load(release, "trtllm").trtllm_allreduce_fusion
        elements = RANKS * tokens * weight.numel()
        integers, negative_zero = NEGATIVE_ZERO[weight.dtype]
        self.buffer_bytes = elements * weight.element_size()
        each = range(RANKS)
        communication = [torch.zeros(elements, dtype=weight.dtype, device="cuda") for _ in each]
        flags = [torch.zeros(RANKS * _BARRIER_FLAGS, dtype=torch.int32, device="cuda") for _ in each]
        mailboxes = [torch.full((3 * elements,), negative_zero, dtype=integers, device="cuda") for _ in each]
        words = [0, 0, 0, self.buffer_bytes, 0]
        self.control = [torch.tensor(words, dtype=torch.int32, device="cuda") for _ in each]
        self._shared = [*communication, *flags, *mailboxes]
        shared = [tensor.data_ptr() for tensor in self._shared]
        self._workspaces = [
            torch.tensor([*shared, self.control[rank].data_ptr()], dtype=torch.int64, device="cuda") for rank in each
        ]

    def launch(self, rank: int, step: Step) -> None:
        tokens, hidden = step.input.shape
        self._function(
            step.input,
            RANKS,
            rank,
            tokens,
            hidden,
            self._workspaces[rank],
            False,  # without programmatic dependent launch
            not step.two_shot,
            True,  # trigger completion at the end
            self.weight.dtype is not torch.float32,  # sum in float32
            _ALL_REDUCE_RESIDUAL_RMS_NORM,
            None,  # the sum alone
            step.residual,
            step.residual_out,
            step.norm_out,
            None,  # quantised output
            None,  # its scales
            self.weight,
            EPSILON,
            None,  # scale factor
            None,  # layout
            None,  # group size
            None,  # weight bias
        )


def make(collective: str, release: str, weight: Tensor, tokens: int, aliased: bool = False) -> Mnnvl | Trtllm:
    """A workspace as it is before the first call."""
    if collective == "trtllm":
        return Trtllm(release, weight, tokens)
    return Mnnvl(release, weight, tokens, aliased)


def _launch(emulation: Emulation, rank: int, step: Step) -> None:
    with torch.cuda.stream(streams()[rank]):
        emulation.launch(rank, step)
        if step.words is not None:
            step.words.copy_(emulation.control[rank])


def _join() -> None:
    first, second = streams()
    first.wait_stream(second)
    second.wait_stream(first)


def eager(emulation: Emulation, programs: Sequence[Sequence[Step]]) -> None:
    """Launch the calls of both ranks, in turn so that no rank's queue fills up with calls that wait."""
    for i in range(max(len(steps) for steps in programs)):
        for rank, steps in enumerate(programs):
            if i < len(steps):
                _launch(emulation, rank, steps[i])
        if emulation.lockstep:
            _join()


def capture(emulation: Emulation, programs: Sequence[Sequence[Step]]) -> Callable[[], None]:
    """Capture the calls, one graph per rank, or one for both where they join. The result replays.

    The kernels must have run before.
    """
    torch.cuda.synchronize()
    if emulation.lockstep:
        graph = torch.cuda.CUDAGraph()
        first, second = streams()
        with torch.cuda.graph(graph, stream=first):
            second.wait_stream(first)
            eager(emulation, programs)
            first.wait_stream(second)
        return lambda: _replay(0, graph)
    graphs = []
    for rank, steps in enumerate(programs):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[rank], stream=streams()[rank]):
            for step in steps:
                _launch(emulation, rank, step)

    def replay() -> None:
        for rank, graph in enumerate(graphs):
            _replay(rank, graph)

    return replay


def _replay(rank: int, graph: torch.cuda.CUDAGraph) -> None:
    with torch.cuda.stream(streams()[rank]):
        graph.replay()


def returned(seconds: float) -> list[bool]:
    """By rank: whether all that was launched on its stream completes in this time. Never blocks."""
    events = [stream.record_event() for stream in streams()]
    return poll(events, seconds)


def poll(events: Sequence[torch.cuda.Event], seconds: float) -> list[bool]:
    deadline = time.monotonic() + seconds
    while not all(event.query() for event in events) and time.monotonic() < deadline:
        time.sleep(0.001)
    return [event.query() for event in events]


def ordinary(generator: torch.Generator, *shape: int) -> Tensor:
    """Random float32 whose elements are not small.

    A float16 of less than 2**-17 would itself be the payload that hangs old releases (M1).
    """
    values = torch.randn(*shape, generator=generator) / 2
    return torch.where(values.abs() < 2**-10, 2**-10, values)


def reference(total: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and residual of a sum over the ranks, in float32."""
    added = total.float() + residual.float()
    scale = torch.rsqrt(added.square().mean(-1, keepdim=True) + EPSILON)
    return added * scale * weight.float(), added
