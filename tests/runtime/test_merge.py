"""Journals merged: what was reported when it happened counts, and positions are compared at one moment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.runtime.watch import journals
from ringfence.runtime.watch.culprit import Failure, Finding
from ringfence.runtime.watch.journal import FORMAT
from ringfence.runtime.watch.position import CallSpan, Position
from ringfence.runtime.watch.report import Report

RANKS = (0, 1, 2)
#: In call 14, whose turn it is; before that call, in an island; and long after it.
WAITS = Position(
    0, "step", 7, (8,), 3, "submod_3", "island", "reference", (CallSpan("0", 14, 14),), {"0": 15}, {"0": 14}
)
STUCK = Position(0, "step", 7, (8,), 1, "submod_1", "island", "reference", (), {"0": 14}, {"0": 14})
WENT_ON = Position(0, "idle", 18, (8,), submitted={"0": 38}, completed={"0": 38})
BETWEEN = Position(0, "idle", 6, (8,), submitted={"0": 14}, completed={"0": 14})
UNHEARD = "has not been heard of for 4.0 s"


def write(folder: Path, rank: int, position: Position, reason: str, **more: Any) -> None:
    value = {
        "format": FORMAT,
        "rank": rank,
        "pid": 1,
        "reason": reason,
        "time": 1000.0,
        "clock_ns": 0,
        "groups": {"0": list(RANKS)},
        "programs": [],
        "steps": [],
        "missed": 0,
        "position": of(rank, position),
        "stacks": {},
        "heard": {},
        "silent": {},
        "failures": [],
        "traceback": [],
        "probes": {},
    }
    (folder / f"journal-rank{rank}.json").write_text(json.dumps({**value, **more}))


def of(rank: int, position: Position) -> dict[str, Any]:
    return position.to_dict() | {"rank": rank}


def heard(positions: Mapping[int, Position]) -> dict[str, Any]:
    return {str(rank): of(rank, position) for rank, position in positions.items()}


def merged(folder: Path) -> journals.Merged:
    return journals.merge(journals.read_folder(folder))


@pytest.mark.parametrize("paused", RANKS)
@pytest.mark.parametrize("heard_of", [False, True])
def test_a_rank_that_was_paused_and_went_on_left_nothing_out(tmp_path: Path, paused: int, heard_of: bool) -> None:
    """Its file is written when it goes on, and tells of another moment than those of the ranks that waited for it."""
    others = [rank for rank in RANKS if rank != paused]
    reason = f"hang: rank {paused} {UNHEARD}; ranks {others[0]}, {others[1]} wait"
    for rank in others:
        of_others = heard({r: WAITS for r in others if r != rank} | {paused: STUCK}) if heard_of else {}
        write(tmp_path, rank, WAITS, reason, silent={str(paused): UNHEARD}, heard=of_others)
    write(tmp_path, paused, WENT_ON, reason, time=1006.1, heard=heard({r: WENT_ON for r in others}) if heard_of else {})
    found = merged(tmp_path)
    assert found.finding is not None and found.finding.ranks == (paused,)
    assert found.finding.waiting == tuple(others)
    assert found.sentence.startswith(f"rank {paused} {UNHEARD}; ranks {others[0]}, {others[1]} wait in step 7")
    assert "left out" not in found.sentence


@pytest.mark.parametrize("full", RANKS)
def test_a_rank_whose_disk_was_full_is_not_to_blame(tmp_path: Path, full: int) -> None:
    """Also where it is the culprit: then for what it did, and not because it has no file."""
    at = {0: WAITS, 1: STUCK, 2: WAITS}
    for rank in RANKS:
        if rank != full:
            write(tmp_path, rank, at[rank], "hang: rank 1", heard=heard({r: p for r, p in at.items() if r != rank}))
    (tmp_path / f"journal-rank{full}.123.456.part").write_text("{")
    found = merged(tmp_path)
    assert found.finding is not None and found.finding.ranks == (1,) and found.finding.waiting == (0, 2)
    assert found.sentence.startswith("rank 1 did not come to call 14 of group 'world'")
    assert found.missing == found.could_not_write == (full,)
    assert found.to_dict()["could_not_write"] == [full]


def test_a_rank_that_was_heard_and_then_not_any_more_is_to_blame(tmp_path: Path) -> None:
    for rank in (1, 2):
        others = {0: WAITS, 3 - rank: WAITS}
        write(tmp_path, rank, WAITS, f"hang: rank 0 {UNHEARD}", heard=heard(others), silent={"0": UNHEARD})
    found = merged(tmp_path)
    assert found.finding is not None and found.finding.ranks == (0,)
    assert found.missing == (0,) and found.could_not_write == ()


def reported(kind: str, reporter: int, ranks: tuple[int, ...], sentence: str, failure: Failure | None = None) -> Any:
    return {"report": asdict(Report(kind, reporter, Finding(ranks, (), sentence), failure)), "later": []}


def test_what_was_reported_counts_and_not_where_the_ranks_have_gone_since(tmp_path: Path) -> None:
    """The rank that compiled alone has raised it by the time at which all write."""
    told = reported("alone", 0, (1,), "rank 1 compiles forward 0/1 anew")
    for rank in RANKS:
        write(tmp_path, rank, BETWEEN if rank == 1 else WAITS, "alone: rank 1", heard=heard({1: BETWEEN}), **told)
    found = merged(tmp_path)
    assert found.sentence == "rank 1 compiles forward 0/1 anew"
    assert found.finding is not None and found.finding.ranks == (1,)


def test_of_two_reports_the_one_that_knows_the_cause_counts(tmp_path: Path) -> None:
    victim = Failure(0, "step 7", "RuntimeError: connection closed by peer", victim=True)
    write(tmp_path, 0, WAITS, "failure: rank 0", **reported("failure", 0, (0,), "rank 0 failed in step 7", victim))
    write(tmp_path, 1, STUCK, "failure: rank 1", **reported("failure", 1, (1,), "rank 1 failed in step 7"))
    write(tmp_path, 2, WAITS, "hang: rank 1", **reported("hang", 2, (1,), "rank 1 has not been heard of"))
    assert merged(tmp_path).sentence == "rank 1 failed in step 7"


def test_hosts_whose_clocks_are_hours_apart_say_the_same(tmp_path: Path) -> None:
    at = {0: WAITS, 1: STUCK, 2: WAITS}
    for shift in (0.0, 3 * 3600.0, -3 * 3600.0):
        for rank in RANKS:
            others = heard({r: p for r, p in at.items() if r != rank})
            write(tmp_path, rank, at[rank], "hang: rank 1", heard=others, time=1000.0 + rank * shift)
        assert merged(tmp_path).sentence.startswith("rank 1 did not come to call 14 of group 'world'")


@pytest.mark.parametrize("watched", [True, False])
def test_who_waits_for_a_rank_since_it_was_told_to_end_blames_nobody(tmp_path: Path, watched: bool) -> None:
    """An interpreter takes seconds to end. Where nobody watched, it cannot be told from a hang that was interrupted."""
    at = {0: replace(STUCK, still=0.1), 1: replace(WAITS, still=6.0), 2: replace(WAITS, still=6.0)}
    for rank in RANKS:
        told = reported("end", rank, (), f"rank {rank} was told to end (SystemExit: 0), in step 7")
        others = heard({r: p for r, p in at.items() if r != rank}) if watched else {}
        write(tmp_path, rank, at[rank], "end: it was told to end", heard=others, **told)
    found = merged(tmp_path)
    if watched:
        assert found.finding is None and found.sentence.startswith("nobody waited for long: rank 0 was told to end")
    else:
        assert found.finding is not None and found.finding.ranks == (0,)
