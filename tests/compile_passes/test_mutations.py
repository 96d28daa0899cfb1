"""Models that write into their inputs: a key-value cache that is a buffer, or an argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfence
from ringfence.compile_passes import mutations

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


@pytest.mark.usefixtures("fake_group")
def test_later_parts_read_the_cache_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part returns a cache, and every copy into one stands in the part that made its value."""
    seen = []

    def keep(whole: torch.fx.GraphModule) -> None:
        original(whole)
        seen.append(whole)

    original = mutations.read_in_place
    monkeypatch.setattr("ringfence.backend.read_in_place", keep)
    backend = ringfence.Backend(
        capture_sizes=[2], graphs="simulated", split_ops=["ringfence_test::attend"], piece_compiler="eager"
    )
    model = Cached(op=True, argument=False)
    steps(torch.compile(model, backend=backend), Cached(op=True, argument=False), False)
    (whole,) = seen
    caches = [n for n in whole.graph.find_nodes(op="placeholder") if tuple(n.meta["val"].shape) == (SLOTS, H)]
    assert len(caches) == 2
    for cache in caches:
        assert len(cache.users) == 2  # the part that writes, and the island that attends
    for part in whole.graph.find_nodes(op="call_module"):
        module = whole.get_submodule(str(part.target))
        copies = module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        for copy in copies:
            assert copy.args[1].op == "call_function", "its value was made here"
            (output,) = module.graph.find_nodes(op="output")
            assert copy.args[1] not in output.args[0]


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


def test_a_value_that_is_read_after_the_write_is_not_written_early() -> None:
    graph = torch.fx.Graph()
    cache, x = graph.placeholder("cache"), graph.placeholder("x")
    new = graph.call_function(torch.ops.aten.add.Tensor, (cache, x))
    view = graph.call_function(torch.ops.aten.view.default, (cache, [-1]))
    other = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    old = graph.call_function(torch.ops.aten.sum.default, (view,))
    last = graph.call_function(torch.ops.aten.neg.default, (other,))
    copy = graph.call_function(torch.ops.aten.copy_.default, (cache, new))
    graph.output((old, last))
    gm = torch.fx.GraphModule({}, graph)
    assert mutations.hoist_writes(gm) == {0}
    names = [n.name for n in graph.nodes]
    assert names.index(old.name) + 1 == names.index(copy.name) < names.index(last.name)
