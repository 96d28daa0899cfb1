"""Inputs off 16-byte alignment: code for a GPU that loads vectors copies them before a call, and what it wrote back.

No write is lost and no copy is stale, in replays too; and what was traced off alignment is not copied at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases.serve import attend, serve
from torch import Tensor

import ringfence
from support import engine_library

H, ROWS = 64, 512
CAPTURE: dict[str, Any] = {"capture_sizes": [2, 4], "graphs": "cuda", "on_capture_failure": "raise"}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device here"),
]
captured_or_not = pytest.mark.parametrize("setting", [{}, CAPTURE], ids=["uncaptured", "captured"])


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    op = ("attend(Tensor q, Tensor(a!) cache, Tensor(b!) out) -> ()", attend, lambda *_: None)
    with engine_library("unaligned", op):
        yield


def by_aten(x: Tensor, c: Tensor, weight: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Reads the old value, writes, and reads the new one."""
    old = c[:4].sum(0)
    c.index_copy_(0, position, x)
    y = (x + old) * weight
    c[8:16].mul_(0.5)
    return y + c[:16].sum(0), c[4:8].clone()


def by_op(x: Tensor, c: Tensor, weight: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """An op of an engine writes between two writes of ATen."""
    c[position] = x
    out = torch.empty_like(x)
    torch.ops.unaligned.attend(x, c, out)
    c[8:16].mul_(0.5)
    return out * weight + c[:16].sum(0), c[4:8] * 2


def lying(at: int, *shape: int) -> Tensor:
    """A tensor that begins so many elements behind the start of its memory, which is aligned."""
    size = torch.Size(shape).numel()
    return torch.randn(size + at, device="cuda")[at:].view(shape)


def given(sizes: tuple[int, ...], *kept: Tensor) -> Iterator[tuple[Any, ...]]:
    for n in sizes:
        yield lying(1, n, H), *kept, torch.randperm(16, device="cuda")[:n]


@captured_or_not
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("program", [by_aten, by_op])
def test_what_is_off_alignment_is_read_and_written(
    program: Callable[..., Any], at: int, setting: dict[str, Any]
) -> None:
    split_ops = ["unaligned::attend"] if setting and program is by_op else []
    cache, weight = lying(at, ROWS, H), lying(1, H)
    served = serve(program, given((4, 2, 4, 2, 4, 2), cache, weight), split_ops=split_ops, **setting)
    assert max(served.off) < 1e-4, served.off


@captured_or_not
def test_code_for_aligned_memory_is_given_other_memory(setting: dict[str, Any]) -> None:
    """Nothing guards where an input begins: the graph that was traced at 0 is called for 1 and 3 as well."""
    caches, weight = [lying(at, ROWS, H) for at in (0, 1, 3)], lying(0, H)
    steps = [each for i in (0, 1, 2, 1, 0, 2) for each in given((4, 2, 4), caches[i], weight)]
    served = serve(by_aten, steps, **setting)
    assert max(served.off) < 1e-4, served.off


def test_a_cache_that_was_traced_off_alignment_is_not_copied() -> None:
    compiled = torch.compile(by_aten, backend=ringfence.Backend(), dynamic=True)
    steps = list(given((4, 2, 4, 2), lying(1, ROWS, H), lying(1, H)))
    with torch.no_grad():
        for each in steps[:3]:
            compiled(*each)
        with torch.profiler.profile(record_shapes=True) as profile:
            compiled(*steps[3])
    seen = [(e.name, e.input_shapes) for e in profile.events() if e.name.startswith("aten::")]
    large = [name for name, shapes in seen if shapes and torch.Size(shapes[0] or [0]).numel() >= ROWS * H]
    assert seen and not {"aten::clone", "aten::copy_"} & set(large), large
    assert "aten::_foreach_copy_" not in dict(seen)
