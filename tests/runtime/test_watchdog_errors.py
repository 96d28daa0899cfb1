"""What a watchdog makes of errors: an exception, a store that does not answer, kernels that gave up waiting."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from watchdogs import SHORT, Clock, Rank, look, ranks

from ringfence.runtime.errors import GroupFailureError, HangError, PoisonedError
from ringfence.runtime.watch.watchdog import EXIT_CODE


def test_what_broke_in_compilation_is_told_and_a_store_that_is_gone_is_nobodys_own_mistake(clock: Clock) -> None:
    fails, hears = both = ranks()
    look(clock, both, 0.1)
    error = ValueError("no such op")
    talking = clock.spawn(lambda: look(clock, both, 0.3))
    assert fails.watchdog.failed(error, "the compilation of a graph") is error
    talking.join()
    assert hears.watchdog.report is not None
    assert "rank 0 failed in the compilation of a graph: ValueError: no such op" in hears.watchdog.report.sentence

    fails, _ = both = ranks()
    look(clock, both, 0.1)
    talking = clock.spawn(lambda: look(clock, [fails], 0.6))
    instead = fails.watchdog.failed(dist.DistNetworkError("Broken pipe"), "the compilation of a graph")
    talking.join()
    assert isinstance(instead, GroupFailureError) and instead.ranks == (1,)


# -- exceptions ------------------------------------------------------------------------------


def test_an_exception_on_one_rank_is_the_error_of_all(clock: Clock, tmp_path: Path) -> None:
    waits, throws = both = ranks(folder=str(tmp_path))
    waits.step(enter=2, leave=1)
    throws.step(enter=1, leave=0)
    error = ValueError("no such expert\nsecond line")
    talker = clock.spawn(lambda: look(clock, [throws], 0.3))
    assert throws.watchdog.failed(error) is error
    talker.join()
    look(clock, both, 0.1)
    report = waits.watchdog.report
    assert report is not None and report.sentence == (
        "rank 1 failed in step 1 of sizes (4,), piece 0 'submod_0' (graph): ValueError: no such expert second line"
    )
    assert isinstance(waits.watchdog.failed(RuntimeError("connection closed by peer")), GroupFailureError)
    with pytest.raises(PoisonedError, match="no such expert"):
        throws.watchdog.health.check()
    assert {p.name for p in tmp_path.iterdir()} == {"journal-rank0.json", "journal-rank1.json"}


def test_the_victim_of_another_rank_names_that_one(clock: Clock) -> None:
    victim, throws = both = ranks()
    victim.step(enter=2, leave=1)
    throws.step(enter=1, leave=0)
    found: list[BaseException] = []
    main = clock.spawn(lambda: found.append(victim.watchdog.failed(RuntimeError("Connection closed by peer"))))
    other = clock.spawn(lambda: throws.watchdog.failed(ValueError("mine")))
    look(clock, both, 0.5)
    main.join(), other.join()
    assert isinstance(found[0], GroupFailureError) and "ValueError: mine" in str(found[0])


def test_an_error_of_a_collective_whose_cause_nobody_knows_stays_what_it_is(clock: Clock) -> None:
    victim, other = both = ranks()
    victim.step(enter=2, leave=1)
    error = RuntimeError("gloo: timed out")
    found: list[BaseException] = []
    main = clock.spawn(lambda: found.append(victim.watchdog.failed(error)))
    look(clock, both, 0.4)
    main.join()
    assert found == [error]
    assert other.watchdog.report is not None and "gloo: timed out" in other.watchdog.report.sentence


# -- the store ---------------------------------------------------------------------------------


class BrokenStore:
    """The store of a host that is gone, from the second request on."""

    def __init__(self) -> None:
        self.requests = 0

    def add(self, key: str, amount: int) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        def request(*_: Any) -> Any:
            raise ConnectionError("Broken pipe")

        return request


def test_a_store_that_is_gone_points_at_its_host(clock: Clock) -> None:
    rank = Rank(1, BrokenStore())
    rank.watchdog.others.host = 0
    rank.step()
    rank.step(enter=2, leave=1)
    look(clock, [rank], 0.4)
    report = rank.watchdog.report
    assert report is not None and report.ranks == (0,)
    assert "rank 0 serves the store, which does not answer (ConnectionError: Broken pipe)" in report.sentence


class StoppedStore:
    """The store of a process that is stopped: what is set goes into a socket, and no question is answered."""

    def __init__(self) -> None:
        self.is_asked, self.goes_on = threading.Event(), threading.Event()

    def set(self, key: str, value: bytes) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.is_asked.set() or self.goes_on.wait(60)


def test_a_store_whose_host_is_stopped_is_noticed_before_the_ranks_have_met(clock: Clock) -> None:
    store = StoppedStore()
    rank = Rank(1, store, ranks=0)
    rank.watchdog.others.host = 0
    talker = threading.Thread(target=rank.watchdog.talk)
    talker.start()
    try:
        assert store.is_asked.wait(60)
        with rank.journal.waiting("meet", (0, 1)):
            until = clock.monotonic() + 20 * SHORT.steady
            while rank.watchdog.report is None and clock.monotonic() < until:
                rank.watchdog.watch()
                clock.sleep(SHORT.beat)
    finally:
        store.goes_on.set()
        talker.join()
    report = rank.watchdog.report
    assert report is not None and report.ranks == (0,)
    assert report.sentence.startswith("rank 0 serves the store, which does not answer")


def test_a_store_of_the_launcher_is_nobodys_fault(clock: Clock) -> None:
    rank = Rank(0, BrokenStore(), ranks=1)
    rank.step()
    rank.step(enter=2, leave=1)
    look(clock, [rank], 0.4)
    report = rank.watchdog.report
    assert report is not None and report.ranks == ()
    assert report.sentence.endswith("the store does not answer, so for whom is not known")


def test_a_folder_that_cannot_be_written_does_not_stop_it(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    waits, absent = both = ranks(on_hang="abort", folder=str(tmp_path / "file" / "journals"))
    waits.step(enter=2, leave=1)
    look(clock, both, 0.5)
    assert waits.ended == absent.ended == [EXIT_CODE]


# -- kernels that end a wait by themselves ------------------------------------------------------------


class Lost:
    """Kernels of a rank, one of which has given up waiting for rank 1."""

    def check_kernels(self) -> None:
        raise HangError("rank 0 waited in vain for rank 1; the outputs since then are NaN", (1,))

    def wait_for(self, seconds: float) -> None:
        pass


def with_lost_wait(first: Rank) -> Lost:
    kernels = Lost()
    first.watchdog.reaction.waits.add("tp", kernels, 5.0)
    return kernels


@pytest.mark.parametrize("on_hang", ["raise", "abort", "report"])
def test_what_a_kernel_says_that_gave_up_is_told_at_the_next_beat(clock: Clock, on_hang: str, tmp_path: Path) -> None:
    """The host is ahead: both main threads are outside of the model, and nobody synchronises."""
    both = ranks(on_hang=on_hang, folder=str(tmp_path))
    first = both[0]
    kept = with_lost_wait(first)
    look(clock, both, 0.2)
    for rank in both:
        report = rank.watchdog.report
        assert report is not None and (report.kind, report.ranks) == ("hang", (1,)) and kept is not None
        assert rank.ended == ([EXIT_CODE] if on_hang == "abort" else [])
        assert (rank.watchdog.health.poisoned is not None) == (on_hang != "report")
        value = json.loads((tmp_path / f"journal-rank{rank.journal.rank}.json").read_text())
        assert value["report"]["finding"]["ranks"] == [1] and "waited in vain for rank 1" in value["reason"]
    if on_hang == "report":  # whoever goes on is not told again
        first.step()
        look(clock, both, 0.2)
        assert first.watchdog.report is None


def test_a_step_that_meets_it_blames_who_did_not_come_and_not_itself(clock: Clock, tmp_path: Path) -> None:
    first, second = both = ranks(on_hang="raise", folder=str(tmp_path))
    with_lost_wait(first)
    first.step(enter=1, leave=1)
    error = first.watchdog.failed(HangError("rank 0 waited in vain for rank 1", (1,)))
    assert isinstance(error, HangError) and error.ranks == (1,) and "rank 0 waited in vain" in str(error)
    look(clock, both, 0.1)
    assert second.watchdog.report is not None and second.watchdog.report.ranks == (1,)
    with pytest.raises(PoisonedError) as caught:
        first.watchdog.health.check()
    assert caught.value.ranks == (1,)


@pytest.mark.parametrize("goes_on", [True, False])
def test_groups_are_not_aborted_for_kernels_that_do_not_wait_any_more(clock: Clock, goes_on: bool) -> None:
    aborted: list[int] = []
    first, second = ranks(on_hang="raise", abort_groups=lambda: aborted.append(0))
    kept = with_lost_wait(first)
    first.step(enter=1, leave=0)
    until = clock.monotonic() + 0.3

    def goes() -> None:
        while goes_on and clock.monotonic() < until:
            clock.sleep(0.01)
            first.journal.leave()
            first.journal.enter()

    thread = clock.spawn(goes)
    look(clock, [first, second], 0.3)
    thread.join()
    assert kept is not None and (aborted, first.ended) == (([], []) if goes_on else ([0], [EXIT_CODE]))
