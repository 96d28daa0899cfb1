"""Which sizes a fused collective is worth using for, as data.

A row holds for one GPU generation, number of ranks, collective and transport, and for how the GPUs are linked: what
wins over an NVSwitch loses over PCIe by an order of magnitude (hazard M50). Sizes are bytes
of the tensor that one rank reduces (tokens x hidden size x element size), so one row serves
every model. ``ringfence bench --write-table FILE`` measures rows for the machine at hand, and
the option ``size_table`` reads them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SizeTableError
from ..hazards.situation import Collective, Strategy
from . import table as collectives
from .kernels import Implementation
from .links import Topology

MIB = 1 << 20

#: Version of the file. Rows of version 1 did not say how the GPUs were linked.
SCHEMA = 2

#: How the ranks' memory is reached: over an NVLink multicast object, or by the peer's own pointer.
TRANSPORTS = ("multicast", "peer")


@dataclass(frozen=True)
class SizeRow:
    """Up to which size, in bytes, each way is the fastest that is known. 0 means never.

    one_shot: fused, every rank sends everything to every rank. fused: fused at all; between the
    two by two-shot. all_reduce: an all-reduce without a norm. bitwise: one-shot was shown to
    return the same bits for a row of the input in every run and whatever the token count.
    topology: how the GPUs were linked where it was measured.
    """

    collective: str
    transport: str | None
    capability: tuple[int, int]
    world_size: int
    one_shot: int
    fused: int
    all_reduce: int
    source: str
    bitwise: bool = False
    topology: Topology = Topology.NVSWITCH

    def strategy(self, size: int) -> Strategy | None:
        """How a fused call of this size is carried out; None: not by this collective."""
        if size <= self.one_shot:
            return Strategy.ONE_SHOT
        return Strategy.TWO_SHOT if size <= self.fused else None


_OURS = "measured (ringfence docs measurements)"
_VLLM = "vLLM's fusion pass, its table of the largest fused size and of the largest one-shot size"
_MNNVL, _TRTLLM, _OWN = Collective.MNNVL, Collective.TRTLLM, Collective.RINGFENCE
_HALF = MIB // 2

TABLE: tuple[SizeRow, ...] = (
    SizeRow(_OWN, "peer", (9, 0), 2, 32 * MIB, 32 * MIB, 32 * MIB, _OURS, bitwise=True),
    SizeRow(_OWN, "peer", (9, 0), 4, MIB // 16, 32 * MIB, 2 * MIB, _OURS, bitwise=True),
    SizeRow(_MNNVL, "peer", (9, 0), 2, 8 * MIB, 8 * MIB, 8 * MIB, _OURS, bitwise=True),
    SizeRow(_TRTLLM, "peer", (9, 0), 2, 8 * MIB, 32 * MIB, 8 * MIB, _OURS, bitwise=True),
    SizeRow(_TRTLLM, "peer", (9, 0), 4, 2 * MIB, 8 * MIB, 2 * MIB, _OURS, bitwise=True),
    SizeRow(_TRTLLM, "peer", (9, 0), 8, _HALF, _HALF, 0, _VLLM),
    SizeRow(_TRTLLM, "peer", (10, 0), 2, 32 * MIB, 64 * MIB, 0, _VLLM),
    SizeRow(_TRTLLM, "peer", (10, 0), 4, 4 * MIB, 32 * MIB, 0, _VLLM),
    SizeRow(_TRTLLM, "peer", (10, 0), 8, MIB, MIB, 0, _VLLM),
    SizeRow(_TRTLLM, "peer", (10, 3), 2, 32 * MIB, 64 * MIB, 0, _VLLM),
    SizeRow(_TRTLLM, "peer", (10, 3), 4, 4 * MIB, 64 * MIB, 0, _VLLM),
    SizeRow(_TRTLLM, "peer", (10, 3), 8, 2 * MIB, 4 * MIB, 0, _VLLM),
    # FlashInfer's own switch to two-shot: ranks x size above 1 MiB.
    SizeRow(_MNNVL, "multicast", (10, 0), 2, _HALF, 64 * MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 0), 4, MIB // 4, 32 * MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 0), 8, MIB // 8, MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 0), 16, MIB // 16, 64 * MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 3), 2, _HALF, 64 * MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 3), 4, MIB // 4, 64 * MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 3), 8, MIB // 8, 4 * MIB, 0, _VLLM),
    SizeRow(_MNNVL, "multicast", (10, 3), 16, MIB // 16, 64 * MIB, 0, _VLLM),
)


def find_row(
    rows: Sequence[SizeRow],
    collective: str,
    transport: str | None,
    capability: tuple[int, int],
    world_size: int,
    topology: Topology,
) -> SizeRow | None:
    """The first row for this; None where nothing is known."""
    found = elsewhere(rows, collective, transport, capability, world_size)
    return next((row for row in found if row.topology == topology), None)


def elsewhere(
    rows: Sequence[SizeRow], collective: str, transport: str | None, capability: tuple[int, int], world_size: int
) -> tuple[SizeRow, ...]:
    """The rows for this, however the GPUs were linked."""
    wanted = (collective, transport, capability, world_size)
    return tuple(r for r in rows if (r.collective, r.transport, r.capability, r.world_size) == wanted)


def forced_row(
    one: Implementation, capability: tuple[int, int], world_size: int, topology: Topology = Topology.UNKNOWN
) -> SizeRow:
    """For a collective that a user insists on where no row knows it: one-shot as far as a small message goes."""
    one_shot = 8 * MIB // world_size
    fused = 8 * MIB if Strategy.TWO_SHOT in one.strategies else one_shot
    source = "no row: forced by the user"
    return SizeRow(one.name, one.transport, capability, world_size, one_shot, fused, 0, source, topology=topology)


@dataclass(frozen=True)
class MoeRow:
    """Up to how many tokens of a rank dispatch and combine by kernels are the fastest that is known. 0 means never."""

    capability: tuple[int, int]
    world_size: int
    most: int
    source: str
    topology: Topology = Topology.NVSWITCH


#: Won at every size that was measured, in bfloat16 and in float8 with scales.
MOE_TABLE: tuple[MoeRow, ...] = (
    MoeRow((9, 0), 2, 1024, "measured on two H200s, hidden 4096 and 7168"),
    MoeRow((9, 0), 4, 1024, "measured on four H200s, hidden 7168"),
)


def find_moe_row(
    rows: Sequence[MoeRow], capability: tuple[int, int], world_size: int, topology: Topology
) -> MoeRow | None:
    """The first row for this; None where nothing is known."""
    wanted = (capability, world_size, topology)
    return next((r for r in rows if (r.capability, r.world_size, r.topology) == wanted), None)


def read_table(path: str | Path) -> tuple[SizeRow, ...]:
    """The rows of a file that :func:`write_table` wrote. Raises :class:`SizeTableError`."""
    content = _content(path)
    _moe_rows(path, content)  # whoever reads them later has been told
    return tuple(_row(path, i, row) for i, row in enumerate(content["rows"]))


def read_moe_rows(path: str | Path) -> tuple[MoeRow, ...]:
    """Those about dispatch and combine. Raises :class:`SizeTableError`."""
    return _moe_rows(path, _content(path))


def _content(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SizeTableError(f"the size table '{path}' cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("rows"), list):
        raise SizeTableError(f"'{path}' is no size table of schema {SCHEMA}; write one with `ringfence bench`")
    return content


def write_table(path: str | Path, rows: Sequence[SizeRow], moe_rows: Sequence[MoeRow] = ()) -> None:
    """Write rows as JSON."""
    content: dict[str, Any] = {"schema": SCHEMA, "rows": [dataclasses.asdict(row) for row in rows]}
    if moe_rows:
        content["moe_rows"] = [dataclasses.asdict(row) for row in moe_rows]
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def _row(path: str | Path, index: int, given: Any) -> SizeRow:
    where = f"row {index} of the size table '{path}'"
    fields = {f.name: f for f in dataclasses.fields(SizeRow)}
    if not isinstance(given, dict):
        raise SizeTableError(f"{where} is no object")
    needed = [name for name, f in fields.items() if f.default is dataclasses.MISSING or name == "topology"]
    if wrong := sorted({*given} - {*fields}) or [name for name in needed if name not in given]:
        raise SizeTableError(
            f"{where} has unknown or missing fields: {', '.join(wrong)}; `ringfence bench` writes them all"
        )
    collective, transport, capability = given["collective"], given["transport"], given["capability"]
    known = {one.name: one.name for one in collectives.ALL if one.make is not None}
    if not isinstance(collective, str) or collective not in known:
        raise SizeTableError(f"{where} is about {collective!r}; only {' and '.join(known)} have sizes")
    if transport not in TRANSPORTS:
        raise SizeTableError(f"{where} has transport {transport!r}, which is not one of {list(TRANSPORTS)}")
    if not isinstance(capability, list) or len(capability) != 2 or any(type(n) is not int for n in capability):
        raise SizeTableError(f"{where} has capability {capability!r}; write it as [9, 0]")
    for name in ("world_size", "one_shot", "fused", "all_reduce"):
        least = 2 if name == "world_size" else 0
        if type(given[name]) is not int or given[name] < least:
            raise SizeTableError(f"{where} has {name} {given[name]!r}, which is no size")
    for name, kind in (("source", str), ("bitwise", bool)):
        if name in given and type(given[name]) is not kind:
            raise SizeTableError(f"{where} has {name} {given[name]!r}, which is no {kind.__name__}")
    if given["one_shot"] > given["fused"]:
        raise SizeTableError(f"{where}: one_shot is larger than fused")
    topologies = {str(topology): topology for topology in Topology}
    if given["topology"] not in list(topologies):
        raise SizeTableError(f"{where} has topology {given['topology']!r}, which is not one of {list(topologies)}")
    checked = {"collective": known[collective], "capability": tuple(capability)}
    return SizeRow(**given | checked | {"topology": topologies[given["topology"]]})


def _moe_rows(path: str | Path, content: dict[str, Any]) -> tuple[MoeRow, ...]:
    rows = content.get("moe_rows", [])
    if not isinstance(rows, list):
        raise SizeTableError(f"moe_rows of the size table '{path}' is no list")
    return tuple(_moe_row(f"MoE row {i} of the size table '{path}'", row) for i, row in enumerate(rows))


def _moe_row(where: str, given: Any) -> MoeRow:
    names = [f.name for f in dataclasses.fields(MoeRow)]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        raise SizeTableError(f"{where} is no object of {', '.join(names)}; `ringfence bench --moe` writes them")
    capability, topologies = given["capability"], {str(topology): topology for topology in Topology}
    if not isinstance(capability, list) or len(capability) != 2 or any(type(n) is not int for n in capability):
        raise SizeTableError(f"{where} has capability {capability!r}; write it as [9, 0]")
    for name, least in (("world_size", 2), ("most", 0)):
        if type(given[name]) is not int or given[name] < least:
            raise SizeTableError(f"{where} has {name} {given[name]!r}, which is no count")
    if given["topology"] not in list(topologies):
        raise SizeTableError(f"{where} has topology {given['topology']!r}, which is not one of {list(topologies)}")
    checked = {"capability": tuple(capability), "topology": topologies[given["topology"]]}
    return MoeRow(**given | checked)
