"""What goes wrong between captured pieces, on simulated CUDA graphs, and that the runner avoids it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from ringfence.runtime.errors import CaptureError
from ringfence.runtime.replay.buffers import copy_into
from ringfence.runtime.replay.capture import SimulatedGraphs


def rows() -> Tensor:
    return torch.randn(4, 8)


def eager_island(x: Tensor) -> Tensor:
    """Allocates its output anew at each call, as most ops do."""
    return x * 2


def add_one(x: Tensor) -> tuple[Tensor, ...]:
    return (x + 1,)


def test_m31_a_replay_uses_the_workspace_that_was_captured() -> None:
    workspace = torch.zeros(8)
    piece = SimulatedGraphs().capture(lambda w: (w.add_(1),), [workspace])
    grown = torch.zeros(16)  # as a manager does when a larger call comes
    piece.replay()
    assert workspace.eq(1).all() and grown.eq(0).all()  # peers that poll the new one see nothing


def test_m31_a_replay_on_a_workspace_that_is_gone_fails() -> None:
    workspace = torch.zeros(8)
    piece = SimulatedGraphs().capture(lambda w: (w + 1,), [workspace])
    del workspace
    gc.collect()
    with pytest.raises(CaptureError, match="freed"):  # on a GPU: an illegal access, or somebody else's memory
        piece.replay()


def test_m40_a_piece_computes_with_the_output_of_an_earlier_step() -> None:
    first = eager_island(rows())
    piece = SimulatedGraphs().capture(add_one, [first])
    piece.replay()
    second = eager_island(rows())
    piece.replay()
    torch.testing.assert_close(piece.outputs[0], first + 1)
    assert not torch.allclose(piece.outputs[0], second + 1)


def test_m40_a_static_landing_buffer_avoids_it() -> None:
    """What the runner does; tests/runtime/test_runner.py checks it there."""
    landing = torch.empty(4, 8)
    piece = SimulatedGraphs().capture(add_one, [landing])
    for _ in range(2):
        result = eager_island(rows())
        copy_into(landing, result)
        piece.replay()
        torch.testing.assert_close(piece.outputs[0], result + 1)


def test_m41_a_replay_reads_memory_that_was_given_to_another_tensor() -> None:
    pool = torch.zeros(32)  # two tensors that share memory, as a pool hands it out after a free
    freed, reused = pool[:32].view(4, 8), pool[:32].view(4, 8)
    piece = SimulatedGraphs().capture(add_one, [freed])
    freed.fill_(1)
    reused.fill_(100)  # a later piece writes while the reader is not done
    piece.replay()
    assert piece.outputs[0].eq(101).all()


def test_m43_padding_that_nobody_defines_reaches_the_kernel() -> None:
    lengths = torch.full((4,), -7)  # what was in memory
    piece = SimulatedGraphs().capture(lambda n: (n.clone(),), [lengths])
    lengths[:2] = 3  # a batch of two, padded to the captured four
    piece.replay()
    assert (piece.outputs[0] < 0).any()
    lengths[2:] = 0
    piece.replay()
    assert (piece.outputs[0] >= 0).all()
