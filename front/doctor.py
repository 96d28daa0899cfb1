"""Doctor: what is here, what ``collective="auto"`` would choose here and why, and which hazards apply.

Runs on any machine: without a GPU, without FlashInfer, outside of any process group. What
cannot be read is a :class:`Found` with a reason, never an error. Devices are asked for their
attributes and nothing else: no memory, no CUDA context, and above all no multicast object.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .copies import NOT_TRIED, try_all
from .machine import Sight, look
from .runtime.collectives import table
from .runtime.collectives.choice import choose
from .runtime.collectives.flashinfer import Unavailable, load
from .runtime.collectives.links import Links, Topology, between
from .runtime.collectives.opt_outs import nccl_settings, own_opt_outs
from .runtime.collectives.rank_facts import RankFacts, linked, numbered, probe
from .runtime.collectives.ready import reference_collective, situation_of
from .runtime.errors import VersionError
from .runtime.groups import nccl_version
from .runtime.hazards.catalogue import applicable, find_hazard
from .runtime.hazards.situation import Collective, Situation, facts_of_nccl
from .runtime.hazards.table import Action, Hazard
from .runtime.versions import parse_version

T = TypeVar("T")

WORLD_SIZES = (2, 4, 8)

#: What keeps a call out of a captured piece.
AGAINST_CAPTURE = (Action.SPLIT, Action.REFUSE)

#: ``CUdevice_attribute`` in cuda.h.
_MULTICAST_SUPPORTED = 132


@dataclass(frozen=True)
class Found(Generic[T]):
    """A value, or why there is none."""

    value: T | None
    why: str | None = None

    def __str__(self) -> str:
        return f"unknown ({self.why})" if self.value is None else str(self.value)


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that this process sees. memory: bytes. multicast: what the driver says, whatever is opted out of.

    peers: for each device, whether this one can address its memory; None for itself.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    multicast: Found[bool]
    peers: Found[tuple[bool | None, ...]]


@dataclass(frozen=True)
class DeviceLinks:
    """Active NVLinks of one device: to each device that this process sees, and to a switch or any other.

    near: how each is reached, as ``nvidia-smi topo -m`` says it; None for itself. fabric_state: what the fabric
    manager has made of the device, None where there is none.
    """

    to: tuple[int, ...]
    elsewhere: int
    switch: int
    near: tuple[str | None, ...]
    fabric_state: str | None = None


@dataclass(frozen=True)
class Advice:
    """What "auto" chooses for a world size. not_here: why that is about a machine like this one, only larger."""

    world_size: int
    not_here: str | None
    collective: str
    transport: str | None
    one_shot: int
    fused: int
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class KnownHazard:
    """A row of the hazard table that applies, and to what."""

    id: str
    title: str
    decides: Action
    against_capture: bool
    remedy: str
    applies_to: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """flashinfer: the installed version. flashinfer_unusable: why ringfence does not use it.

    topology: how the devices reach each other. copies: for each device, whether data that it copies to each other one
    arrives. machine: what else was looked at.
    """

    ringfence: str
    python: str
    torch: str
    cuda: Found[str]
    nccl: Found[str]
    flashinfer: Found[str]
    flashinfer_unusable: str | None
    driver: Found[str]
    devices: Found[tuple[Gpu, ...]]
    links: Found[tuple[DeviceLinks, ...]]
    topology: Found[str]
    copies: Found[tuple[tuple[bool | None, ...], ...]]
    machine: tuple[Sight, ...]
    opt_outs: tuple[str, ...]
    advice: tuple[Advice, ...]
    hazards: tuple[KnownHazard, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing speaks against capture."""
        return not any(hazard.against_capture for hazard in self.hazards)


# -- gathering -------------------------------------------------------------------------


def gather(*, copies: bool = False, journals: Path | None = None, dtype: str = "bfloat16") -> Facts:
    """Look at this machine. Never raises.

    copies: whether to try copies between the devices, which takes a process and memory on them.
    journals: the folder in which ranks would write. None is the current one. dtype: of the activations, which some
    hazards depend on.
    """
    devices = _found(_devices)
    found = devices.value or ()
    version, nccl = _flashinfer_version(), _found(_nccl)
    package = _found(load)
    unusable = package.why or (package.value.reason if isinstance(package.value, Unavailable) else None)
    ranks = _found(lambda: tuple(probe(torch.device("cuda", device.index)) for device in found))
    advice, hazards = advise(ranks.value or (), ranks.why or devices.why, dtype)
    links = _found(lambda: _links(ranks.value or ())) if found else Found[tuple[DeviceLinks, ...]](None, devices.why)
    tried = _found(lambda: _copies(len(found))) if copies else Found[Any](None, NOT_TRIED)
    settings = nccl_settings()
    sights = look([facts.links for facts in ranks.value or ()], settings, journals or Path.cwd())
    return Facts(
        ringfence=importlib.metadata.version("ringfence"),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=Found(torch.version.cuda, None if torch.version.cuda else "this torch is built without CUDA"),
        nccl=nccl,
        flashinfer=version,
        flashinfer_unusable=unusable,
        driver=_found(_driver),
        devices=devices,
        links=links,
        topology=_found(lambda: _linked(ranks.value or ())),
        copies=tried,
        machine=sights,
        opt_outs=own_opt_outs(),
        advice=advice,
        hazards=_merged(
            [
                *hazards_of_version(version.value, dtype),
                *hazards_of_nccl(nccl.value, settings.get("NCCL_GRAPH_REGISTER")),
                *hazards_of_machine(sights, tried.value),
                *hazards,
            ]
        ),
    )


def advise(
    ranks: Sequence[RankFacts], why_none: str | None = None, dtype: str = "bfloat16"
) -> tuple[tuple[Advice, ...], list[tuple[Hazard, str]]]:
    """What "auto" chooses for each world size, and the hazards of that. ``ranks``: the facts of each device here.

    A world larger than that is made of more devices like these; without any (``why_none``), it is the reference.
    """
    advice: list[Advice] = []
    hazards: list[tuple[Hazard, str]] = []
    for size in WORLD_SIZES:
        not_here = f"not here: {len(ranks)} device{'' if len(ranks) == 1 else 's'}" if size > len(ranks) else None
        if not ranks:
            ready = reference_collective(size, why_none or "there is no CUDA device")
            collective, candidates = ready.collective, tuple(map(str, ready.candidates))
            advice.append(Advice(size, not_here, collective, None, 0, 0, candidates))
            continue
        world = [ranks[i % len(ranks)] for i in range(size)]
        choice = choose(world, dtype=dtype)
        row = choice.row
        sizes = (row.one_shot, row.fused) if row is not None else (0, 0)
        advice.append(Advice(size, not_here, choice.collective, choice.transport, *sizes, choice.reasons))
        name = f"{choice.collective}/{choice.transport}" if choice.transport else str(choice.collective)
        hazards += [
            (hazard, f"{name}, {size} ranks") for hazard in applicable(situation_of(choice, world, dtype=dtype))
        ]
    return tuple(advice), hazards


def hazards_of_version(version: str | None, dtype: str = "bfloat16") -> list[tuple[Hazard, str]]:
    """What the installed FlashInfer is known for, used by whomever: ringfence would pass an old one over."""
    try:
        parse_version(version or "")
    except VersionError:
        return []
    return [
        (hazard, f"{collective} of FlashInfer {version}")
        for collective in dict.fromkeys(one.name for one in table.ALL if one.make is not None)
        for hazard in applicable(Situation(collective, version, dtype=dtype))  # float16 has a row more, M49
    ]


def hazards_of_machine(
    sights: Sequence[Sight], copies: Sequence[Sequence[bool | None]] | None
) -> list[tuple[Hazard, str]]:
    """What is the case here, and not only possible: a fabric that is not ready, copies that were lost."""
    found = [(find_hazard(s.hazard), f"{s.name}: {s.seen}") for s in sights if s.hazard in ("M52", "M53")]
    lost = [(of, to) for of, row in enumerate(copies or ()) for to, arrived in enumerate(row) if arrived is False]
    return found + [(find_hazard("M51"), f"copies from device {of} to device {to}") for of, to in lost]


def hazards_of_nccl(version: str | None, graph_register: str | None = None) -> list[tuple[Hazard, str]]:
    """What this NCCL is known for where a group spans several machines, whatever these are."""
    situation = Situation(Collective.NCCL, nodes=2, facts=facts_of_nccl(version, graph_register))
    return [(hazard, f"NCCL {version}, captured, in a group of several nodes") for hazard in applicable(situation)]


def _flashinfer_version() -> Found[str]:
    """What is installed, without an import: that fails where it is too old for this torch."""
    for name in ("flashinfer-python", "flashinfer"):
        try:
            return Found(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Found(None, "FlashInfer is not installed")


def _merged(found: Sequence[tuple[Hazard, str]]) -> tuple[KnownHazard, ...]:
    """One finding for each hazard."""
    applies_to: dict[Hazard, list[str]] = {}
    for hazard, what in found:
        applies_to.setdefault(hazard, []).append(what)
    return tuple(
        KnownHazard(h.id, h.title, h.decides, h.decides in AGAINST_CAPTURE, h.remedy, tuple(what))
        for h, what in applies_to.items()
    )


def _found(read: Callable[[], T]) -> Found[T]:
    try:
        return Found(read())
    except Exception as error:  # torch, NVML and the driver raise what they like
        text = " ".join(str(error).split())
        return Found(None, text if isinstance(error, _Absent) else f"{type(error).__name__}: {text}")


class _Absent(Exception):
    """A probe found that there is nothing to read; the message says why."""


def _nccl() -> str:
    version = nccl_version()
    if version is None:
        raise _Absent("this torch is built without NCCL")
    return version


def _devices() -> tuple[Gpu, ...]:
    if torch.version.cuda is None:
        raise _Absent("this torch is built without CUDA")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        raise _Absent("torch sees no CUDA device")
    found = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        multicast = _found(lambda index=index: _driver_offers_multicast(index))  # type: ignore[misc]
        peers = _found(lambda index=index: _peers(index, count))  # type: ignore[misc]
        found.append(Gpu(index, properties.name, capability, properties.total_memory, multicast, peers))
    return tuple(found)


def _peers(index: int, count: int) -> tuple[bool | None, ...]:
    return tuple(None if i == index else bool(torch.cuda.can_device_access_peer(index, i)) for i in range(count))


def _driver_offers_multicast(index: int) -> bool:
    """The driver's own attribute; torch answers no where a variable turns multicast off."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, value = ctypes.c_int(), ctypes.c_int()
    for name, *arguments in (
        ("cuInit", 0),
        ("cuDeviceGet", ctypes.byref(device), index),
        ("cuDeviceGetAttribute", ctypes.byref(value), _MULTICAST_SUPPORTED, device),
    ):
        if status := getattr(driver, name)(*arguments):
            raise _Absent(f"{name} returned {status}")
    return bool(value.value)


def _linked(ranks: Sequence[RankFacts]) -> str:
    if len(ranks) < 2:
        raise _Absent("there are not two devices")
    return linked(numbered(ranks))


def _copies(count: int) -> tuple[tuple[bool | None, ...], ...]:
    if count < 2:
        raise _Absent(f"there is nothing to copy between: {'one device' if count else 'no device'}")
    found = try_all(count)
    return tuple(tuple(found.get((of, to)) for to in range(count)) for of in range(count))


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        raise _Absent(f"{path} is absent: the NVIDIA driver is not loaded")
    found = re.search(r"\d+\.\d+(\.\d+)*", text := path.read_text())
    return found[0] if found else text.strip()


def _links(ranks: Sequence[RankFacts]) -> tuple[DeviceLinks, ...]:
    for facts in ranks:
        if facts.links is None:
            raise _Absent(facts.links_unknown or "NVML does not say")
    found = [facts.links for facts in ranks if facts.links is not None]
    return tuple(device_links(one, found) for one in found)


def device_links(one: Links, devices: Sequence[Links]) -> DeviceLinks:
    """What this process sees of one device's links. devices: the links of all that it sees."""
    to = tuple(dict(one.to).get(other.address, 0) for other in devices)
    near = tuple(None if other is one else _near(one, other) for other in devices)
    return DeviceLinks(to, one.active - sum(to), one.switch, near, one.fabric_state)


def _near(one: Links, other: Links) -> str:
    """As ``nvidia-smi topo -m`` says it: how many NVLinks, or how near over PCIe."""
    way = between(one, other)
    if way is Topology.NVSWITCH:
        return f"NV{one.active}"
    if way is Topology.NVLINK:
        return f"NV{dict(one.to).get(other.address) or dict(other.to).get(one.address)}"
    return dict(one.pcie).get(other.address, "PCIe") if way is Topology.PCIE else "unknown"
