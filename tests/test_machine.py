"""What doctor sees of a machine beside its GPUs, on machines that are folders; and copies in a process of their own."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import copies_child
import pytest

from ringfence import machine
from ringfence.copies import steps, try_all
from ringfence.machine import Sight, container, disk, fabric, gpus, imex, iommu_and_acs, limits, look
from ringfence.runtime.collectives.links import Links
from ringfence.runtime.hazards.catalogue import find_hazard


def config(acs: int | None, *, whole: bool = True) -> bytes:
    """A configuration space: an extended capability, and behind it access control services with this control word."""
    space = bytearray(4096)
    struct.pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | 0x140 << 20)  # advanced error reporting, next at 0x140
    if acs is not None:
        struct.pack_into("<IHH", space, 0x140, 0x000D | 1 << 16, 0x5F, acs)
    return bytes(space if whole else space[:64])


def board(root: Path, *, acs: int | None = 0, whole: bool = True, kind: str | None = "DMA-FQ", count: int = 2) -> Path:
    """GPUs, each behind a bridge of its own."""
    listed = root / "sys/bus/pci/devices"
    listed.mkdir(parents=True)
    for i in range(count):
        bridge = root / f"sys/devices/pci0000:{i:02x}/0000:{i:02x}:01.1"
        gpu = bridge / f"0000:{i:02x}:02.0"
        for place, class_, vendor in ((bridge, "0x060400", "0x1022"), (gpu, "0x030200", "0x10de")):
            place.mkdir(parents=True)
            (place / "class").write_text(f"{class_}\n")
            (place / "vendor").write_text(f"{vendor}\n")
            (place / "config").write_bytes(config(acs, whole=whole))
            (listed / place.name).symlink_to(place)
        if kind is not None:
            group = root / f"sys/kernel/iommu_groups/{i}"
            group.mkdir(parents=True)
            (group / "type").write_text(f"{kind}\n")
            (gpu / "iommu_group").symlink_to(group)
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text("BOOT_IMAGE=/vmlinuz quiet intel_iommu=on pci=noats\n")
    return root


def test_gpus_are_found_among_the_devices(tmp_path: Path) -> None:
    assert [gpu.name for gpu in gpus(board(tmp_path, count=3))] == [f"0000:0{i}:02.0" for i in range(3)]
    assert gpus(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("board_of", "iommu", "acs", "concerned"),
    [
        ({"acs": 0x1D}, "on, and translates for the GPUs", "redirects at 0000:00:01.1, 0000:01:01.1", "ACS"),
        ({"acs": 0x1D, "kind": "identity"}, "on, and passes through", "redirects at", "ACS"),
        ({"acs": 0x1D, "kind": None}, "off", "redirects at", "ACS"),
        ({"acs": 0x01}, "on, and translates", "off", None),  # the source is validated, nothing redirected
        ({"acs": 0}, "on, and translates", "off", None),
        ({"acs": None}, "on, and translates", "off", None),  # a bridge without the capability
        ({"whole": False}, "on, and translates", "not to be read (root only)", "IOMMU"),
        ({"whole": False, "kind": "identity"}, "passes through", "not to be read (root only)", None),
        ({"whole": False, "kind": None}, "off", "not to be read (root only)", None),
    ],
)
def test_what_may_keep_stores_from_a_peer(
    tmp_path: Path, board_of: dict[str, Any], iommu: str, acs: str, concerned: str | None
) -> None:
    root = board(tmp_path, **board_of)
    sights = iommu_and_acs(root, over_pcie=True)
    assert [s.name for s in sights] == ["IOMMU", "ACS"]
    assert iommu in sights[0].seen and "(kernel: intel_iommu=on pci=noats)" in sights[0].seen
    assert acs in sights[1].seen
    assert [s.name for s in sights if s.concern] == ([concerned] if concerned else [])
    assert all(s.hazard == ("M51" if s.concern else None) for s in sights)
    assert not any(s.concern for s in iommu_and_acs(root, over_pcie=False)), "NVLink does not pass the bridges"


def test_a_machine_without_gpus_has_no_bridge_to_ask(tmp_path: Path) -> None:
    assert iommu_and_acs(board(tmp_path, count=0), over_pcie=True) == (
        Sight("IOMMU", "off (kernel: intel_iommu=on pci=noats)"),
        Sight("ACS", "no bridge above a GPU to be seen"),
    )


def test_a_chain_of_capabilities_that_bites_its_tail_ends(tmp_path: Path) -> None:
    space = bytearray(config(None))
    struct.pack_into("<I", space, 0x140, 0x0002 | 1 << 16 | 0x100 << 20)
    root = board(tmp_path)
    for bridge in (root / "sys/devices").glob("*/*"):
        (bridge / "config").write_bytes(bytes(space))
    assert iommu_and_acs(root, over_pcie=True)[1].seen == "off"


def test_the_state_of_the_fabric() -> None:
    done, late = Links("a", fabric_state="completed"), Links("b", fabric_state="in progress")
    assert fabric([done, done]) == Sight("fabric", "completed on all GPUs")
    assert fabric([Links("a"), None]).seen == "none, or not told by the driver"
    sight = fabric([done, late, None])
    assert (sight.seen, sight.hazard) == ("GPU 1 in progress", "M52") and sight.concern is not None
    assert fabric([Links("a", fabric_state="completed, with error 3")]).hazard == "M52"


def test_imex_channels_where_a_fabric_spans_nodes(tmp_path: Path) -> None:
    rack = [Links("a", fabric="some/1")]
    assert imex(tmp_path, rack).hazard == "M53" and imex(tmp_path, rack).seen == "no channel"
    assert imex(tmp_path, [Links("a"), None]).concern is None
    folder = tmp_path / "dev/nvidia-caps-imex-channels"
    folder.mkdir(parents=True)
    (folder / "channel0").touch()
    assert imex(tmp_path, rack) == Sight("IMEX", "channel0")


def process(root: Path, *, capabilities: int, seccomp: int, scope: str | None) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tpython\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\n")
    if scope is not None:
        (root / "proc/sys/kernel/yama").mkdir(parents=True)
        (root / "proc/sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
    return root


@pytest.mark.parametrize(
    ("capabilities", "seccomp", "scope", "concerned"),
    [
        (1 << 19, 2, "1", False),
        (0xA80425FB, 2, "0", True),  # docker's default
        (0, 0, "1", True),
        (0, 0, "0", False),
        (0, 0, None, False),
        (~(1 << 19) & 0xFFFFFFFF, 0, "2", True),
    ],
)
def test_whether_a_process_may_look_into_another(
    tmp_path: Path, capabilities: int, seccomp: int, scope: str | None, concerned: bool
) -> None:
    root = process(tmp_path, capabilities=capabilities, seccomp=seccomp, scope=scope)
    sight = container(root)
    assert (sight.concern is not None) == concerned == (sight.hazard == "M54")
    assert ("with CAP_SYS_PTRACE" in sight.seen) == bool(capabilities >> 19 & 1)
    assert f"ptrace_scope {scope or 0}" in sight.seen and sight.seen.startswith("none to be seen")
    (root / ".dockerenv").touch()
    assert container(root).seen.startswith("yes")


def test_limits_and_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(tmp_path)[1].concern and "memory unlimited" in limits(tmp_path)[0].seen
    (tmp_path / "dev/shm").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{8 << 30}\n")
    for size, concerned in ((64 << 20, True), (1 << 30, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, size=size: SimpleNamespace(total=size, free=size))
        allowed, shm = limits(tmp_path)
        assert "memory 8.0 GiB" in allowed.seen and (shm.concern is not None) == concerned
    assert shm.seen == "1.0 GiB"
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert "memory unlimited" in limits(tmp_path)[0].seen


def test_room_for_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk(tmp_path / "not" / "yet").concern is None
    for free, concerned in ((1 << 20, True), (1 << 40, False)):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert (disk(tmp_path).concern is not None) == concerned
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be written" in disk(tmp_path).seen and disk(tmp_path).concern is not None


def test_all_of_it(tmp_path: Path) -> None:
    root = process(board(tmp_path / "m", acs=0x1D), capabilities=0, seccomp=2, scope="1")
    bridged = [Links("a"), Links("b")]
    sights = look(bridged, {"NCCL_P2P_LEVEL": "SYS", "NCCL_DEBUG": "WARN"}, tmp_path, root)
    assert {s.hazard for s in sights if s.concern} == {"M51", "M54", None}
    assert [s.seen for s in sights if s.name == "NCCL variables"] == ["NCCL_DEBUG=WARN, NCCL_P2P_LEVEL=SYS"]
    for sight in sights:
        assert sight.hazard is None or find_hazard(sight.hazard)
    switched = [Links("a", switch=18), Links("b", switch=18)]
    assert "M51" not in {s.hazard for s in look(switched, {}, tmp_path, root)}
    assert look([], {}, tmp_path, tmp_path / "nothing"), "a machine without anything"


# -- copies in a process of their own


def test_every_pair_that_is_within_reach_is_tried_and_announced() -> None:
    found = list(steps(3, lambda of, to: {of, to} != {0, 2}, lambda of, to: of < to))
    assert found == [
        step for of, to in ((0, 1), (1, 0), (1, 2), (2, 1)) for step in ((of, to, None), (of, to, of < to))
    ]

    def broken(of: int, to: int) -> bool:
        raise RuntimeError("CUDA error:\n unspecified")

    assert list(steps(2, lambda of, to: True, broken)) == [
        (0, 1, None),
        (0, 1, "RuntimeError: CUDA error: unspecified"),
    ]


def test_a_copy_that_hangs_is_lost_and_ended() -> None:
    assert try_all(2, seconds=120, target=copies_child.ends) == {(0, 1): False, (1, 0): True}
    looks = iter([0.0, 0.0, 0.0, 0.0, 1000.0])  # the deadline is over when three steps were heard
    with mock.patch("ringfence.copies.time", mock.Mock(monotonic=lambda: next(looks))):
        assert try_all(2, seconds=120, target=copies_child.hangs) == {(0, 1): True, (1, 0): False}


@pytest.mark.parametrize(("name", "said"), [("fails", "RuntimeError: no CUDA"), ("dies", "that process ended with 3")])
def test_what_cannot_be_tried_is_no_loss(name: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"copies could not be tried: {said}"):
        try_all(2, seconds=120, target=getattr(copies_child, name))
