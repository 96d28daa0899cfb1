"""Copies between the ranks' memories, on devices that are made up, and through a driver that is."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import FACTS, FakeFlashInfer, fakes

from ringfence.runtime.channel import Channel, open_channel
from ringfence.runtime.collectives import group_facts, peer_copy, ready, table
from ringfence.runtime.collectives.links import Links
from ringfence.runtime.collectives.peer_copy import SIZE, Copies, CudaMemory, try_copies
from ringfence.runtime.collectives.rank_facts import RankFacts
from ringfence.runtime.collectives.ready import ReadyCollective, Wanted, prepare
from ringfence.runtime.collectives.workspace import close_workspaces
from ringfence.runtime.errors import CollectiveUnavailableError, WorkspaceError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective
from support import run_threaded


class Machine:
    """The memory of all devices in one table of blocks; an address is block << 32 and an offset.

    lose: called with the rank that copies, the rank whose memory is written and the one whose is read; whether the
    bytes go nowhere. hang: the same, whether the copy never comes back.
    """

    def __init__(self, lose: Callable[..., bool] = lambda *_: False, hang: Callable[..., bool] = lambda *_: False):
        self.lose, self.hang = lose, hang
        self.blocks: dict[int, bytearray] = {}
        self.owner: dict[int, int] = {}
        self.mapped: list[int] = []
        self.lock = threading.Lock()
        self.copies: list[tuple[int, int, int]] = []

    def device(self, rank: int) -> Device:
        return Device(self, rank)


class Device:
    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine, self.rank = machine, rank

    def allocate(self, size: int) -> int:
        with self.machine.lock:
            block = len(self.machine.owner) + 1
            self.machine.blocks[block], self.machine.owner[block] = bytearray(size), self.rank
        assert size % (1 << 21) == 0, "a block that others share"
        return block << 32

    def handle(self, address: int) -> bytes:
        return address.to_bytes(8, "little")

    def map(self, handle: bytes) -> int:
        address = int.from_bytes(handle, "little")
        assert self.machine.owner[address >> 32] != self.rank, "a process cannot map its own"
        self.machine.mapped.append(address)
        return address

    def _place(self, address: int, size: int) -> tuple[bytearray, int]:
        block = self.machine.blocks[address >> 32]
        offset = address & 0xFFFFFFFF
        assert offset + size <= len(block)
        return block, offset

    def write(self, address: int, data: bytes) -> None:
        block, at = self._place(address, len(data))
        assert self.machine.owner[address >> 32] == self.rank
        block[at : at + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        assert self.machine.owner[address >> 32] == self.rank, "read through the device itself"
        block, at = self._place(address, size)
        return bytes(block[at : at + size])

    def copy(self, to: int, of: int, size: int, seconds: float) -> bool:
        ranks = self.rank, self.machine.owner[to >> 32], self.machine.owner[of >> 32]
        self.machine.copies.append(ranks)
        if self.machine.hang(*ranks):
            return False
        if not self.machine.lose(*ranks):
            block, at = self._place(to, size)
            source, start = self._place(of, size)
            block[at : at + size] = source[start : start + size]
        return True

    def unmap(self, address: int) -> None:
        self.machine.mapped.remove(address)

    def free(self, address: int) -> None:
        del self.machine.blocks[address >> 32]


def tried(machine: Machine, count: int, names: tuple[int, ...] | None = None, **faults: Any) -> list[Copies]:
    """Every rank on a thread of its own. faults: what the device of rank 1 does in place of something."""
    store = dist.HashStore()
    results: list[Any] = [None] * count

    def body(rank: int) -> None:
        device = machine.device(rank)
        for name, fault in faults.items() if rank == 1 else ():
            setattr(device, name, fault)
        channel = Channel(store, rank, count, seconds=120, ranks=names)
        results[rank] = try_copies(channel, lambda: device, seconds=3)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in results
    return results


@pytest.mark.parametrize("count", [2, 3, 4])
def test_copies_that_arrive_say_nothing_and_every_pair_is_tried_both_ways(count: int) -> None:
    machine = Machine()
    assert tried(machine, count) == [Copies()] * count
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    assert sorted(machine.copies) == sorted([(a, b, a) for a, b in pairs] + [(a, a, b) for a, b in pairs])
    assert not machine.blocks and not machine.mapped


def test_a_write_that_does_not_arrive_is_named_on_all_ranks() -> None:
    """A posted write is dropped: the copy succeeds, and nobody is told (V#51513)."""
    machine = Machine(lose=lambda rank, to, of: (rank, to) == (0, 2))
    said = "a copy from rank 4 into the memory of rank 6 did not arrive"
    assert tried(machine, 3, names=(4, 5, 6)) == [Copies((said,))] * 3
    assert not machine.blocks and not machine.mapped


def test_a_read_that_brings_other_data_is_named_on_all_ranks() -> None:
    machine = Machine(lose=lambda rank, to, of: (rank, of) == (1, 0))
    assert tried(machine, 2) == [Copies(("a copy by rank 1 out of the memory of rank 0 brought other data",))] * 2


def test_all_that_is_lost_is_named() -> None:
    (copies, *_) = tried(Machine(lose=lambda rank, to, of: to != of), 2)
    assert len(copies.lost) == 4 and copies.untried is None


def test_a_copy_that_does_not_come_back_is_given_up_and_accuses_no_other_pair() -> None:
    machine = Machine(hang=lambda rank, to, of: (rank, to) == (1, 0))
    expected = "a copy from rank 1 into the memory of rank 0 did not come back within 3 s"
    assert tried(machine, 3) == [Copies((expected,))] * 3
    assert [machine.owner[block] for block in machine.blocks] == [1, 1], "rank 1 keeps what is being copied"


@pytest.mark.parametrize("name", ["allocate", "handle", "map", "write", "copy", "read"])
def test_what_cannot_be_tried_is_no_loss(name: str) -> None:
    """A container may forbid handles while peer memory is well."""

    def broken(*arguments: Any) -> Any:
        raise WorkspaceError(f"{name} returned 801")

    for copies in tried(Machine(), 2, **{name: broken}):
        assert not copies.lost and copies.untried is not None
        assert copies.untried.startswith("rank 1: ") and f"{name} returned 801" in copies.untried


def test_a_device_without_a_driver_is_no_loss() -> None:
    store = dist.HashStore()
    results: list[Any] = [None] * 2

    def body(rank: int) -> None:
        def make() -> Any:
            if rank == 1:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return Machine().device(rank)

        results[rank] = try_copies(Channel(store, rank, 2, seconds=120), make)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results[0] == results[1] and "cannot open shared object file" in results[0].untried


# -- the driver's calls


class Driver:
    """What is called of libcuda, over host memory; a copy takes a while."""

    def __init__(self, ready_after: int = 3) -> None:
        self.ready_after, self.queries = ready_after, 0
        self.memory: dict[int, Any] = {}
        self.queued: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return {"cuStreamCreate": self._make, "cuEventCreate": self._make, "cuEventRecord": lambda *_: 0}[name]

    def _make(self, place: Any, flags: int) -> int:
        place._obj.value = 7
        return 0

    def cuMemAlloc_v2(self, place: Any, size: Any) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        place._obj.value = ctypes.addressof(buffer)
        self.memory[place._obj.value] = buffer
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.memory[address.value]
        return 0

    def cuIpcGetMemHandle(self, handle: Any, address: Any) -> int:
        ctypes.memmove(handle, ctypes.byref(ctypes.c_uint64(address.value)), 8)
        return 0

    def cuIpcOpenMemHandle_v2(self, place: Any, handle: Any, flags: int) -> int:
        assert flags == 1
        place._obj.value = int.from_bytes(bytes(handle)[:8], "little")
        return 0

    def cuIpcCloseMemHandle(self, address: Any) -> int:
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, data: bytes, size: Any, stream: Any) -> int:
        self.queued = (to.value, data, size.value)  # it is there once somebody has seen the event
        self.queries = 0
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, of: Any, size: Any) -> int:
        ctypes.memmove(to, of.value, size.value)
        return 0

    def cuMemcpyAsync(self, to: Any, of: Any, size: Any, stream: Any) -> int:
        ctypes.memmove(to.value, of.value, size.value)
        self.queries = 0
        return 0

    def cuEventQuery(self, event: Any) -> int:
        self.queries += 1
        if self.queries < self.ready_after:
            return 600
        if self.queued:
            ctypes.memmove(*self.queued)
            self.queued = ()
        return 0


@pytest.fixture
def no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@pytest.mark.usefixtures("no_context")
def test_the_driver_is_called_with_addresses_and_sizes() -> None:
    driver = Driver()
    one, other = CudaMemory(driver), CudaMemory(driver)
    own = one.allocate(1 << 21)
    mapped = other.map(one.handle(own))
    assert mapped == own
    scratch = other.allocate(1 << 21)
    other.write(scratch, b"x" * SIZE)
    assert other.copy(mapped + SIZE, scratch, SIZE, 5) and driver.queries == 3
    assert one.read(own + SIZE - 1, SIZE + 2) == b"\0" + b"x" * SIZE + b"\0"
    other.unmap(mapped)
    one.free(own)
    other.free(scratch)
    assert not driver.memory


@pytest.mark.usefixtures("no_context")
def test_a_copy_is_waited_for_no_longer_than_it_may_take() -> None:
    memory = CudaMemory(Driver(ready_after=10**9))
    block = memory.allocate(1 << 21)
    assert not memory.copy(block, block + SIZE, SIZE, 0.05)


@pytest.mark.usefixtures("no_context")
@pytest.mark.parametrize("name", ["cuMemAlloc_v2", "cuEventQuery", "cuIpcGetMemHandle"])
def test_what_the_driver_refuses_is_named(name: str) -> None:
    driver = Driver()
    memory = CudaMemory(driver)
    block = memory.allocate(1 << 21)
    setattr(driver, name, lambda *arguments: 719)
    with pytest.raises(WorkspaceError, match=f"{name} returned 719"):
        memory.allocate(1 << 21)
        memory.handle(block)
        memory.copy(block, block + SIZE, SIZE, 1)


# -- in the choice


def prepared(machine: Machine, facts: RankFacts, monkeypatch: pytest.MonkeyPatch, wanted: str = "auto") -> list[Any]:
    """What two ranks of these facts get, twice: the second graph of a group asks nothing anew."""

    def body(rank: int) -> ReadyCollective | str:
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        packages[rank] = FakeFlashInfer(name)
        wish = Wanted(wanted, "auto", 256, torch.float32, max_tokens=4)
        found: list[ReadyCollective] = []
        try:
            for _ in range(2):
                channel = open_channel(name, seconds=120)
                found.append(prepare(channel, Group(name, "nccl", 2, rank), torch.device("cuda", rank), wish))
        except CollectiveUnavailableError as error:
            return str(error)
        finally:
            close_workspaces(name)
        assert [r.collective for r in found] == [found[0].collective] * 2 and found[0].notes == found[1].notes
        return found[0]

    packages: dict[int, FakeFlashInfer] = {}
    monkeypatch.setattr(table, "ALL", fakes(lambda: packages[dist.get_rank()]))
    monkeypatch.setattr(group_facts, "probe", lambda device: facts)
    monkeypatch.setattr(group_facts, "CudaMemory", lambda: machine.device(dist.get_rank()))
    monkeypatch.setattr(ready, "_tested", lambda *_: ready.SelfTest(None, None, 1))
    monkeypatch.setattr(peer_copy, "_SECONDS", 3)
    return run_threaded(2, body)


SWITCHED = replace(FACTS, peers=True)
OVER_PCIE = replace(SWITCHED, links=Links("gpu"))
LOST = Machine(lose=lambda rank, to, of: (rank, to) == (0, 1))


def test_memory_that_works_is_tried_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    for found in prepared(machine, SWITCHED, monkeypatch):
        assert found.collective is Collective.MNNVL and not found.notes
    assert len(machine.copies) == 4


def test_memory_that_does_not_work_is_not_used_and_nccl_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a copy from rank 0 into the memory of rank 1 did not arrive"
    for found in prepared(LOST, SWITCHED, monkeypatch):
        assert found.collective is Collective.REFERENCE
        for candidate in found.candidates[1:3]:
            assert candidate.why_not.endswith(f"within reach, and {said} (hazard M51)")
        note, *_ = found.notes
        assert said in note and "NCCL_P2P_DISABLE=1" in note and "ACS" in note
    for error in prepared(LOST, SWITCHED, monkeypatch, "trtllm"):
        assert (
            error.startswith("collective='trtllm' cannot be had here: trtllm/peer: the driver says") and said in error
        )


def test_nccl_is_warned_of_where_no_kernel_would_be_chosen_either(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in prepared(LOST, OVER_PCIE, monkeypatch):
        assert found.collective is Collective.REFERENCE and "NCCL_P2P_DISABLE=1" in found.notes[0]


def test_who_told_nccl_to_keep_off_is_not_tried_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    off = replace(OVER_PCIE, nccl_p2p_off=True)
    for machine, facts in ((Machine(), off), (Machine(), replace(SWITCHED, peers=False))):
        for found in prepared(machine, facts, monkeypatch):
            assert found.collective is Collective.REFERENCE and "NCCL" not in str(found.notes)
        assert not machine.copies
    assert all("did not arrive" in error for error in prepared(LOST, off, monkeypatch, "trtllm"))


def test_what_could_not_be_tried_is_noted_and_bars_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(Device, "handle", lambda self, address: 1 / 0)
    for found in prepared(machine, SWITCHED, monkeypatch):
        assert found.collective is Collective.MNNVL
        assert found.notes[0].startswith("copies between the ranks' memories could not be tried: rank")
