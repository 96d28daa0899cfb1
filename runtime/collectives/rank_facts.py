"""What each rank knows of itself, and what the facts of all ranks say of the machine that they share.

A sentence here is a reason: why something cannot be had on these ranks.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..channel import by_value
from .flashinfer import Unavailable, load
from .opt_outs import own_opt_outs


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of itself.

    rank: by which people are told of it; :func:`numbered` fills it in.
    flashinfer: the version, None where it cannot be used for the reason in ``flashinfer_missing``.
    multicast: whether the device and driver offer NVLink multicast; nothing is created to find out.
    peers: whether this GPU can address the others that this process sees; None if it sees one only.
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
    rank: int = 0


def probe(device: torch.device) -> RankFacts:
    """The facts of this rank, on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    package = load()
    missing = package.reason if isinstance(package, Unavailable) else None
    index = torch.cuda.current_device() if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != index]
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
    )


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
    return None


def multicast_barred(ranks: Sequence[RankFacts]) -> str | None:
    """Why no multicast object may be created here."""
    for facts in ranks:
        if facts.opt_outs:
            return f"multicast is turned off ({facts.opt_outs[0]} on rank {facts.rank})"
        if not facts.multicast:
            return f"the device of rank {facts.rank} has no NVLink multicast"
    return None


def _device_has_multicast(index: int) -> bool:
    """What the driver says of the device. Asking creates nothing."""
    from torch._C import _distributed_c10d
    from torch._C._autograd import DeviceType

    try:
        return bool(_distributed_c10d._SymmetricMemory.has_multicast_support(DeviceType.CUDA, index))
    except (AttributeError, RuntimeError):  # a build without symmetric memory
        return False
