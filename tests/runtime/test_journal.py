from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ringfence.cli import main
from ringfence.runtime.errors import JournalError
from ringfence.runtime.watch import journals, picture, summary
from ringfence.runtime.watch.culprit import Failure, Finding, find_culprit
from ringfence.runtime.watch.folder import Origin
from ringfence.runtime.watch.journal import (
    CAPTURE,
    REPLAY,
    UNCAPTURED,
    CallSpan,
    Journal,
    Marks,
    PieceNote,
    Position,
    ProgramNote,
)
from ringfence.runtime.watch.report import Report, failed

#: A compute piece, an island with one call, a piece with two calls.
NOTE = ProgramNote(
    (PieceNote("submod_0", False), PieceNote("submod_1", True, ("tp",)), PieceNote("submod_2", False, ("tp", "tp"))),
    "reference",
)


def journal(rank: int = 0, **places: int) -> Journal:
    j = Journal(rank, **places)
    j.register(NOTE)
    j.name_group("tp", (0, 1))
    return j


def step(j: Journal, how: str = REPLAY, sizes: tuple[int, ...] = (4,), enter: int = 3, leave: int = 3) -> Marks:
    """A step that enters and leaves so many pieces; it is ended where it left all."""
    marks = j.begin(0, sizes, how)
    for i in range(enter):
        marks.enter()
        if i < leave:
            marks.leave()
    if leave == 3:
        marks.end()
    return marks


# -- where is this rank? -----------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_each_piece_is_entered_before_it_is_given_and_left_before_the_next(beside: bool) -> None:
    j, by_hand = journal(), journal()
    if beside:  # of a step that another one is in
        j.begin(0, (4,), REPLAY), by_hand.begin(0, (4,), REPLAY)
    marks, others = j.begin(0, (4,), REPLAY), by_hand.begin(0, (4,), REPLAY)
    given = ""
    for piece in marks.each("abc"):
        others.enter()
        ours, theirs = j.position(), by_hand.position()
        assert (ours.piece, ours.submitted, ours.completed) == (theirs.piece, theirs.submitted, theirs.completed)
        given += piece
        others.leave()
    assert given == "abc"
    assert j.position().submitted == by_hand.position().submitted == {"tp": 3}


def test_a_piece_that_raises_is_not_left_and_the_next_is_not_entered() -> None:
    j = journal()
    marks = j.begin(0, (4,), REPLAY)
    with pytest.raises(ValueError, match="b"):
        for piece in marks.each("abc"):
            if piece == "b":
                raise ValueError(piece)
    (written,) = j.to_dict()["steps"]
    (first_began, first_ended), (began, ended) = written["pieces"]
    assert first_began <= first_ended == began and ended is None
    assert j.position().piece == 1 and j.position().stuck_in_piece


def test_only_the_last_level_of_a_folder_is_made_and_the_path_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[int, str]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, record.getMessage()))

    logger, lines = logging.getLogger("ringfence.runtime.watch.journal"), Lines()
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "_cache", {})
    monkeypatch.setattr(logger, "handlers", [lines])
    monkeypatch.chdir(tmp_path)
    for level in (logging.WARNING, logging.INFO):
        j = Journal(rank=3)
        assert {path.absolute() for path in (j.dump("made"), j.dump("made"))} == {tmp_path / "made/journal-rank3.json"}
        ((told, text),) = said
        assert told == level and str(tmp_path / "made/journal-rank3.json") in text
        assert ("that was not there" in text) == (level == logging.WARNING)
        said.clear()
    with pytest.raises(JournalError, match=f"'{tmp_path}/lgo' does not exist"):
        Journal().dump("lgo/job")
    Journal().try_dump("lgo/job", "a hang")  # a watch goes on
    assert [(told, "cannot be written" in text) for told, text in said] == [(logging.ERROR, True)]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_file_is_begun_when_a_later_backend_is_the_first_with_a_folder(tmp_path: Path) -> None:
    j = Journal(rank=1)
    for folder in (None, None, tmp_path, tmp_path):
        j.begin_file(folder, Origin("token", {1: "token"}, "run", 0))
    assert [path.name for path in tmp_path.iterdir()] == ["journal-rank1.json"]


def test_an_error_that_concerns_no_group_is_not_told_of_later_steps() -> None:
    j = journal()
    j.refuse((), "InputError: too many tokens")
    step(j)
    assert "too many tokens" not in str(j.position())


def test_an_idle_rank_has_completed_what_it_submitted() -> None:
    j = journal()
    assert j.position().phase == "idle" and j.position().step == -1
    step(j)
    step(j)
    position = j.position()
    assert (position.phase, position.step, position.stuck_in_piece) == ("idle", 1, False)
    assert position.submitted == position.completed == {"tp": 6}


def test_a_rank_inside_a_call() -> None:
    j = journal()
    step(j)
    step(j, enter=2, leave=1)
    position = j.position()
    assert (position.phase, position.step, position.piece, position.name) == ("step", 1, 1, "submod_1")
    assert (position.kind, position.sizes, position.collective) == ("island", (4,), "reference")
    assert position.calls == (CallSpan("tp", 3, 3),)
    assert (position.submitted, position.completed) == ({"tp": 4}, {"tp": 3})


def test_a_captured_piece_holds_several_calls() -> None:
    j = journal()
    step(j)
    step(j, enter=3, leave=2)
    position = j.position()
    assert position.kind == "graph" and position.calls == (CallSpan("tp", 4, 5),)
    assert str(position.calls[0]) == "calls 4 to 5 of group 'tp'"


def test_between_two_pieces_no_call_is_waited_for() -> None:
    j = journal()
    step(j, enter=2, leave=2)
    assert j.position().calls == () and j.position().completed == {"tp": 1}


def test_first_steps_and_captures_are_warm_up() -> None:
    j = journal()
    for how, phase in ((UNCAPTURED, "warm-up"), (CAPTURE, "warm-up"), (REPLAY, "step")):
        marks = step(j, how, leave=0)
        assert j.position().phase == phase
        marks.end()
    j.compiling(True)
    assert j.position().phase == "compile"
    j.compiling(False)
    assert j.position().phase == "idle"


def test_a_step_that_failed_counts_what_it_entered() -> None:
    j = journal()
    step(j, enter=2, leave=1).fail()
    assert j.position().phase == "idle" and j.position().submitted == {"tp": 1}
    (written,) = j.to_dict()["steps"]
    assert written["ended_ns"] is None and [left is None for _, left in written["pieces"]] == [False, True]
    step(j)
    assert j.position().submitted == {"tp": 4}


def test_a_nested_step_is_counted_and_not_written_down() -> None:
    j = journal()
    marks = step(j, enter=1, leave=0)
    step(j)
    assert j.missed == 1 and j.position().piece == 0
    marks.leave()
    marks.end()
    assert len(j.to_dict()["steps"]) == 1


def test_a_position_survives_json() -> None:
    j = journal()
    step(j, enter=2, leave=1)
    position = j.position()
    assert Position.from_dict(json.loads(json.dumps(position.to_dict()))) == position


class Device:
    """Completion as a test wants it."""

    def __init__(self) -> None:
        self.pending: set[int] = set()

    def record(self, slot: int) -> bool:
        self.pending.add(slot)
        return True

    def done(self, slot: int) -> bool:
        return slot not in self.pending

    def watch_from_here(self) -> None:
        pass


def test_on_a_device_a_step_is_outstanding_until_its_mark() -> None:
    j, device = journal(), Device()
    j.use(device)
    step(j)
    step(j)
    position = j.position()
    assert (position.phase, position.step, position.stuck_in_piece) == ("step", 0, True)
    assert position.calls == (CallSpan("tp", 0, 2),) and position.completed == {"tp": 0}
    assert position.submitted == {"tp": 6}  # the host has run ahead
    before = position.moved
    device.pending.clear()
    position = j.position()
    assert position.phase == "idle" and position.completed == {"tp": 6} and position.moved != before


def test_a_host_that_stopped_within_a_step_is_told_from_the_devices_that_wait() -> None:
    ahead, stopped = journal(0), journal(1)
    for j in (ahead, stopped):
        j.use(Device())
    step(ahead)  # its host has left the model; its device waits somewhere in the step
    step(stopped, enter=2, leave=1)
    finding = find_culprit({0: ahead.position(), 1: stopped.position()}, {})
    assert finding is not None and (finding.ranks, finding.waiting) == ((1,), (0,))
    assert finding.sentence.startswith("rank 1 has entered calls before 1 of group 'tp', and rank 0 all of its step")


# -- the ring ------------------------------------------------------------------------------


def test_the_ring_keeps_the_last_steps_whole() -> None:
    j = journal(pieces=16, steps=8)
    for n in range(50):
        step(j, sizes=(n,))
    written = j.to_dict()["steps"]
    assert [s["step"] for s in written] == [45, 46, 47, 48, 49]  # 16 places hold five steps of three pieces
    assert [s["sizes"] for s in written] == [[45], [46], [47], [48], [49]]
    assert written[0]["calls_before"] == {"tp": 135}
    assert all(entered <= left for s in written for entered, left in s["pieces"])


def test_a_ring_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Journal(pieces=100)


def test_nothing_is_allocated_per_step() -> None:
    j, sizes = journal(pieces=64, steps=16), (4,)
    for _ in range(100):
        step(j, sizes=sizes)
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        for _ in range(1000):
            step(j, sizes=sizes)
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    ours = [d for d in after.compare_to(before, "filename") if Path(d.traceback[0].filename).name == "rings.py"]
    assert ours and sum(d.size_diff for d in ours) < 10_000  # the rings are full of values that were made since


def test_positions_are_read_while_another_thread_writes() -> None:
    j = journal(pieces=64, steps=16)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            step(j)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            position = j.position()
            assert 0 <= position.completed.get("tp", 0) <= position.submitted.get("tp", 0)
    finally:
        stop.set()
        writer.join()


# -- files ------------------------------------------------------------------------------------


def dumped(folder: Path, *ranks: Journal, **more: Any) -> Path:
    for j in ranks:
        j.dump(folder, "test", **more)
    return folder


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
    assert value["short"] == said[0] and "test_journal.py:" in value["code"]["1"]
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
        "rank 1 left no journal; "
        "rank 0 waits in step 0 of sizes (4,), piece 1 'submod_1' (island), call 0 of group 'tp'"
    )


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


def test_a_dump_on_a_signal_that_the_user_chose(tmp_path: Path) -> None:
    j = journal(3)
    step(j)
    before = signal.getsignal(signal.SIGUSR2)
    undo = j.dump_on_signal(signal.SIGUSR2, tmp_path)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        value = json.loads((tmp_path / "journal-rank3.json").read_text())
        assert value["reason"] == "signal SIGUSR2" and any(
            "test_journal" in "".join(s) for s in value["stacks"].values()
        )
    finally:
        undo()
    assert signal.getsignal(signal.SIGUSR2) is before


def test_a_position_of_an_older_file_is_read() -> None:
    """The collective was called a strategy there."""
    old = Position(0, "idle", 3, collective="trtllm").to_dict()
    old["strategy"] = old.pop("collective")
    assert Position.from_dict(old).collective == "trtllm"


# -- the first report stays ---------------------------------------------------------------------


def report(rank: int, *, victim: bool = False) -> Report:
    return failed(Failure(rank, "step 0", "ValueError: no such expert", victim))


def written(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "journal-rank0.json").read_text())
    assert isinstance(value, dict)
    return value


def test_what_was_written_with_the_first_report_stays(tmp_path: Path) -> None:
    j = journal()
    step(j, enter=2, leave=1)
    first = report(1)
    j.dump(tmp_path, "failure: rank 1", report=first, probes={})
    j.dump(tmp_path, "failure: rank 1", report=first, probes={"flags": [1]})  # found out meanwhile
    j.leave(), j.fail()
    step(j)
    j.dump(tmp_path, "signal SIGUSR2")
    j.dump(tmp_path, "failure: rank 0", report=report(0))
    value = written(tmp_path)
    assert value["report"]["finding"]["ranks"] == [1] and value["reason"] == "failure: rank 1"
    assert value["position"]["step"] == 0 and value["position"]["calls"]
    assert value["probes"] == {"flags": [1]}
    assert [note["reason"] for note in value["later"]] == ["signal SIGUSR2", "failure: rank 0"]
    assert journals.read_folder(tmp_path)[0].later == ("signal SIGUSR2", "failure: rank 0")


def test_the_cause_replaces_what_a_victim_wrote(tmp_path: Path) -> None:
    j = journal()
    j.dump(tmp_path, "failure: rank 0", report=report(0, victim=True))
    j.dump(tmp_path, "failure: rank 1", report=report(1))
    value = written(tmp_path)
    assert value["reason"] == "failure: rank 1" and value["report"]["finding"]["ranks"] == [1]
    assert [note["reason"] for note in value["later"]] == ["failure: rank 0"]


def test_after_a_report_that_was_withdrawn_the_next_is_a_first_one(tmp_path: Path) -> None:
    j = journal()
    j.withdraw(tmp_path, "nothing was reported")
    assert not list(tmp_path.iterdir())
    j.dump(tmp_path, "hang: rank 1", report=report(1))
    j.withdraw(tmp_path, "rank 0 went on")
    assert [note["reason"] for note in written(tmp_path)["later"]] == ["rank 0 went on"]
    j.dump(tmp_path, "hang: rank 0", report=report(0))
    value = written(tmp_path)
    assert value["reason"] == "hang: rank 0" and value["later"] == []
    assert [note["reason"] for note in value["earlier"]] == ["hang: rank 1"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    j = journal()
    monkeypatch.setattr(Path, "write_text", full)
    j.try_dump(tmp_path, "hang: rank 1", report=report(1))
    assert not list(tmp_path.iterdir())


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
