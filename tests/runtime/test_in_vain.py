"""A kernel that gave up waiting: the watch says who did not come and why, with the kernel's words as its evidence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from watchdogs import SHORT, Clock, Rank, look

from ringfence.runtime.collectives.lost import Lost
from ringfence.runtime.errors import HangError, PoisonedError
from ringfence.runtime.watch import summary
from ringfence.runtime.watch.bounded import BoundedWaits
from ringfence.runtime.watch.culprit import Finding, find_culprit
from ringfence.runtime.watch.journal import REPLAY
from ringfence.runtime.watch.journals import merge, read_folder
from ringfence.runtime.watch.position import CallSpan, Position
from ringfence.runtime.watch.report import Report, lost_wait
from ringfence.runtime.watch.watchdog import EXIT_CODE
from support import BoundedKernels

SAID = "rank 0 waited in vain for the part of rank 1 (call 313 of the workspace, token 2)"
#: So that the watch finds nothing by itself.
PATIENT = replace(SHORT, steady=30.0, alone=30.0, silence=1.0)


class Device:
    """Whose steps are complete, up to a number."""

    ended = 10**9

    def record(self, slot: int) -> bool:
        return True

    def done(self, slot: int) -> bool:
        return slot <= self.ended

    def watch_from_here(self) -> None: ...


class Watched(Rank):
    """A rank with a device of its own, and kernels that wait for others for at most five seconds."""

    def __init__(self, rank: int, store: dist.Store, ranks: int = 2, bound: float = 5.0, **options: object) -> None:
        super().__init__(rank, store, ranks, **{"deadlines": PATIENT, **options})  # type: ignore[arg-type]
        self.device, self.kernels = Device(), BoundedKernels()
        self.journal.use(self.device)
        self.watchdog.reaction.waits.add("tp", self.kernels, bound)
        self.step()  # so that the next one is no warm-up

    def waits_in_a_step(self, size: int = 4) -> None:
        """The host has returned from it, and the device has not."""
        self.device.ended = self.journal.begun - 1
        marks = self.journal.begin(0, (size,), REPLAY)
        for _ in range(2):
            marks.enter()
            marks.leave()
        marks.end()

    def gives_up(self, missing: tuple[int, ...] = (1,), told: bool = False) -> None:
        """The kernel returns, so to the device the call is complete."""
        lost = Lost(313, 2, missing[0], self.journal.rank, missing, sums=False, relayed=told)
        self.kernels.lost, self.device.ended = lost.error(), 10**9


def watched(count: int = 2, **options: object) -> list[Watched]:
    store = dist.HashStore()
    return [Watched(rank, store, count, **options) for rank in range(count)]


def until_told(clock: Clock, some: list[Watched]) -> None:
    """All of them have a report."""
    until = clock.monotonic() + 20
    while any(rank.watchdog.report is None for rank in some) and clock.monotonic() < until:
        look(clock, some, 0.1)
    look(clock, some, 3 * SHORT.beat)


def in_its_own_code(rank: Watched) -> None:
    rank.step(enter=1, leave=0)


def went_past(rank: Watched) -> None:
    rank.step()


def other_size(rank: Watched) -> None:
    rank.waits_in_a_step(8)


def same_call(rank: Watched) -> None:
    rank.waits_in_a_step()


def nothing(rank: Watched) -> None:
    pass


@pytest.mark.parametrize("on_hang", ["raise", "abort", "report"])
@pytest.mark.parametrize(
    ("does", "says", "ranks"),
    [
        (in_its_own_code, r"rank 1 did not come to call 1 .*\(step 1 .*rank 0 waits: rank 1 is in step 1", (1,)),
        (nothing, r"rank 1 did not come to call 1 of group 'tp' .*: rank 1 is outside of the model since", (1,)),
        (went_past, r"rank 1 left out a call of .*it has completed call 1, in which rank 0 still waits", (1,)),
        (other_size, r"rank 0 came with 4 tokens, rank 1 with 8 tokens: rank 0 waits in step 1", (0, 1)),
        (same_call, None, (1,)),
    ],
)
def test_the_watch_says_why_with_the_words_of_the_kernel(
    clock: Clock,
    does: Callable[[Watched], None],
    says: str | None,
    ranks: tuple[int, ...],
    on_hang: str,
    tmp_path: Path,
) -> None:
    first, second = both = watched(on_hang=on_hang, folder=str(tmp_path))
    first.waits_in_a_step()
    does(second)
    look(clock, both, 3 * SHORT.beat)
    first.gives_up()
    until_told(clock, both)
    told = [rank.watchdog.report for rank in both]
    assert told[0] is not None and told[0] == told[1]
    sentence = told[0].sentence
    assert told[0].kind == "hang" and told[0].ranks == ranks and SAID in sentence
    assert sentence.startswith(SAID) if says is None else re.match(says + r".*; " + re.escape(SAID), sentence)
    merged = merge(read_folder(tmp_path))
    assert merged.sentence == sentence and SAID in " ".join(summary.text(merged).split())
    assert summary.text(merged).count("waited in vain") == 1
    for rank in both:
        assert on_hang != "abort" or rank.ended == [EXIT_CODE]
        value = json.loads((tmp_path / f"journal-rank{rank.journal.rank}.json").read_text())
        assert value["report"]["finding"]["sentence"] == sentence
    where = json.loads((tmp_path / "journal-rank0.json").read_text())["position"]
    assert where["step"] == 1 and where["calls"] == [{"group": "tp", "first": 1, "last": 1}], "where it waited"


def test_a_rank_that_is_gone_is_waited_for_until_it_is_silent(clock: Clock) -> None:
    first, second = both = watched()
    first.waits_in_a_step()
    in_its_own_code(second)
    look(clock, both, 3 * SHORT.beat)
    first.watchdog.talk()  # it has heard the last of it
    first.gives_up()
    look(clock, [first], SHORT.silence / 4)
    assert first.watchdog.report is None, "it may be alive"
    until_told(clock, [first])
    report = first.watchdog.report
    assert report is not None and report.ranks == (1,) and report.finding.evidence.startswith(SAID)
    assert report.sentence.startswith("rank 1 has not been heard of for")
    assert "; rank 0 waits in step 1 of sizes (4,)" in report.sentence


def test_a_main_thread_that_meets_it_raises_the_same_and_waits_no_longer_than_a_step_may(
    clock: Clock, tmp_path: Path
) -> None:
    first, second = both = watched(folder=str(tmp_path))
    first.waits_in_a_step()
    in_its_own_code(second)
    look(clock, both, 3 * SHORT.beat)
    first.gives_up()
    raised: list[BaseException] = []
    began = clock.monotonic()
    assert first.kernels.lost is not None
    main = clock.spawn(lambda: raised.append(first.watchdog.failed(first.kernels.lost)))  # type: ignore[arg-type]
    look(clock, [second], 0.0)
    while not main.ended():
        for rank in both:
            rank.watchdog.talk()
        clock.sleep(SHORT.beat)
    assert clock.monotonic() - began < 3 * SHORT.silence
    (error,) = raised
    assert isinstance(error, HangError) and error.ranks == (1,)
    assert "the ranks hang: rank 1 did not come to call 1" in str(error) and SAID in str(error)
    with pytest.raises(PoisonedError, match=r"rank 1 did not come to call 1 .*waited in vain") as caught:
        first.watchdog.health.check()
    assert caught.value.ranks == (1,)
    until_told(clock, [second])
    assert second.watchdog.report is not None and second.watchdog.report.sentence in str(error)


def test_what_the_watch_has_found_first_is_kept(clock: Clock) -> None:
    first, second = both = watched(deadlines=SHORT)
    first.waits_in_a_step()
    in_its_own_code(second)
    look(clock, both, 0.4)
    report = first.watchdog.report
    assert report is not None and "waited in vain" not in report.sentence
    first.gives_up()
    look(clock, both, 0.1)
    assert first.kernels.lost is not None and first.watchdog.report == report
    assert str(first.watchdog.failed(first.kernels.lost)) == str(first.watchdog.reaction.error(report))


def test_a_rank_that_comes_when_it_is_too_late_has_left_nothing_out(clock: Clock) -> None:
    first, second = both = watched()
    first.waits_in_a_step()
    in_its_own_code(second)
    look(clock, both, 4 * SHORT.beat)
    first.gives_up()
    marks = second.journal.begin(0, (4,), REPLAY)
    for _ in range(2):
        marks.enter()
        marks.leave()
    marks.end()
    second.gives_up((1,), told=True)
    until_told(clock, both)
    for rank in both:
        report = rank.watchdog.report
        assert report is not None and report.ranks == (1,) and report.reporter == 0
        assert report.sentence.startswith("rank 1 did not come to call 1")


def test_who_was_told_says_what_the_one_has_seen_that_told_it(clock: Clock) -> None:
    """Of three, rank 2 has just come: its kernel is told at once, and where it is says nothing."""
    first, second, third = three = watched(3)
    first.waits_in_a_step()
    in_its_own_code(second)
    look(clock, three, 4 * SHORT.beat)
    third.waits_in_a_step()
    third.gives_up(told=True)
    look(clock, three, 2 * SHORT.beat)
    assert third.watchdog.report is None
    first.gives_up()
    until_told(clock, three)
    assert [rank.watchdog.report is not None and rank.watchdog.report.reporter for rank in three] == [0, 0, 0]


def test_a_position_that_is_older_than_the_wait_says_nothing() -> None:
    """The watch was kept from looking: since then the device may have come to any other call."""
    now = [0.0]
    waits, kernels = BoundedWaits(lambda: now[0]), BoundedKernels()
    waits.add("tp", kernels, 1.0)
    inside = Position(0, "step", 4, (4,), 1, "submod_1", calls=(CallSpan("tp", 4, 4),), submitted={"tp": 5}, moved=9)
    after = Position(0, "idle", 7, (4,), submitted={"tp": 8}, completed={"tp": 8}, moved=20)
    compiles = Position(0, "compile", 7, exchange="meet", compiles="compiles a graph")
    for seconds, told, stands in ((0.9, False, True), (1.1, False, False), (0.9, True, False)):
        kernels.lost = None
        assert waits.stands(lambda: inside) is inside
        now[0] += seconds
        kernels.lost = HangError(SAID, (1,), told=told)
        found = waits.stands(lambda: after)
        assert (found.calls, found.step, found.moved) == ((inside.calls, 4, 20) if stands else ((), 7, 20))
        assert not stands or found.still == pytest.approx(inside.still + seconds)
        now[0] += 100.0  # what was found at the first look stays
        assert waits.stands(lambda: after).step == found.step
        assert waits.stands(lambda: compiles) is compiles


def test_no_count_of_calls_blames_the_rank_that_waited() -> None:
    def at(rank: int, calls: tuple[CallSpan, ...], done: int) -> Position:
        phase, piece = ("step", 1) if calls else ("idle", None)
        counts = {"submitted": {"tp": done + len(calls)}, "completed": {"tp": done}}
        return Position(rank, phase, 3, (4,), piece, calls=calls, **counts)

    waits, past = at(0, (CallSpan("tp", 3, 3),), 3), [at(rank, (), 4) for rank in (1, 2)]
    positions = dict(enumerate([waits, *past]))
    found = find_culprit(positions, {})
    assert found is not None and found.ranks == (0,), "it made a call more than two others"
    assert find_culprit(positions, {}, victims=(0,)) is None
    together = {rank: at(rank, (CallSpan("tp", 3, 3),), 3) for rank in range(2)}
    assert find_culprit(together, {}) is not None and find_culprit(together, {}, victims=(0,)) is None
    alone = {0: Position(0, "step", 3, (4,), 1, "island")}
    assert find_culprit(alone, {}) is not None and find_culprit(alone, {}, victims=(0,)) is None


def test_a_report_keeps_its_evidence_on_the_way() -> None:
    error = HangError(SAID, (1,))
    plain, whole = lost_wait(0, error), lost_wait(0, error, Finding((1,), (0,), "rank 1 sleeps", "asleep"))
    assert (plain.sentence, plain.finding.evidence) == (SAID, "")
    assert (whole.sentence, whole.finding.evidence, whole.brief.sentence) == (f"rank 1 sleeps; {SAID}", SAID, "asleep")
    assert Report.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
