"""What of a machine a collective depends on beside its GPUs, as files say it: IOMMU, access control, IMEX, containers.

Reading needs no GPU and no privileges. A *sight* that may end in trouble says how, and which row of the hazard table
that is; whether it does is another matter: `ringfence doctor --copies` tries.
"""

from __future__ import annotations

import os
import resource
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .runtime.collectives.links import FULL, Links, topology

#: An extended capability of PCI Express: access control services, and the bits that send peer traffic to the root.
_ACS, _EXTENDED = 0x0D, 0x100
_REDIRECTS = 0x04 | 0x08 | 0x10  # requests, completions, upstream forwarding
_NVIDIA, _BRIDGE, _DISPLAY = "0x10de", "0x0604", ("0x0300", "0x0302")
_CAP_SYS_PTRACE = 19
#: A file of a rank is some hundred kilobytes, and more after a long hang.
_LITTLE_DISK, _LITTLE_SHM = 256 << 20, 64 << 20


@dataclass(frozen=True)
class Sight:
    """Something that was looked at. concern: what may follow. hazard: the row of the table that this is."""

    name: str
    seen: str
    concern: str | None = None
    hazard: str | None = None


def look(
    links: Sequence[Links | None],
    nccl: Mapping[str, str],
    journals: Path,
    root: Path = Path("/"),
) -> tuple[Sight, ...]:
    """Everything. links: of the devices that this process sees. nccl: what is set for NCCL. root: of the files."""
    over_pcie = topology([("", one) for one in links]) not in FULL and len(gpus(root)) > 1
    return (
        *iommu_and_acs(root, over_pcie=over_pcie),
        fabric(links),
        imex(root, links),
        container(root),
        *limits(root),
        Sight("NCCL variables", ", ".join(f"{name}={value}" for name, value in sorted(nccl.items())) or "none"),
        disk(journals),
    )


# -- PCI Express -----------------------------------------------------------------------


def gpus(root: Path) -> list[Path]:
    """NVIDIA's GPUs among the machine's PCI devices, by their place in the tree of bridges."""
    devices = sorted((root / "sys/bus/pci/devices").glob("*"))
    return [d.resolve() for d in devices if _read(d / "vendor") == _NVIDIA and _read(d / "class")[:6] in _DISPLAY]


def iommu_and_acs(root: Path, *, over_pcie: bool) -> tuple[Sight, Sight]:
    """Whether stores from one GPU to another are translated, and whether they are sent up to the root first."""
    found = gpus(root)
    types = {kind for gpu in found if (kind := _read(gpu / "iommu_group/type"))}
    groups = list((root / "sys/kernel/iommu_groups").glob("*"))
    told = [word for word in _read(root / "proc/cmdline").split() if "iommu" in word or word.startswith("pci=")]
    said = f" (kernel: {' '.join(told)})" if told else ""
    translates = any(not kind.startswith("identity") for kind in types)
    if not groups:
        iommu = f"off{said}"
    elif not types:
        iommu = f"on{said}"
    else:
        iommu = f"on, and {'translates' if translates else 'passes through'} for the GPUs{said}"
    bridges = {bridge: _acs_control(bridge) for gpu in found for bridge in _bridges_above(gpu)}
    on = sorted(b.name for b, control in bridges.items() if control is not None and control & _REDIRECTS)
    hidden = [b for b, control in bridges.items() if control is None]
    acs = f"redirects at {', '.join(on)}" if on else "off" if bridges and not hidden else "not to be read (root only)"
    if not bridges:
        acs = "no bridge above a GPU to be seen"
    trouble = (
        "stores from GPU to GPU may be dropped or land elsewhere, without an error"
        if translates
        else "stores from GPU to GPU take the way over the root complex: slow, and not on every board at all"
    )
    suspect = over_pcie and translates and not on and bool(hidden)
    return (
        Sight("IOMMU", iommu, trouble if suspect else None, "M51" if suspect else None),
        Sight("ACS", acs, trouble if on and over_pcie else None, "M51" if on and over_pcie else None),
    )


def _bridges_above(gpu: Path) -> Iterator[Path]:
    yield from (place for place in gpu.parents if _read(place / "class")[:6] == _BRIDGE)


def _acs_control(device: Path) -> int | None:
    """The control word of access control services; 0 without any; None where it is not to be read."""
    try:
        space = (device / "config").read_bytes()
    except OSError:
        return None
    if len(space) <= _EXTENDED:  # the rest is shown to root only
        return None
    place, seen = _EXTENDED, set()
    while place and place not in seen and place + 8 <= len(space):
        seen.add(place)
        (header,) = struct.unpack_from("<I", space, place)
        if header & 0xFFFF == _ACS:
            return int(struct.unpack_from("<H", space, place + 6)[0])
        place = header >> 20
    return 0


# -- NVLink between machines ---------------------------------------------------------------


def fabric(links: Sequence[Links | None]) -> Sight:
    """What the fabric manager says of the GPUs."""
    states = {i: one.fabric_state for i, one in enumerate(links) if one is not None and one.fabric_state is not None}
    if not states:
        return Sight("fabric", "none, or not told by the driver")
    late = {i: state for i, state in states.items() if state != "completed"}
    seen = ", ".join(f"GPU {i} {state}" for i, state in late.items()) or "completed on all GPUs"
    if not late:
        return Sight("fabric", seen)
    return Sight("fabric", seen, "the fabric manager has not let these GPUs in: whoever meets them waits", "M52")


def imex(root: Path, links: Sequence[Links | None]) -> Sight:
    """Whether this process could map memory of other nodes, and whether there are any."""
    channels = sorted(path.name for path in (root / "dev/nvidia-caps-imex-channels").glob("channel*"))
    spans = any(one is not None and one.fabric is not None for one in links)
    if channels:
        return Sight("IMEX", ", ".join(channels[:4]))
    if not spans:
        return Sight("IMEX", "no channel, and no fabric between nodes that would need one")
    return Sight("IMEX", "no channel", "memory of other nodes of this NVLink domain cannot be mapped", "M53")


# -- containers ------------------------------------------------------------------------


def container(root: Path) -> Sight:
    """Whether a process may look into another of its user: py-spy does, and who takes memory handles out of it."""
    status = dict(line.split(":\t", 1) for line in _read(root / "proc/self/status").splitlines() if ":\t" in line)
    scope = _read(root / "proc/sys/kernel/yama/ptrace_scope") or "0"
    may = bool(int(status.get("CapEff", "0"), 16) >> _CAP_SYS_PTRACE & 1)
    filtered = status.get("Seccomp", "0").strip() == "2"
    inside = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    seen = (
        f"{'yes' if inside else 'none to be seen'}, {'with' if may else 'without'} CAP_SYS_PTRACE, "
        f"ptrace_scope {scope}, seccomp {'on' if filtered else 'off'}"
    )
    if may or (scope == "0" and not filtered):
        return Sight("container", seen)
    return Sight("container", seen, "py-spy and pidfd_getfd may be refused (EPERM): --cap-add=SYS_PTRACE", "M54")


def limits(root: Path) -> tuple[Sight, Sight]:
    """Shared memory, locked memory, open files, and what the control group allows."""
    most = _read(root / "sys/fs/cgroup/memory.max") or _read(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ", ".join(
        (
            f"memory {_size(int(most)) if most.isdecimal() and int(most) < 1 << 60 else 'unlimited'}",
            f"locked {'unlimited' if locked == resource.RLIM_INFINITY else _size(locked)}",
            f"open files {files}",
        )
    )
    shm = root / "dev/shm"
    if not shm.is_dir():
        return Sight("limits", allowed), Sight("/dev/shm", "absent", "NCCL between the ranks of a host needs it")
    size = shutil.disk_usage(shm).total
    concern = (
        "NCCL and torch put shared memory there: start the container with --shm-size" if size <= _LITTLE_SHM else None
    )
    return Sight("limits", allowed), Sight("/dev/shm", _size(size), concern)


def disk(folder: Path) -> Sight:
    """Room for journals."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Sight("journals", f"{folder}: {error.strerror}", "a rank that cannot write says nothing afterwards")
    writable = os.access(there, os.W_OK)
    seen = f"{_size(free)} free in {folder}{'' if writable else ', which may not be written'}"
    if writable and free >= _LITTLE_DISK:
        return Sight("journals", seen)
    return Sight("journals", seen, "a rank that cannot write its journal is missing when the job is looked into")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 1 << 30 else f"{bytes_ / 2**20:.0f} MiB"
