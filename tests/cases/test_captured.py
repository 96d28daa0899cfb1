"""What is captured, what is not, and what a capture keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases.serve import serve
from torch import Tensor

import ringfence
from ringfence.runtime.replay import runner as runners
from support import engine_library

H = 64
pytestmark = pytest.mark.usefixtures("fake_group")
CAPTURED: dict[str, Any] = {"capture_sizes": [2, 4], "graphs": "simulated", "on_capture_failure": "raise"}
SEEN: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    unsafe, reads = torch.Tag.cudagraph_unsafe, torch.Tag.data_dependent_output

    def writes(q: Tensor, out: Tensor) -> None:
        SEEN.append("writes")
        out.copy_(q * 2)

    def writes_first(q: Tensor, out: list[Tensor]) -> None:
        writes(q, out[0])

    def returns(q: Tensor) -> Tensor:
        SEEN.append("returns")
        return q * 2

    def counts(q: Tensor, state: Tensor) -> Tensor:
        SEEN.append("counts")
        state.add_(float(q.sum() > 0))
        return q + state

    def attention(x: Tensor) -> Tensor:
        return x * 2

    ops = (
        ("writes(Tensor q, Tensor(a!) out) -> ()", writes, lambda q, out: None, unsafe),
        ("writes_list(Tensor q, Tensor(a!)[] out) -> ()", writes_first, lambda q, out: None, unsafe),
        ("writes_maybe(Tensor q, Tensor(a!)? out) -> ()", writes, lambda q, out: None, unsafe),
        ("returns(Tensor q) -> Tensor", returns, torch.empty_like, unsafe),
        ("counts(Tensor q, Tensor(a!) state) -> Tensor", counts, lambda q, state: torch.empty_like(q), reads),
        ("attention(Tensor x) -> Tensor", attention, torch.empty_like),
    )
    with engine_library("captured", *ops):
        yield


# -- tags of an op that writes ---------------------------------------------------------------


def buffer(x: Tensor, state: Tensor) -> Tensor:
    o = torch.empty_like(x)
    torch.ops.captured.writes(x + 1, o)
    return o + 1


def part_of_an_input(x: Tensor, state: Tensor) -> Tensor:
    torch.ops.captured.writes(x + 1, state[: x.shape[0]])
    return state.sum(0) + 1


def transposed(x: Tensor, state: Tensor) -> Tensor:
    o = torch.empty(x.shape[1], x.shape[0])
    torch.ops.captured.writes(x + 1, o.t())
    return o + 1


def listed(x: Tensor, state: Tensor) -> Tensor:
    o = torch.empty_like(x)
    torch.ops.captured.writes_list(x + 1, [o, state])
    return o + 1


def optional(x: Tensor, state: Tensor) -> Tensor:
    o = torch.empty_like(x)
    torch.ops.captured.writes_maybe(x + 1, o)
    return o + 1


def functional(x: Tensor, state: Tensor) -> Tensor:
    return torch.ops.captured.returns(x + 1) + 1


def reads_data(x: Tensor, state: Tensor) -> Tensor:
    return torch.ops.captured.counts(x + 1, state[0]) * 2


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("function", [buffer, part_of_an_input, transposed, listed, optional, functional, reads_data])
def test_tags_of_an_op_hold_whatever_it_writes(function: Callable[..., Tensor], compiler: str) -> None:
    state = torch.randn(8, H)
    given = [(torch.randn(4, H), state) for _ in range(4)]
    SEEN.clear()
    served = serve(function, given, dynamic=False, piece_compiler=compiler, **CAPTURED)
    assert max(served.off) < 1e-5, served.off
    assert len(SEEN) == 2 * len(given), "once in each step, here and in eager"
    assert any(piece.island for piece in served.reports[-1].pieces)


# -- random numbers ----------------------------------------------------------------------------

RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda x: x + torch.rand_like(x),
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "randn": lambda x: x + torch.randn(x.shape),
    "randint": lambda x: x + torch.randint(0, 1000, x.shape),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "multinomial": lambda x: torch.multinomial(x.abs(), 8),
    "randperm": lambda x: x[:, torch.randperm(x.shape[1])],
    "exponential_": lambda x: x / torch.empty_like(x).exponential_(1),
    "normal_ of a slice": lambda x: torch.cat([x[:, :8].clone().normal_(), x[:, 8:]], 1),
}


@pytest.mark.parametrize("capture", [{}, CAPTURED], ids=["uncaptured", "captured"])
@pytest.mark.parametrize("compiler", ["inductor", "eager"])
@pytest.mark.parametrize("name", list(RANDOM))
def test_random_ops_run_and_give_new_numbers_in_every_step(name: str, compiler: str, capture: dict[str, Any]) -> None:
    torch._dynamo.reset()
    backend = ringfence.Backend(piece_compiler=compiler, **capture)
    compiled = torch.compile(lambda x: RANDOM[name](x), backend=backend, fullgraph=True, dynamic=False)
    x = torch.randn(4, H)
    with torch.no_grad():
        seen = [compiled(x).clone() for _ in range(4)]
    assert all(s.shape == RANDOM[name](x).shape and s.double().isfinite().all() for s in seen)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    if compiler == "eager":
        for step in range(3):
            torch.manual_seed(step)
            right = RANDOM[name](x)
            torch.manual_seed(step)
            assert torch.equal(compiled(x), right)


# -- memory -----------------------------------------------------------------------------------------


def residual_stream(x: Tensor, weight: Tensor) -> Tensor:
    r = x
    for _ in range(16):
        h = torch.ops.captured.attention(F.rms_norm(r, (1024,), weight, 1e-6))
        r = r + h * 1.5
    return r


def with_projections(x: Tensor, weight: Tensor) -> Tensor:
    r = x
    for _ in range(16):
        h = F.rms_norm(r, (1024,), weight, 1e-6)
        h = torch.ops.captured.attention(torch.sin(h) * h + 1) * 1.5
        dist.all_reduce(h)
        r = r + h
    return r


@pytest.mark.parametrize("function", [residual_stream, with_projections])
def test_captures_hold_what_is_live_at_once(function: Callable[..., Tensor]) -> None:
    """Counted in activations of the largest size, over all sizes: about as many as a step has alive."""
    sizes, made = [8, 16, 32, 64], []
    init = runners.PiecewiseRunner.__init__

    def spy(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    with mock.patch.object(runners.PiecewiseRunner, "__init__", spy):
        given = [(torch.randn(n, 1024), torch.ones(1024)) for n in reversed(sizes)] * 2
        served = serve(
            function,
            given,
            split_ops=["captured::attention"],
            piece_compiler="eager",
            **{**CAPTURED, "capture_sizes": sizes},
        )
    assert max(served.off) < 1e-4
    held = {
        storage.data_ptr(): storage.nbytes()
        for entry in made[-1]._places.entries.values()
        for tensor in _tensors(entry)
        if (storage := tensor.untyped_storage()).nbytes() >= 8 * 1024 * 4
    }
    assert sum(held.values()) / (64 * 1024 * 4) <= 10, held


def _tensors(entry: Any) -> Iterator[Tensor]:
    for value in [*entry.slots, *(o for piece in entry.pieces for o in piece.outputs)]:
        if isinstance(value, Tensor):
            yield value


# -- release ------------------------------------------------------------------------------------------


def test_every_piece_is_released_though_one_fails() -> None:
    class Piece:
        outputs: tuple[Any, ...] = ()

        def __init__(self, bad: bool) -> None:
            self.bad, self.released = bad, 0

        def release(self) -> None:
            self.released += 1
            if self.bad:
                raise RuntimeError("reset failed")

    pieces = [Piece(False), Piece(True), Piece(False), Piece(True), Piece(False)]
    entry = runners.Entry((1,), [], [], pieces, (), [])  # type: ignore[arg-type]
    with pytest.raises(Exception, match="reset failed"):
        entry.release()
    assert [piece.released for piece in pieces] == [1, 1, 1, 1, 1]
