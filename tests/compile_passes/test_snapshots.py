"""Values taken of memory that the model writes: each is what was there then, whoever compiles the piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ringfence

H = 16


@torch.library.custom_op("ringfence_snapshots::cut", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def cut(x: Tensor) -> Tensor:
    return x * 2


cut.register_fake(torch.empty_like)


def row(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    y = cut(x)
    c[0].copy_(x[0])
    old = c[0].clone()
    z = cut(y)
    c.mul_(3)
    return z, cut(old)


def rows_that_were_scaled(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    y = cut(x)
    c[3:].mul_(2)
    old = c[3:].clone()
    z = cut(y)
    c[3:].add_(100)
    return z, cut(old)


def rows_that_were_copied(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    y = cut(x)
    c[:4].copy_(x)
    old = c[:4].clone()
    z = cut(y)
    c.mul_(3)
    return z, cut(old)


def shifted(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    c[1:].copy_(c[:-1].clone())
    old = c[1:].clone()
    y = cut(x)
    c.mul_(1.5)
    return y, cut(old)


def all_of_it(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    y = cut(x)
    c[3:].mul_(2)
    old = c.clone()
    z = cut(y)
    c.mul_(0.3)
    return z, cut(old)


def for_the_caller(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    c[:5].add_(1)
    y = cut(x)
    c[3:].mul_(0.5)
    return y, c[3:].clone()


def for_the_caller_by_another_write(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    y = cut(x)
    c[:5].sub_(y.sum() / 100)
    return y, c[3:].clone()


def filled(x: Tensor, c: Tensor) -> Sequence[Tensor]:
    y = cut(x)
    c[3:].mul_(2)
    old = torch.empty_like(c[3:])
    old[:] = c[3:]
    z = cut(y)
    c.mul_(0.3)
    return z, cut(old)


PROGRAMS: list[Callable[[Tensor, Tensor], Sequence[Tensor]]] = [
    row,
    rows_that_were_scaled,
    rows_that_were_copied,
    shifted,
    all_of_it,
    for_the_caller,
    for_the_caller_by_another_write,
    filled,
]
CAPTURED: dict[str, Any] = {"capture_sizes": [4], "graphs": "simulated"}


@pytest.mark.parametrize("captured", [False, True], ids=["uncaptured", "captured"])
@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
def test_a_snapshot_is_what_was_there(piece_compiler: str, captured: bool) -> None:
    for program in PROGRAMS:
        torch._dynamo.reset()
        options = CAPTURED if captured else {}
        backend = ringfence.Backend(piece_compiler=piece_compiler, on_capture_failure="raise", **options)
        compiled = torch.compile(program, backend=backend, dynamic=True, fullgraph=True)
        generator = torch.Generator().manual_seed(3)
        right = torch.randn(8, H, generator=generator)
        ours, held = right.clone(), []
        with torch.no_grad():
            for _ in range(3):
                x = torch.randn(4, H, generator=generator)
                expected, actual = program(x, right), compiled(x, ours)
                held.append((actual, [t.clone() for t in actual]))
                torch.testing.assert_close(list(actual), list(expected), msg=program.__name__)
                torch.testing.assert_close(ours, right)
        for actual, then in held:  # what the caller has does not change in later steps
            torch.testing.assert_close(list(actual), then, rtol=0, atol=0, msg=program.__name__)


# -- values that are not where their copies would be ------------------------------------------


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
def test_what_counts_from_the_start_of_the_storage_is_read_there(piece_compiler: str) -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.as_strided((2, 8), (8, 1), 0) * 2
        return before, x[1:].as_strided((2, 8), (8, 1), 2 * H + 1) * 2

    backend = ringfence.Backend(piece_compiler=piece_compiler, **CAPTURED)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    memory = torch.randn(12, H)
    for _ in range(4):
        memory.copy_(torch.randn(12, H))
        torch.testing.assert_close(compiled(memory[2:6]), run(memory[2:6]))
    assert any("as_strided" in note for note in backend.reports[0].notes)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_conjugates_are_conjugated_in_replays() -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        z = x * 1
        y = cut(x)
        return y, z.conj() * 2, z.imag + 1, (x * 2).conj()

    compiled = torch.compile(run, backend=ringfence.Backend(piece_compiler="eager", **CAPTURED), fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, H, dtype=torch.complex64)
            for actual, expected in zip(compiled(x), run(x), strict=True):
                torch.testing.assert_close(actual.resolve_conj(), expected.resolve_conj())
            torch.testing.assert_close(compiled(x.conj())[1].resolve_conj(), run(x.conj())[1].resolve_conj())


# -- inputs that lie where the model writes ------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(8, H))

    def forward(self, x: Tensor) -> Tensor:
        self.state.mul_(0.5)
        y = cut(x)
        self.state[:4].add_(y)
        return y + x


def test_an_input_that_lies_in_a_buffer_that_is_written_is_no_copy() -> None:
    backend = ringfence.Backend(piece_compiler="eager", **CAPTURED)
    ours, right = Recurrent(), Recurrent()
    compiled = torch.compile(ours, backend=backend, dynamic=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, H)
            torch.testing.assert_close(compiled(x), right(x))
        for _ in range(2):
            torch.testing.assert_close(compiled(ours.state[2:6]), right(right.state[2:6]))
            torch.testing.assert_close(ours.state, right.state)
    assert any("may lie in memory that the model writes" in note for note in backend.reports[-1].notes)


def test_keys_and_values_that_interleave_are_captured() -> None:
    def run(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k.add_(x)
        return cut(x) + v

    backend = ringfence.Backend(piece_compiler="eager", on_capture_failure="raise", **CAPTURED)
    compiled = torch.compile(run, backend=backend, dynamic=False)
    right = torch.randn(4, 2, H)
    ours = right.clone()
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, H)
            expected = run(x, right[:, 0], right[:, 1])
            torch.testing.assert_close(compiled(x, ours[:, 0], ours[:, 1]), expected)
            torch.testing.assert_close(ours, right)
    (report,) = backend.reports
    assert not any("uncaptured" in note for note in report.notes)


def test_the_token_count_is_not_that_of_a_cache() -> None:
    def run(x: Tensor, c: Tensor) -> Tensor:
        c.add_(1)
        return cut(x) + c[:4]

    backend = ringfence.Backend(piece_compiler="eager", **CAPTURED)
    with torch.no_grad():
        torch.compile(run, backend=backend)(torch.randn(4, H), torch.randn(8, H))
    assert (
        "the token count is the first dimension of input 'l_x', as no all-reduce tells it" in backend.reports[0].notes
    )


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("sizes", [(), (2,)], ids=["uncaptured", "captured"])
def test_a_cache_that_a_graph_allocates_keeps_its_count(sizes: tuple[int, ...]) -> None:
    """Its count of tokens is an input that is written and returned: AOT returns the copy into it."""
    from transformers import LlamaConfig, StaticCache

    config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)

    def step(x: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        key, value = cache.update(x, x * 2, 0)
        y = x + 1
        dist.all_reduce(y)
        return y + key.sum(), value

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=sizes, graphs="simulated")
    compiled = torch.compile(step, backend=backend, dynamic=True)
    x = torch.randn(1, 1, 2, 8)
    ours, theirs = (StaticCache(config=config, max_cache_len=4) for _ in range(2))
    with torch.no_grad():
        for got, want in zip(compiled(x, ours), step(x, theirs), strict=True):
            torch.testing.assert_close(got, want)
    mine, other = (cache.layers[0] for cache in (ours, theirs))
    torch.testing.assert_close(mine.keys, other.keys)
    assert int(mine.cumulative_length) == int(other.cumulative_length) == 2
