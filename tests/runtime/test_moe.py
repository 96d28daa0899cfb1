"""MoE dispatch and combine: the ops, their reference, their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moe_ranks
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringfence
from ringfence.runtime.collectives import moe, moe_reference
from ringfence.runtime.errors import (
    CaptureError,
    CollectiveUnavailableError,
    GradModeError,
    GroupError,
    InputError,
)
from ringfence.runtime.replay.capture import SimulatedGraphs
from support import run_ranks, run_threaded, start_fake_group

E, C = 4, 6


@pytest.fixture(scope="module")
def gloo_ranks() -> list[dict[str, Any]]:
    return run_ranks(4, moe_ranks.over_gloo)


@pytest.mark.xdist_group("moe")
def test_every_routing_over_gloo(gloo_ranks: list[dict[str, Any]]) -> None:
    for found in gloo_ranks:
        assert found["two"] == found["four"] == 25, "each was compared with the oracle, bit by bit"


@pytest.mark.xdist_group("moe")
def test_payloads_are_opaque_bytes(gloo_ranks: list[dict[str, Any]]) -> None:
    for found in gloo_ranks:
        assert {"torch.float8_e4m3fn", "torch.float4_e2m1fn_x2", "torch.bfloat16"} <= set(found["dtypes"])
        assert len(found["dtypes"]) == 10


@pytest.mark.xdist_group("moe")
def test_experts_lie_in_blocks_the_first_larger(gloo_ranks: list[dict[str, Any]]) -> None:
    pairs, all_four = zip(*(found["local"] for found in gloo_ranks), strict=True)
    assert pairs[:2] == ([0, 1, 2, 3], [4, 5, 6])
    assert all_four == ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9])
    for experts, ranks in ((7, 2), (10, 4), (4, 4), (64, 3)):
        owner = moe_reference.owner_of(torch.arange(experts), experts, ranks).tolist()
        blocks = [range(*(moe_reference.first_expert(r + i, experts, ranks) for i in (0, 1))) for r in range(ranks)]
        assert owner == [r for r, block in enumerate(blocks) for _ in block]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_random_routings(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    sizes = tuple(data.draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)))
    experts = data.draw(st.integers(max(ranks, 2), 12))
    k = data.draw(st.integers(1, min(experts, 5)))
    routing = data.draw(st.sampled_from(list(moe_ranks.ROUTINGS)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed, slack = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, 3))
    empty_id = data.draw(st.sampled_from([-1, experts, 2**31 - 1]))

    def body(rank: int) -> None:
        with torch.no_grad():
            moe_ranks.check_one(
                rank, ranks, None, sizes, k, experts, routing, dtype, seed, slack=slack, empty_id=empty_id
            )

    run_threaded(ranks, body)


def test_an_id_of_no_expert_goes_nowhere_where_nobody_can_look() -> None:
    """On a device the values cannot be read without a wait; a row that overwrites another's is worse than one less."""
    ids = torch.tensor([[0, -1], [E, 3], [-5, 10**6]])
    route = moe_reference.route_of(ids, E, 2)
    assert route.tolist() == [[0, -1], [-1, 0], [-1, -1]]


def test_the_sum_is_rounded_once() -> None:
    """Three parts of which two, rounded after each add, are lost."""
    parts = (256.0, 1.0, 1.0)

    def body(rank: int) -> Tensor:
        sent = ringfence.moe.dispatch(
            [torch.ones(1, 8, dtype=torch.bfloat16)], torch.tensor([[0, 1, 2]]), capacity=1, num_experts=3
        )
        return ringfence.moe.combine(torch.full((3, 8), parts[rank], dtype=torch.bfloat16), sent.route)

    for result in run_threaded(3, body):
        assert (result == 258.0).all(), "256 + 1 is 256 in bfloat16"


# -- as ops

#: Of an op whose result is memory to be written: all but what compares values.
OF_UNDEFINED = ("test_schema", "test_faketensor")


@pytest.mark.usefixtures("fake_group")
def test_the_ops_pass_torchs_own_checks() -> None:
    x, ids = torch.randn(5, 8).bfloat16(), torch.randint(0, E, (5, 2))
    for indices in (ids, ids.int()):
        torch.library.opcheck(moe.moe_dispatch, ([x, x.float()], indices, C, E, -1, "world", "reference"))
    torch.library.opcheck(moe.moe_dispatch, ([x], ids, C, E, None, "world", "reference" + moe.KNOWN_IDS))
    route = moe_reference.route_of(ids, E, 2)
    buffer = (route, 2 * C, 8, torch.bfloat16, "world", "reference")
    torch.library.opcheck(moe.moe_combine_buffer, buffer, test_utils=OF_UNDEFINED)
    partial = torch.randn(2 * C, 8).bfloat16()
    torch.library.opcheck(moe.moe_combine, (partial, route, "world", "reference"))
    torch.library.opcheck(moe.moe_combine_into, (torch.empty_like(x), partial, route, "world", "reference"))


@pytest.mark.parametrize("ranks", [3, 4, 6, 8])
def test_counts_lie_where_the_kernels_keep_them_and_fakes_say_so(ranks: int) -> None:
    """A compiler takes an op's results to begin at a multiple of 16 bytes, unless they are seen not to."""
    start_fake_group(ranks)
    try:
        x, ids = torch.randn(3, 8), torch.randint(0, 2 * ranks, (3, 2))
        given_ = ([x], ids, C, 2 * ranks, -1, "world", "reference")
        torch.library.opcheck(moe.moe_dispatch, given_, test_utils="test_faketensor")
        counts = moe.moe_dispatch(*given_)[3]
        assert counts.shape == (ranks,) and counts.storage_offset() * 4 == (8 + 4 * ranks) % 16
    finally:
        dist.destroy_process_group()


def _layer(x: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
    sent = ringfence.moe.dispatch([x, weights], ids, capacity=capacity, num_experts=E)
    rows, w = sent.payloads
    mine = sent.ids >= 0
    partial = (rows[:, None] * torch.where(mine, w, 0.0)[..., None]).sum(1)
    return ringfence.moe.combine(partial, sent.route).sin()


def _layer_into(x: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=capacity, num_experts=E)
    out = torch.zeros_like(x)
    ringfence.moe.combine(sent.payloads[0] * 2, sent.route, out=out)
    return out + 1


def _layer_into_buffer(x: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=capacity, num_experts=E, empty_id=None, known_ids=True)
    buffer = ringfence.moe.combine_buffer(sent, 16, x.dtype)
    torch.mul(sent.payloads[0], sent.counts, out=buffer)  # of the one rank
    return ringfence.moe.combine(buffer, sent.route)


@pytest.mark.parametrize("layer", [_layer, _layer_into, _layer_into_buffer])
def test_traced_by_anybody(layer: Callable[..., Tensor]) -> None:
    """Dynamo sees one op for each half, with the capacity as a number that may change."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.no_grad():
            traced = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
            for tokens, capacity in ((5, 6), (7, 9)):
                ids, weights = torch.randint(0, E, (tokens, 2)), torch.rand(tokens, 2)
                x = torch.randn(tokens, 16)
                assert torch.equal(traced(x, ids, weights, capacity), layer(x, ids, weights, capacity))
    finally:
        dist.destroy_process_group()


# -- what is refused


def a_dispatch(**changed: Any) -> tuple[Any, ...]:
    given = {"payloads": [torch.randn(3, 8)], "topk_ids": torch.zeros(3, 2, dtype=torch.int64), "capacity": C,
             "num_experts": E, "empty_id": -1} | changed  # fmt: skip
    return given.pop("payloads"), given.pop("topk_ids"), given


BAD_DISPATCHES: list[tuple[dict[str, Any], str]] = [
    ({"payloads": []}, "list of payloads"),
    ({"payloads": [torch.randn(3, 8)] * 6}, "1 to 5 payloads"),
    ({"payloads": [1.0]}, "tensors"),
    ({"payloads": [torch.randn(2, 8)]}, r"payload 0 must be \[3, width\], as topk_ids is \[3, 2\], but it is \[2, 8\]"),
    ({"payloads": [torch.randn(3, 8), torch.randn(3)]}, r"payload 1 must be \[3, width\], .* but it is \[3\]"),
    ({"payloads": [torch.randn(3, 0)]}, r"payload 0 must be .* but it is \[3, 0\]"),
    ({"payloads": [torch.randn(3, 8, device="meta")]}, "payload 0 must be on cpu, as topk_ids is, but it is on meta"),
    ({"topk_ids": torch.zeros(3, 2)}, "topk_ids must be .* of torch.int32 or torch.int64, but it is torch.float32"),
    (
        {"topk_ids": torch.zeros(3, dtype=torch.int64)},
        r"topk_ids must be \[tokens, top_k\] of .* but it is torch\.int64 \[3\]",
    ),
    ({"topk_ids": torch.zeros(3, 0, dtype=torch.int64)}, r"\[3, 0\]"),
    ({"topk_ids": torch.zeros(3, 5, dtype=torch.int64)}, "top_k must be at most 4, the number of experts, but it is 5"),
    ({"topk_ids": torch.full((3, 2), E)}, "topk_ids must be numbers of experts, 0 to 3, but it holds 4"),
    ({"topk_ids": torch.full((3, 2), -1)}, "topk_ids must be .* but it holds -1"),
    ({"num_experts": 1}, "num_experts must be at least 2, one for each rank, but it is 1"),
    ({"capacity": 0}, "capacity must be at least 1, .* but it is 0"),
    ({"capacity": 2}, "capacity must be the largest number .* but it is 2 and this rank has 3"),
    ({"empty_id": 2**31}, "empty_id must be within int32, but it is 2147483648"),
]


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(("changed", "message"), BAD_DISPATCHES)
def test_a_dispatch_that_would_overwrite_others_rows_is_an_error(changed: dict[str, Any], message: str) -> None:
    payloads, ids, others = a_dispatch(**changed)
    with pytest.raises(InputError, match=message):
        ringfence.moe.dispatch(payloads, ids, **others)
    payloads, ids, others = a_dispatch()
    ringfence.moe.dispatch(payloads, ids, **others)  # the rest of it was right


@pytest.mark.usefixtures("fake_group")
def test_a_combine_that_answers_another_dispatch_is_an_error() -> None:
    route = torch.zeros(3, 2, dtype=torch.int32)
    partial = torch.randn(2 * C, 8)
    cases: list[tuple[Tensor, Tensor, Tensor | None, str]] = [
        (partial, route.long(), None, "route must be the one that .* but it is torch.int64"),
        (partial, route[:, :1], None, r"route must be .* torch\.int32 \[tokens, 2\], but it is torch\.int32 \[3, 1\]"),
        (partial.double(), route, None, "partial must be of torch.float16, .* but it is torch.float64"),
        (partial[:5], route, None, r"partial must be \[2 \* capacity, hidden\], .* but it is \[5, 8\]"),
        (partial[:4], route, None, "route must be of the dispatch that partial answers, .* but it is of 3 tokens"),
        (partial.to("meta"), route, None, "partial must be on cpu, as route is, but it is on meta"),
        (
            partial,
            route,
            torch.empty(2, 8),
            r"out must be torch\.float32 \[3, 8\] on cpu, but it is torch\.float32 \[2, 8\]",
        ),
        (partial, route, torch.empty(3, 8).half(), "out must be torch.float32 .* but it is torch.float16"),
    ]
    for given_partial, given_route, out, message in cases:
        with pytest.raises(InputError, match=message):
            ringfence.moe.combine(given_partial, given_route, out=out)
    ringfence.moe.combine(partial, route)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 0}, r"a buffer must be \[2 \* capacity, hidden\], .* but it is \[12, 0\]"),
        ({"dtype": torch.float64}, "partial must be of .* but it is torch.float64"),
        ({"route": torch.zeros(3, 2)}, "route must be .* but it is torch.float32"),
        ({"route": torch.zeros(7, 2, dtype=torch.int32)}, r"but it is \[12, 8\] for 7 tokens"),
        ({"ids": torch.zeros(5, 2)}, r"but it is \[5, 8\] for 3 tokens"),
    ],
)
def test_a_buffer_for_another_dispatch_is_an_error(changed: dict[str, Any], message: str) -> None:
    payloads, ids, others = a_dispatch()
    sent, about = ringfence.moe.dispatch(payloads, ids, **others), {"hidden": 8, "dtype": torch.float32}
    fields = {name: value for name, value in changed.items() if name not in about}
    with pytest.raises(InputError, match=message):
        ringfence.moe.combine_buffer(
            sent._replace(**fields), **(about | {n: changed[n] for n in about if n in changed})
        )


@pytest.mark.usefixtures("fake_group")
def test_other_errors_are_typed() -> None:
    payloads, ids, others = a_dispatch()
    with pytest.raises(GroupError, match="ep:7"):
        ringfence.moe.dispatch(payloads, ids, **others, group="ep:7")
    with pytest.raises(GroupError, match="no process group"):
        ringfence.moe.dispatch(payloads, ids, **others, group=3)  # type: ignore[arg-type]
    with pytest.raises(CollectiveUnavailableError, match="'mnnvl' cannot carry out a MoE dispatch"):
        moe.moe_dispatch(payloads, ids, C, E, -1, "world", "mnnvl")
    with pytest.raises(GradModeError, match="no backward"):
        ringfence.moe.dispatch([payloads[0].requires_grad_()], ids, **others)
    with pytest.raises(InputError, match=r"num_experts must be at least 2, .* but it is 1"):
        ringfence.moe.local_experts(1)


def test_a_capture_that_somebody_else_makes_is_refused_over_gloo() -> None:
    """Nobody would run the host's collective again in a replay."""
    start_fake_group(2)
    try:
        payloads, ids, others = a_dispatch()
        for call in (
            lambda x: ringfence.moe.dispatch([x], ids, **others).payloads,
            lambda x: (ringfence.moe.combine(x.repeat(4, 1), torch.zeros(3, 2, dtype=torch.int32)),),
        ):
            with pytest.raises(CaptureError, match="run on the host over fake"):
                SimulatedGraphs().capture(call, (payloads[0],))
    finally:
        dist.destroy_process_group()
