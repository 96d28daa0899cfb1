"""Doctor: what is here, what ``collective="auto"`` would choose here and why, and which hazards apply.

Runs on any machine: without a GPU, without FlashInfer, outside of any process group. What
cannot be read is a :class:`Found` with a reason, never an error. Devices are asked for their
attributes and nothing else: no memory, no CUDA context, and above all no multicast object.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .runtime.collectives import table
from .runtime.collectives.choice import choose
from .runtime.collectives.flashinfer import Unavailable, load
from .runtime.collectives.opt_outs import own_opt_outs
from .runtime.collectives.rank_facts import RankFacts, probe
from .runtime.collectives.ready import reference_collective, situation_of
from .runtime.errors import VersionError
from .runtime.groups import nccl_version
from .runtime.hazards.catalogue import applicable
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
class Links:
    """Active NVLinks of one device: to each device that this process sees, and to a switch or any other."""

    to: tuple[int, ...]
    elsewhere: int


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
    """flashinfer: the installed version. flashinfer_unusable: why ringfence does not use it."""

    ringfence: str
    python: str
    torch: str
    cuda: Found[str]
    nccl: Found[str]
    flashinfer: Found[str]
    flashinfer_unusable: str | None
    driver: Found[str]
    devices: Found[tuple[Gpu, ...]]
    links: Found[tuple[Links, ...]]
    opt_outs: tuple[str, ...]
    advice: tuple[Advice, ...]
    hazards: tuple[KnownHazard, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing speaks against capture."""
        return not any(hazard.against_capture for hazard in self.hazards)


# -- gathering -------------------------------------------------------------------------


def gather() -> Facts:
    """Look at this machine. Never raises."""
    devices = _found(_devices)
    found = devices.value or ()
    version, nccl = _flashinfer_version(), _found(_nccl)
    package = _found(load)
    unusable = package.why or (package.value.reason if isinstance(package.value, Unavailable) else None)
    ranks = _found(lambda: tuple(probe(torch.device("cuda", device.index)) for device in found))
    advice, hazards = advise(ranks.value or (), ranks.why or devices.why)
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
        links=_found(_links) if found else Found(None, devices.why),
        opt_outs=own_opt_outs(),
        advice=advice,
        hazards=_merged([*hazards_of_version(version.value), *hazards_of_nccl(nccl.value), *hazards]),
    )


def advise(
    ranks: Sequence[RankFacts], why_none: str | None = None
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
        choice = choose(world)
        row = choice.row
        sizes = (row.one_shot, row.fused) if row is not None else (0, 0)
        advice.append(Advice(size, not_here, choice.collective, choice.transport, *sizes, choice.reasons))
        name = f"{choice.collective}/{choice.transport}" if choice.transport else str(choice.collective)
        hazards += [
            (hazard, f"{name}, {size} ranks") for hazard in applicable(situation_of(choice, world, dtype="bfloat16"))
        ]
    return tuple(advice), hazards


def hazards_of_version(version: str | None) -> list[tuple[Hazard, str]]:
    """What the installed FlashInfer is known for, used by whomever: ringfence would pass an old one over."""
    try:
        parse_version(version or "")
    except VersionError:
        return []
    return [
        (hazard, f"{collective} of FlashInfer {version}")
        for collective in dict.fromkeys(one.name for one in table.ALL if one.make is not None)
        for hazard in applicable(Situation(collective, version, dtype="bfloat16"))  # float16 has a row more, M49
    ]


def hazards_of_nccl(version: str | None) -> list[tuple[Hazard, str]]:
    """What this NCCL is known for where a group spans several machines, whatever these are."""
    situation = Situation(Collective.NCCL, nodes=2, facts=facts_of_nccl(version))
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


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        raise _Absent(f"{path} is absent: the NVIDIA driver is not loaded")
    found = re.search(r"\d+\.\d+(\.\d+)*", text := path.read_text())
    return found[0] if found else text.strip()


def _links() -> tuple[Links, ...]:
    # NVML counts all devices of the machine, torch those that CUDA_VISIBLE_DEVICES leaves: the UUID is common.
    return links(_nvml(), [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())])


def links(nvml: Any, uuids: Sequence[str]) -> tuple[Links, ...]:
    """The active NVLinks of these devices, by ``pynvml``."""
    nvml.nvmlInit()
    try:
        handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        places = [_text(nvml.nvmlDeviceGetPciInfo(handle).busId) for handle in handles]
        found = []
        for handle in handles:
            ends = list(_ends(nvml, handle))
            to = tuple(ends.count(place) for place in places)
            found.append(Links(to, len(ends) - sum(to)))
        return tuple(found)
    finally:
        nvml.nvmlShutdown()


def _ends(nvml: Any, handle: Any) -> list[str]:
    """The PCI address at the other end of each active NVLink of a device."""
    ends = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link) != nvml.NVML_FEATURE_ENABLED:
                continue
        except nvml.NVMLError:  # this device has fewer links, or none
            break
        try:
            ends.append(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
        except nvml.NVMLError:  # a virtual machine hides the switch
            ends.append("hidden")
    return ends


def _text(value: str | bytes) -> str:
    """NVML's strings are bytes in some releases of its binding."""
    return (value.decode() if isinstance(value, bytes) else value).lower()


def _nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise _Absent("pynvml cannot be imported: pip install nvidia-ml-py") from error
