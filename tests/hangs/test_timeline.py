"""Traces as text, as SVG and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from ringfence.runtime.drawing import ALARM_FILL
from ringfence.runtime.errors import TraceError
from ringfence.runtime.protocol.calls import program, until, without
from ringfence.runtime.protocol.explore import Event, ModelFailure, Result
from ringfence.runtime.protocol.plan import check
from ringfence.runtime.protocol.timeline import dump, load, svg, text

CALLS = program([1] * 8)
SAFE = check("mnnvl", "0.6.13", [CALLS] * 2)
STALE = check("mnnvl", "0.6.13", [CALLS, without(CALLS, 5)])
STUCK = check("mnnvl", "0.6.13", [CALLS, until(CALLS, 5)])
RESULTS = [pytest.param(r, id=str(r.failure)) for r in (SAFE, STALE, STUCK)]
SVG = "{http://www.w3.org/2000/svg}"


def test_a_timeline_has_a_column_per_rank_and_a_row_per_step() -> None:
    result: Result[Any] = Result(
        ModelFailure.DEADLOCK,
        7,
        (Event(0, 0, "push", "to rank 1"), Event(1, 0, "poll", "token 0")),
        ("rank 0 waits",),
        None,
        2,
    )
    assert text(result).splitlines() == [
        "deadlock: a shortest trace has 2 steps (7 states)",
        "every rank has made 2 calls without trouble; from there:",
        "  step  rank 0                  rank 1",
        "------  ----------------------  --------------------",
        "     1  call 0: push to rank 1",
        "     2                          call 0: poll token 0",
        "rank 0 waits",
    ]


def test_many_ranks_fit_a_terminal_too() -> None:
    trace = tuple(
        Event(rank, 8, "poll", f"token {rank}, buffer 1: takes what was sent in call 7" * 2) for rank in range(8)
    )
    said = text(Result(ModelFailure.DEADLOCK, 1, trace, ("rank 3 waits for " + "a word " * 30,))).splitlines()
    assert max(map(len, said)) <= 80 and said[1].split() == ["step", "rank", "does"]
    begun = [line.split()[:2] for line in said if line[:16].strip() and line[0] == " " and line[5].isdigit()]
    assert begun == [[str(rank + 1), str(rank)] for rank in range(8)]


def test_a_safe_answer_is_one_line() -> None:
    assert text(SAFE) == f"safe: no order of the steps fails ({SAFE.states} states)"


def test_a_stale_read_ends_in_the_step_that_reads() -> None:
    last = [line for line in text(STALE, width=200).splitlines() if line.strip()][-1]
    assert last.endswith("-- STALE READ")
    assert text(STALE).count("\n") > len(STALE.trace)


def test_a_deadlock_ends_in_what_everybody_waits_for() -> None:
    assert text(STUCK, width=200).splitlines()[-2:] == list(STUCK.waiting)
    assert "polls token 0" in STUCK.waiting[0]
    assert STUCK.waiting[1] == "rank 1 waits for nothing: its program has ended"


def test_a_trace_that_may_not_be_shortest_does_not_say_so() -> None:
    assert "a trace has" in text(replace(STALE, shortest=False)).splitlines()[0]


@pytest.mark.parametrize("result", RESULTS)
def test_the_picture_shows_every_step_and_every_wait(result: Result[Any]) -> None:
    root = ElementTree.fromstring(svg(result))
    boxes = [e for e in root.iter(f"{SVG}rect") if e.get("rx")]
    assert len(boxes) == len(result.trace)
    titles = [e.text or "" for e in root.iter(f"{SVG}title")]
    assert all(event.detail in title for event, title in zip(result.trace, titles, strict=True))
    said = " ".join(e.text or "" for e in root.iter(f"{SVG}text"))
    assert all(sentence in said for sentence in result.waiting)
    assert sum(box.get("fill") == ALARM_FILL for box in boxes) == (result.failure is ModelFailure.STALE_READ)


def test_the_picture_has_every_line_whole_and_what_the_table_says() -> None:
    """In boxes that are high enough; nothing is cut, and nothing lies outside."""
    long = "takes rank 0's part of token 0 in call 7 for rank 0's part of token 0 in call 8"
    trace = tuple(Event(rank, 8, "poll", f"token {rank}, buffer 1: {long}") for rank in range(8))
    result: Result[Any] = Result(ModelFailure.STALE_READ, 1, trace, ("rank 9 waits",))
    root = ElementTree.fromstring(
        svg(result, ["hazard: M25, ranks replay different graphs", "remedy: " + "vote " * 60])
    )
    said = " ".join(e.text or "" for e in root.iter(f"{SVG}text"))
    assert said.count(long) == 8 and "…" not in said
    assert "hazard: M25" in said and said.count("vote") == 60
    assert [f"rank {r}" for r in (*range(8), 9)] == re.findall(r"rank \d(?= rank|$)|rank 9(?= )", said)[:9]
    boxes = [e for e in root.iter(f"{SVG}rect") if e.get("rx")]
    width, height = (float(root.attrib["viewBox"].split()[i]) for i in (2, 3))
    assert all(float(b.attrib["x"]) + float(b.attrib["width"]) <= width for b in boxes)
    below = float(boxes[-1].attrib["y"]) + float(boxes[-1].attrib["height"])
    assert below < height and all(float(b.attrib["height"]) > 60 for b in boxes)


def test_the_picture_escapes_what_it_is_told() -> None:
    result: Result[Any] = Result(ModelFailure.STALE_READ, 1, (Event(0, 0, "poll", 'a < b & "c"'),))
    assert 'a < b & "c"' in "".join(ElementTree.fromstring(svg(result)).itertext())


@pytest.mark.parametrize("result", RESULTS)
def test_a_result_is_read_as_it_was_written(result: Result[Any]) -> None:
    assert load(dump(result)) == replace(result, end=None)


def spoiled(change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(dump(STALE))
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    "saved",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        "null",
        dump(STALE)[:-40],
        spoiled(lambda v: v.update(format=2)),
        spoiled(lambda v: v.pop("trace")),
        spoiled(lambda v: v.update(failure="melted")),
        spoiled(lambda v: v.update(states="many")),
        spoiled(lambda v: v.update(states=True)),
        spoiled(lambda v: v.update(waiting=[1])),
        spoiled(lambda v: v["trace"][0].pop("rank")),
        spoiled(lambda v: v["trace"][0].update(rank="0")),
        spoiled(lambda v: v["trace"].append("event")),
        spoiled(lambda v: v.update(trace={"a": 1})),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused(saved: str) -> None:
    with pytest.raises(TraceError, match="write it again"):
        load(saved)
