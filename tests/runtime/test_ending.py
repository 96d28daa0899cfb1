"""A rank that is told to end has not failed; what it has to say of those it waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.runtime.watch.culprit import Failure, find_culprit
from ringfence.runtime.watch.ending import broken_off, how_it_ends, on_uncaught
from ringfence.runtime.watch.position import CallSpan, Position
from ringfence.runtime.watch.process import UNKNOWN, this_process, why_silent

WAITS = Position(0, "step", 7, (8,), 3, "submod_3", "island", "", (CallSpan("0", 14, 14),), {"0": 15}, {"0": 14})
BETWEEN = Position(1, "idle", 6, (8,), submitted={"0": 14}, completed={"0": 14})


class Reloaded(Exception):
    """What a server raises in a handler of its own."""


def caught(body: Callable[[], Any]) -> BaseException:
    try:
        body()
    except BaseException as error:
        return error
    raise AssertionError


def throw(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "where_it_waits", "in_its_own_code"),
    [
        (KeyboardInterrupt(), "was interrupted (KeyboardInterrupt)", "was interrupted (KeyboardInterrupt)"),
        (SystemExit(0), "was told to end (SystemExit: 0)", "was told to end (SystemExit: 0)"),
        (SystemExit(None), "was told to end (SystemExit: 0)", "was told to end (SystemExit: 0)"),
        (SystemExit(1), "was told to end (SystemExit: 1)", None),
        (SystemExit("no such model"), "was told to end (SystemExit: no such model)", None),
        (ValueError("no such expert"), None, None),
        (RuntimeError("connection closed by peer"), None, None),
    ],
)
def test_which_exceptions_are_no_failures(
    error: BaseException, where_it_waits: str | None, in_its_own_code: str | None
) -> None:
    error = caught(lambda: throw(error))
    assert how_it_ends(error, waits=True) == where_it_waits
    assert how_it_ends(error, waits=False) == in_its_own_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_whatever_a_handler_of_a_signal_raises_is_the_signals(number: signal.Signals) -> None:
    def handler(*_: Any) -> None:
        raise Reloaded("on request")

    before = signal.signal(number, handler)
    try:
        error = caught(lambda: (os.kill(os.getpid(), number), time.sleep(5)))
        assert how_it_ends(error, waits=False) == f"was ended by {number.name} (Reloaded: on request)"
    finally:
        signal.signal(number, before)
    assert how_it_ends(caught(lambda: throw(Reloaded())), waits=False) is None


def test_what_a_rank_that_nobody_watches_writes_of_its_exception() -> None:
    ends = broken_off(KeyboardInterrupt(), WAITS, None, victim=False)
    assert (ends.kind, ends.ranks, ends.conclusive) == ("end", (), False)
    assert ends.sentence.startswith("rank 0 was interrupted (KeyboardInterrupt), in step 7")
    victim = broken_off(RuntimeError("connection closed by peer"), WAITS, None, victim=True)
    assert victim.failure is not None and victim.failure.victim and not victim.conclusive
    own = broken_off(RuntimeError("the remote end"), BETWEEN, "its own code", victim=True)
    assert own.conclusive and own.sentence == "rank 1 failed in its own code: RuntimeError: the remote end"


def test_a_rank_that_ended_is_named_where_others_wait_for_it() -> None:
    ended = {1: "rank 1 has closed its backend, after step 6 of sizes (8,)"}
    found = find_culprit({0: WAITS, 1: BETWEEN}, {}, (), {"0": (0, 1)}, ended)
    assert found is not None and found.ranks == (1,) and found.waiting == (0,)
    assert found.sentence.endswith("in which rank 0 waits: rank 1 has closed its backend, after step 6 of sizes (8,)")
    unknown = find_culprit({0: WAITS}, {}, (), {"0": (0, 1)}, ended)  # it may have gone on unwatched
    assert unknown is not None and unknown.ranks == (1,)
    assert unknown.sentence.startswith(
        "rank 1 has closed its backend, after step 6 of sizes (8,); rank 0 waits in step 7"
    )
    assert find_culprit({0: BETWEEN}, {}, (), {"0": (0, 1)}, ended) is None  # nobody waits


def test_a_failure_stands_before_a_rank_that_ended() -> None:
    failure = Failure(0, "step 7", "ValueError: mine")
    found = find_culprit({0: WAITS, 1: BETWEEN}, {}, (failure,), {"0": (0, 1)}, {1: "rank 1 has ended"})
    assert found is not None and found.ranks == (0,)


# -- exceptions that end the process ------------------------------------------------------------


@pytest.fixture
def excepthook() -> Iterator[list[BaseException]]:
    printed: list[BaseException] = []
    before = sys.excepthook
    sys.excepthook = lambda kind, error, trace: printed.append(error)
    yield printed
    sys.excepthook = before


def test_an_uncaught_exception_is_printed_and_then_told(excepthook: list[BaseException]) -> None:
    mine, told = sys.excepthook, list[BaseException]()
    undo = on_uncaught(lambda error: told.append(error) if excepthook == [error] else None)
    error = ValueError("outside of every call")
    sys.excepthook(ValueError, error, None)
    assert excepthook == told == [error]
    undo()
    assert sys.excepthook is mine


def test_a_hook_that_somebody_set_later_stays(excepthook: list[BaseException]) -> None:
    undo = on_uncaught(lambda error: None)
    theirs = sys.excepthook = lambda *_: None
    undo()
    assert sys.excepthook is theirs


# -- processes of this host -----------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell of its processes")
def test_why_a_process_of_this_host_is_silent() -> None:
    place, mine = this_process()
    assert mine == os.getpid() and why_silent(place, mine) == "its process lives, and holds Python's lock"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        child.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 120
        while "stopped" not in why_silent(place, child.pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert why_silent(place, child.pid) == "its process is stopped, as by SIGSTOP"
    finally:
        child.kill()
    while "ended" not in why_silent(place, child.pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert why_silent(place, child.pid) == "its process ended"  # before somebody waits for it
    child.wait()
    assert why_silent(place, child.pid) == "its process ended"
    assert why_silent("another host", mine) == why_silent("", mine) == UNKNOWN
