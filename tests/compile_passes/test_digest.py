"""What ranks compare: it tells plans apart, and not ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ringfence
from ringfence.runtime.hazards.situation import Collective, Situation
from ringfence.runtime.watch.agree import PlanDigest, first_difference
from ringfence.runtime.watch.supervision import Supervision


def model(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    return F.rms_norm(y + residual, (16,), weight)


def other_model(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    y = y + residual
    dist.all_reduce(y)
    return F.rms_norm(y, (16,), weight)


def digest_of(
    fn: Any = model,
    dtype: torch.dtype = torch.float32,
    *,
    judged: Situation | None = None,
    dynamic: bool = False,
    **options: Any,
) -> PlanDigest:
    digests: list[PlanDigest] = []

    def supervise(_: Any, digest: PlanDigest) -> Supervision:
        digests.append(digest)
        return Supervision()

    torch._dynamo.reset()
    backend = ringfence.Backend(planned=judged, piece_compiler="eager", **options)
    backend.supervisor.supervise = supervise  # type: ignore[method-assign]
    inputs = [torch.randn(s, dtype=dtype) for s in ((4, 16), (4, 16), (16,))]
    for tensor in inputs[: 2 + (fn is own_size)] if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    return digests[-1]


@pytest.mark.usefixtures("fake_group")
def test_compiling_twice_gives_the_same() -> None:
    assert digest_of(capture_sizes=[4]) == digest_of(capture_sizes=[4])
    assert digest_of().short == digest_of().short


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"capture_sizes": [4]}, "option capture_sizes differs"),
        ({"split_ops": ["aten::mul"]}, "option split_ops differs"),
        ({"fn": other_model}, "call 1 differs"),
        ({"dtype": torch.bfloat16}, "call 0 differs"),
    ],
)
def test_a_difference_that_matters_is_found(changed: dict[str, Any], first: str) -> None:
    a, b = digest_of(), digest_of(**changed)
    assert a.short != b.short
    assert first_difference([a.parts, b.parts]).startswith(first)


@pytest.mark.usefixtures("fake_group")
def test_what_is_a_ranks_own_business_is_left_out() -> None:
    own = {"on_report": print, "on_hang": "report", "step_seconds": 5, "journal_dir": "here", "agree_seconds": 1.0}
    assert digest_of() == digest_of(**own)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert digest_of() == digest_of()
    finally:
        torch.set_num_threads(before)
    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name
    assert all(f"'{name}'" not in text for _, text in digest_of().parts)


def with_bias(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y = x * 2 + residual.sin()
    dist.all_reduce(y)
    return F.rms_norm(y.relu() + residual, (16,), weight)


@pytest.mark.usefixtures("fake_group")
def test_local_work_is_left_out_and_so_is_what_follows_a_sum_of_torchs() -> None:
    a, b = digest_of(), digest_of(with_bias)
    assert a.parts == b.parts and a.sources != b.sources


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("collective", [None, Collective.MNNVL])
def test_sizes_are_named_where_collectives_are_captured(collective: Collective | None) -> None:
    judged = Situation(collective, "0.7.0") if collective is not None else None
    a, b = (
        digest_of(fn, judged=judged, dynamic=True, capture_sizes=[4], graphs="simulated") for fn in (model, own_size)
    )
    assert a.lockstep is b.lockstep is (collective is not None)
    if collective is None:
        assert a.parts == b.parts
    else:
        said = first_difference([a.parts, b.parts])
        assert re.fullmatch(r"sizes that a capture is for differs: rank 0: .*x.*; rank 1: .*x.*weight.*", said), said


def own_size(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return model(x, residual, torch.ones(16)), weight * 2
