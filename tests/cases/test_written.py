"""Caches: written by the model or by an engine's op, read before and after, whole or through a view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases.serve import SETTINGS, name_of, serve, whole_copies
from torch import Tensor, nn

import ringfence
from support import engine_library

H, ROWS = 64, 8
pytestmark = pytest.mark.usefixtures("fake_group")
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=name_of)


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """Ops as engines register them: what they write is an argument."""

    def attention(q: Tensor, cache: Tensor, out: Tensor) -> None:
        cache[: q.shape[0]].add_(q)
        out.copy_(q + cache.mean(0))

    def append(cache: Tensor, x: Tensor, pos: Tensor) -> None:
        cache[pos] = x

    def both(keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        keys[: x.shape[0]].copy_(x)
        values[: x.shape[0]].copy_(x * 2)
        return x + keys.mean(0)

    def maybe(x: Tensor, cache: Tensor | None) -> Tensor:
        if cache is None:
            return x + 1
        cache[: x.shape[0]].copy_(x)
        return x + cache.mean(0)

    def each(x: Tensor, caches: list[Tensor]) -> None:
        for i, cache in enumerate(caches):
            cache[: x.shape[0]].copy_(x + i)

    def nothing(*_: Any) -> None:
        return None

    ops = (
        ("attention(Tensor q, Tensor(a!) cache, Tensor(b!) out) -> ()", attention, nothing),
        ("append(Tensor(a!) cache, Tensor x, Tensor pos) -> ()", append, nothing),
        ("both(Tensor(a!) keys, Tensor(b!) values, Tensor x) -> Tensor", both, lambda k, v, x: torch.empty_like(x)),
        ("maybe(Tensor x, Tensor(a!)? cache) -> Tensor", maybe, lambda x, cache: torch.empty_like(x)),
        ("each(Tensor x, Tensor(a!)[] caches) -> ()", each, nothing),
    )
    with engine_library("case", *ops):
        yield


def site(x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """An all-reduce with the add and the norm that it is fused with."""
    y = x * 1
    dist.all_reduce(y)
    r = r + y
    return F.rms_norm(r, (H,), weight, 1e-6), r


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(H, H) / 8, requires_grad=False) for _ in range(2))
        self.g = nn.Parameter(1 + torch.randn(H) / 4, requires_grad=False)

    def layer(self, i: int, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return site(x @ self.w[i], r, self.g)


# -- a stacked cache, and views of one ---------------------------------------------------


class Stacked(Layers):
    """Layer i writes kv[i]."""

    def forward(self, x: Tensor, r: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        for i in range(2):
            o = torch.empty_like(x)
            torch.ops.case.attention(x, kv[i], o)
            x, r = self.layer(i, o, r)
        return x, r


class Unbound(Layers):
    def forward(self, x: Tensor, r: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        for i, cache in enumerate(kv.unbind(0)):
            x, r = self.layer(i, torch.ops.case.maybe(x, cache), r)
        return x, r


class KeysAndValues(Layers):
    """One tensor holds both, one op writes both halves."""

    def forward(self, x: Tensor, r: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        x, r = self.layer(0, torch.ops.case.both(kv[0], kv[1], x), r)
        return self.layer(1, x + kv[1].mean(0), r)


class Columns(Layers):
    """The op is given a transposed slice."""

    def forward(self, x: Tensor, r: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        o = torch.empty_like(x)
        torch.ops.case.attention(x, kv.permute(1, 0, 2)[:, 1], o)
        return self.layer(0, o, r)


def steps(sizes: tuple[int, ...], *caches: Tensor) -> Iterator[tuple[Any, ...]]:
    for n in sizes:
        yield (torch.randn(n, H), torch.randn(n, H), *caches)


STACKED = {Stacked: "attention", Columns: "attention", KeysAndValues: "both", Unbound: "maybe"}


@every_setting
@pytest.mark.parametrize("model", list(STACKED))
def test_layer_of_a_stacked_cache(model: type[Layers], setting: dict[str, Any]) -> None:
    """As an island where pieces are captured, inside a piece where they are not."""
    split_ops = [f"case::{STACKED[model]}"] if "capture_sizes" in setting else []
    served = serve(model(), steps((4, 2, 4, 2), torch.randn(2, ROWS, H)), split_ops=split_ops, **setting)
    assert max(served.off) < 1e-4, served.off
    assert set(served.sites) == {"fused"}


# -- written twice, and read between ------------------------------------------------------


class Shared(Layers):
    """Two layers share one cache; the second write follows a read."""

    scale: float | None = None

    def forward(self, x: Tensor, r: Tensor, pos: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        c.index_copy_(0, pos, x)
        x, r = self.layer(0, x + c.sum(0), r)
        c.index_copy_(0, pos, x)
        between = c[:4].clone()
        if self.scale is not None:
            c.mul_(self.scale)
        return self.layer(1, x + c.sum(0) + between.sum(0), r)


class SharedAndHalved(Shared):
    scale = 0.5


class Rollback(Layers):
    """Speculative decoding: write, read, put back what was there."""

    def forward(self, x: Tensor, r: Tensor, pos: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        before = c.clone()
        c.index_copy_(0, pos, x)
        x, r = self.layer(0, x + c.mean(0), r)
        c.copy_(before)
        return self.layer(1, x + c.mean(0), r)


class Ring(Layers):
    """The oldest rows leave, the new ones come in at the end."""

    def forward(self, x: Tensor, r: Tensor, pos: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        oldest = c[:n]
        y = x + oldest.mean(0)
        c.copy_(torch.cat([c[n:], x]))
        return self.layer(0, y + c.mean(0), r)


class ViewFirst(Layers):
    """A view that is made before the write, read after it: it sees the new rows."""

    def forward(self, x: Tensor, r: Tensor, pos: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        top, total = c[:4], c.sum(0)
        x, r = self.layer(0, x, r)
        c.index_copy_(0, pos, x)
        return self.layer(1, x + top.sum(0) + total, r)


@every_setting
@pytest.mark.parametrize("model", [Shared, SharedAndHalved, Rollback, Ring, ViewFirst])
def test_cache_written_and_read_between(model: type[Layers], setting: dict[str, Any]) -> None:
    dynamic = "capture_sizes" in setting
    cache = torch.randn(ROWS, H)
    sizes = (4, 2, 4, 2) if dynamic else (4, 4, 4)  # a static size is a compilation
    given = [(*s[:2], torch.arange(i, i + s[0].shape[0]), cache) for i, s in enumerate(steps(sizes))]
    served = serve(model(), given, dynamic=dynamic, **setting)
    assert max(served.off) < 1e-4, served.off
    assert set(served.sites) == {"fused"}


# -- the old value, kept in a buffer -------------------------------------------------------


class TokenShift(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.randn(4, H))
        self.register_buffer("other", torch.randn(4, H))

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        before = self.state.clone()
        self.state.copy_(x)
        return self.layer(0, 0.5 * x + 0.5 * before, r)


class Swap(TokenShift):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.state.clone()
        self.state.copy_(self.other + x)
        self.other.copy_(kept)
        return self.layer(0, x + self.state - self.other, r)


class Average(TokenShift):
    """The old value is read late, behind the layer."""

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        before = self.state + 0.0
        self.state.mul_(0.9).add_(x, alpha=0.1)
        y, r = self.layer(0, x, r)
        return y + before, r


@every_setting
@pytest.mark.parametrize("model", [TokenShift, Swap, Average])
def test_old_value_is_read_after_the_write(model: Callable[[], nn.Module], setting: dict[str, Any]) -> None:
    served = serve(model(), steps((4, 4, 4)), dynamic=False, **setting)
    assert max(served.off) < 1e-4, served.off


# -- a view of a written input, across a cut -------------------------------------------------


def sum_before_write(x: Tensor, r: Tensor, weight: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    old = c[:4]
    a, _ = site(x, r, weight)
    n = old.sum() + 1
    c[: x.shape[0]] = a
    return n, old * 2


def transposed_view(x: Tensor, r: Tensor, weight: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    old = c.t()[:, 1:5]
    a, _ = site(x, r, weight)
    n = old.amax(1)
    c[: x.shape[0]].mul_(0.5).add_(a)
    return n, old * 2


def view_of_view(x: Tensor, r: Tensor, weight: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    old = c.view(2, -1, H)[0]
    a, b = site(x, r, weight)
    total = old.sum(0)
    c.index_copy_(0, torch.arange(x.shape[0]), a)
    a, _ = site(a + total, b, weight)
    return a, old + 1


@every_setting
@pytest.mark.parametrize("program", [sum_before_write, transposed_view, view_of_view])
def test_view_of_a_written_input_crosses_a_cut(program: Callable[..., Any], setting: dict[str, Any]) -> None:
    given = [(*s[:2], 1 + torch.randn(H) / 4, s[2]) for s in steps((2, 4, 2, 4), torch.randn(16, H))]
    served = serve(program, given, split_ops=["ringfence::all_reduce_add_rms_norm"], **setting)
    assert max(served.off) < 1e-4, served.off


# -- what an island costs -------------------------------------------------------------------


class Appends(Layers):
    """An op writes its cache, which later layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.randn(4096, H))

    def forward(self, x: Tensor, r: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        x, r = self.layer(0, x, r)
        torch.ops.case.append(self.cache, x, pos)
        return self.layer(1, x + self.cache[:2].mean(0), r)


class Attends(Layers):
    """Cache and output buffer are written by one op, in several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k0", torch.randn(4096, H))
        self.register_buffer("k1", torch.randn(2, 4096, H))

    def forward(self, x: Tensor, r: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        for i, cache in enumerate((self.k0, self.k1[1])):
            o = torch.empty_like(x)
            torch.ops.case.attention(x, cache, o)
            x, r = self.layer(i, o, r)
        return x, r


class Lists(Attends):
    """A list of caches, and an optional one."""

    def forward(self, x: Tensor, r: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        torch.ops.case.each(x, [self.k0, self.k1[0]])
        x, r = self.layer(0, torch.ops.case.maybe(x, self.k1[1]), r)
        return self.layer(1, torch.ops.case.maybe(x, None), r)


class Aten(Attends):
    """A layer of a stack is written by ATen: by index, in columns, in blocks."""

    def forward(self, x: Tensor, r: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        self.k1[1][pos] = x
        x, r = self.layer(0, x + self.k1[1, :4].sum(0), r)
        self.k1[0, :, :8] = x[:1, :8]
        blocks = self.k1[0].view(512, 8, H)
        blocks[: x.shape[0], 0] = x
        blocks[1].mul_(0.5)
        return self.layer(1, x + self.k1[0, :4].sum(0), r)


OPS = {Aten: [], Appends: ["case::append"], Attends: ["case::attention"], Lists: ["case::each", "case::maybe"]}


@every_setting
@pytest.mark.parametrize("model", list(OPS))
def test_no_cache_is_copied_whole(model: type[Layers], setting: dict[str, Any]) -> None:
    made = model()
    served = serve(made, _with_positions((2, 2, 2)), split_ops=OPS[model], **setting)
    assert max(served.off) < 1e-4, served.off
    compiled = torch.compile(made, backend=ringfence.Backend(split_ops=OPS[model], **setting))
    given = list(_with_positions((2, 2, 2)))
    with torch.no_grad():
        for arguments in given[:2]:
            compiled(*arguments)
    assert not whole_copies(compiled, given[2], 4096 * H)


def _with_positions(sizes: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    for i, (x, r) in enumerate(steps(sizes)):
        yield x, r, torch.arange(i, i + x.shape[0])


@every_setting
def test_a_cache_that_is_an_argument_is_not_copied_either(setting: dict[str, Any]) -> None:
    """Marked or not, and as another cache comes in turn."""
    caches = [torch.randn(4096, H) for _ in range(2)]
    model = _Argument()
    given = [(*s, torch.arange(3, 5), caches[i // 2 % 2]) for i, s in enumerate(steps((2,) * 6))]
    served = serve(model, given, split_ops=["case::append"], **setting)
    assert max(served.off) < 1e-4, served.off
    compiled = torch.compile(model, backend=ringfence.Backend(split_ops=["case::append"], **setting))
    with torch.no_grad():
        for arguments in given[:4]:
            compiled(*arguments)
    assert not whole_copies(compiled, given[4], 4096 * H)


class _Argument(Layers):
    def forward(self, x: Tensor, r: Tensor, pos: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        x, r = self.layer(0, x, r)
        torch.ops.case.append(cache, x, pos)
        return self.layer(1, x + cache[:2].mean(0), r)
