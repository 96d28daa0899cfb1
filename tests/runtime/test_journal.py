from __future__ import annotations

import json
import logging
import os
import signal
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from journal_steps import journal, step

from ringfence.runtime.errors import JournalError
from ringfence.runtime.watch import journals
from ringfence.runtime.watch.culprit import Failure, find_culprit
from ringfence.runtime.watch.folder import Origin
from ringfence.runtime.watch.journal import CAPTURE, REPLAY, UNCAPTURED, CallSpan, Journal, Position
from ringfence.runtime.watch.report import Report, failed

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


# -- its file -----------------------------------------------------------------------------


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
