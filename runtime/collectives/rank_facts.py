"""What each rank knows of itself, and what the facts of all ranks say of the machine that they share.

A sentence here is a reason: why something cannot be had on these ranks.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..hazards.situation import Fact
from ..spelling import by_value
from . import nvrtc
from .flashinfer import Unavailable, load
from .links import Links, Topology, between, read, topology
from .opt_outs import nccl_setting, own_opt_outs


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of itself.

    rank: by which people are told of it; :func:`numbered` fills it in.
    flashinfer: the version, None where it cannot be used for the reason in ``flashinfer_missing``.
    multicast: whether the device and driver offer NVLink multicast; nothing is created to find out.
    peers: whether this GPU can address the others that this process sees; None if it sees one only.
    links: what NVML says of its NVLinks; None where that cannot be read, for the reason in ``links_unknown``.
    nccl_p2p_off: whether NCCL_P2P_DISABLE keeps NCCL from the memory of peers.
    nvrtc_missing: why this rank cannot compile kernels, with the remedy; None where it can.
    lost: the copies into and out of the memory of peers that did not bring the data; :mod:`.peer_copy` tries them.
    """

    host: str
    device: str
    capability: tuple[int, int]
    multiprocessors: int
    flashinfer: str | None
    flashinfer_missing: str | None
    opt_outs: tuple[str, ...]
    multicast: bool
    peers: bool | None
    links: Links | None = None
    links_unknown: str | None = None
    nccl_p2p_off: bool = False
    nvrtc_missing: str | None = None
    lost: tuple[str, ...] = ()
    rank: int = 0


def probe(device: torch.device) -> RankFacts:
    """The facts of this rank, on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    package = load()
    missing = package.reason if isinstance(package, Unavailable) else None
    index = torch.cuda.current_device() if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != index]
    links, links_unknown = _links(properties)
    return RankFacts(
        host=socket.gethostname(),
        device=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        flashinfer=None if isinstance(package, Unavailable) else package.version,
        flashinfer_missing=missing,
        opt_outs=own_opt_outs(),
        multicast=_device_has_multicast(index),
        peers=all(torch.cuda.can_device_access_peer(index, i) for i in others) if others else None,
        links=links,
        links_unknown=links_unknown,
        nccl_p2p_off=nccl_setting("NCCL_P2P_DISABLE") not in (None, "", "0"),
        nvrtc_missing=nvrtc.missing(),
    )


def _links(properties: Any) -> tuple[Links | None, str | None]:
    """The links of a device by its properties, or why they cannot be read."""
    try:
        (found,) = read([f"GPU-{properties.uuid}"])
    except Exception as error:  # NVML, its binding and nvidia-smi raise what they like
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return found, None


def numbered(ranks: Sequence[RankFacts], numbers: Sequence[int] | None = None) -> list[RankFacts]:
    """With the number of each rank: its global rank, or where that is not given its place."""
    return [replace(f, rank=n) for f, n in zip(ranks, numbers or range(len(ranks)), strict=True)]


def differ(ranks: Sequence[RankFacts], *names: str) -> str | None:
    """In which of these facts the ranks are not alike. Grids would differ between them (hazard M22)."""
    for name in names:
        values = [getattr(facts, name) for facts in ranks]
        if len(set(values)) > 1:
            return f"ranks differ in {name}: {by_value(values, [facts.rank for facts in ranks])}"
    return None


def peers_out_of_reach(ranks: Sequence[RankFacts]) -> str | None:
    """Why a rank cannot store into the memory of another."""
    if len({facts.host for facts in ranks}) > 1:
        return "the ranks are on several nodes, and peer memory is reached within one"
    if any(facts.peers is False for facts in ranks):
        return "a GPU cannot address the memory of another"
    lost = [copy for facts in ranks for copy in facts.lost]
    if lost:
        return f"the driver says that peer memory is within reach, and {lost[0]} (hazard M51)"
    return None


def cannot_compile(ranks: Sequence[RankFacts]) -> str | None:
    """Why kernels that are compiled where they run cannot be had on a rank."""
    return next(
        (
            f"its kernels are compiled where they run, and rank {facts.rank} cannot: {facts.nvrtc_missing}"
            for facts in ranks
            if facts.nvrtc_missing
        ),
        None,
    )


def topology_of(ranks: Sequence[RankFacts]) -> Topology:
    """How the GPUs of these ranks reach each other."""
    return topology([(facts.host, facts.links) for facts in ranks])


def facts_of_group(ranks: Sequence[RankFacts], part_of_world: bool) -> frozenset[Fact]:
    """What the hazard table should know of each call among these ranks, whatever carries it out."""
    facts = {Fact.GROUP_IS_NOT_WORLD} if part_of_world else set[Fact]()
    if topology_of(ranks) in (Topology.PARTIAL, Topology.PCIE):
        facts.add(Fact.NOT_ALL_NVLINK)
    return frozenset(facts)


def linked(ranks: Sequence[RankFacts]) -> str:
    """How they do, for people: with the pair that makes it so where it is not the same for all."""
    found = topology_of(ranks)
    if found in (Topology.PARTIAL, Topology.PCIE):
        pairs = [pair for pair in itertools.combinations(ranks, 2) if _between(*pair) is Topology.PCIE]
        one, other = pairs[0]
        every = len(ranks) * (len(ranks) - 1) // 2
        return f"{found.meaning} ({len(pairs)} of {every} pairs, such as ranks {one.rank} and {other.rank})"
    if found is Topology.UNKNOWN:
        why = next((facts.links_unknown for facts in ranks if facts.links_unknown), "NVML does not say")
        return f"{found.meaning} ({why})"
    return found.meaning


def _between(one: RankFacts, other: RankFacts) -> Topology:
    return between(one.links, other.links, one_host=one.host == other.host)


def multicast_barred(ranks: Sequence[RankFacts]) -> str | None:
    """Why no multicast object may be created here."""
    for facts in ranks:
        if facts.opt_outs:
            return f"multicast is turned off ({facts.opt_outs[0]} on rank {facts.rank})"
        if not facts.multicast:
            return f"the device of rank {facts.rank} has no NVLink multicast"
    # A device may have it where its links do not: bridged GPUs, nodes without a common fabric (hazard M24).
    if topology_of(ranks) not in (Topology.NVSWITCH, Topology.UNKNOWN):
        return f"NVLink multicast needs an NVSwitch, and the ranks are linked by {linked(ranks)}"
    return None


def _device_has_multicast(index: int) -> bool:
    """What the driver says of the device. Asking creates nothing."""
    from torch._C import _distributed_c10d
    from torch._C._autograd import DeviceType

    try:
        return bool(_distributed_c10d._SymmetricMemory.has_multicast_support(DeviceType.CUDA, index))
    except (AttributeError, RuntimeError):  # a build without symmetric memory
        return False
