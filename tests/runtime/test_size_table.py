from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.runtime.collectives import table as collectives
from ringfence.runtime.collectives.kernels import Implementation
from ringfence.runtime.collectives.links import Topology
from ringfence.runtime.collectives.size_table import (
    MIB,
    SCHEMA,
    TABLE,
    TRANSPORTS,
    SizeRow,
    elsewhere,
    find_row,
    forced_row,
    read_table,
    write_table,
)
from ringfence.runtime.errors import OptionsError, SizeTableError
from ringfence.runtime.hazards.situation import Collective, Strategy

MNNVL, TRTLLM, RINGFENCE = Collective.MNNVL, Collective.TRTLLM, Collective.RINGFENCE
ROW = SizeRow(TRTLLM, "peer", (9, 0), 2, 1000, 4000, 500, "a test", bitwise=True)


def implementation(name: str, transport: str) -> Implementation:
    return next(one for one in collectives.ALL if (one.name, one.transport) == (name, transport))


def key(row: SizeRow) -> tuple[object, ...]:
    return row.collective, row.transport, row.capability, row.world_size, row.topology


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.collective}-{r.transport}-{r.capability[0]}-{r.world_size}")
def test_built_in_rows_are_well_formed(row: SizeRow) -> None:
    assert row.collective in (MNNVL, TRTLLM, RINGFENCE) and row.transport in TRANSPORTS and row.source
    assert 0 < row.one_shot <= row.fused and row.all_reduce >= 0
    assert row.world_size in (2, 4, 8, 16)
    # Three Lamport buffers of ranks x size each: below the size where the kernel's offset wraps.
    assert row.world_size * row.fused < 1 << 30 or row.transport == "multicast"
    if row.collective in (TRTLLM, RINGFENCE):
        assert row.transport == "peer"
    elif row.transport == "peer":
        assert row.world_size == 2 and row.one_shot == row.fused, "one-shot, on two ranks"
    if row.bitwise:
        assert "measured" in row.source, "nobody else looked at the bits"


def test_no_row_hides_another() -> None:
    assert len({key(row) for row in TABLE}) == len(TABLE)


def test_rows_are_found_by_all_of_their_key() -> None:
    for row in TABLE:
        assert find_row(TABLE, *key(row)) is row  # type: ignore[arg-type]
    switch = Topology.NVSWITCH
    assert find_row(TABLE, TRTLLM, "multicast", (9, 0), 2, switch) is None
    assert find_row(TABLE, TRTLLM, "peer", (9, 1), 2, switch) is None
    assert find_row(TABLE, TRTLLM, "peer", (9, 0), 3, switch) is None
    assert find_row((), TRTLLM, "peer", (9, 0), 2, switch) is None
    assert find_row((ROW, *TABLE), TRTLLM, "peer", (9, 0), 2, switch) is ROW
    for other in {*Topology} - {switch}:
        assert find_row((ROW, *TABLE), TRTLLM, "peer", (9, 0), 2, other) is None
    bridged = dataclasses.replace(ROW, topology=Topology.NVLINK)
    assert find_row((ROW, bridged), TRTLLM, "peer", (9, 0), 2, Topology.NVLINK) is bridged
    assert elsewhere((ROW, bridged, *TABLE[:1]), TRTLLM, "peer", (9, 0), 2) == (ROW, bridged)


@pytest.mark.parametrize(
    ("size", "strategy"),
    [
        (1, Strategy.ONE_SHOT),
        (1000, Strategy.ONE_SHOT),
        (1001, Strategy.TWO_SHOT),
        (4000, Strategy.TWO_SHOT),
        (4001, None),
    ],
)
def test_strategies_at_their_borders(size: int, strategy: Strategy | None) -> None:
    assert ROW.strategy(size) is strategy


def test_a_row_of_one_strategy_has_no_border_inside() -> None:
    row = dataclasses.replace(ROW, fused=1000)
    assert row.strategy(1000) is Strategy.ONE_SHOT and row.strategy(1001) is None
    assert dataclasses.replace(ROW, one_shot=0).strategy(1) is Strategy.TWO_SHOT
    assert dataclasses.replace(ROW, one_shot=0, fused=0).strategy(1) is None


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_forced_rows(world_size: int) -> None:
    trtllm = forced_row(implementation(TRTLLM, "peer"), (12, 0), world_size)
    assert trtllm.one_shot * world_size == trtllm.fused == 8 * MIB
    assert key(trtllm) == (TRTLLM, "peer", (12, 0), world_size, Topology.UNKNOWN)
    assert not trtllm.bitwise and trtllm.all_reduce == 0, "neither was measured"
    peer = forced_row(implementation(MNNVL, "peer"), (12, 0), world_size)
    assert peer.one_shot == peer.fused, "the peer transport has no two-shot"
    assert forced_row(implementation(MNNVL, "multicast"), (12, 0), world_size).fused == 8 * MIB


# -- files


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    write_table(path, TABLE)
    assert read_table(path) == TABLE
    write_table(path, (ROW,))
    (row,) = read_table(str(path))
    assert row == ROW and isinstance(row.collective, Collective) and isinstance(row.capability, tuple)
    assert row.topology is Topology.NVSWITCH
    write_table(path, ())
    assert read_table(path) == ()


def test_bitwise_may_be_left_out(tmp_path: Path) -> None:
    given = dataclasses.asdict(ROW)
    del given["bitwise"]
    assert not read(tmp_path, given)[0].bitwise


def read(tmp_path: Path, *rows: Any) -> tuple[SizeRow, ...]:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"schema": SCHEMA, "rows": rows}))
    return read_table(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"rows": []}', '{"schema": 1, "rows": []}', '{"schema": 2}', '{"schema": 2, "rows": {}}'],
)
def test_files_that_are_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sizes.json"
    path.write_text(text)
    with pytest.raises(SizeTableError, match=r"sizes\.json"):
        read_table(path)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    with pytest.raises(SizeTableError, match="cannot be read"):
        read_table(path)
    with pytest.raises(SizeTableError, match="cannot be read"):
        read_table(tmp_path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SizeTableError, match="cannot be read"):
        read_table(path)


BAD: dict[str, tuple[Any, str]] = {
    "no object": ([1], "is no object"),
    "unknown field": ({"speed": 1}, "unknown or missing fields: speed"),
    "collective": ({"collective": "nccl"}, "is about 'nccl'"),
    "reference": ({"collective": "reference"}, "is about 'reference'"),
    "collective of another type": ({"collective": ["trtllm"]}, "is about"),
    "transport": ({"transport": "pcie"}, "has transport 'pcie'"),
    "capability": ({"capability": "9.0"}, "has capability '9.0'"),
    "capability of three": ({"capability": [9, 0, 0]}, "has capability"),
    "capability of truths": ({"capability": [True, False]}, "has capability"),
    "capability of texts": ({"capability": ["9", "0"]}, "has capability"),
    "negative": ({"fused": -1}, "has fused -1, which is no size"),
    "no number": ({"one_shot": "8 MiB"}, "has one_shot '8 MiB', which is no size"),
    "a fraction": ({"all_reduce": 1.5}, "has all_reduce 1.5"),
    "a truth": ({"world_size": True}, "has world_size True"),
    "no size": ({"fused": None}, "has fused None"),
    "one rank": ({"world_size": 1}, "has world_size 1"),
    "order": ({"one_shot": 4001}, "one_shot is larger than fused"),
    "source": ({"source": 7}, "has source 7"),
    "topology": ({"topology": "a cable"}, "has topology 'a cable', which is not one of ['nvswitch'"),
    "topology of another type": ({"topology": ["nvswitch"]}, "has topology ['nvswitch']"),
    "bitwise": ({"bitwise": "no"}, "has bitwise 'no'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_its_number(tmp_path: Path, case: str) -> None:
    other, said = BAD[case]
    good = dataclasses.asdict(ROW)
    assert read(tmp_path, good, good) == (ROW, ROW)
    with pytest.raises(SizeTableError) as caught:
        read(tmp_path, good, good | other if isinstance(other, dict) else other)
    assert str(caught.value).startswith("row 1 of the size table '") and said in str(caught.value)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SizeRow) if f.name != "bitwise"])
def test_every_field_is_needed(tmp_path: Path, field: str) -> None:
    given = dataclasses.asdict(ROW)
    del given[field]
    with pytest.raises(SizeTableError, match=rf"row 0 .*unknown or missing fields: {field};"):
        read(tmp_path, given)


def test_the_option_reads_the_file_when_it_is_given(tmp_path: Path) -> None:
    from ringfence.options import Options

    path = tmp_path / "sizes.json"
    write_table(path, TABLE)
    assert Options.parse({"size_table": str(path)}).size_table == str(path)
    path.write_text("{}")
    with pytest.raises((SizeTableError, OptionsError), match="size table"):
        Options.parse({"size_table": str(path)})
