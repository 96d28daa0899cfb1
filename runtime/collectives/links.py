"""How the ranks' GPUs are linked: over an NVSwitch, by NVLinks of their own, or over PCIe.

Each rank reads what NVML says of its own GPU, without a CUDA context; :func:`topology` puts together what all said.
That a driver lets one GPU address another says nothing of the way there: over PCIe a fused kernel is many times
slower than no fusion (hazard M50).
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LinksUnknownError
from ..hazards.situation import Explained

#: The most NVLinks that a GPU has (H100, H200, B200). Where its peers' counts add up to more, they share a switch.
_MOST_LINKS = 18
_SMI_SECONDS = 10.0


class Topology(Explained):
    """How two ranks reach each other, or all pairs of a group."""

    NVSWITCH = "nvswitch", "NVSwitch"
    NVLINK = "nvlink", "NVLink bridges, without a switch"
    PARTIAL = "partial", "NVLink for some pairs and PCIe for others"
    PCIE = "pcie", "PCIe, without NVLink"
    NODES = "nodes", "a network between nodes"
    UNKNOWN = "unknown", "links that are not known"


#: Where every pair has NVLink.
FULL = (Topology.NVSWITCH, Topology.NVLINK)


@dataclass(frozen=True)
class Links:
    """What NVML says of one GPU; other GPUs by their PCI address.

    to: active NVLinks that end at another GPU. switch: those that end at a switch. hidden: those whose other end
    a virtual machine hides. p2p: whether another GPU of this machine is reached over NVLink at all. pcie: how near it
    is over PCIe, in the words of ``nvidia-smi topo -m``. fabric: the NVLink fabric between nodes, None without one.
    fabric_state: what the fabric manager has made of it.
    """

    address: str
    to: tuple[tuple[str, int], ...] = ()
    switch: int = 0
    hidden: int = 0
    p2p: tuple[tuple[str, bool], ...] = ()
    pcie: tuple[tuple[str, str], ...] = ()
    fabric: str | None = None
    fabric_state: str | None = None

    @property
    def active(self) -> int:
        """All active NVLinks."""
        return sum(count for _, count in self.to) + self.switch + self.hidden


def between(one: Links | None, other: Links | None, *, one_host: bool = True) -> Topology:
    """How these two GPUs reach each other. None: nothing is known of one."""
    if one is None or other is None:
        return Topology.UNKNOWN if one_host else Topology.NODES
    if not one_host:
        return Topology.NVSWITCH if one.fabric is not None and one.fabric == other.fabric else Topology.NODES
    if dict(one.to).get(other.address) or dict(other.to).get(one.address):
        return Topology.NVLINK
    told = dict(one.p2p).get(other.address, dict(other.p2p).get(one.address))
    if told is None and one.address == other.address and one.p2p:  # one more of the same, in a world that is made up
        told = all(reached for _, reached in one.p2p)
    if told is None and (one.switch and other.switch):
        told = True
    if told is None and (one.hidden or other.hidden):
        return Topology.UNKNOWN
    return Topology.NVSWITCH if told else Topology.PCIE


def topology(gpus: Sequence[tuple[str, Links | None]]) -> Topology:
    """How all of these reach each other; for each its host and its links. A single one has nobody to reach."""
    found = {between(a, b, one_host=host == other) for (host, a), (other, b) in itertools.combinations(gpus, 2)}
    if not found:
        return Topology.UNKNOWN
    for worst in (Topology.NODES, Topology.UNKNOWN):
        if worst in found:
            return worst
    if Topology.PCIE in found:
        return Topology.PARTIAL if len(found) > 1 else Topology.PCIE
    return Topology.NVLINK if Topology.NVLINK in found else Topology.NVSWITCH


# -- reading -----------------------------------------------------------------------------


def read(uuids: Sequence[str]) -> tuple[Links, ...]:
    """The links of these GPUs (``GPU-...``), by NVML, or where its binding is missing by ``nvidia-smi``.

    Raises :class:`LinksUnknownError`, or what NVML raises.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return from_smi(uuids, _smi)
    return from_nvml(nvml, uuids)


def from_nvml(nvml: Any, uuids: Sequence[str]) -> tuple[Links, ...]:
    """By the module ``pynvml``. It counts all GPUs of the machine, whatever CUDA_VISIBLE_DEVICES leaves."""
    nvml.nvmlInit()
    try:
        everyone = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return tuple(_links(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), everyone) for uuid in uuids)
    finally:
        nvml.nvmlShutdown()


def _links(nvml: Any, handle: Any, everyone: Sequence[Any]) -> Links:
    own = _address(nvml, handle)
    others = {address: other for other in everyone if (address := _address(nvml, other)) != own}
    ends = Counter(_ends(nvml, handle))
    direct = tuple(sorted((end, count) for end, count in ends.items() if end not in ("switch", "hidden")))
    p2p, pcie = {}, {}
    for address, other in others.items():
        status = _asked(nvml, "nvmlDeviceGetP2PStatus", handle, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status is not None:
            p2p[address] = status == nvml.NVML_P2P_STATUS_OK
        level = _asked(nvml, "nvmlDeviceGetTopologyCommonAncestor", handle, other)
        if level is not None:
            pcie[address] = _NEAR.get(level, "SYS")
    fabric, state = _fabric(nvml, handle)
    return Links(own, direct, ends["switch"], ends["hidden"], tuple(p2p.items()), tuple(pcie.items()), fabric, state)


#: ``nvmlGpuTopologyLevel_t``, as ``nvidia-smi topo -m`` writes it.
_NEAR = {0: "PSB", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}

#: ``nvmlGpuFabricState_t``.
_FABRIC_STATES = {1: "not started", 2: "in progress", 3: "completed"}


def _ends(nvml: Any, handle: Any) -> list[str]:
    """For each active NVLink: the address of the GPU at its other end, "switch", or "hidden"."""
    ends = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link) != nvml.NVML_FEATURE_ENABLED:
                continue
        except nvml.NVMLError:  # this device has fewer links, or none
            break
        kind = _asked(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        place = _asked(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
        if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            ends.append("switch")
        elif place is None or kind not in (None, nvml.NVML_NVLINK_DEVICE_TYPE_GPU):
            ends.append("hidden")  # a virtual machine hides the switch
        else:
            ends.append(_text(place.busId))
    return ends


def _fabric(nvml: Any, handle: Any) -> tuple[str | None, str | None]:
    """The fabric between nodes that a GPU belongs to, and its state; None where it knows of none."""
    try:
        info = nvml.c_nvmlGpuFabricInfoV_t()
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    except (nvml.NVMLError, AttributeError):  # an older driver or binding, another kind of GPU
        return None, None
    state = _FABRIC_STATES.get(int(info.state))
    if state is not None and (status := int(info.status)):
        state += f", with error {status}"
    cluster = bytes(info.clusterUuid)
    return (f"{cluster.hex()}/{info.cliqueId}" if any(cluster) and state == "completed" else None), state


def _asked(nvml: Any, name: str, *arguments: Any) -> Any:
    """What a function of NVML answers; None where this driver, binding or device has no answer."""
    try:
        return getattr(nvml, name)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _address(nvml: Any, handle: Any) -> str:
    return _text(nvml.nvmlDeviceGetPciInfo(handle).busId)


def _text(value: str | bytes) -> str:
    """NVML's strings are bytes in some releases of its binding."""
    return (value.decode() if isinstance(value, bytes) else value).lower()


# -- nvidia-smi --------------------------------------------------------------------------


def from_smi(uuids: Sequence[str], run: Callable[..., str]) -> tuple[Links, ...]:
    """By what ``nvidia-smi topo -m`` prints. Of two GPUs alone it does not say whether a switch is between them."""
    asked = run("--query-gpu=uuid,pci.bus_id", "--format=csv,noheader")
    addresses = dict(line.split(", ") for line in asked.lower().splitlines() if ", " in line)
    if missing := [uuid for uuid in uuids if uuid.lower() not in addresses]:
        raise LinksUnknownError(f"nvidia-smi does not know {missing[0]}; pip install nvidia-ml-py")
    places = list(addresses.values())
    found = {place: _row(place, cells, places) for place, cells in zip(places, _cells(run("topo", "-m")), strict=False)}
    if len(found) != len(places):
        raise LinksUnknownError(
            f"nvidia-smi topo -m shows {len(found)} of {len(places)} GPUs; pip install nvidia-ml-py"
        )
    return tuple(found[addresses[uuid.lower()]] for uuid in uuids)


def _cells(text: str) -> list[list[str]]:
    """The rows of its table, without the names of the GPUs."""
    return [line.split()[1:] for line in text.splitlines() if re.match(r"GPU\d+\s.*\bX\b", line)]


def _row(place: str, cells: Sequence[str], places: Sequence[str]) -> Links:
    others = [(other, cell) for other, cell in zip(places, cells, strict=False) if other != place]
    counts = [(other, int(cell[2:])) for other, cell in others if re.fullmatch(r"NV\d+", cell)]
    by_switch = sum(count for _, count in counts) > _MOST_LINKS
    return Links(
        place,
        to=() if by_switch else tuple(counts),
        switch=max((count for _, count in counts), default=0) if by_switch else 0,
        p2p=tuple((other, cell.startswith("NV")) for other, cell in others),
        pcie=tuple((other, cell) for other, cell in others if not cell.startswith("NV")),
    )


def _smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinksUnknownError(
            f"pynvml cannot be imported, and nvidia-smi does not run ({type(error).__name__}): pip install nvidia-ml-py"
        ) from error
    if done.returncode:
        raise LinksUnknownError(f"nvidia-smi {arguments[0]} ended with {done.returncode}: pip install nvidia-ml-py")
    return done.stdout
