"""Outputs that share memory share it when the caller has them, however the call was served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ringfence

Model = Callable[..., tuple[Tensor, ...]]


def whole_and_slice(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(x)
    return v, v[:], v[1:]


def views_alone(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(x)
    return v[0], v.view(-1), v.t()


def same_tensor(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(x)
    return v.contiguous(), v, v.to(v.dtype)


def parts_and_whole(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(x)
    a, b = v.chunk(2, -1)
    return a, b, v, a.unsqueeze(0)


def starts_at_a_size(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(x)
    return v[x.shape[0] // 2 :], v


def copied_into_a_cache(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(cache) + x[0]
    cache.copy_(v)
    return v, v[:2], x * 2


def two_values(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    a, b = torch.empty_like(x), torch.sin(x)
    a.copy_(b)  # another tensor with the same numbers
    return a, b, a[:], b[:]


def of_an_island(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.tanh(x)
    return v, torch.sin(v), v[:], v.view(-1)


def taken_after_an_island(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    v = torch.sin(x)
    w = torch.tanh(v)
    return v[:1] * 2, w, v[1:], v


MODELS = [
    whole_and_slice,
    views_alone,
    same_tensor,
    parts_and_whole,
    starts_at_a_size,
    copied_into_a_cache,
    two_values,
    of_an_island,
    taken_after_an_island,
]


def changes(call: Model, cache: Tensor, rows: int, calls: int) -> Iterator[list[Tensor]]:
    """What a call's outputs are after the caller wrote into one of them; each of them in turn."""
    for step in range(calls):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(step)) + 3
        outputs = call(x, cache)
        outputs[step % len(outputs)].fill_(step + 7.0)
        yield [o.clone() for o in outputs]


def check(model: Model, **options: Any) -> ringfence.Backend:
    start = torch.randn(4, 8)
    ours, theirs = start.clone(), start.clone()
    torch._dynamo.mark_static_address(ours)
    islands = ["aten::tanh"] if "island" in model.__name__ else []
    backend = ringfence.Backend(graphs="simulated", on_capture_failure="raise", split_ops=islands, **options)
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (6, 4, 6):  # 4 is padded, or runs uncaptured
            for got, right in zip(changes(compiled, ours, rows, 5), changes(model, theirs, rows, 5), strict=True):
                torch.testing.assert_close(got, right)
                torch.testing.assert_close(ours, theirs)
    return backend


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("pads", [False, True], ids=["exact", "padded"])
def test_outputs_share_what_they_share_in_eager(model: Model, pads: bool) -> None:
    backend = check(model, capture_sizes=[6], pad_to_capture_size=pads, piece_compiler="eager")
    (report,) = backend.reports
    assert report.graphs == "simulated"


@pytest.mark.parametrize("model", [whole_and_slice, two_values, taken_after_an_island], ids=lambda m: m.__name__)
def test_outputs_of_inductor_share_what_they_share_in_eager(model: Model) -> None:
    check(model, capture_sizes=[6])
