"""What ranks of one host see of each other without a thread, and ranks that wait for each other in two places."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest
import torch.distributed as dist
from watchdogs import Clock

from ringfence.runtime.channel import Channel
from ringfence.runtime.errors import ConcurrentCallError
from ringfence.runtime.watch import page as module
from ringfence.runtime.watch.culprit import find_alone
from ringfence.runtime.watch.journal import REPLAY, CallSpan, Journal, Marks, PieceNote, Position, ProgramNote
from ringfence.runtime.watch.page import Neighbours, Page

NOTE = ProgramNote((PieceNote("submod_0", False), PieceNote("submod_1", True, ("tp", "tp"))), "", "target 0/0")
OTHER = ProgramNote((PieceNote("submod_0", True, ("tp",)), PieceNote("submod_1", True, ("dp",))), "", "draft 1/0")


def _page() -> Page:
    page = Page.make()
    assert page is not None
    return page


def test_a_page_is_seen_by_its_address_and_by_no_other() -> None:
    mine = _page()
    theirs = Page.at(mine.address)
    assert theirs is not None
    mine.calls[0] = 12
    assert theirs.calls[0] == 12 and mine.left == ""
    theirs.leave("rank 1 compiles α")
    assert mine.left == "rank 1 compiles α"
    theirs.leave("x" * 100_000)
    assert len(mine.left) < 100_000 and set(mine.left) == {"x"}
    path, token = mine.address.split()
    assert Page.at(f"{path} {'0' * 32}") is None and Page.at(f"/proc/{os.getpid()}/fd/99999 {token}") is None
    fd = os.open(path, os.O_RDWR)
    os.close(fd)
    count = len(os.listdir("/proc/self/fd"))
    del mine, theirs
    assert len(os.listdir("/proc/self/fd")) < count


def _neighbours(count: int = 2) -> list[Neighbours]:
    store = dist.HashStore()
    channels = [Channel(store, rank, count) for rank in range(count)]
    return [Neighbours(channel, _page(), range(10, 10 + count)) for channel in channels]


def test_a_rank_that_is_ahead_is_believed_when_it_stays_so(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", 0.1)
    mine, theirs = _neighbours()
    assert mine.ahead(4, 1) == ()
    theirs.mine.calls[0] = 5
    assert mine.ahead(4, 1) == () and mine.ahead(4, 1) == ()
    clock.sleep(0.15)
    assert mine.ahead(4, 2) == (), "another exchange: what was seen in the one before says nothing"
    assert mine.ahead(5, 2) == (), "this rank has come to it"
    assert mine.ahead(4, 2) == ()
    clock.sleep(0.15)
    assert mine.ahead(4, 2) == (11,) and theirs.ahead(5, 2) == ()
    mine.tell("rank 10 compiles alone", (10,))
    assert theirs.told() == ("rank 10 compiles alone", (10,)) and mine.told() is None


def step(journal: Journal, program: int, pieces: int = 2) -> Marks:
    marks = journal.begin(program, (4,), REPLAY)
    for _ in range(pieces):
        marks.enter()
        marks.leave()
    if pieces == 2:
        marks.end()
    return marks


def test_each_step_shows_its_calls_when_it_begins() -> None:
    journal, page = Journal(), _page()
    target, draft = journal.register(NOTE), journal.register(OTHER)
    step(journal, target)
    journal.show("tp", page.calls)
    assert page.calls[0] == 2
    marks = step(journal, target, pieces=1)
    assert page.calls[0] == 4 and journal.calls("tp") == 2
    marks.enter(), marks.leave(), marks.end()
    step(journal, draft, pieces=0).fail()
    assert page.calls[0] == journal.calls("tp") == 4, "calls that do not come are not promised"
    step(journal, draft)
    assert journal.position().submitted == {"tp": 5, "dp": 1} and page.calls[0] == 5


def test_calls_of_a_step_inside_another_are_counted() -> None:
    journal = Journal()
    target, draft = journal.register(NOTE), journal.register(OTHER)
    outer = step(journal, target, pieces=1)
    step(journal, draft)
    assert journal.missed == 1 and journal.position().submitted == {"tp": 1, "dp": 1}
    outer.enter()
    position = journal.position()
    assert position.calls == (CallSpan("tp", 1, 2),) and position.submitted == {"tp": 3, "dp": 1}
    assert position.completed == {"tp": 1, "dp": 1}
    outer.leave(), outer.end()
    step(journal, draft)
    assert journal.position().submitted == {"tp": 4, "dp": 2} and journal.position().graph == "draft 1/0"


def test_two_threads_over_one_group_are_refused_where_somebody_judges_by_its_order() -> None:
    journal = Journal()
    journal.one_caller = True
    target, apart = journal.register(NOTE), journal.register(ProgramNote((PieceNote("s", True, ("dp",)),)))
    outer = step(journal, target, pieces=1)
    errors: list[str] = []

    def other_thread() -> None:
        for program in (target, apart):
            try:
                journal.begin(program, (4,), REPLAY).enter()
            except ConcurrentCallError as error:
                errors.append(str(error))

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "two threads call models over group 'tp' at once" in errors[0]
    step(journal, target)  # inside the outer one, on its thread
    outer.enter(), outer.leave(), outer.end()
    assert journal.position().submitted == {"tp": 4, "dp": 1}


def test_exchanges_of_two_threads_leave_nothing_behind() -> None:
    journal = Journal()
    first, second = journal.waiting("a", (0, 1)), journal.waiting("b")
    first.__enter__(), second.__enter__()
    assert journal.position().exchange == "b"
    first.__exit__(None, None, None)
    assert journal.position().exchange == "b" and journal.position().waits
    second.__exit__(None, None, None)
    assert journal.position().exchange == "" and not journal.position().waits


# -- waiting for each other ---------------------------------------------------------------------


def inside(rank: int, first: int, still: float = 5, group: str = "tp") -> Position:
    calls = (CallSpan(group, first, first),)
    return Position(rank, "step", 7, (4,), 1, "submod_1", "island", "", calls, {group: first + 1}, {}, still=still)


def compiling(rank: int, submitted: int, among: Sequence[int] = (0, 1, 2), still: float = 5) -> Position:
    what = "compiles forward 0/2 anew, because of a guard that failed: 2 <= x.size()[0]"
    counts = {"tp": submitted}
    return Position(
        rank, "compile", 6, submitted=counts, exchange="agree", still=still, among=tuple(among), compiles=what
    )


MEMBERS = {"tp": (0, 1, 2), "dp": (0, 3)}


def test_ranks_that_wait_for_each_other_in_two_places() -> None:
    found = find_alone({0: inside(0, 9), 1: compiling(1, 9), 2: inside(2, 9)}, MEMBERS, 2)
    assert found is not None and (found.ranks, found.waiting) == ((1,), (0, 2))
    assert found.sentence.startswith(
        "rank 1 compiles forward 0/2 anew, because of a guard that failed: 2 <= x.size()[0]; ranks 0, 2 do not, and "
        "wait for rank 1 in step 7 of sizes (4,), piece 1 'submod_1' (island), call 9 of group 'tp'. Neither comes"
    )


@pytest.mark.parametrize(
    "positions",
    [
        [inside(0, 9), compiling(1, 10)],  # it has come to that call
        [inside(0, 9, still=0.5), compiling(1, 9)],
        [inside(0, 9), compiling(1, 9, still=0.5)],
        [inside(0, 9), compiling(1, 9, among=(1, 2))],  # it waits for rank 2, which may come
        [inside(0, 9, group="dp"), compiling(1, 0)],  # it is none of that group
        [compiling(0, 9), compiling(1, 9)],
        [inside(0, 9), inside(1, 8)],
    ],
)
def test_ranks_that_are_slow_are_not_taken_for_those(positions: list[Position]) -> None:
    assert find_alone({p.rank: p for p in positions}, MEMBERS, 2) is None
