"""Watchdogs of several ranks in one process: their threads are not started, the tests do what those would do."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from watchdogs import SHORT, Clock, look, ranks

from ringfence.runtime.errors import HangError, PoisonedError
from ringfence.runtime.watch.health import Health
from ringfence.runtime.watch.journal import CAPTURE, REPLAY, PieceNote, ProgramNote
from ringfence.runtime.watch.watchdog import EXIT_CODE, Reaction


def test_who_did_not_come_is_named_on_all_ranks(clock: Clock, tmp_path: Path) -> None:
    waits, absent = both = ranks(on_hang="raise", folder=str(tmp_path), probes={"flags": lambda: [1, 2], "bad": _throw})
    waits.step(enter=2, leave=1)
    absent.step(enter=1, leave=0)
    look(clock, both, 0.5)
    said = [r.watchdog.report for r in both]
    assert said[0] is not None and said[1] is not None
    assert said[0].kind == "hang" and said[0].ranks == said[1].ranks == (1,)
    assert "rank 1 did not come to call 1 of group 'tp'" in said[0].sentence and said[0].sentence == said[1].sentence
    assert waits.ended == absent.ended == [EXIT_CODE]  # neither main thread came back
    for rank in both:
        with pytest.raises(PoisonedError, match="rank 1 did not come to call 1"):
            rank.watchdog.health.check()
    value = json.loads((tmp_path / "journal-rank0.json").read_text())
    assert value["probes"] == {"flags": [1, 2], "bad": "RuntimeError: no such memory"}
    assert value["reason"].startswith("hang: rank 1") and value["stacks"]
    assert (tmp_path / "journal-rank1.json").exists()


def test_a_slow_probe_costs_neither_the_journal_nor_the_others(clock: Clock, tmp_path: Path) -> None:
    path, release = tmp_path / "journal-rank0.json", threading.Event()
    seen: list[dict[str, Any]] = []

    def slow() -> None:
        seen.append(json.loads(path.read_text()))
        release.wait(60)

    probes = {"flags": lambda: [1, 2], "slow": slow, "behind": lambda: 3}
    waits, absent = both = ranks(on_hang="abort", folder=str(tmp_path), probes=probes)
    threads: list[str] = []
    waits.journal.watch_from_here = lambda: threads.append(threading.current_thread().name)  # type: ignore[method-assign]
    waits.step(enter=2, leave=1)
    absent.step(enter=1, leave=0)
    began = time.monotonic()
    look(clock, both, 0.4)
    assert time.monotonic() - began < 45
    assert seen[0]["probes"] == {} and seen[0]["reason"].startswith("hang: rank 1"), "written before"
    late = "no answer within 0.6 s"
    assert json.loads(path.read_text())["probes"] == {"flags": [1, 2], "slow": late, "behind": late}
    assert threads and threading.current_thread().name not in threads, "captures are left alone by a thread of its own"
    assert waits.ended == [EXIT_CODE]
    release.set()


def test_probes_are_asked_where_a_file_is_written(clock: Clock, tmp_path: Path) -> None:
    asked: list[int] = []
    waits, _ = both = ranks(on_hang="abort", probes={"flags": lambda: asked.append(1)})
    waits.step(enter=2, leave=1)
    look(clock, both, 0.4)
    assert waits.ended == [EXIT_CODE] and not asked


def _throw() -> None:
    raise RuntimeError("no such memory")


#: Longer than it must look so that ranks wait in two places, and far from a deadline of steps.
PATIENT = replace(SHORT, steady=60.0, alone=0.2)


def test_a_rank_whose_call_was_an_error_is_named_at_once(clock: Clock) -> None:
    waits, refuses = both = ranks(deadlines=PATIENT)
    waits.step(enter=2, leave=1)
    refuses.journal.refuse({"tp"}, "GradModeError: called in grad mode")
    refuses.journal.refuse({"tp"}, "GradModeError: called in grad mode")  # again and again
    look(clock, both, 0.1)
    assert waits.watchdog.report is None, "it may call again"
    look(clock, both, 0.3)
    report = waits.watchdog.report
    assert report is not None and (report.kind, report.ranks) == ("hang", (1,))
    assert "rank 1 did not come to call 1 of group 'tp'" in report.sentence and "rank 0 waits" in report.sentence
    assert report.sentence.endswith("its last call was an error: GradModeError: called in grad mode")
    assert refuses.watchdog.report is not None


@pytest.mark.parametrize("how", ["all", "called again", "another group", "later"])
def test_a_rank_that_is_late_after_an_error_is_not(clock: Clock, how: str) -> None:
    waits, late = both = ranks(deadlines=PATIENT)
    if how != "later":
        late.journal.refuse({"dp" if how == "another group" else "tp"}, "InputError: too many tokens")
    if how == "all":
        waits.journal.refuse({"tp"}, "InputError: too many tokens")
    if how == "called again":
        for rank in both:
            rank.step()
    waits.step(enter=2, leave=1)
    look(clock, both, 1.0)
    assert waits.watchdog.report is None and late.watchdog.report is None
    if how == "later":
        late.journal.refuse({"tp"}, "InputError: too many tokens")
        look(clock, both, 0.1)
        late.step(enter=2, leave=1)
        look(clock, both, 0.5)
        assert waits.watchdog.report is None


def test_slow_but_progressing_ranks_are_left_alone(clock: Clock) -> None:
    waits, slow = both = ranks()
    waits.step(enter=2, leave=1)
    long = slow.journal.register(ProgramNote((PieceNote("compute", False),) * 1000))
    slow.journal.begin(long, (4,), REPLAY).end()
    marks = slow.journal.begin(long, (4,), REPLAY)
    look(clock, both, 3 * SHORT.steady, between=lambda: (marks.enter(), marks.leave()))
    assert waits.watchdog.report is None and not waits.ended


def test_a_rank_that_compiles_has_more_time_and_not_for_ever(clock: Clock) -> None:
    waits, busy = both = ranks()
    waits.step(enter=2, leave=1)
    busy.journal.compiling(True)
    look(clock, both, 2 * SHORT.steady)
    assert waits.watchdog.report is None
    look(clock, both, SHORT.warm_up)
    assert waits.watchdog.report is not None and "rank 1 compiles since" in waits.watchdog.report.sentence


def test_a_rank_that_waits_for_an_agreement_is_not_busy(clock: Clock) -> None:
    waits, agrees = both = ranks()
    waits.step(enter=2, leave=1)
    agrees.journal.compiling(True)
    with agrees.journal.waiting("agree on a plan"):
        look(clock, both, 3 * SHORT.steady)
    assert waits.watchdog.report is not None
    assert "rank 1 waits for the others in the exchange 'agree on a plan'" in waits.watchdog.report.sentence
    with pytest.raises(HangError, match="rank 1 waits for the others"):
        agrees.watchdog.interrupt()


def test_who_is_late_to_an_exchange_has_the_deadline_of_the_exchange(clock: Clock) -> None:
    waits, late = both = ranks()
    with waits.journal.waiting("facts of each rank"):
        look(clock, both, 3 * SHORT.steady)
    assert waits.watchdog.report is None and late.watchdog.report is None


def test_a_rank_that_is_gone_is_named_by_those_who_wait_in_an_exchange(clock: Clock) -> None:
    first, second, gone = three = ranks(3, begun=False)
    look(clock, three, 0.1)
    with first.journal.waiting("facts of each rank"), second.journal.waiting("facts of each rank"):
        look(clock, [first, second], 0.5)
    for rank in (first, second):
        assert rank.watchdog.report is not None and rank.watchdog.report.ranks == (2,)
        assert "ranks 0, 1 wait in the exchange 'facts of each rank', before its" in rank.watchdog.report.sentence
    assert gone.watchdog.report is None
    assert first.ended == second.ended == [EXIT_CODE]  # neither main thread came back: its store may not answer


def test_a_rank_that_has_not_begun_to_talk_is_not_gone(clock: Clock) -> None:
    first, second, _ = ranks(3, begun=False)
    with first.journal.waiting("facts of each rank"), second.journal.waiting("facts of each rank"):
        look(clock, [first, second], 0.5)  # the third still reads its weights
    assert first.watchdog.report is None and second.watchdog.report is None


class Shared:
    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.told: list[str] = []

    def invalidate(self, why: str) -> None:
        self.told.append(why)
        for user in list(self.users):
            user.poison(why)


def test_a_closed_watchdog_keeps_nobody_waiting(clock: Clock) -> None:
    first, _ = ranks()
    first.watchdog.close()
    began, error = clock.monotonic(), ValueError("mine")
    assert first.watchdog.failed(error) is error and clock.monotonic() == began
    first.watchdog.health.check()


def test_who_shares_memory_is_poisoned_with_the_first_reason() -> None:
    mine, theirs, apart = Health(), Health(), Health()
    memory = Shared()
    for health in (mine, mine, theirs):
        health.share(memory)
    mine.poison("rank 1 failed", (1,))
    mine.poison("rank 2 failed", (2,))
    assert set(memory.told) == {"rank 1 failed"} and theirs.poisoned == mine.poisoned == "rank 1 failed"
    apart.check()
    with pytest.raises(PoisonedError) as caught:
        mine.check()
    assert caught.value.ranks == (1,)


def test_what_is_shared_is_not_kept_alive() -> None:
    health, memory = Health(), Shared()
    health.share(memory)
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    assert gone() is None
    health.poison("rank 1 failed")


def test_captures_have_the_deadline_of_warm_up(clock: Clock) -> None:
    waits, absent = both = ranks()
    waits.step(enter=2, leave=1, how=CAPTURE)
    absent.step(enter=1, leave=0, how=CAPTURE)
    look(clock, both, 2 * SHORT.steady)
    assert waits.watchdog.report is None


def test_idle_ranks_have_no_deadline(clock: Clock) -> None:
    both = ranks()
    look(clock, both, 3 * SHORT.steady)
    assert all(r.watchdog.report is None for r in both)


def test_a_rank_that_no_longer_answers_is_named(clock: Clock) -> None:
    first, second, gone = three = ranks(3)
    look(clock, three, 0.1)
    first.step(enter=2, leave=1)
    second.step(enter=2, leave=1)
    look(clock, [first, second], 0.4)
    for rank in (first, second):
        assert rank.watchdog.report is not None and rank.watchdog.report.ranks == (2,)
        assert "rank 2 has not been heard of" in rank.watchdog.report.sentence
        assert "ranks 0, 1 wait in step 1" in rank.watchdog.report.sentence
    assert gone.watchdog.report is None


def test_a_rank_is_not_judged_by_where_it_was_long_ago(clock: Clock) -> None:
    """It is between two beats and dead: neither silent yet nor where it was heard of, in a capture long done."""
    waits, gone = both = ranks()
    gone.step(enter=2, leave=1, how=CAPTURE)
    look(clock, both, 0.06)
    waits.step()
    waits.step(enter=2, leave=1)
    watchdog, now = waits.watchdog, clock.monotonic()
    watchdog.watch()
    peer = watchdog.others.peers[1]
    assert peer.position is not None and peer.position.phase == "warm-up"
    watchdog._moved_at, peer.heard = now - 1.2 * SHORT.steady, now - 0.8 * SHORT.steady
    watchdog.watch()
    assert watchdog.report is None, watchdog.report.sentence
    peer.heard = now - 1.2 * SHORT.steady
    watchdog.watch()
    assert watchdog.report is not None and watchdog.report.sentence.startswith("rank 1 has not been heard of")


def test_time_in_which_this_process_was_stopped_does_not_count(clock: Clock) -> None:
    waits, other = both = ranks()
    waits.step(enter=2, leave=1)
    other.step(enter=1, leave=0)
    look(clock, both, 0.05)
    clock.sleep(3 * SHORT.steady)  # nobody looked
    look(clock, both, 0.05)
    assert waits.watchdog.report is None
    look(clock, both, 2 * SHORT.steady)
    assert waits.watchdog.report is not None


def test_report_goes_on_waiting(clock: Clock) -> None:
    waits, absent = both = ranks(on_hang="report")
    waits.step(enter=2, leave=1)
    look(clock, both, 0.4)
    assert waits.watchdog.report is not None and not waits.ended and not absent.ended
    waits.watchdog.health.check()
    error = RuntimeError("its own")
    waits.watchdog.interrupt()
    absent.step()  # it was slow, and goes on; a second time is reported again
    waits.journal.leave(), waits.journal.end()
    waits.step(enter=2, leave=1)
    look(clock, both, 0.05)
    assert waits.watchdog.report is None
    look(clock, both, 0.4)
    assert waits.watchdog.report is not None and "call 2" in waits.watchdog.report.sentence
    assert waits.watchdog.failed(error) is error


def test_abort_ends_the_process(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    waits, absent = both = ranks(on_hang="abort")
    waits.step(enter=2, leave=1)
    look(clock, both, 0.5)
    assert waits.ended == absent.ended == [EXIT_CODE]
    said = capfd.readouterr().err.splitlines()
    last = next(line for line in said if line.startswith("ringfence: rank 0 ends with"))
    assert last == (  # in brief: the log has the whole sentence
        "ringfence: rank 0 ends with exit code 85: the ranks hang: rank 1 did not come to call 1 of group 'tp', in "
        "which rank 0 waits"
    )


@pytest.mark.parametrize("how", ["the next call", "the next call, abort", "an exchange"])
def test_whoever_hears_of_a_verdict_finds_it_in_the_journal(clock: Clock, how: str, tmp_path: Path) -> None:
    """A job may end at once then; and where the watch ends the process, nobody outruns it to another exit code."""
    waits, idle = both = ranks(folder=str(tmp_path), on_hang="abort" if "abort" in how else "raise")
    write, writes, may = idle.journal.try_dump, threading.Event(), threading.Event()
    idle.journal.try_dump = lambda *given, **more: (writes.set(), may.wait(60), write(*given, **more))[2]  # type: ignore[func-returns-value]
    found: list[Any] = []

    def hear() -> None:
        assert writes.wait(60)
        threading.Timer(0.3, may.set).start()
        with pytest.raises((HangError, PoisonedError), match="rank 1 did not come to call 1"):
            idle.watchdog.interrupt() if how == "an exchange" else idle.watchdog.health.check()
        found.extend([json.loads((tmp_path / "journal-rank1.json").read_text()), list(idle.ended)])

    hears = threading.Thread(target=hear)
    hears.start()
    waits.step(enter=2, leave=1)
    look(clock, both, 0.5)
    hears.join()
    assert found[0]["report"]["finding"]["ranks"] == [1]
    assert found[1] == ([EXIT_CODE] if "abort" in how else [])


def test_raise_lets_an_idle_main_thread_live_and_refuses_its_next_call(clock: Clock) -> None:
    waits, idle = both = ranks()
    waits.step(enter=2, leave=1)
    look(clock, both, 0.5)
    assert idle.ended == [] and idle.watchdog.health.poisoned is not None


def test_raise_wakes_a_main_thread_that_can_be_woken(clock: Clock) -> None:
    waits, absent = both = ranks()
    woken: list[BaseException] = []
    aborted = RuntimeError("NCCL communicator was aborted")  # what the main thread gets, and brings here
    waits.watchdog.reaction = Reaction(
        "raise", abort_groups=lambda: woken.append(waits.watchdog.failed(aborted)), end=waits.ended.append
    )
    waits.step(enter=2, leave=1)
    absent.step(enter=1, leave=0)
    look(clock, both, 0.4)
    assert waits.ended == []
    assert isinstance(woken[0], HangError) and woken[0].ranks == (1,)
