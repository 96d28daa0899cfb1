"""How GPUs are linked, from what NVML says of machines that are made up; and what is chosen on them."""

from __future__ import annotations

import ctypes
import itertools
import re
import types
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_flashinfer import FACTS

from ringfence.runtime.collectives import links as links_module
from ringfence.runtime.collectives import rank_facts
from ringfence.runtime.collectives.choice import choose
from ringfence.runtime.collectives.links import Links, Topology, between, from_nvml, from_smi, read, topology
from ringfence.runtime.collectives.rank_facts import RankFacts, linked, numbered, topology_of
from ringfence.runtime.collectives.ready import situation_of
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.errors import CollectiveUnavailableError, LinksUnknownError
from ringfence.runtime.hazards.catalogue import applicable
from ringfence.runtime.hazards.situation import Collective, Fact

MNNVL, TRTLLM, REFERENCE = Collective.MNNVL, Collective.TRTLLM, Collective.REFERENCE
RINGFENCE = Collective.RINGFENCE


class Machine:
    """GPUs whose links are these, seen through ``pynvml``.

    bridges: NVLinks between two GPUs. switch: NVLinks of each GPU to an NVSwitch. hidden: a virtual machine hides
    what is at their ends. old: a driver that knows nothing of P2P states, kinds of ends, fabrics or PCIe levels.
    """

    NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED = 18, 1
    NVML_NVLINK_DEVICE_TYPE_GPU, NVML_NVLINK_DEVICE_TYPE_SWITCH = 0, 2
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0

    class NVMLError(Exception):
        pass

    class c_nvmlGpuFabricInfoV_t(ctypes.Structure):
        _fields_ = (
            ("clusterUuid", ctypes.c_uint8 * 16),
            ("status", ctypes.c_uint32),
            ("cliqueId", ctypes.c_uint32),
            ("state", ctypes.c_uint32),
        )

    def __init__(
        self,
        count: int,
        bridges: dict[tuple[int, int], int] | None = None,
        switch: int = 0,
        *,
        hidden: bool = False,
        old: bool = False,
        fabric: tuple[int, int, int] | None = None,
    ) -> None:
        self.count, self.switch, self.hidden, self.old, self.fabric = count, switch, hidden, old, fabric
        self.bridges = {frozenset(pair): links for pair, links in (bridges or {}).items()}
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        text = f"00000000:{0x3B + handle:02X}:00.0"
        return SimpleNamespace(busId=text.encode() if handle % 2 else text)

    def _ends(self, handle: int) -> list[int | None]:
        """GPU, or None for the switch; one link of every GPU is down."""
        bridged = [(other, self.bridges.get(frozenset((handle, other)), 0)) for other in range(self.count)]
        return [end for end, links in (*bridged, (None, self.switch)) for _ in range(links)]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if not self._ends(handle):
            raise self.NVMLError
        return int(link < len(self._ends(handle)))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        if self.old:
            raise self.NVMLError
        return 255 if self.hidden else 2 if self._ends(handle)[link] is None else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        end = self._ends(handle)[link]
        if self.hidden or (self.old and end is None):
            raise self.NVMLError
        return self.nvmlDeviceGetPciInfo(200 if end is None else end)

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        if self.old:
            raise self.NVMLError
        return 0 if self.switch or frozenset((one, other)) in self.bridges else 5

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, other: int) -> int:
        if self.old:
            raise self.NVMLError
        return 10 if one // 2 == other // 2 else 30 if one // 4 == other // 4 else 50

    def nvmlDeviceGetGpuFabricInfoV(self, handle: int, info: Any) -> None:
        if self.fabric is None:
            raise self.NVMLError
        state, clique, cluster = self.fabric
        found = info._obj
        found.state, found.status, found.cliqueId, found.clusterUuid[0] = state, 0, clique, cluster

    def links(self, devices: Sequence[int] | None = None) -> tuple[Links, ...]:
        found = from_nvml(self, [f"GPU-{i}" for i in (devices if devices is not None else range(self.count))])
        assert self.open == 0
        return found


def pairs(count: int, size: int, links: int) -> dict[tuple[int, int], int]:
    """Bridges within islands of this size."""
    return {p: links for p in itertools.combinations(range(count), 2) if p[0] // size == p[1] // size}


MACHINES: dict[str, tuple[Machine, Topology]] = {
    "HGX H200": (Machine(8, switch=18), Topology.NVSWITCH),
    "HGX H200 in a virtual machine": (Machine(8, switch=18, hidden=True), Topology.NVSWITCH),
    "two GPUs of an HGX": (Machine(2, switch=18), Topology.NVSWITCH),
    "H200 NVL, eight in two islands of four": (Machine(8, pairs(8, 4, 6)), Topology.PARTIAL),
    "H200 NVL, four with a 4-way bridge": (Machine(4, pairs(4, 4, 6)), Topology.NVLINK),
    "H100 NVL, four in pairs": (Machine(4, pairs(4, 2, 12)), Topology.PARTIAL),
    "H100 NVL, a pair": (Machine(2, pairs(2, 2, 12)), Topology.NVLINK),
    "H100 PCIe, two": (Machine(2), Topology.PCIE),
    "H100 PCIe, four": (Machine(4), Topology.PCIE),
    "an old driver, bridges": (Machine(4, pairs(4, 2, 12), old=True), Topology.PARTIAL),
    "an old driver, PCIe": (Machine(4, old=True), Topology.PCIE),
    "an old driver that hides the ends": (Machine(4, switch=18, hidden=True, old=True), Topology.UNKNOWN),
}


def world(found: Sequence[Links], **other: Any) -> list[RankFacts]:
    return numbered([replace(FACTS, peers=True, links=links, **other) for links in found])


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_machine_is(name: str) -> None:
    machine, expected = MACHINES[name]
    assert topology_of(world(machine.links())) is expected


@pytest.mark.parametrize("name", MACHINES)
def test_kernels_are_the_default_where_they_were_measured_and_nowhere_else(name: str) -> None:
    machine, expected = MACHINES[name]
    found = machine.links()
    choice = choose(world(found))
    if expected is Topology.NVSWITCH:
        assert choice.collective is (RINGFENCE if len(found) == 2 else TRTLLM)
        return
    assert choice.collective is REFERENCE and choice.row is None
    (why,) = [c.why_not for c in choice.candidates if c.collective is TRTLLM]
    assert why is not None and f"no row of the size table knows {len(found)} GPUs of SM90 linked by" in why
    assert expected.meaning in why and "it was measured over NVSwitch (" in why and "`ringfence bench`" in why
    assert ("10 to 34 times slower" in why and "M50" in why) == (expected in (Topology.PARTIAL, Topology.PCIE))


def test_the_reason_names_a_pair_without_nvlink() -> None:
    two_islands = world(MACHINES["H200 NVL, eight in two islands of four"][0].links())
    assert linked(two_islands) == "NVLink for some pairs and PCIe for others (16 of 28 pairs, such as ranks 0 and 4)"
    assert linked(numbered(two_islands, [8, 9, 10, 11, 12, 13, 14, 15])).endswith("such as ranks 8 and 12)")
    assert linked(two_islands[:4]) == "NVLink bridges, without a switch"
    assert linked(two_islands[3:5]) == "PCIe, without NVLink (1 of 1 pairs, such as ranks 3 and 4)"
    unknown = world([None, None], links_unknown="OSError: no NVML")  # type: ignore[list-item]
    assert linked(unknown) == "links that are not known (OSError: no NVML)"


def test_one_rank_whose_links_are_not_known_is_enough() -> None:
    for odd in range(4):
        ranks = world(Machine(4, switch=18).links())
        ranks[odd] = replace(ranks[odd], links=None, links_unknown="ImportError: no pynvml")
        choice = choose(ranks)
        assert choice.collective is REFERENCE
        assert any("ImportError: no pynvml" in reason for reason in choice.reasons)


def test_a_worker_that_sees_one_gpu_only_is_placed_by_what_the_others_say() -> None:
    """Ray and Kubernetes: each process is shown its own GPU, by CUDA or by NVML too."""
    for machine, expected in MACHINES.values():
        seen = [machine.links([i])[0] for i in range(machine.count)]
        assert topology([("here", links) for links in seen]) is expected
        alone = [replace(links, p2p=(), pcie=()) for links in seen]  # a container shows NVML one GPU
        if not machine.hidden:
            assert topology([("here", links) for links in alone]) is expected
    hidden = [replace(links, p2p=()) for links in MACHINES["HGX H200 in a virtual machine"][0].links()]
    assert topology([("here", links) for links in hidden]) is Topology.UNKNOWN


def test_a_switch_that_does_not_join_two_gpus_is_pcie() -> None:
    """No fabric manager, or two partitions of one switch: the links are up, and NVML knows no way."""
    machine = Machine(2, switch=18)
    machine.nvmlDeviceGetP2PStatus = lambda one, other, index: 5  # type: ignore[method-assign]
    assert topology_of(world(machine.links())) is Topology.PCIE


def test_nodes_are_linked_by_a_fabric_or_by_a_network() -> None:
    (rack,) = Machine(1, switch=18, fabric=(3, 7, 9)).links()
    assert rack.fabric == f"09{'00' * 15}/7" and rack.fabric_state == "completed"
    (other,) = Machine(1, switch=18, fabric=(3, 8, 9)).links()
    (unready,) = Machine(1, switch=18, fabric=(2, 7, 9)).links()
    (alone,) = Machine(1, switch=18, fabric=(3, 0, 0)).links()
    assert unready.fabric is None and unready.fabric_state == "in progress" and alone.fabric is None
    assert between(rack, replace(rack, address="elsewhere"), one_host=False) is Topology.NVSWITCH
    for links in (other, unready, alone, None):
        assert between(rack, links, one_host=False) is Topology.NODES
    ranks = world([rack, rack], capability=(10, 0), multicast=True, opt_outs=())
    ranks[1] = replace(ranks[1], host="node1")
    assert choose(ranks).transport == "multicast"
    ranks[1] = replace(ranks[1], links=other)
    assert choose(ranks).collective is REFERENCE
    with pytest.raises(
        CollectiveUnavailableError, match=r"multicast needs an NVSwitch, and .* a network between nodes"
    ):
        choose(ranks, wanted="mnnvl")  # the device has multicast, the way to the other does not (hazard M24)


def test_multicast_is_barred_where_bridges_only_look_like_it() -> None:
    """H200 NVL: the device attribute says yes, the workspace is created, the first capture crashes."""
    ranks = world(MACHINES["H200 NVL, eight in two islands of four"][0].links(), multicast=True, opt_outs=())
    with pytest.raises(CollectiveUnavailableError, match="mnnvl/multicast: NVLink multicast needs an NVSwitch"):
        choose(ranks, wanted="mnnvl")


def test_who_insists_is_warned_by_the_table() -> None:
    for name, warned in (("H100 PCIe, four", True), ("H100 NVL, four in pairs", True), ("HGX H200", False)):
        ranks = world(MACHINES[name][0].links())
        choice = choose(ranks, wanted="trtllm")
        situation = situation_of(choice, ranks, dtype="bfloat16")
        assert (Fact.NOT_ALL_NVLINK in situation.facts) == warned
        assert ("M50" in [h.id for h in applicable(situation)]) == warned


def test_a_row_of_ones_own_for_this_topology_is_taken() -> None:
    ranks = world(MACHINES["H100 PCIe, two"][0].links())
    mine = SizeRow(TRTLLM, "peer", (9, 0), 2, 1, 2, 3, "mine", topology=Topology.PCIE)
    assert choose(ranks, table=(mine,)).row is mine
    assert choose(world(Machine(2, switch=18).links()), table=(mine,)).collective is REFERENCE


def test_all_that_nvml_says_of_one_gpu() -> None:
    links = Machine(4, pairs(4, 2, 12), 3).links([1])[0]
    assert links == Links(
        "00000000:3c:00.0",
        to=(("00000000:3b:00.0", 12),),
        switch=3,
        p2p=tuple((f"00000000:{i:02x}:00.0", True) for i in (0x3B, 0x3D, 0x3E)),
        pcie=tuple((f"00000000:{i:02x}:00.0", near) for i, near in ((0x3B, "PIX"), (0x3D, "PHB"), (0x3E, "PHB"))),
    )
    assert links.active == 15


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
def test_a_group_is_as_its_worst_pair(gpus: int) -> None:
    """Against the same, said of each pair by hand."""
    ends = {"switch": Links("s", switch=18), "bridge": Links("b", to=(("b", 6),)), "pcie": Links("p")}
    for names in itertools.product(ends, repeat=gpus):
        found = topology([("here", ends[name]) for name in names])
        ways = {"switch" if {a, b} == {"switch"} else "bridge" if a == b == "bridge" else "pcie"
                for a, b in itertools.combinations(names, 2)}  # fmt: skip
        expected = {
            frozenset(): Topology.UNKNOWN,
            frozenset({"switch"}): Topology.NVSWITCH,
            frozenset({"bridge"}): Topology.NVLINK,
            frozenset({"pcie"}): Topology.PCIE,
        }.get(frozenset(ways), Topology.PARTIAL)
        assert found is expected, names


# -- nvidia-smi, where there is no binding of NVML


def smi(cells: list[list[str]]) -> Any:
    """What it prints for these cells of its matrix, with what it adds."""
    count = len(cells)
    head = "\t" + "\t".join(f"GPU{i}" for i in range(count)) + "\tNIC0\tCPU Affinity\tNUMA Affinity"
    rows = [f"GPU{i}\t" + "\t".join(f" {c} " for c in row) + "\tSYS\t0-47\t0" for i, row in enumerate(cells)]
    legend = "NIC0\tSYS\tSYS\t X\n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks"
    table = "\n".join([head, *rows, legend])
    uuids = "\n".join(f"GPU-{i}, 00000000:{0x3B + i:02X}:00.0" for i in range(count))

    def run(*arguments: str) -> str:
        return table if arguments[0] == "topo" else uuids

    return run


def matrix(count: int, cell: Any) -> list[list[str]]:
    return [["X" if i == j else cell(i, j) for j in range(count)] for i in range(count)]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (matrix(8, lambda i, j: "NV18"), Topology.NVSWITCH),
        (matrix(4, lambda i, j: "NV6"), Topology.NVLINK),
        (matrix(4, lambda i, j: "NV12" if i // 2 == j // 2 else "SYS"), Topology.PARTIAL),
        (matrix(8, lambda i, j: "NV6" if i // 4 == j // 4 else "NODE"), Topology.PARTIAL),
        (matrix(2, lambda i, j: "PHB"), Topology.PCIE),
        (matrix(2, lambda i, j: "NV18"), Topology.NVLINK),  # a switch or a bridge: the lesser is believed
    ],
)
def test_the_matrix_of_nvidia_smi(cells: list[list[str]], expected: Topology) -> None:
    found = from_smi([f"GPU-{i}" for i in range(len(cells))], smi(cells))
    assert topology([("here", links) for links in found]) is expected
    assert found[1].address == "00000000:3c:00.0"


def test_what_nvidia_smi_does_not_say_is_named() -> None:
    with pytest.raises(LinksUnknownError, match="does not know GPU-9; pip install nvidia-ml-py"):
        from_smi(["GPU-9"], smi(matrix(2, lambda i, j: "SYS")))
    run = smi(matrix(2, lambda i, j: "SYS"))
    with pytest.raises(LinksUnknownError, match="shows 0 of 2 GPUs"):
        from_smi(["GPU-0"], lambda *arguments: "" if arguments[0] == "topo" else run(*arguments))


def test_without_a_binding_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(links_module.importlib, "import_module", missing)
    monkeypatch.setattr(links_module, "_smi", smi(matrix(2, lambda i, j: "PIX")))
    assert [links.pcie for links in read(["GPU-1"])] == [(("00000000:3b:00.0", "PIX"),)]
    monkeypatch.undo()
    monkeypatch.setattr(links_module.importlib, "import_module", missing)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LinksUnknownError, match=re.escape("nvidia-smi does not run (FileNotFoundError)")):
        read(["GPU-1"])


def test_the_probe_of_a_rank_reads_its_own_gpu_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, uuid="1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(rank_facts, "_device_has_multicast", lambda index: False)
    monkeypatch.setattr(rank_facts, "read", lambda uuids: from_nvml(Machine(2, switch=18), uuids))
    facts = rank_facts.probe(torch.device("cuda", 0))
    assert facts.links is not None and facts.links.switch == 18 and facts.links_unknown is None
    monkeypatch.setattr(rank_facts, "read", lambda uuids: 1 / 0)
    facts = rank_facts.probe(torch.device("cuda", 0))
    assert facts.links is None and facts.links_unknown == "ZeroDivisionError: division by zero"
