"""Graphs that write into their inputs: every read sees the value of its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ringfence

H = 32


@torch.library.custom_op("ringfence_test::fill", mutates_args=("out",))
def fill(x: Tensor, out: Tensor) -> None:
    out.copy_(x * 2)


fill.register_fake(lambda x, out: None)


@torch.library.custom_op("ringfence_test::store", mutates_args=("cache", "others", "last"))
def store(x: Tensor, cache: Tensor, others: list[Tensor], last: Tensor | None = None) -> Tensor:
    cache[: x.shape[0]].add_(x)
    for other in others:
        other.mul_(0.5).add_(x.sum())
    if last is not None:
        last.copy_(cache.sum(0))
    return cache.sum(0)


store.register_fake(lambda x, cache, others, last=None: torch.empty_like(x[0]))


@torch.library.custom_op("ringfence_test::between", mutates_args=())
def between(x: Tensor) -> Tensor:
    return x.clone()


between.register_fake(lambda x: torch.empty_like(x))

cut_here = torch.ops.ringfence_test.between
SPLIT = ("ringfence_test::between", "ringfence_test::fill", "ringfence_test::store")


def token_shift(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a.clone()
    a.copy_(x)
    return cut_here(x * 0.5) + old


def late_view(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a[:2]
    y = cut_here(x).sum() + old.sum()
    a[:2] = x[:2]
    return y + old.sum()


def read_across_the_cut(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a[1:]
    y = cut_here(x * 2)
    a[:2] = y[:2]
    z = cut_here(y)
    return old.sum() + z


def old_value_after_two_cuts(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a + 0.0
    a.add_(cut_here(x))
    y = cut_here(x + 1)
    return y + old


def swap(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a.clone()
    a.copy_(b)
    y = cut_here(x)
    b.copy_(old)
    return y + a + b


def swap_at_once(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = cut_here(x)
    old = a.clone()
    a.copy_(b)
    b.copy_(old)
    return y + a


def written_twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a[:2] = x[:2]
    y = cut_here(x) + a.sum(0)
    kept = a[:2].clone()
    a[1:3] = y[:2]
    z = cut_here(y) + a.sum(0)
    a.mul_(0.5)
    return z + kept.sum(0) + a.mean()


def one_into_the_other(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a.copy_(b)
    y = cut_here(x) + a
    b.add_(y)
    return cut_here(y) + b


def op_writes_rows(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.ops.ringfence_test.store(x[:2], a, [b[1:], b[0]])
    y = cut_here(x) + out
    torch.ops.ringfence_test.store(y[:2] * 0.1, b, [a.T[0]], a[3])
    return y + a.sum(0) + b.sum(0)


def old_value_of_what_an_op_writes(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a[:3]
    before = old * 1.0
    torch.ops.ringfence_test.store(x[:1], a, [])
    return before + old + cut_here(x)[:3]


def out_buffer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.ops.ringfence_test.fill(cut_here(x + 1), out)
    y = cut_here(out * 2)
    torch.ops.ringfence_test.fill(y, out)
    return out + 1


def buffer_read_before_it_is_filled_again(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    torch.ops.ringfence_test.fill(x, out)
    first = out * 1.0
    seen = out[1:]
    torch.ops.ringfence_test.fill(x * 3, out)
    return first + out + cut_here(x) + seen.sum()


def transposed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a.T[0] = x[0, :4].sum()
    y = cut_here(x)
    a.view(-1)[3:7] = y.view(-1)[:4]
    return y + a.sum(0)


def overlapping(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = cut_here(x)
    a[1:] = a[:-1].clone()
    a[0] = y[0]
    return y + a.sum(0)


def returned(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    y = a + x
    a.copy_(y)
    z = cut_here(x)
    return y, z + y, y[:2], a


def views_of_one(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    rows = y[:2]
    z = cut_here(x)
    return y, rows + z[:2], y.T, rows


def masked(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a[x[:, 0] > 0] = 1.0
    y = cut_here(x)
    a.masked_fill_(y > 1, -1.0)
    a.clamp_(min=-0.5)
    return y + a


PROGRAMS = [
    token_shift, late_view, read_across_the_cut, old_value_after_two_cuts, swap, swap_at_once, written_twice,
    one_into_the_other, op_writes_rows, old_value_of_what_an_op_writes, out_buffer,
    buffer_read_before_it_is_filled_again, transposed, overlapping, returned, views_of_one, masked,
]  # fmt: skip


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
@pytest.mark.parametrize("capture", [(), (4,)], ids=["uncaptured", "captured"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_reads_see_the_value_of_their_place(program: Any, capture: tuple[int, ...], piece_compiler: str) -> None:
    backend = ringfence.Backend(
        capture_sizes=capture, graphs="simulated", split_ops=SPLIT, piece_compiler=piece_compiler
    )
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, H, generator=generator) for _ in range(2))
    a2, b2 = a.clone(), b.clone()
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, H, generator=generator)
            right, ours = program(x.clone(), a2, b2), compiled(x.clone(), a, b)
            torch.testing.assert_close(ours, right)
            torch.testing.assert_close((a, b), (a2, b2))
    assert any(p.island for p in backend.reports[0].pieces)


def chunk_of_an_input(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.chunk(2, -1)[1], a.T[1:], x * 2


def rows_of_what_was_written(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    a.add_(1)
    b.copy_(b * 2)
    return a[:, :3], b[1:, 2:5], a, x * 2


def chunk_before_it_is_written(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    first, second = a.tensor_split(2, -1)
    a.masked_fill_(x[:, :1] > 0, 0.25)
    return first, second, b[x.shape[0] // 2 :], x * 2


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "program", [chunk_of_an_input, rows_of_what_was_written, chunk_before_it_is_written], ids=lambda p: p.__name__
)
def test_a_returned_view_is_of_the_callers_tensor(program: Any, dynamic: bool, static: bool) -> None:
    """Where it begins in the storage, and how far its rows lie apart, is asked of what the caller passed."""
    backend = ringfence.Backend(capture_sizes=[4], graphs="simulated", piece_compiler="eager", static_outputs=static)
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for step in range(4):
            big, x = torch.randn(3, 4, H, generator=generator), torch.randn(4, H, generator=generator)
            a, b = (big[1], big[2]) if step % 2 else (big[1].clone(), big[2].clone())
            a2, b2 = a.clone(), b.clone()
            right, ours = program(x, a2, b2), compiled(x, a, b)
            torch.testing.assert_close(ours, right)
            torch.testing.assert_close((a, b), (a2, b2))
            assert ours[0].untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


def value_that_is_also_written(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    y = a * 2
    a.copy_(y)
    return y[:, :3], (x @ x.T)[x.shape[0] // 2 :], cut_here(x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("capture", [(), (4,)], ids=["uncaptured", "captured"])
def test_a_returned_value_that_an_input_is_given_too_is_the_callers_own(capture: Any, dynamic: bool) -> None:
    backend = ringfence.Backend(capture_sizes=capture, graphs="simulated", split_ops=SPLIT, piece_compiler="eager")
    compiled = torch.compile(value_that_is_also_written, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for _ in range(3):
            x, a = torch.randn(4, H), torch.randn(4, H)
            a2 = a.clone()
            right, ours = value_that_is_also_written(x, a2, a2), compiled(x, a, a2.clone())
            torch.testing.assert_close(ours, right)
            torch.testing.assert_close(a, a2)
            assert ours[0].untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


def test_a_write_through_a_transpose_is_one_into_the_whole() -> None:
    """The spec knows that a transpose of a transpose is the tensor itself."""

    def step(c: Tensor, r: Tensor, x: Tensor) -> Tensor:
        c[1:5].copy_(x)
        c.t()[:, :4] = r.t()
        kept = c.contiguous().clone()
        c.copy_(c * 0.5)
        return kept

    compiled = torch.compile(step, backend=ringfence.Backend(piece_compiler="eager"), fullgraph=True)
    with torch.no_grad():
        c, r, x = torch.randn(8, H), torch.randn(4, H), torch.randn(4, H)
        twin = c.clone()
        torch.testing.assert_close(compiled(c, r, x), step(twin, r, x))
        torch.testing.assert_close(c, twin)


@torch.library.custom_op("ringfence_test::attend_into", mutates_args=("out",))
def attend_into(q: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels of attention do: into a tensor of the caller's, and what they return is new."""
    out.copy_(q * 2)
    return q.sum(-1), q.amax(-1)


attend_into.register_fake(lambda q, out: (q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1])))


@pytest.mark.parametrize("capture", [(), (2,)], ids=["", "captured"])
def test_an_op_that_writes_and_returns_several_values(capture: tuple[int, ...]) -> None:
    def step(q: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(q)
        total, most = torch.ops.ringfence_test.attend_into(q, out)
        return total + 1, most, out.sin()

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=capture, graphs="simulated")
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            q = torch.randn(2, H)
            torch.testing.assert_close(compiled(q), step(q))
