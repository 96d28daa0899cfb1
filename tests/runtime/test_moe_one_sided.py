"""FlashInfer's kernels for dispatch and combine: their memory, which calls they serve, and what a hang shows.

The library is :mod:`moe_library`, which does on the CPU what the kernels do with pointers; ranks are threads.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from moe_library import Library, host_bytes, offsets, up
from moe_on_threads import SIZES, made, on_ranks, served
from moe_on_threads import one_device as one_device
from torch import Tensor

import ringfence
from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import flashinfer, moe_one_sided
from ringfence.runtime.collectives.moe_dump import describe_moe
from ringfence.runtime.collectives.moe_one_sided import MoeMemory, OneSided, compiled_top_k, unserved, within
from ringfence.runtime.collectives.moe_ready import needed
from ringfence.runtime.collectives.probe import GroupProbe
from ringfence.runtime.collectives.workspace import MoeWorkspace, workspaces_of
from ringfence.runtime.errors import InputError, WorkspaceError
from ringfence.runtime.hazards.situation import Collective, Situation
from support import HostDevice, run_threaded

# -- what a workspace is --------------------------------------------------------------------


def test_memory_is_unicast_at_one_stride_and_the_combine_region_is_behind_the_largest_rows() -> None:
    library, (first, second) = on_ranks(2, lambda kernels, _: (kernels.combine_at, kernels.nbytes, kernels.memory))
    for asked in library.allocated:
        assert asked["enable_multicast"] is False and asked["allocate_signal_pads"] is False
        assert asked["group_size"] == 2 and asked["buf_size"] == first[1]
    kept = offsets(2, SIZES.capacity)
    assert first[0] == second[0] == up(kept[-1] + 2 * SIZES.capacity * SIZES.row_bytes)
    assert first[1] == up(first[0] + 2 * SIZES.capacity * SIZES.combine_bytes)
    for rank, (_, _, memory) in enumerate((first, second)):
        own = library.base + rank * library.stride
        assert (memory.rank, memory.world_size, memory.flag) == (rank, 2, own)
        assert (memory.dispatch_flags, memory.combine_flags, memory.received) == (own + 128, own + 256, own + 16)


def test_the_capacity_is_what_the_budget_holds() -> None:
    for ranks, limit in itertools.product((2, 8, 64), (1 << 16, 1 << 20, 512 << 20)):
        asked = needed(7168 * 2 + 32, 8, 7168 * 2, 1 << 20)
        fitting = within(asked, ranks, limit)
        if fitting is None:
            assert ranks * (asked.row_bytes + asked.combine_bytes) + 176 > limit - 9216
            continue
        total = up(up(offsets(ranks, fitting.capacity)[-1] + ranks * fitting.capacity * asked.row_bytes))
        total += up(ranks * fitting.capacity * asked.combine_bytes)
        assert total <= limit
        assert total + 2 * (ranks * (asked.row_bytes + asked.combine_bytes) + 176) + 9216 > limit
    assert within(needed(64, 2, 64, 7), 2, 1 << 30) == needed(64, 2, 64, 7)


@pytest.mark.parametrize(
    ("top_k", "made_with"), [(1, 1), (3, 4), (5, 6), (7, 8), (9, 10), (20, 22), (22, 22), (23, None)]
)
def test_numbers_of_experts_that_kernels_were_compiled_for(top_k: int, made_with: int | None) -> None:
    assert compiled_top_k(top_k) == made_with


def test_what_no_workspace_can_be_made_for() -> None:
    channel = Channel(dist.HashStore(), 0, 2, seconds=1)
    channel.barrier = lambda topic: None  # type: ignore[method-assign]
    with pytest.raises(WorkspaceError, match="23 experts of a token"):
        made(Library(2), channel, needed(64, 23, 64, 4))
    library = Library(2)
    package = library.package(0)
    apart = mock.Mock(return_value=mock.Mock(**{
        "get_buffer_ptrs_host.return_value": [4096, 4096 + 8192], "get_allocation_size.return_value": 4096,
    }))  # fmt: skip
    package.modules["flashinfer.comm.mnnvl"].SymmDeviceMemory = apart
    with pytest.raises(WorkspaceError, match="unequal distances"):
        moe_one_sided.create(package, channel, SIZES)


def test_no_rank_begins_before_all_have_cleared_their_memory() -> None:
    """Hazard M64: a peer's first flag would be wiped."""
    order: list[str] = []

    class Watched(Channel):
        def barrier(self, topic: str) -> None:
            order.append(topic)
            super().barrier(topic)

    library, store = Library(2), dist.HashStore()
    initialise = type(library.package(0).modules["flashinfer.comm.trtllm_moe_alltoall"]).moe_a2a_initialize

    @functools.wraps(initialise)
    def noted(*args: Any) -> Tensor:
        order.append("cleared")
        return initialise(*args)

    with mock.patch("moe_library.Api.moe_a2a_initialize", noted):
        run_threaded(2, lambda rank: made(library, Watched(store, rank, 2, seconds=20)))
    assert order.index("moe workspace") > order.index("cleared") and order.count("moe workspace") == 2


# -- which calls it serves -------------------------------------------------------------------


def test_what_a_workspace_does_not_serve() -> None:
    assert unserved(SIZES, SIZES) is None
    assert "4 experts of a token" in str(unserved(SIZES, needed(1, 4, 1, 1)))
    assert "bytes of a token in all payloads" in str(unserved(SIZES, needed(SIZES.row_bytes, 1, 1, 1)))
    assert "combined rows of 65 bytes" in str(unserved(SIZES, needed(1, 1, 65, 1)))
    assert (SIZES | needed(1, 4, 65, 3)).covers(SIZES) and not SIZES.covers(needed(1, 4, 1, 1))


def test_calls_that_a_workspace_was_not_made_for() -> None:
    """Wider rows are an error, because the combine cannot know of them."""

    def body(kernels: OneSided, channel: Channel) -> list[str]:
        workspace = served(kernels)
        ids, said = torch.zeros(2, 2, dtype=torch.int64), []
        assert kernels.sizes.top_k == 4
        for payloads, many, capacity in (
            ([torch.zeros(2, 64)], ids, 3),
            ([torch.zeros(2, 1)], torch.zeros(2, 6, dtype=torch.int64), 3),
        ):
            with pytest.raises(InputError) as caught:
                ringfence.moe.dispatch(payloads, many, capacity=capacity, num_experts=8)
            said.append(str(caught.value))
        with pytest.raises(InputError) as caught:
            ringfence.moe.combine(torch.zeros(6, 64), torch.zeros(2, 2, dtype=torch.int32))
        said.append(str(caught.value))
        workspace.device = torch.device("meta")
        with pytest.raises(InputError, match=r"must be on meta, as the workspace of group .* is, but they are on cpu"):
            ringfence.moe.dispatch([torch.zeros(2, 1)], ids, capacity=3, num_experts=8)
        return said

    library, (first, second) = on_ranks(2, body)
    assert first == second and not library.calls[0], "nothing was sent"
    rows, many, combined = first
    assert "264 bytes of a token" in rows and "ringfence.moe.prepare" in rows
    assert "6 experts of a token" in many and "combined rows of 256 bytes" in combined


@pytest.mark.parametrize("capacity", [10, 11])
def test_the_capacity_alone_decides_who_carries_a_pair_out(capacity: int) -> None:
    with mock.patch("ringfence.runtime.collectives.moe.reference") as reference:
        reference.dispatch.side_effect = lambda payloads, ids, *_: (
            [p.new_zeros(22, p.shape[1]) for p in payloads],
            ids,
            ids,
            ids,
        )
        reference.combine.side_effect = lambda partial, route, group: partial[: route.shape[0]].clone()

        def body(kernels: OneSided, channel: Channel) -> None:
            served(kernels)
            sent = ringfence.moe.dispatch(
                [torch.zeros(2, 4)], torch.zeros(2, 2).int(), capacity=capacity, num_experts=4
            )
            ringfence.moe.combine(torch.zeros(2 * capacity, 4), sent.route)

        library, _ = on_ranks(2, body)
    by_kernels = capacity == 10
    assert [len(calls) for calls in library.calls] == [2 * by_kernels] * 2
    assert reference.dispatch.called is reference.combine.called is not by_kernels


def test_m37_an_eager_call_waits_for_the_one_before_it_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, str]] = []
    streams = {name: mock.Mock(wait_stream=lambda other, n=name: waits.append((n, other.name))) for name in "ab"}
    for name, stream in streams.items():
        stream.name = name
    capturing, now = [False], ["a"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[now[0]])
    kernels = mock.Mock()
    workspace = MoeWorkspace(kernels, torch.device("cuda", 0), Situation(Collective.MOE_ALL_TO_ALL))
    for stream, captures in (("a", False), ("a", False), ("b", False), ("b", True), ("a", True), ("b", False)):
        now[0], capturing[0] = stream, captures
        assert workspace.in_order() is kernels
    assert waits == [("b", "a")], "a capture waits for nothing outside of itself, and is no call of its stream"
    now[0], capturing[0] = "a", False
    workspace.in_order()
    assert waits == [("b", "a"), ("a", "b")]


# -- the package --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", flashinfer.MOE_CONTRACT)
def test_an_all_to_all_that_is_not_as_it_was_read(name: str) -> None:
    module, _, function = name.partition(":")
    package = Library(2).package(0)

    class Other:
        def __getattr__(self, name: str) -> Any:
            return None if name == function else getattr(package_before[module], name)

    package_before = dict(package.modules)
    package.modules[module] = Other()  # type: ignore[assignment]
    with pytest.raises(WorkspaceError, match=f"has another MoE all-to-all: .*{function} is gone"):
        package.moe()


def test_a_closed_workspace_says_so() -> None:
    def body(kernels: OneSided, channel: Channel) -> None:
        kernels.close()
        with pytest.raises(WorkspaceError, match="was closed"):
            kernels.combine(torch.zeros(4, 4), torch.zeros(2, 4))

    on_ranks(2, body)


# -- in a hang ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "dispatched", "combined", "silent", "says"),
    [
        (0, (0, 0, 0), (0, 0, 0), [], "no dispatch has begun on this rank"),
        (3, (3, 1, 1), (2, 2, 2), [5, 6], "dispatch 2 waits: ranks 5, 6 have not come to it"),
        (3, (1, 3, 3), (2, 2, 2), [], "dispatch 2 has not sent everything yet"),
        (4, (3, 3, 3), (4, 4, 2), [6], "combine 2 waits: rank 6 has not come to it"),
        (4, (3, 3, 3), (4, 4, 4), [], "no call of this rank waits in it: all have come to combine 2"),
        (4, (3, 5, 3), (4, 4, 4), [], "all have come to combine 2; rank 5 has come to the next call"),
        (4, (3, 3, 3), (4, 6, 4), [5], "combine 2 and a flag of 6: the ranks' calls are not in step"),
    ],
)
def test_who_has_not_arrived_is_read_off_the_flags(
    call: int, dispatched: tuple[int, ...], combined: tuple[int, ...], silent: list[int], says: str
) -> None:
    value = describe_moe(MoeMemory(0, 3, 0, 0, 0, 0), call, dispatched, combined, (1, 2, 3), (4, 5, 6))
    assert value["silent"] == silent and says in value["says"]
    assert value["words"]["call"] == call and value["words"]["received"] == [1, 2, 3]


def test_a_probe_names_the_rank_that_a_dispatch_waits_for() -> None:
    said: list[Any] = []

    def body(kernels: OneSided, channel: Channel) -> None:
        workspaces_of(dist.group.WORLD.group_name).moe.append(served(kernels))
        memory, device = kernels.memory, HostDevice(staging=4096)
        probe = GroupProbe(dist.group.WORLD.group_name, device)
        said.append((channel.rank, probe()))
        channel.barrier("asked")
        if channel.rank == 0:  # as its kernel does, before it waits
            for address, value in ((memory.flag, 1), (memory.dispatch_flags, 1)):
                host_bytes(address, 4).view(torch.int32).fill_(value)
            said.append((0, probe()))

    on_ranks(2, body)
    idle = [value for _, value in said[:2]]
    assert [entry["says"] for (entry,) in idle] == ["no dispatch has begun on this rank"] * 2
    ((entry,),) = [value for _, value in said[2:]]
    assert entry["collective"] == "moe_all_to_all" and entry["silent"] == [1]
    assert entry["says"] == "dispatch 1 waits: rank 1 has not come to it"
