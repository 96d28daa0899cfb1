"""The folder of journals over several starts of a job: nothing of an older one is taken for the last one's."""

from __future__ import annotations

import json
from pathlib import Path

from ringfence.runtime.watch import folder as module
from ringfence.runtime.watch import journals
from ringfence.runtime.watch.culprit import Failure
from ringfence.runtime.watch.folder import Origin
from ringfence.runtime.watch.journal import Journal
from ringfence.runtime.watch.report import failed


def starts(folder: Path, name: str, ranks: tuple[int, ...] = (0, 1, 2), attempt: int | None = None) -> list[Journal]:
    """The journals of the ranks that come so far in a start of three."""
    made = []
    for rank in ranks:
        j = Journal(rank)
        j.name_group("0", (0, 1, 2))
        met = {r: f"{name}{r}" for r in (0, 1, 2)}
        j.begin_file(folder, Origin(met[rank], met, "run" if attempt is not None else "", attempt))
        made.append(j)
    return made


def fails(folder: Path, some: list[Journal], rank: int, error: str) -> None:
    report = failed(Failure(rank, "step 7", error))
    for j in some:
        j.dump(folder, f"failure: {report.sentence}", report=report)


def said(folder: Path) -> str:
    return journals.merge(journals.read_folder(folder)).sentence


def test_what_an_older_start_left_is_never_the_cause_of_this_one(tmp_path: Path) -> None:
    first = starts(tmp_path, "a", attempt=0)
    fails(tmp_path, first, 1, "ValueError: the first one's own")
    assert "the first one's own" in said(tmp_path)
    second = starts(tmp_path, "b", attempt=1)  # all of them are killed before they write
    assert said(tmp_path).startswith("ranks 0, 1, 2 began and wrote nothing since")
    fails(tmp_path, second[:2], 2, "ValueError: the second one's")  # rank 2 is killed
    merged = journals.merge(journals.read_folder(tmp_path))
    assert "the second one's" in merged.sentence and merged.missing == (2,)
    assert (merged.to_dict()["run"], merged.to_dict()["attempt"]) == ("run", 1)
    older = json.loads((tmp_path / "journal-rank0.1.json").read_text())
    assert "the first one's own" in older["reason"] and older["origin"]["attempt"] == 0


def test_a_rank_that_did_not_come_so_far_has_only_an_older_file(tmp_path: Path) -> None:
    """Without a launcher that counts, and whatever the clocks say: the others have put such a start's files away."""
    fails(tmp_path, starts(tmp_path, "a"), 1, "ValueError: the first one's own")
    second = starts(tmp_path, "b", ranks=(0, 2))
    for ahead in (-1e6, 1e6):
        path = tmp_path / "journal-rank1.json"
        value = json.loads(path.read_text())
        path.write_text(json.dumps({**value, "time": value["time"] + ahead}))
        assert [j.rank for j in journals.read_folder(tmp_path)] == [0, 2]
    fails(tmp_path, second, 0, "ValueError: the second one's")
    merged = journals.merge(journals.read_folder(tmp_path))
    assert "the second one's" in merged.sentence and merged.missing == (1,)


def test_files_of_two_jobs_that_know_nothing_of_each_other_go_by_their_time(tmp_path: Path) -> None:
    fails(tmp_path, starts(tmp_path, "a", ranks=(1,)), 1, "ValueError: of another job")
    path = tmp_path / "journal-rank1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time": 1000.0}))
    fails(tmp_path, starts(tmp_path, "b", ranks=(0, 2)), 0, "ValueError: the last one's")
    assert "the last one's" in said(tmp_path)


def test_some_older_files_are_kept_and_not_too_many_bytes(tmp_path: Path, monkeypatch: object) -> None:
    for n in range(8):
        fails(tmp_path, starts(tmp_path, f"{n}-", ranks=(0,)), 0, f"ValueError: {n}")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["journal-rank0.json"] + [f"journal-rank0.{n}.json" for n in (1, 2, 3, 4)] or len(names) == 5
    assert [f"ValueError: {7 - n}" in (tmp_path / f"journal-rank0.{n}.json").read_text() for n in (1, 2, 3, 4)] == [
        True
    ] * 4
    (tmp_path / "journal-rank0.2.json").write_text(" " * (module._OLDER_BYTES - 1000))
    starts(tmp_path, "last-", ranks=(0,))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "journal-rank0.1.json",
        "journal-rank0.2.json",
        "journal-rank0.json",
    ]


def test_a_file_that_is_no_journal_makes_way_too(tmp_path: Path) -> None:
    (tmp_path / "journal-rank0.json").write_text("{")
    starts(tmp_path, "a", ranks=(0,))
    assert (tmp_path / "journal-rank0.1.json").read_text() == "{"


def test_a_disk_that_is_full_after_the_first_file_blames_nobody(tmp_path: Path) -> None:
    """A rank that has begun only is one without a journal; that others heard it shows that it could not write."""
    some = starts(tmp_path, "a")
    position = some[0].position().to_dict()
    report = failed(Failure(1, "step 7", "ValueError: mine"))
    for j in some[1:]:
        j.dump(tmp_path, "failure: rank 1", report=report, heard={"0": position})
    merged = journals.merge(journals.read_folder(tmp_path))
    assert merged.missing == merged.could_not_write == (0,)
    assert merged.finding is not None and merged.finding.ranks == (1,)
