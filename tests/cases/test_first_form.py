"""Ops that write lists, slices and transposes, in the first form (``auto_functionalized``): right, and not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases.serve import SETTINGS, attend, name_of, serve, whole_copies, write_each
from torch import Tensor
from torch._inductor import config as inductor_config

import ringfence
from support import engine_library

H, ROWS, LAYERS = 16, 1024, 2
OPS = ("first::attend", "first::each", "first::pair", "first::step")
pytestmark = pytest.mark.usefixtures("fake_group")


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    def pair(keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        keys[: x.shape[0]].copy_(x)
        values[: x.shape[0]].copy_(keys[: x.shape[0]] * 2)
        return x + keys[:4].mean(0)

    def step(x: Tensor, states: list[Tensor]) -> Tensor:
        for i, state in enumerate(states):
            state.mul_(0.5).add_(x.sum() * (i + 1))
        return x * states[0].mean()

    def nothing(*_: Any) -> None:
        return None

    ops = (
        ("attend(Tensor q, Tensor(a!) cache, Tensor(b!) out) -> ()", attend, nothing),
        ("each(Tensor x, Tensor(a!)[] caches) -> ()", write_each, nothing),
        ("pair(Tensor(a!) keys, Tensor(b!) values, Tensor x) -> Tensor", pair, lambda k, v, x: torch.empty_like(x)),
        ("step(Tensor x, Tensor(a!)[] states) -> Tensor", step, lambda x, states: torch.empty_like(x)),
    )
    with engine_library("first", *ops):
        yield


@pytest.fixture(autouse=True)
def first_form() -> Iterator[None]:
    with inductor_config.patch(enable_auto_functionalized_v2=False):
        yield


op = torch.ops.first


def listed(x: Tensor, a: Tensor, b: Tensor) -> Any:
    """A list of two caches, read before and after."""
    before = b[:4].sum(0)
    op.each(x, [a, b])
    y = torch.tanh(x + a[:4].sum(0))
    op.each(y, [b, a])
    return y + before + b[:4].sum(0)


def layers_in_a_list(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    """Layers of one stack: their new values come together in one chain of scatters."""
    y = op.step(x, list(kv.unbind(0)))
    return y + kv[:, :4].sum((0, 1))


def slices_in_a_list(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    head = kv[0, 2:8]
    op.each(x, [head, kv[1], c[4:]])
    return torch.cos(x) + head.sum(0) + kv[1, :4].sum(0) + c[:8].sum(0)


def slice_of_a_layer(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    """A slice of a slice, which is read again through the view that was there before."""
    out, slots = torch.empty_like(x), kv[1][2:10]
    op.attend(x, slots, out)
    return torch.sin(out) + slots.sum(0), kv[1, :12].sum(0)


def transposed(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    out = torch.empty_like(x)
    op.attend(x, kv.permute(1, 0, 2)[:, 1], out)
    y = torch.tanh(out)
    op.attend(y, kv.transpose(0, 1).select(1, 0), out)
    return y + out, kv[:, :4].sum((0, 1))


def blocks(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    """A paged cache: rows in blocks, of which one is a slot."""
    out, paged = torch.empty_like(x), kv[0].view(-1, 8, H)
    op.attend(x, paged[:, 1], out)
    return out + paged[:2].sum((0, 1)), kv[0, 3:5].sum(0)


def every_second(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    out = torch.empty_like(x)
    op.attend(x, c[::2], out)
    old = c[1].clone()
    op.attend(out, c[1::2], out)
    return out + old, c[:4].sum(0)


def halves(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    """Both halves of one tensor are written, the old one is read afterwards."""
    before = kv[1, :4].clone()
    y = op.pair(kv[0], kv[1], x)
    keys = kv[0]
    y = op.pair(kv[1], keys, torch.tanh(y))
    return y + before.sum(0) + keys[:4].sum(0)


def rolled_back(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    before = kv[0, :8].clone()
    y = op.pair(kv[0], kv[1], x)
    kv[0, :8] = before
    return y + kv[0, :8].sum(0)


def same_twice(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """One cache under two names: what is written through one is read through the other."""
    op.each(x, [c, c])
    return op.step(x, [kv[0], kv[0]]) + c[:4].sum(0)


def scratch(x: Tensor, kv: Tensor, _: Tensor) -> Any:
    """Buffers of the graph's own: slices of one are written, and its transpose."""
    held, wide = torch.zeros(4, 8, H), torch.empty(H, x.shape[0])
    op.attend(x, held[1], wide.t())
    op.attend(wide.t() * 2, held[2], wide.t())
    op.each(x, [held[0], kv[1]])
    return wide.t() + held.sum((0, 1)), kv[1, :4].sum(0)


PROGRAMS = (
    listed, layers_in_a_list, slices_in_a_list, slice_of_a_layer, transposed, blocks, every_second, halves,
    rolled_back, same_twice, scratch,
)  # fmt: skip


def given(program: Callable[..., Any], steps: int, rest: int = 0) -> Iterator[tuple[Any, ...]]:
    """rest: the caches are what is behind so many rows of other tensors."""
    first = torch.randn(rest + ROWS, H) if program is listed else torch.randn(rest + LAYERS, ROWS, H)
    second = torch.randn(rest + ROWS, H)
    caches = first[rest:], second[rest:]
    for i in range(steps):
        yield torch.randn((4, 2)[i % 2], H), *caches


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("setting", SETTINGS[:2], ids=name_of)
def test_what_is_written_through_views_and_lists(program: Callable[..., Any], setting: dict[str, Any]) -> None:
    split_ops = list(OPS) if "capture_sizes" in setting else []
    served = serve(program, given(program, 4, rest=3), split_ops=split_ops, **setting)
    assert max(served.off) < 1e-4, served.off


@pytest.mark.parametrize("program", [halves, transposed, every_second])
def test_a_base_begins_elsewhere_behind_the_first_write(program: Callable[..., Any]) -> None:
    """With sizes that are numbers: what the first op leaves begins where its storage does, which no cache does."""
    served = serve(program, given(program, 2, rest=3), dynamic=False, piece_compiler="eager")
    assert max(served.off) < 1e-4, served.off


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_cache_is_copied_whole(program: Callable[..., Any]) -> None:
    compiled = torch.compile(program, backend=ringfence.Backend(split_ops=list(OPS), **SETTINGS[0]), dynamic=True)
    arguments = list(given(program, 3))
    with torch.no_grad():
        for each in arguments[:2]:
            compiled(*each)
    assert not whole_copies(compiled, arguments[2], ROWS * H)
