"""Journals of several ranks in a folder: what they say together, and which files are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from journal_steps import NOTE, dumped, journal, step

from ringfence.cli import main
from ringfence.runtime.errors import JournalError
from ringfence.runtime.watch import journals, picture, summary
from ringfence.runtime.watch.culprit import Finding
from ringfence.runtime.watch.journal import CAPTURE, REPLAY, Journal, PieceNote, ProgramNote
from ringfence.runtime.watch.report import Report


def test_the_rank_that_did_not_come_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ahead, behind = journal(0), journal(1)
    for j in (ahead, behind):
        step(j)
    step(ahead, enter=2, leave=1)
    step(behind, enter=1, leave=0)
    dumped(tmp_path, ahead, behind)
    assert main(["journal", str(tmp_path), "--svg", str(tmp_path / "ranks.svg")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "rank 1 did not come to call 3 of group 'tp', in which rank 0 waits"
    assert [line for line in said if line.startswith("rank 0")] == [
        "rank 0 waits in call 3: step 1 of sizes (4,), piece 1 'submod_1'"
    ]
    about = [e.text or "" for e in ElementTree.parse(tmp_path / "ranks.svg").findall(".//{*}title")]
    assert len([text for text in about if text.startswith("step 0")]) == 6  # three pieces on both ranks
    assert main(["journal", str(tmp_path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["format"], value["ranks"], value["waiting"], value["missing"]) == (1, [1], [0], [])
    assert value["short"] == said[0] and "journal_steps.py:" in value["code"]["1"]
    assert value["sentence"] == (
        "rank 1 did not come to call 3 of group 'tp' (step 1 of sizes (4,), piece 1 'submod_1' (island) "
        "on rank 0), in which rank 0 waits: "
        "rank 1 is in step 1 of sizes (4,), piece 0 'submod_0' (graph)"
    )


def test_what_the_probes_say_of_a_rank_whose_part_has_not_arrived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits, others, absent = (journal(rank) for rank in range(3))
    for j in (waits, others, absent):
        step(j)
    silent = {"collective": "mnnvl", "silent": [2], "says": "a call waits: nothing has arrived from rank 2"}
    odd = {"flags": [1, 2], "text": "no such memory", "words": [{"silent": None}, {"silent": ["2"]}, {}]}
    dumped(tmp_path, waits, others, probes={"workspaces of group 'tp'": [{"silent": []}, silent], **odd})
    dumped(tmp_path, absent, probes={"workspaces of group 'tp'": "no workspace is open", **odd})
    assert main(["journal", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing of rank 2 has arrived in the memory of ranks 0, 1, which wait for it" in said
    assert main(["journal", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nothing_from"] == {"2": [0, 1]}


def test_a_rank_without_a_journal_is_to_blame(tmp_path: Path) -> None:
    waits = journal(0)
    step(waits, enter=2, leave=1)
    merged = journals.merge(journals.read_folder(dumped(tmp_path, waits)))
    assert merged.missing == (1,)
    assert merged.sentence == (
        "rank 1 left no journal that can be read; "
        "rank 0 waits in step 0 of sizes (4,), piece 1 'submod_1' (island), call 0 of group 'tp'"
    )


def test_what_is_said_of_a_rank_is_what_its_file_shows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It has begun one; or there is an empty one, which a full disk leaves."""
    waits, other = journal(0), journal(1)
    step(waits, enter=2, leave=1)
    dumped(tmp_path, waits)
    other.begin_file(tmp_path, other.origin)
    assert journals.merge(journals.read_folder(tmp_path)).sentence.startswith("rank 1 wrote nothing since it began; ")
    (tmp_path / "journal-rank1.json").write_bytes(b"")
    merged = journals.merge(journals.read_folder(tmp_path))
    assert merged.sentence.startswith("rank 1 left no journal that can be read; ")
    assert "'journal-rank1.json' is empty, as where its disk was full" in capfd.readouterr().err


def test_a_rank_that_left_out_a_call_is_told_from_its_victims(tmp_path: Path) -> None:
    ranks = [journal(r) for r in range(3)]
    for j in ranks:
        j.name_group("tp", (0, 1, 2))
        step(j)
    step(ranks[1])  # it has completed call 3, which nobody can complete alone
    for j in (ranks[0], ranks[2]):
        step(j, enter=2, leave=1)
    merged = journals.merge(journals.read_folder(dumped(tmp_path, *ranks)))
    assert merged.finding is not None and (merged.finding.ranks, merged.finding.waiting) == ((1,), (0, 2))
    assert merged.sentence.startswith("rank 1 left out a call of group 'tp'")


def test_the_first_step_in_which_ranks_diverge(tmp_path: Path) -> None:
    a, b = journal(0), journal(1)
    for j, sizes in ((a, (4, 8, 4)), (b, (4, 4, 4))):
        for n in sizes:
            step(j, sizes=(n,))
    merged = journals.merge(journals.read_folder(dumped(tmp_path, a, b)))
    assert merged.sentence == ("the ranks diverge at step 1: rank 0: sizes (8,), replay; rank 1: sizes (4,), replay")


def test_a_graph_without_dynamic_sizes_has_fixed_ones(tmp_path: Path) -> None:
    """Its tuple of sizes is empty, which nobody should read as "no tokens"."""
    ahead, behind = journal(0), journal(1)
    step(ahead, sizes=()), step(behind, sizes=(4,))
    step(ahead, sizes=(), enter=2, leave=1)
    merged = journals.merge(journals.read_folder(dumped(tmp_path, ahead, behind)))
    assert "step 1 of fixed sizes, piece 1" in merged.sentence
    assert merged.divergence == "the ranks diverge at step 0: rank 0: fixed sizes, replay; rank 1: sizes (4,), replay"
    assert "step 0 of fixed sizes, piece 0" in picture.svg(merged)
    assert "()" not in summary.text(merged) + picture.svg(merged)


def test_ranks_that_wait_for_nothing(tmp_path: Path) -> None:
    a, b = journal(0), journal(1)
    step(a), step(b)
    assert "no rank waits" in summary.text(journals.merge(journals.read_folder(dumped(tmp_path, a, b))))


def write(path: Path, text: str) -> None:
    path.write_text(text)


def test_bad_folders_are_refused_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps(journal(0).to_dict())

    def refused(folder: Path) -> str:
        assert main(["journal", str(folder)]) == 2
        return capsys.readouterr().err

    assert "is no folder" in refused(tmp_path / "nowhere")
    assert "holds no journal-rank*.json" in refused(tmp_path)
    cases: Sequence[tuple[str, str]] = (
        ("{", "cannot be read"),
        ("[1]", "no journal of format 1"),
        (json.dumps({"format": 2}), "no journal of format 1"),
        (json.dumps({"format": 1, "rank": 0}), "is damaged: KeyError"),
        (json.dumps(json.loads(good) | {"steps": [{"step": 0}]}), "is damaged"),
        (json.dumps(json.loads(good) | {"position": 7}), "is damaged"),
    )
    for text, message in cases:
        write(tmp_path / "journal-rank0.json", text)
        said = refused(tmp_path)
        assert message in said and "journal-rank0.json" in said
    (tmp_path / "journal-rank0.json").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(tmp_path)
    write(tmp_path / "journal-rank0.json", good)
    write(tmp_path / "journal-rank1.json", good)
    assert "are both of rank 0" in refused(tmp_path)
    (tmp_path / "journal-rank1.json").unlink()
    with pytest.raises(JournalError, match="no folder"):
        journals.read_folder(tmp_path / "journal-rank0.json")
    with pytest.raises(SystemExit, match="2"):
        main(["journal", str(tmp_path), "--svg", str(tmp_path / "no" / "x.svg")])


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("position", "piece"), "9"),
        (("position", "submitted"), 1.5),
        (("position", "still"), float("nan")),
        (("position", "calls"), [{"group": "tp", "first": None, "last": 3}]),
        (("heard", "1", "moved"), [1]),
        (("groups", "tp"), [0, None]),
        (("groups", "tp"), [0, [1]]),
        (("steps", 0, "step"), {"a": 1}),
        (("steps", 0, "how"), [1]),
        (("steps", 0, "pieces", 0), [0, float("inf")]),
        (("steps", 0, "calls_before"), {"tp": "many"}),
        (("failures",), [{"rank": 0, "where": 3, "error": "", "victim": False}]),
        (("code",), {"file": "job.py", "line": "30", "function": "serve", "text": ""}),
        (("report",), {"kind": "hang", "reporter": 0, "finding": {"ranks": [0], "waiting": "x", "sentence": ""}}),
        (("time",), 1e300),
        (("rank",), True),
    ],
)
def test_a_value_that_is_no_such_thing_is_damage(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    """In one line: files are edited, cut, and written by other versions."""
    ahead, behind = journal(0), journal(1)
    step(ahead), step(behind)
    dumped(tmp_path, ahead, heard={"1": behind.position().to_dict()}, failures=[])
    path = tmp_path / "journal-rank0.json"
    written = json.loads(path.read_text())
    journals.merge(journals.read_folder(tmp_path))
    at = written
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    path.write_text(json.dumps(written))
    with pytest.raises(JournalError, match=r"^'journal-rank0.json' is damaged: \w+Error: [^\n]+$"):
        journals.read_folder(tmp_path)


def test_of_a_long_ring_the_last_steps_are_looked_at(tmp_path: Path) -> None:
    """Which is most of the time that journals of many ranks take. Their steps are compared all the same."""
    ahead, behind = journal(0), journal(1)
    for n in range(100):
        step(ahead, sizes=(n,))
        step(behind, sizes=(n if n != 3 else 7,))
    first, second = journals.read_folder(dumped(tmp_path, ahead, behind))
    assert {m.step for m in first.marks} == set(range(92, 100)) and len(first.steps) == 100
    assert [str(c) for m in first.marks if m.step == 99 for c in m.calls] == [
        "call 297 of group 'tp'",
        "calls 298 to 299 of group 'tp'",
    ]
    assert journals.first_divergence((first, second)) is not None


def full_rings(folder: Path, ranks: int, pieces: int = 64) -> int:
    """The files of so many ranks, of which one did not come to the call of the others. How many bytes they are."""
    note = ProgramNote(tuple(PieceNote(f"submod_{i}", bool(i % 2), ("tp",) * (i % 2)) for i in range(pieces)))
    written = []
    for entered in (2, 1):
        j = Journal(0)
        j.register(note)
        j.name_group("tp", tuple(range(ranks)))
        for count in [pieces] * (8192 // pieces + 1) + [entered]:
            marks = j.begin(0, (4,), REPLAY)
            for i in range(count):
                marks.enter()
                if count == pieces or i == 0:
                    marks.leave()
            if count == pieces:
                marks.end()
        written.append(j.to_dict("hang: rank 1"))
    at = [{**written[rank == 1]["position"], "rank": rank} for rank in range(ranks)]
    told = Report("hang", 0, Finding((1,), (0,), "rank 1 did not come to call 4128")).to_dict()
    for rank in range(ranks):
        heard = {str(r): position for r, position in enumerate(at) if r != rank}
        value = {**written[rank == 1], "rank": rank, "position": at[rank], "heard": heard, "report": told}
        write(folder / f"journal-rank{rank}.json", json.dumps(value))
    return sum(path.stat().st_size for path in folder.iterdir())


def test_sixty_megabytes_of_journals_are_merged_in_the_time_it_takes_to_parse_them(tmp_path: Path) -> None:
    """Or twice that. Seconds would measure the machine."""
    assert 55e6 < full_rings(tmp_path, 170) < 80e6  # clocks have fewer digits after a restart
    began = time.process_time()
    for path in tmp_path.iterdir():
        json.loads(path.read_text())
    parsed = time.process_time()
    merged = journals.merge(journals.read_folder(tmp_path))
    took, least = time.process_time() - parsed, parsed - began
    assert merged.sentence.startswith("rank 1 did not come to call")
    assert took < 6 * least, f"{took:.2f} s; to parse them takes {least:.2f} s"


def test_only_what_all_ranks_share_of_a_step_can_differ(tmp_path: Path) -> None:
    """A size of a rank's own, and what it captures alone, are no divergence."""
    a, b = Journal(0), Journal(1)
    for j in (a, b):
        j.register(ProgramNote(NOTE.pieces, shared=(0,), lockstep=False))
        j.name_group("tp", (0, 1))
    step(a, REPLAY, (4, 100)), step(b, CAPTURE, (4, 7))
    assert journals.merge(journals.read_folder(dumped(tmp_path, a, b))).divergence is None
    step(a, REPLAY, (4, 100)), step(b, REPLAY, (8, 100))
    merged = journals.merge(journals.read_folder(dumped(tmp_path, a, b)))
    assert merged.divergence == "the ranks diverge at step 1: rank 0: sizes (4,); rank 1: sizes (8,)"
