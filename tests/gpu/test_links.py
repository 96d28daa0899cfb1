"""How the GPUs here are linked, and whether peer memory brings the data: on real devices, two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringfence.copies import try_all
from ringfence.runtime.collectives.links import Links, Topology, between, read
from ringfence.runtime.collectives.peer_copy import Copies, CudaMemory, try_copies
from support import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, {GPUS} here"),
]


def _uuids() -> list[str]:
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(GPUS)]


def test_nvml_places_the_devices() -> None:
    """An H100 or H200 with 18 active links and a way to each other; of others only that there is an answer."""
    links = read(_uuids())
    assert len({one.address for one in links}) == GPUS
    ways = {between(a, b) for a in links for b in links if a is not b}
    print(f"linked by {sorted(map(str, ways))}; {links[0]}")
    assert Topology.NODES not in ways
    if all(one.active == 18 for one in links) and torch.cuda.get_device_name(0) in (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H200",
    ):
        assert ways == {Topology.NVSWITCH}


def _copies(rank: int) -> dict[str, Any]:
    from ringfence.runtime.channel import open_channel
    from ringfence.runtime.collectives.rank_facts import probe

    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    channel = open_channel(name, seconds=60)
    copies = try_copies(channel, CudaMemory)
    channel.barrier("all memory is given back")
    held = before - torch.cuda.mem_get_info()[0]
    links = probe(torch.device("cuda", rank)).links
    sums = torch.full((8,), float(rank + 1), device="cuda")
    dist.all_reduce(sums)  # the device and NCCL are as they were
    return {"copies": copies, "held": held, "links": links, "sum": sums.tolist()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_copies_between_processes_arrive_and_leave_nothing_behind(ranks: int) -> None:
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} CUDA devices, {GPUS} here")
    found = run_ranks(ranks, _copies, backend="nccl", timeout=120)
    for one in found:
        assert one["copies"] == Copies(), one["copies"]
        assert isinstance(one["links"], Links)
        assert one["held"] < 32 << 20
        assert one["sum"] == [ranks * (ranks + 1) / 2] * 8


def test_copies_of_doctor_arrive() -> None:
    found = try_all(GPUS)
    reachable = {(a, b) for a in range(GPUS) for b in range(GPUS) if a != b and torch.cuda.can_device_access_peer(a, b)}
    assert found == dict.fromkeys(reachable, True)
