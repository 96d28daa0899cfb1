"""A dispatch and its combine by FlashInfer's kernels: what they compute, what they launch, what the self-test finds."""

from __future__ import annotations

import functools
import sys
from typing import Any
from unittest import mock

import moe_ranks
import pytest
import torch
from moe_library import Launches, Library
from moe_on_threads import CPU, SIZES, on_ranks, served
from moe_on_threads import one_device as one_device
from torch import Tensor

import ringfence
from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import moe_checks
from ringfence.runtime.collectives.moe_one_sided import MoeSizes, OneSided
from ringfence.runtime.collectives.moe_ready import needed
from ringfence.runtime.collectives.moe_self_test import self_test
from ringfence.runtime.collectives.workspace import MoeWorkspace
from ringfence.runtime.hazards.situation import Collective, Situation

# -- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_routing_against_the_oracle(ranks: int) -> None:
    """Rows, empty slots and sums; 3 experts of a token, which no kernel was compiled for; ids of both widths."""

    def body(kernels: OneSided, channel: Channel) -> int:
        served(kernels)
        return moe_ranks.all_routings(
            channel.rank, ranks, None, in_order=ranks == 2
        )  # else in that of a token's experts

    library, counts = on_ranks(ranks, body)
    assert counts == [25] * ranks
    for calls in library.calls:
        assert len(calls) == 25 * 4 and all(call["k"] == 4 and call["pdl"] is False for call in calls)
        assert len({call["at"] for call in calls if "at" in call}) == 1, "no call moves the combine region (hazard M63)"
        assert [call["copied"] for call in calls if "at" in call] == [True, False] * 25, "the second was written there"


def test_payloads_are_opaque_bytes_in_any_order() -> None:
    def body(kernels: OneSided, channel: Channel) -> list[str]:
        served(kernels)
        return moe_ranks.bytes_arrive(channel.rank, 2, None)

    library, (first, second) = on_ranks(2, body, needed(200, 2, 64, 10))
    assert first == second and len(first) == 10
    for call in library.calls[0]:  # or a row of 16 bytes would lie at a multiple of 4 (hazard M67)
        steps = [min(width & -width, 16) for width in call.get("widths", [])]
        assert steps == sorted(steps, reverse=True)


def test_operands_that_a_kernel_cannot_read_are_copied() -> None:
    """Strides, addresses that are no multiple of 16 bytes, and a result into a slice of something larger."""

    def body(kernels: OneSided, channel: Channel) -> None:
        served(kernels)
        x, ids, weights = moe_ranks.batch(channel.rank, 2, 5, 2, 4, "uniform", torch.bfloat16, 3)
        want = moe_ranks.expected(channel.rank, 2, 4, x, ids, weights)
        wide, shifted = torch.zeros(5, 2 * moe_ranks.H, dtype=x.dtype), torch.zeros(5 * moe_ranks.H + 1, dtype=x.dtype)
        wide[:, ::2], shifted[1:] = x, x.flatten()
        out = torch.full((5, 2 * moe_ranks.H), float("nan"), dtype=x.dtype)
        for given in (wide[:, ::2], shifted[1:].view(5, moe_ranks.H)):
            sent = ringfence.moe.dispatch([given, weights], ids.t().contiguous().t(), capacity=7, num_experts=4)
            partial = moe_ranks.expert_rows(channel.rank, 2, 4, sent.payloads[0], sent.ids, sent.payloads[1])
            ringfence.moe.combine(partial.t().contiguous().t(), sent.route, out=out[:, 1 : moe_ranks.H + 1])
            assert torch.equal(out[:, 1 : moe_ranks.H + 1], want) and bool(out[:, 0].isnan().all())

    on_ranks(2, body)


def test_what_is_received_lies_where_a_compiler_takes_it_to_lie() -> None:
    """Rows of 4 bytes behind two of the same: at no multiple of 16 in the workspace."""

    def body(kernels: OneSided, channel: Channel) -> None:
        x, w, ids = torch.randn(1, 4), torch.rand(1, 1), torch.tensor([[channel.rank]], dtype=torch.int32)
        for given in ([x, w], [w, x]):
            rows, got, counts = kernels.dispatch(given, ids, 1, 2, -1)
            assert all(t.data_ptr() % 16 == 0 for t in (*rows, got)), "copied where it was not"
            for sent, arrived in zip(given, rows, strict=True):
                assert torch.equal(arrived[channel.rank], sent[0])
            assert got[channel.rank].tolist() == [channel.rank] and got[1 - channel.rank].tolist() == [-1]
            assert counts.tolist() == [int(channel.rank == 0), int(channel.rank == 1)]

    on_ranks(2, body, needed(4 * 4 + 4, 1, 4, 3))


def test_an_id_of_no_expert_writes_nothing_beyond_the_counters() -> None:
    """On a device nobody looks at ids before the call (hazard M65): such an id is asked of nobody who has it."""

    def body(kernels: OneSided, channel: Channel) -> list[list[int]]:
        ids = torch.tensor([[-1, 0], [4, 3], [2**31 - 1, -7]])
        rows, got, _ = kernels.dispatch([torch.ones(3, 4)], ids, 3, 4, -1)
        assert got.dtype == torch.int64 and rows[0].shape == (6, 4)
        return got[got.ne(-1).any(1)].tolist()

    _, (first, second) = on_ranks(2, body)
    assert sorted(first) == sorted(2 * [[-1, 0], [2**31 - 1, -7]])
    assert sorted(second) == sorted(2 * [[4, 3], [2**31 - 1, -7]])


# -- what is launched ---------------------------------------------------------------------------

PAIR = ["prepare_dispatch", "dispatch", "prepare_combine", "combine"]


def launched(ids: Tensor, *, empty_id: int | None, known: bool, there: bool) -> list[str]:
    """By one rank of two for a pair, the result of which is right."""

    def body(kernels: OneSided, channel: Channel) -> list[str]:
        served(kernels)
        x = torch.randn(4, moe_ranks.H, generator=torch.Generator().manual_seed(channel.rank))
        want = x * (ids // 2 == 0).any(1, keepdim=True) + x * (ids // 2 == 1).any(1, keepdim=True)
        with Launches() as seen:
            sent = ringfence.moe.dispatch([x], ids, capacity=5, num_experts=4, empty_id=empty_id, known_ids=known)
            partial = ringfence.moe.combine_buffer(sent, moe_ranks.H, x.dtype) if there else sent.payloads[0]
        if there:
            partial.copy_(sent.payloads[0])  # the experts
        with seen:
            result = ringfence.moe.combine(partial, sent.route)
        assert torch.equal(result, want)
        return seen.names

    functions = sys.modules[ringfence.moe.dispatch.__module__]
    no_tracer, no_look = {"is_traced": lambda _: False}, {"is_capturing": lambda _: True}  # at ids, as on a device
    with mock.patch.multiple(functions, **no_tracer), mock.patch.multiple(moe_checks, **no_look):
        library, (first, second) = on_ranks(2, body, needed(4 * moe_ranks.H, ids.shape[1], 4 * moe_ranks.H, 10))
    assert first == second
    assert all(call["copied"] is not there for calls in library.calls for call in calls if "copied" in call)
    return first


def test_a_pair_is_the_librarys_kernels_and_nothing_else_where_the_caller_knows() -> None:
    """Each further launch is one that was asked for."""
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1]], dtype=torch.int32)
    assert launched(ids, empty_id=None, known=True, there=True) == PAIR
    assert launched(ids, empty_id=None, known=True, there=False) == PAIR, "rows are copied in a launch that is made"
    assert launched(ids, empty_id=-1, known=True, there=True) == [*PAIR[:2], "sanitize", *PAIR[2:]]
    assert launched(ids, empty_id=None, known=False, there=True) == ["clamp", *PAIR]
    wide = launched(ids.long(), empty_id=None, known=True, there=True)
    assert wide == ["_to_copy", *PAIR[:2], "_to_copy", *PAIR[2:]]
    three = torch.cat((ids, ids[:, 1:]), 1)  # padded to four, for which kernels were compiled
    assert launched(three, empty_id=None, known=True, there=True) == ["cat", *PAIR]


# -- the self-test -----------------------------------------------------------------------------


def tried(kernels: OneSided, channel: Channel) -> str | None:
    workspace = MoeWorkspace(kernels, CPU, Situation(Collective.MOE_ALL_TO_ALL))
    result = self_test(workspace, channel, capture=True)
    assert result.captured is None
    return result.eager


@pytest.mark.parametrize("sizes", [SIZES, needed(1, 1, 2, 1), needed(300, 5, 64, 40)])
def test_kernels_that_are_right_pass_the_self_test(sizes: MoeSizes) -> None:
    assert on_ranks(3, tried, sizes)[1] == [None] * 3


BROKEN: dict[str, str] = {
    "moe_a2a_sanitize_expert_ids": "brought",
    "_store": "brought",
    "moe_a2a_combine": "combine of",
    "in place": "combine in place of",
}


@pytest.mark.parametrize("what", BROKEN)
def test_kernels_that_are_wrong_on_one_rank_are_found_on_all(what: str) -> None:
    function = "moe_a2a_combine" if what == "in place" else what
    real = getattr(type(Library(1).package(0).modules["flashinfer.comm.trtllm_moe_alltoall"]), function)

    @functools.wraps(real)  # the adapter looks at its parameters
    def broken(self: Any, *args: Any, **named: Any) -> Any:
        if function == "moe_a2a_combine":
            result = real(self, *args, **named)
            wrong = named["payload_in_workspace"] or what != "in place"
            if args[5] == 1 and wrong and result.numel():
                result[-1, 0] += 1
            return result
        if what == "_store":
            _, _, to, rank, _, slot, *_ = args
            if (to, rank, slot) == (1, 0, 1):  # a row that is lost
                return None
        elif args[3] == 1:  # empty slots keep what lay there
            return None
        return real(self, *args, **named)

    with mock.patch(f"moe_library.Api.{function}", broken):
        _, said = on_ranks(2, tried)
    assert said[0] == said[1] and BROKEN[what] in str(said[0]) and "rank 1" in str(said[0])
