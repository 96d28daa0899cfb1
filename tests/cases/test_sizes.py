"""Sizes that are sums, or that another size replaces, cross from one piece into the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases.serve import SETTINGS, name_of, serve
from torch import Tensor, nn

from support import engine_library

H = 64
pytestmark = pytest.mark.usefixtures("fake_group")
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=name_of)


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    def attention(x: Tensor, out: Tensor) -> None:
        out.copy_(x * 3)

    with engine_library("sized", ("attention(Tensor x, Tensor(a!) out) -> ()", attention, lambda x, out: None)):
        yield


def site(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    dist.all_reduce(y)
    r = r + y
    return F.rms_norm(r, (H,), None, 1e-6), r


class PrefillAndDecode(nn.Module):
    """The rows of the layers are the sum of two sizes."""

    def forward(self, prefill: Tensor, decode: Tensor) -> Tensor:
        x = torch.cat([prefill, decode]) * 1.0
        r = x
        for _ in range(2):
            x, r = site(torch.sigmoid(x), r)
        return x


class CacheAndNew(nn.Module):
    """A mask one longer than the cache, in a later piece than the cache's own size."""

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        length = past.shape[0] + 1
        h, r = site(x, x)
        keys = torch.cat([past, h[-1:]])
        a = torch.softmax(h @ keys.t() - 0.01 * torch.arange(length), -1) @ keys
        h, _ = site(torch.sigmoid(a), r)
        return h


class Returned(nn.Module):
    """A sum of sizes leaves the graph, and a product is a shape."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        rows = x.shape[0] + y.shape[0]
        h, _ = site(x, x)
        both = torch.sigmoid(torch.cat([h, y])).view(rows * 2, H // 2)
        h, _ = site(both.view(rows, H), both.view(rows, H) * 2)
        return h, rows, both.sum(0)


@every_setting
@pytest.mark.parametrize(
    ("model", "unbacked"),  # a softmax over a length that is unbacked asks for its value
    [(PrefillAndDecode, False), (PrefillAndDecode, True), (CacheAndNew, False), (Returned, False), (Returned, True)],
)
def test_a_size_that_is_a_sum_crosses_pieces(
    model: Callable[[], nn.Module], unbacked: bool, setting: dict[str, Any]
) -> None:
    mark = torch._dynamo.decorators.mark_unbacked if unbacked else torch._dynamo.mark_dynamic
    given = [(torch.randn(p, H), torch.randn(q, H)) for p, q in ((4, 2), (3, 3), (4, 2), (2, 5))]
    for arguments in given:
        for tensor in arguments:
            mark(tensor, 0)
    options = {**setting, "capture_sizes": [6, 7]} if "capture_sizes" in setting else setting
    served = serve(model(), given, dynamic=None, split_ops=["aten::sigmoid"], **options)
    assert max(served.off) < 1e-4, served.off


def buffer_between(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """An empty buffer that an island fills: its size is that of the first input, and is traced as the second's."""
    a, b = site(x.clone(), r)
    out = torch.empty_like(a)
    torch.ops.sized.attention(a, out)
    return site(out, b)


def two_buffers(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    out, more = torch.empty_like(x), x.new_empty(r.shape[0] + x.shape[0], H)
    torch.ops.sized.attention(x, out)
    torch.ops.sized.attention(torch.cat([out, r]), more)
    return site(more[: x.shape[0]], r)


def size_of_the_other(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    out = r.new_empty(x.shape[0], H)
    torch.ops.sized.attention(r * x.shape[0], out)
    return site(out + x, r)


@every_setting
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [buffer_between, two_buffers, size_of_the_other])
def test_a_size_that_another_replaces(
    function: Callable[..., Any], dynamic: bool | None, setting: dict[str, Any]
) -> None:
    given = [(torch.randn(n, H), torch.randn(n, H)) for n in (2, 4, 2, 3, 4, 2, 5)]
    served = serve(function, given, dynamic=dynamic, split_ops=["sized::attention"], **setting)
    assert max(served.off) < 1e-4, served.off


def chosen(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.cond(x.sum() > 0, lambda x: torch.tanh(x @ w), lambda x: x @ w.t(), (x,))
    return site(y, x)


def repeated(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    _, y = torch.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, torch.tanh(y @ w)), (torch.tensor(0), x))
    return site(y, x)


@every_setting
@pytest.mark.parametrize("function", [chosen, repeated])
def test_a_branch_or_loop_is_given_a_size_that_is_a_number_by_now(
    function: Callable[..., Any], setting: dict[str, Any]
) -> None:
    """The width is a symbol until a weight says how wide: also inside of the branch."""
    w = nn.Parameter(torch.randn(H, H) / 8, requires_grad=False)
    given = [(sign * torch.rand(n, H), w) for n, sign in ((4, 1), (2, -1), (3, 1), (4, -1))]
    served = serve(function, given, **setting)
    assert max(served.off) < 1e-4, served.off
