"""Models with a key-value cache, which is a buffer or an argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfence

H, SLOTS = 32, 8


@torch.library.custom_op("ringfence_test::attend", mutates_args=())
def attend(q: Tensor, cache: Tensor) -> Tensor:
    return F.softmax(q @ cache.T, -1) @ cache


attend.register_fake(lambda q, cache: torch.empty_like(q))


class Cached(nn.Module):
    """Two layers; each writes a row of its cache and attends over it. ``argument``: the caches are the caller's."""

    def __init__(self, *, op: bool, argument: bool) -> None:
        super().__init__()
        self.op, self.argument = op, argument
        self.norm = nn.RMSNorm(H, eps=1e-5)
        for i in range(2):
            self.register_buffer(f"cache{i}", torch.zeros(SLOTS, H))

    def forward(self, x: Tensor, position: Tensor, *caches: Tensor) -> Tensor:
        for i in range(2):
            cache = caches[i] if self.argument else getattr(self, f"cache{i}")
            cache.index_copy_(0, position, x.sin())
            y = torch.ops.ringfence_test.attend(x, cache) if self.op else F.softmax(x @ cache.T, -1) @ cache
            dist.all_reduce(y)
            x = self.norm(x + y)
        return x


def steps(model: Any, twin: Cached, argument: bool) -> None:
    """The same outputs and caches as an eager twin, step by step, with caches that are not always the same tensors."""
    mine = [[torch.zeros(SLOTS, H) for _ in range(2)] for _ in range(2)]
    theirs = [[torch.zeros(SLOTS, H) for _ in range(2)] for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in range(8):
            x, position = torch.randn(2, H, generator=generator), torch.tensor([step % SLOTS, (step + 3) % SLOTS])
            ours, right = (mine[step % 2], theirs[step % 2]) if argument else ([], [])
            torch.testing.assert_close(model(x, position, *ours), twin(x, position, *right))
            torch.testing.assert_close(ours, right)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
@pytest.mark.parametrize("argument", [False, True], ids=["buffer", "argument"])
@pytest.mark.parametrize("op", [False, True], ids=["inlined", "op"])
@pytest.mark.parametrize("capture", [(), (2,)], ids=["uncaptured", "captured"])
def test_caches_are_written(piece_compiler: str, argument: bool, op: bool, capture: tuple[int, ...]) -> None:
    model, twin = (Cached(op=op, argument=argument) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    split = ("ringfence_test::attend", "ringfence::all_reduce_add_rms_norm") if op else ()
    backend = ringfence.Backend(
        capture_sizes=capture, graphs="simulated", split_ops=split, piece_compiler=piece_compiler
    )
    steps(torch.compile(model, backend=backend, fullgraph=True), twin, argument)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))
    (report,) = backend.reports
    ringfence.assert_fused(report, 2)
    if op and capture:
        assert sum(p.island for p in report.pieces) >= 2


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(SLOTS, H))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.cache.index_copy_(0, position, x.sin())
        dist.all_reduce(x)
        return F.rms_norm(x, (H,), None, 1e-5) + self.cache.sum()


@pytest.mark.usefixtures("fake_group")
def test_a_graph_that_writes_into_its_inputs_is_not_padded() -> None:
    """A padded row would be written at the position that its zero stands for."""
    model, twin = Rows(), Rows()
    backend = ringfence.Backend(capture_sizes=[4], graphs="simulated", pad_to_capture_size=True, piece_compiler="eager")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (4, 3, 3, 2):
            x, position = torch.randn(rows, H), torch.arange(1, rows + 1)
            torch.testing.assert_close(compiled(x.clone(), position), twin(x.clone(), position))
            torch.testing.assert_close(model.cache, twin.cache)
    assert any("writes into its inputs" in note for note in backend.reports[-1].notes)


def test_a_cache_at_the_address_of_one_that_is_gone_is_served() -> None:
    """A device knows addresses only, so the capture of the first cache serves the others that come there."""

    def step(x: Tensor, cache: Tensor) -> Tensor:
        cache[:2] += x[:2]
        return cache.sum(0) + x

    backend = ringfence.Backend(capture_sizes=[4], graphs="simulated", piece_compiler="eager")
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(20):
            x, cache = torch.randn(4, H), torch.randn(6, H)
            twin = cache.clone()
            torch.testing.assert_close(compiled(x, cache), step(x, twin))
            torch.testing.assert_close(cache, twin)
            del cache
