"""Scaled, doubled and biased sums: what becomes of their terms, and that ranks get what eager gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringfence import Backend
from ringfence.compile_passes import Reason, Rounding, Site, find, fuse
from ringfence.compile_passes.verify import verify
from ringfence.runtime.collectives import ops
from support import aot_graph, run_ranks

H = 32
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((4, H), (4, H), (4, H), (H,), (H,))

#: ``(x, y, r, b, w)``: two partial values, a residual, a bias, a weight.
Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def ar(x: Tensor) -> Tensor:
    x = x * 1.0
    dist.all_reduce(x)
    return x


def norm(h: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(h, (h.shape[-1],), w, 1e-6)


def of(total: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Program:
    """The norm of a sum, and the sum."""

    def run(x: Tensor, y: Tensor, r: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = total(x, y, r, b)
        return norm(h, w), h

    return run


MERGED, SCALED, RESIDUALS, BIAS = Rounding.MERGED, Rounding.SCALED, Rounding.RESIDUALS, Rounding.BIAS

#: The program, how many all-reduces it has, and the roundings of its one fused op.
FUSED: dict[str, tuple[Program, int, set[Rounding]]] = {
    "left to right": (of(lambda x, y, r, b: r + ar(x) + ar(y)), 2, {MERGED}),
    "sum first": (of(lambda x, y, r, b: r + (ar(x) + ar(y))), 2, {MERGED}),
    "residual last": (of(lambda x, y, r, b: (ar(x) + ar(y)) + r), 2, {MERGED}),
    "three": (of(lambda x, y, r, b: (ar(x) + r) + (ar(y) + ar(x.sin()))), 3, {MERGED}),
    "no residual": (of(lambda x, y, r, b: ar(x) + ar(y)), 2, {MERGED}),
    "difference": (of(lambda x, y, r, b: r + (ar(x) - ar(y))), 2, {MERGED}),
    "scaled branch": (of(lambda x, y, r, b: r + (ar(x) + 0.3 * ar(y))), 2, {MERGED, SCALED}),
    "shared experts": (of(lambda x, y, r, b: (ar(x) + y.sin()) + r), 1, {RESIDUALS}),
    "shared and routed": (of(lambda x, y, r, b: r + (ar(x) + r.sin() + ar(y))), 2, {MERGED, RESIDUALS}),
    "granite": (of(lambda x, y, r, b: r + ar(x) * 0.22), 1, {SCALED}),
    "divided": (of(lambda x, y, r, b: r + ar(x) / 7), 1, {SCALED}),
    "alpha": (of(lambda x, y, r, b: torch.add(r, ar(x), alpha=0.22)), 1, {SCALED}),
    "alpha of the residual": (of(lambda x, y, r, b: torch.add(ar(x), r, alpha=0.22)), 1, {SCALED}),
    "scaled without residual": (of(lambda x, y, r, b: ar(x) * H**0.5), 1, {SCALED}),
    "scaled by a constant": (of(lambda x, y, r, b: ar(x) * torch.tensor(H**0.5, dtype=x.dtype)), 1, {SCALED}),
    "scaled sum": (of(lambda x, y, r, b: (ar(x) + r) * 0.7), 1, {SCALED}),
    "scaled through views": (of(lambda x, y, r, b: (ar(x).view(2, 2, H) * 0.22).view(4, H) + r), 1, {SCALED}),
    "bias": (of(lambda x, y, r, b: r + (ar(x) + b)), 1, {BIAS}),
    "bias of two": (of(lambda x, y, r, b: r + (ar(x) + b + ar(y))), 2, {MERGED, BIAS}),
    "scaled with bias": (of(lambda x, y, r, b: r + (ar(x) + b) * 0.22), 1, {SCALED, BIAS}),
}

#: What is exact is no rounding, and fused under strict too.
EXACT: dict[str, tuple[Program, int]] = {
    "halved": (of(lambda x, y, r, b: r + ar(x) * 0.5), 1),
    "doubled by alpha": (of(lambda x, y, r, b: torch.add(ar(x), r, alpha=2)), 1),
    "subtracted": (of(lambda x, y, r, b: r - ar(x)), 1),
    "subtracted from": (of(lambda x, y, r, b: ar(x) - r), 1),
    "negated": (of(lambda x, y, r, b: -ar(x) + r), 1),
    "by one": (of(lambda x, y, r, b: 1.0 * ar(x) + r), 1),
    "bias alone": (of(lambda x, y, r, b: ar(x) + b), 1),
    "row of the residual": (of(lambda x, y, r, b: ar(x) + r[:1]), 1),
    "column": (of(lambda x, y, r, b: ar(x) + r[:, :1]), 1),
    "flat": (of(lambda x, y, r, b: ar(x.view(-1)).view(4, H) + r), 1),
}


def inputs(dtype: torch.dtype, rank: int = 0) -> list[Tensor]:
    """The partial values are each rank's own, everything else is equal on all ranks."""
    mine, same = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(77)
    drawn = [torch.randn(s, generator=mine if i < 2 else same).to(dtype) for i, s in enumerate(SHAPES)]
    return [drawn[0], torch.randn(SHAPES[1], generator=mine).to(dtype), *drawn[2:]]


def sites_of(program: Program, dtype: torch.dtype = BF16, **options: object) -> list[Site]:
    gm = aot_graph(program, *inputs(dtype))
    return fuse(gm, verify(find(gm, **options), torch.device("cpu")))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.usefixtures("fake_group")
def test_sum_is_fused_with_its_rounding_and_not_under_strict(case: str) -> None:
    program, count, roundings = FUSED[case]
    gm = aot_graph(program, *inputs(BF16))
    strict = [c.site for c in find(gm, strict=True)]
    # The last of two sums is fused where what is added to it is the very value that the source adds.
    assert sum(s.fused for s in strict) == (case in ("left to right", "no residual"))
    reasons = {s.decline.reason for s in strict if s.decline is not None}
    assert reasons == {Reason.BIAS if case == "bias" else Reason.ROUNDING_DIFFERS}
    assert all("strict" in s.message for s in strict if not s.fused)

    candidates = find(gm)
    assert all(c.match for c in verify(candidates, torch.device("cpu"))), "verify sees another answer"
    sites = fuse(gm, candidates)
    assert [s.fused for s in sites] == [True] * count, [s.message for s in sites]
    assert [s.merged_into for s in sites] == [None] + [0] * (count - 1)
    assert all(set(s.roundings) & {MERGED, SCALED, RESIDUALS, BIAS} == roundings for s in sites)
    targets = [n.target for n in gm.graph.nodes]
    assert sum(t in (ops.all_reduce_add_rms_norm, ops.all_reduce_rms_norm) for t in targets) == 1
    assert not [t for t in targets if "c10d" in str(t)]


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.usefixtures("fake_group")
def test_exact_sum_is_fused_under_strict(case: str) -> None:
    (site,) = sites_of(EXACT[case][0], F32, strict=True)
    assert site.fused and not site.roundings, site.message
    assert site.hidden_size == H


@pytest.mark.usefixtures("fake_group")
def test_float16_is_scaled_down_only() -> None:
    (site,) = sites_of(of(lambda x, y, r, b: ar(x) * 12.0 + r), F16)
    assert site.decline is not None and site.decline.reason is Reason.SCALE_RANGE and "overflow" in site.message
    (site,) = sites_of(of(lambda x, y, r, b: ar(x) * 0.5 + r), F16)
    assert site.fused and Rounding.SCALED in site.roundings  # its subnormals are near
    (site,) = sites_of(of(lambda x, y, r, b: ar(x) * float("inf") + r), BF16)
    assert site.decline is not None and site.decline.reason is Reason.SCALE_RANGE


@pytest.mark.usefixtures("fake_group")
def test_sums_of_two_groups_are_not_merged() -> None:
    other = dist.new_group([0, 1])

    def elsewhere(x: Tensor) -> Tensor:
        x = x * 1.0
        dist.all_reduce(x, group=other)
        return x

    program = of(lambda x, y, r, b: r + ar(x) + elsewhere(y))
    first, second = sites_of(program)
    assert second.fused and second.merged_into is None and MERGED not in second.roundings
    assert first.decline is not None and first.decline.reason is Reason.CLAIMED
    program = of(lambda x, y, r, b: r + ar(x) + elsewhere(y) + ar(x.sin()))
    sites = sites_of(program)
    assert [(s.fused, s.merged_into) for s in sites] == [(True, None), (False, None), (True, 0)]


@pytest.mark.usefixtures("fake_group")
def test_a_sum_that_is_read_elsewhere_is_not_merged() -> None:
    def program(x: Tensor, y: Tensor, r: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a = ar(x)
        h = r + (a + ar(y))
        return norm(h, w), h, a.exp()

    first, second = sites_of(program)
    assert first.decline is not None and first.decline.reason is Reason.VALUE_USED_ELSEWHERE
    assert second.fused and MERGED not in second.roundings


def _on_ranks(rank: int) -> dict[str, tuple[float, float, int]]:
    """By program: the largest difference from eager, and from float64, relative to the row; how many were fused."""
    torch.set_num_threads(1)
    found = {}
    for name, (program, *_) in (FUSED | EXACT).items():
        torch._dynamo.reset()
        backend = Backend(piece_compiler="eager")
        args = inputs(F32, rank)
        with torch.no_grad():
            ours = torch.compile(program, backend=backend, fullgraph=True)(*args)
            eager = program(*args)
            wide = program(*(a.double() for a in args))
        found[name] = (_distance(ours, eager), _distance(ours, wide), len(backend.reports[0].fused))
    return found


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(
        float(((a.double() - b.double()).abs() / b.double().abs().amax(-1, keepdim=True)).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def test_ranks_get_what_eager_gets() -> None:
    for found in run_ranks(2, _on_ranks):
        for name, (from_eager, from_float64, fused) in found.items():
            assert from_eager <= 2e-6 and from_float64 <= 2e-6, (name, from_eager, from_float64)
            assert fused == (FUSED | EXACT)[name][1], name


def _scaled_by_rank(rank: int) -> str:
    torch.set_num_threads(1)
    factor = 0.5 if rank == 0 else 1.5
    program = of(lambda x, y, r, b: r + ar(x) * factor)
    try:
        torch.compile(program, backend=Backend(piece_compiler="eager"), fullgraph=True)(*inputs(F32, rank))
    except Exception as error:
        return str(error)
    return "no error"


def test_factor_that_differs_between_ranks_is_refused() -> None:
    """In front of the sum, each rank's factor would scale that rank's part of it."""
    with_factors = run_ranks(2, _scaled_by_rank)
    assert all("scaled by (0.5,)" in text and "scaled by (1.5,)" in text for text in with_factors), with_factors


@pytest.mark.usefixtures("fake_group")
def test_factors_are_those_of_the_path() -> None:
    program = of(lambda x, y, r, b: (r - (ar(x) / 4 + b)) * 0.5 + torch.add(r, -ar(y), alpha=3))
    (first, _) = find(aot_graph(program, *inputs(F32)))
    assert first.match is not None and first.match.terms.factors == (-0.125, -3.0)
