"""Who carries out dispatches and combines: chosen, made and tested by all ranks, two over gloo; kernels that count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import moe_ready_ranks
import pytest

from ringfence.runtime.collectives.links import Topology
from ringfence.runtime.collectives.size_table import (
    MoeRow,
    find_moe_row,
    read_moe_rows,
    read_table,
    write_table,
)
from ringfence.runtime.errors import SizeTableError
from support import run_ranks

KERNELS = "moe_all_to_all"
PAIR = [("dispatch", 8), ("combine", 8)] * 2


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, moe_ready_ranks.all_of_it)


def test_what_was_prepared_carries_out_calls_up_to_its_capacity(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        said = found["prepared"]
        assert (said.collective, said.capacity, said.capture_failure) == (KERNELS, 12, None)
        assert said.why == (f"{KERNELS}/peer: chosen",) and "capacities up to 12, 1.0 MiB" in str(said)
        assert found["calls"] == PAIR, "27 is beyond it: both halves are the reference's"


def test_a_workspace_serves_what_it_covers_and_is_joined_by_a_larger_one(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["again"].capacity == 12 and found["larger"].capacity == 12
        assert found["made"] == [2, 2] and found["closed"] == ([], None, [True, True])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "its self-test failed: rank 1: combine of"),
        ("broken", "its workspace could not be created (rank 1: no memory left)"),
        ("unlike", "ranks differ in capability"),
        ("nodes", "the ranks are on several nodes"),
        ("not measured", "not measured on 2 GPUs of SM89 linked by"),
        ("unlinked", "not measured on 2 GPUs of SM90 linked by"),
    ],
)
def test_what_speaks_against_kernels_on_one_rank_does_on_all(
    ranks: list[dict[str, Any]], fault: str, reason: str
) -> None:
    for found in ranks:
        collective, capacity, why, made = found[fault]
        assert (collective, capacity) == ("reference", 0) and reason in why, why
        forced = found[f"{fault}, forced"]
        if fault in ("not measured", "unlinked"):
            assert made == 0 and forced == f"nothing; {KERNELS}"
        else:
            assert forced.startswith("CollectiveUnavailableError: moe_collective=") and reason in forced


def test_what_is_asked_for_is_the_same_on_all_ranks_and_fits(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["other capacity"].startswith("RankMismatch: ") and "capacity" in found["other capacity"]
        capacity, none = found["small budget"]
        assert 0 < capacity < 12 and "reference" in none
        assert "reference" in found["large top_k"]


def test_a_graph_is_carried_out_by_kernels_or_by_the_reference_alone(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        excess, ((calls, kinds),), sizes, declined = found["auto"]
        assert max(excess) <= 1.0 and calls == [("dispatch", 6), ("combine", 6)] * 2 and declined == "None"
        assert kinds == [("int32", True, 4 * (found is ranks[0]))], "narrowed in the graph, which shows whose they are"
        assert sizes == ["MoeSizes(capacity=6, row_bytes=76, combine_bytes=64, top_k=2)"]
        excess, calls, _, declined = found["reference"]
        assert max(excess) <= 1.0 and calls == [] and declined == "None"


def test_a_site_that_no_kernel_is_faster_at_stays_a_gather(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for case, reason, why in (
            ("site, not measured", "no_kernel", "not measured on 2 GPUs of SM89"),
            ("site, small", "beyond_table", "more than the 2 tokens"),
        ):
            excess, *_, declined = found[case]
            assert max(excess) <= 2.0 and declined == reason and why in found[f"{case}, why"], found[f"{case}, why"]


def test_a_dynamic_graph_is_for_the_tokens_that_kernels_win_at_or_for_more(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        ran, (within, beyond) = found["ranged"]
        for tokens, graphs, calls in ran:
            pair = [("dispatch", tokens), ("combine", tokens)]
            assert graphs == (1 if tokens in (5, 7, 8) else 2), ran
            assert calls == (pair if tokens <= 8 else []), ran
        assert within is None and beyond[0] == "beyond_table" and "for more than the 8 tokens" in beyond[1]


def test_another_capacity_on_a_rank_is_told_before_anything_is_sent(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        said, made = found["disagreeing"]
        assert said.startswith("RankMismatch: ") and "capacity" in said and made == 0


@pytest.mark.parametrize("collective", [KERNELS, "reference"])
def test_eager_dispatches_are_compared_where_that_was_asked_for(ranks: list[dict[str, Any]], collective: str) -> None:
    for found in ranks:
        said, sent = found[f"compared, {collective}"]
        assert sent == 0, "nothing is sent"
        *unlike, alike = said
        told = (
            "capacity",
            "row_bytes",
            "num_experts",
            "[8], float32 [4]",
            "float16 [16]",
            "this rank has 5",
            "all of them",
        )
        for text, what in zip(unlike, told, strict=True):
            assert text.startswith("RankMismatch: the ranks call a dispatch differently") and what in text, text
        assert alike.startswith("InputError: a dispatch takes a list"), "all refuse it alike"
        assert found["compared within"] < 60, "nobody waits until the patience ends"
        assert found["compared by one"].startswith("RankMismatch: ")


def test_bench_measures_pairs_and_says_where_they_are_not_to_be_had(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        (row,), text, calls, made = found["measured"]
        assert (row.capability, row.world_size, row.source) == ((9, 0), 2, "a test") and row.most in (0, 1, 3)
        assert calls >= {1, 3} and made == 2, "for each hidden size"
        assert all(f"{hidden:8d}  {tokens:18d}" in text for hidden in (64, 128) for tokens in (1, 3)), text
        rows, text = found["not measured here"]
        assert rows == () and "was not measured" in text and "no memory left" in text


def test_a_table_of_ones_own_lets_kernels_in(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        _, ((calls, _),), _, declined = found["site, measured"]
        assert declined == "None" and calls == [("dispatch", 6), ("combine", 6)] * 2


def test_rows_of_a_file_decide_and_are_checked(tmp_path: Path) -> None:
    path, row = tmp_path / "table.json", MoeRow((9, 0), 8, 64, "a test")
    write_table(path, (), (row, replace(row, most=0, topology=Topology.PCIE)))
    assert read_table(path) == () and read_moe_rows(path)[0] == row
    assert find_moe_row(read_moe_rows(path), (9, 0), 8, Topology.PCIE) == replace(row, most=0, topology=Topology.PCIE)
    assert find_moe_row(read_moe_rows(path), (9, 0), 4, Topology.NVSWITCH) is None
    content = json.loads(path.read_text())
    for name, value, said in (
        ("capability", 9, "write it as"),
        ("world_size", 1, "no count"),
        ("most", "1", "no count"),
        ("topology", "wires", "not one of"),
        ("more", 1, "no object of"),
    ):
        wrong = content | {"moe_rows": [content["moe_rows"][0] | {name: value}]}
        path.write_text(json.dumps(wrong))
        with pytest.raises(SizeTableError, match=said):
            read_table(path)
    path.write_text(json.dumps(content | {"moe_rows": 3}))
    with pytest.raises(SizeTableError, match="no list"):
        read_moe_rows(path)


def test_halves_in_different_graphs_are_carried_out_alike(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["two graphs, kernels"] == (True, [[("dispatch", 12), ("combine", 12)]])
        assert found["two graphs, reference"] == (True, [])
        assert found["unanswered"].startswith("RefusedError: the other half") and "M69" in found["unanswered"]
