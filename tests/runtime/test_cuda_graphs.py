"""CUDA graphs over a fake of torch's: what a capture asks of torch, and what becomes of one that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from ringfence.runtime.errors import CaptureError
from ringfence.runtime.replay.capture import CudaGraphs

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """What torch was asked, in order. invalid: whether captures cannot be ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.graphs: list[Any] = []
        self.invalid, self.handles = False, 0
        cuda = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local", "another thread may use the device meanwhile"
                cuda.graphs.append(self)
                cuda.log.append(f"begin in {pool}")

            def capture_end(self) -> None:
                cuda.log.append("end")
                if cuda.invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                cuda.log.append("replay")

            def reset(self) -> None:
                cuda.log.append("reset")

        class Generator:
            def clone_state(self) -> str:
                return "state"

            def graphsafe_set_state(self, state: str) -> None:
                cuda.log.append(f"{state} restored")

        def handle() -> int:
            self.handles += 1
            return self.handles

        @contextlib.contextmanager
        def on(stream: Any) -> Iterator[None]:
            cuda.log.append(f"on {stream}")
            yield
            cuda.log.append(f"off {stream}")

        for name, fake in {
            "CUDAGraph": Graph,
            "Stream": lambda device: "side",
            "stream": on,
            "current_stream": lambda device: "main",
            "device": lambda device: contextlib.nullcontext(),
            "graph_pool_handle": handle,
            "default_generators": [Generator()],
            "synchronize": lambda device: cuda.log.append("synchronize"),
            "empty_cache": lambda: cuda.log.append("empty"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def said(self) -> list[str]:
        """Since it was last asked."""
        said, self.log = self.log, []
        return said


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture
def graphs(cuda: FakeCuda) -> CudaGraphs:
    graphs = CudaGraphs(DEVICE)
    graphs.pool_for(own=True)
    return graphs


def add(*args: int) -> Sequence[int]:
    return (sum(args),)


def runs_out(times: int, error: type[BaseException] = torch.OutOfMemoryError) -> Any:
    """A piece that throws so often."""
    left = [times]

    def call(*args: int) -> Sequence[int]:
        left[0] -= 1
        if left[0] >= 0:
            raise error("of memory")
        return add(*args)

    return call


def captured(pool: int) -> list[str]:
    return ["on side", f"begin in {pool}", "end", "off side"]


def test_pieces_are_captured_one_after_the_other_without_a_wait_for_the_device(
    graphs: CudaGraphs, cuda: FakeCuda
) -> None:
    """``torch.cuda.graph`` would wait, and empty the allocator, before each."""
    graphs.make_room()
    assert cuda.said() == ["synchronize", "empty"]
    pieces = [graphs.capture(add, [i, 1]) for i in range(3)]
    pool = cuda.handles
    assert cuda.said() == captured(pool) * 3, "all in one pool"
    assert [piece.outputs for piece in pieces] == [(1,), (2,), (3,)]
    for piece in pieces:
        piece.replay()
        piece.release()
    assert cuda.said() == ["replay", "reset"] * 3


def test_a_capture_that_finds_no_memory_is_made_again_with_what_the_allocator_kept(
    graphs: CudaGraphs, cuda: FakeCuda
) -> None:
    first = graphs.capture(add, [1])
    pool = cuda.handles
    cuda.said()
    piece = graphs.capture(runs_out(1), [2, 3])
    ended = ["on side", f"begin in {pool}", "end"]
    assert cuda.said() == [*ended, "synchronize", "empty", *captured(pool)], "it has ended, so the pool is still good"
    assert (first.outputs, piece.outputs) == ((1,), (5,))
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture(runs_out(2), [1])
    assert cuda.said() == [*ended, "synchronize", "empty", *ended]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_piece_throws_ends_its_capture(error: type[BaseException], graphs: CudaGraphs, cuda: FakeCuda) -> None:
    first = graphs.capture(add, [1])
    pool = cuda.handles
    with pytest.raises(error):
        graphs.capture(runs_out(1, error), [1])
    cuda.said()
    graphs.capture(add, [1])
    assert cuda.said() == captured(pool) and first.outputs == (1,)


def test_a_capture_that_was_invalidated_leaves_its_pool_and_the_random_numbers(
    graphs: CudaGraphs, cuda: FakeCuda
) -> None:
    first = graphs.capture(add, [1])
    pool = cuda.handles
    cuda.said()
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(runs_out(1, ValueError), [1])
    assert cuda.said() == ["on side", f"begin in {pool}", "end", "state restored"]
    cuda.invalid = False
    graphs.capture(add, [1])
    assert cuda.said() == captured(cuda.handles) and cuda.handles > pool and first.outputs == (1,)


def test_a_capture_that_changes_control_words_is_dropped(cuda: FakeCuda) -> None:
    words = iter([(1,), (1,), (1,), (2,)])
    graphs = CudaGraphs(DEVICE, lambda: next(words))
    graphs.pool_for(own=True)
    assert graphs.capture(add, [1]).outputs == (1,)
    cuda.said()
    with pytest.raises(CaptureError, match=r"from \(1,\) to \(2,\)"):
        graphs.capture(add, [1])
    assert cuda.said()[-1] == "reset"
