"""The picture of the merged journals: every rank, the gap, the numbers of the calls, who waits for whom."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ringfence.runtime.drawing import ALARM, ALARM_FILL, lines_of, width_of
from ringfence.runtime.watch import journals, picture
from ringfence.runtime.watch.position import CallSpan, Position

CODE = {"file": "job.py", "line": 30, "function": "serve", "text": "time.sleep(3600)"}
PROGRAM = {
    "pieces": [
        {"name": "submod_0", "island": False, "calls": []},
        {"name": "submod_1", "island": True, "calls": ["tp"]},
        {"name": "submod_2", "island": False, "calls": ["tp", "tp"]},
    ]
}
#: Of a step, in nanoseconds: when each piece is entered and left.
STEP = ((0, 10_000_000), (10_000_000, 30_000_000), (30_000_000, 40_000_000))


def steps(count: int, *, stuck: bool) -> list[dict[str, Any]]:
    """Complete steps of 50 ms, and one whose second piece is not left."""
    found = [
        {
            "step": n,
            "program": 0,
            "sizes": [8],
            "how": "replay",
            "calls_before": {"tp": 3 * n},
            "pieces": [[n * 50_000_000 + entered, n * 50_000_000 + left] for entered, left in STEP],
        }
        for n in range(count + stuck)
    ]
    if stuck:
        found[-1]["pieces"] = [found[-1]["pieces"][0], [found[-1]["pieces"][1][0], None]]
    return found


def write(
    folder: Path, rank: int, ranks: int, *, waits: bool, seconds: float = 3.0, ahead: float = 0.0, **more: Any
) -> None:
    call = 3 * 6
    position = (
        Position(
            rank,
            "step",
            6,
            (8,),
            1,
            "submod_1",
            "island",
            "",
            (CallSpan("tp", call, call),),
            {"tp": call + 1},
            {"tp": call},
        )
        if waits
        else Position(rank, "idle", 5, (8,), submitted={"tp": call}, completed={"tp": call}, still=seconds)
    )
    value = {
        "format": 1,
        "rank": rank,
        "reason": "hang: somebody did not come",
        "time": 1e9 + ahead + 0.35 + seconds,
        "clock_ns": int((0.35 + seconds) * 1e9),
        "groups": {"tp": list(range(ranks))},
        "programs": [PROGRAM],
        "steps": steps(6, stuck=waits),
        "position": position.to_dict(),
        **more,
    }
    (folder / f"journal-rank{rank}.json").write_text(json.dumps(value))


class Seen:
    """What is in a picture."""

    def __init__(self, folder: Path) -> None:
        self.root = ElementTree.fromstring(picture.svg(journals.merge(journals.read_folder(folder))))
        _, _, self.width, self.height = map(float, self.root.attrib["viewBox"].split())
        self.words = [
            (e.text or "", float(e.attrib["x"]), float(e.attrib["y"]), e.attrib)
            for e in self.root.findall(".//{*}text")
        ]
        self.boxes = [{k: v for k, v in e.attrib.items()} for e in self.root.findall(".//{*}rect")][1:]
        self.about = [e.text or "" for e in self.root.findall(".//{*}title")]

    def texts(self) -> list[str]:
        return [text for text, *_ in self.words]

    def y_of(self, text: str) -> float:
        (y,) = [y for found, _, y, _ in self.words if found == text]
        return y

    def filled(self, fill: str, row: float) -> list[dict[str, str]]:
        """Boxes of a rank, whose name stands on ``row``."""
        return [b for b in self.boxes if b["fill"] == fill and abs(float(b["y"]) + 17 - row) < 1]

    def check(self) -> None:
        """Whatever it shows, nothing lies outside."""
        for text, x, y, attributes in self.words:
            size = float(attributes["font-size"])
            assert 0 <= y <= self.height and (
                x + width_of(text, size) <= self.width + 1 or attributes["text-anchor"] != "start"
            )
        for box in self.boxes:
            assert float(box["x"]) + float(box["width"]) <= self.width and float(box["width"]) > 0


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    """Rank 1 sleeps outside of the model, rank 3 has no file."""
    for rank in (0, 2):
        write(tmp_path, rank, 4, waits=True)
    write(tmp_path, 1, 4, waits=False, code=CODE)
    return Seen(tmp_path)


def test_every_rank_has_a_row_in_order(seen: Seen) -> None:
    assert [t for t in seen.texts() if re.fullmatch(r"rank \d", t)] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    rows = [seen.y_of(f"rank {rank}") for rank in range(4)]
    assert rows == sorted(rows) and len(set(rows)) == 4
    assert "left no file that can be read" in seen.texts()
    assert [b["stroke-dasharray"] for b in seen.boxes if abs(float(b["y"]) + 17 - rows[3]) < 1] == ["4 3"]
    seen.check()


def test_what_was_heard_of_a_rank_without_a_file_ends_before_the_break(tmp_path: Path) -> None:
    for rank in (0, 2):
        heard = Position(1, "step", 6, (8,), 0, "a_piece_of_a_model_with_a_long_name" * 3, "graph").to_dict()
        write(tmp_path, rank, 3, waits=True, heard={"1": heard})
    seen = Seen(tmp_path)
    ((text, x, _, attributes),) = [word for word in seen.words if word[0].startswith("could not write")]
    (broken,) = [x for text, x, *_ in seen.words if text.startswith("nothing moved")]
    assert text.endswith(" ...") and x + width_of(text, float(attributes["font-size"])) < broken
    assert any("long_name" in about for about in seen.about)


def test_calls_have_their_numbers_and_pieces_their_description(seen: Seen) -> None:
    """Of the last four steps: numbers of whole pieces as from-to."""
    assert seen.texts().count("15") == 3 and seen.texts().count("16-17") == 3
    assert "3" not in seen.texts() and "step 2" not in seen.texts() and seen.texts().count("step 5") == 3
    assert "step 5 of sizes (8,), piece 2 'submod_2' (graph), calls 16 to 17 of group 'tp'" in seen.about


def test_who_waits_is_open_to_the_right_and_the_axis_is_broken(seen: Seen) -> None:
    for rank in (0, 2):
        (box,) = seen.filled(ALARM_FILL, seen.y_of(f"rank {rank}"))
        assert float(box["x"]) + float(box["width"]) == seen.width - 60
    assert seen.texts().count("waits in call 18") == 2
    assert "nothing moved for 3.0 s" in [t for t in seen.texts() if t.startswith("nothing moved")]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_an_arrow_leads_to_the_culprit(tmp_path: Path, culprit: int) -> None:
    for rank in range(3):
        write(tmp_path, rank, 3, waits=rank != culprit, code=CODE)
    seen = Seen(tmp_path)
    heads = [e.attrib["points"].split(" ")[0] for e in seen.root.findall(".//{*}polygon")]
    row = seen.y_of(f"rank {culprit}")
    assert len(heads) == 2 and float(heads[0].split(",")[1]) == pytest.approx(
        row - 5, abs=1
    )  # the other is the legend's
    stubs = [e.attrib["points"] for e in seen.root.findall(".//{*}polyline") if e.attrib["stroke"] == ALARM]
    assert len(stubs) == 2 + 1 + 1 + 1  # of those that wait, what joins them, to the culprit, and the legend's
    assert seen.texts().count("outside of the model") == 1
    assert seen.texts().count("job.py:30 in serve: time.sleep(3600)") == 1
    seen.check()


def test_there_is_a_legend(seen: Seen) -> None:
    for meaning in ("piece", "island", "not complete", "nothing was written down", "who waits for whom"):
        assert meaning in seen.texts()


def test_ranks_that_wait_for_nothing_have_no_gap(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path, rank, 2, waits=False, reason="asked for")
    seen = Seen(tmp_path)
    assert not [b for b in seen.boxes if b["fill"] == ALARM_FILL] and not list(seen.root.findall(".//{*}polygon"))
    assert max(float(b["x"]) + float(b["width"]) for b in seen.boxes) == seen.width - 60
    seen.check()


def test_a_long_answer_is_wrapped(tmp_path: Path) -> None:
    error = "ValueError: " + "the tokens of the request do not fit " * 20
    failures = [{"rank": 1, "where": "step 6", "error": error, "victim": False}]
    write(tmp_path, 0, 2, waits=True, failures=failures)
    write(tmp_path, 1, 2, waits=False, failures=failures, code=CODE | {"text": "x" * 300})
    seen = Seen(tmp_path)
    seen.check()
    bold = [
        t
        for t, _, _, a in seen.words
        if a.get("font-weight") == "bold" and not t.startswith("rank 1 f") and "tokens" in t
    ]
    assert len(bold) >= 4


@pytest.mark.parametrize("ahead", [3600.0, -7200.0])
def test_clocks_that_differ_are_lined_up(tmp_path: Path, ahead: float) -> None:
    for rank in range(3):
        write(tmp_path, rank, 3, waits=rank != 1, ahead=ahead * (rank == 2))
    skewed = Seen(tmp_path)
    for rank in range(3):
        write(tmp_path, rank, 3, waits=rank != 1)
    even = Seen(tmp_path)
    assert [(b["x"], b["width"]) for b in skewed.boxes] == [(b["x"], b["width"]) for b in even.boxes]
    assert any(f"rank 2's by {abs(ahead):.1f} s" in text for text in skewed.texts())
    assert not any("lined up" in text for text in even.texts())


def test_files_without_common_calls_are_taken_to_be_of_one_moment(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, waits=True)
    write(tmp_path, 1, 2, waits=False, ahead=3600.0, steps=[])
    first, second = journals.read_folder(tmp_path)
    assert picture.clocks((first, second)) == {0: 0.0, 1: pytest.approx(3600.0)}


def test_what_xml_cannot_hold_is_replaced(tmp_path: Path) -> None:
    failures = [{"rank": 1, "where": "step 6", "error": "a < b & \x00\x1b[31m \ud800", "victim": False}]
    write(tmp_path, 0, 2, waits=True, failures=failures)
    seen = Seen(tmp_path)
    assert any("a < b & " in text for text in seen.texts())


def test_sixty_four_ranks_are_all_drawn(tmp_path: Path) -> None:
    for rank in range(64):
        write(tmp_path, rank, 64, waits=rank != 5)
    seen = Seen(tmp_path)
    assert sum(bool(re.fullmatch(r"rank \d+", text)) for text in seen.texts()) == 64
    seen.check()


def test_lines_are_no_wider_than_they_may_be() -> None:
    lines = lines_of("a call of group 'tp' " * 9 + "x" * 200, 300, 12)
    assert len(lines) > 4 and all(width_of(line, 12) <= 300 for line in lines)
