"""How engines keep their state: caches in another dtype, shared by two graphs, shifted, rotated in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases.serve import SETTINGS, difference, name_of, serve
from torch import Tensor

import ringfence

H, ROWS = 32, 8
pytestmark = pytest.mark.usefixtures("fake_group")
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=name_of)


def site(x: Tensor, r: Tensor) -> Tensor:
    y = x * 1
    dist.all_reduce(y)
    return F.rms_norm(r + y, (H,), None, 1e-6)


def float8_cache(x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Written as bytes, because no kernel puts float8 by an index."""
    cache.view(torch.uint8)[slots[: x.shape[0]]] = (x * 4).to(torch.float8_e4m3fn).view(torch.uint8)
    keys = cache.to(x.dtype) / 4
    return site(torch.softmax(x @ keys.t() / 6, -1) @ keys, x)


def shifted(x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """The state of a convolution, by roll: the last column is the newest."""
    state.copy_(torch.roll(state, -1, -1))
    state[: x.shape[0], :, -1] = x
    return site(state.sum(-1)[: x.shape[0]], x)


def rotated(x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Both halves of each head in place, from each other's old value; then as complex numbers."""
    q, k = torch.cat([x, x * 2], -1).split(H, -1)
    for part in (q, k):
        one, two = part.view(-1, 2, H // 2).unbind(1)
        old = one.clone()
        one.mul_(0.8).sub_(two * 0.6)
        two.mul_(0.8).add_(old * 0.6)
    cache[slots[: x.shape[0]]] = k
    pairs = torch.view_as_complex(cache.view(ROWS, H // 2, 2))
    pairs.mul_(torch.polar(torch.ones(()), torch.tensor(0.5)))
    return site(torch.softmax(q @ cache.t() / 6, -1) @ cache, x)


def heavy_hitters(x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Rows are kept by a score that depends on the data, and the others are overwritten."""
    scores = torch.softmax(x @ cache.t(), -1)
    keep = scores.sum(0).topk(6).indices.sort().values
    cache[:6] = cache[keep]
    cache[6:] = x[:2]
    return site(scores @ cache, x)


PROGRAMS: dict[Callable[..., Tensor], Callable[[], Tensor]] = {
    float8_cache: lambda: torch.randn(ROWS, H).to(torch.float8_e4m3fn),
    shifted: lambda: torch.randn(ROWS, H, 4),
    rotated: lambda: torch.randn(ROWS, H),
    heavy_hitters: lambda: torch.randn(ROWS, H),
}


def given(cache: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for n in (4, 2, 4, 3):
        yield torch.randn(n, H), cache, torch.randperm(ROWS)


@every_setting
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda each: each.__name__)
def test_state_of_engines(program: Callable[..., Any], setting: dict[str, Any]) -> None:
    served = serve(program, given(PROGRAMS[program]()), **setting)
    assert max(served.off) < 1e-4, served.off


def prefill(x: Tensor, cache: Tensor) -> Tensor:
    cache[: x.shape[0]] = x
    return site(x, x)


def decode(x: Tensor, cache: Tensor) -> Tensor:
    old = cache[1].clone()
    cache.copy_(torch.roll(cache, -1, 0))
    cache[-1] = x[0]
    return site(x + cache.mean(0) + old, x)


@every_setting
def test_two_graphs_share_a_cache(setting: dict[str, Any]) -> None:
    """One backend compiles both; each sees what the other left."""
    torch._dynamo.reset()
    backend = ringfence.Backend(**setting)
    compiled = {f: torch.compile(f, backend=backend, fullgraph=True, dynamic=True) for f in (prefill, decode)}
    ours = torch.randn(ROWS, H)
    theirs = ours.clone()
    with torch.no_grad():
        for f, n in ((prefill, 4), (decode, 2), (decode, 2), (prefill, 2), (decode, 4), (decode, 2), (prefill, 4)):
            x = torch.randn(n, H)
            seen, right = compiled[f](x, ours), f(x, theirs)
            assert difference([seen, ours], [right, theirs]) < 1e-5
