"""Picture: the last steps of all ranks side by side, and who waits for whom, as SVG.

Time runs right. The steps take most of the width; then the axis is broken, and what is right of it is the time in
which nothing moved, however long. Ranks have clocks of their own, which are lined up by the calls that they completed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..drawing import ALARM, ALARM_FILL, CALL, FAINT, HAIR, INK, ISLAND, PAPER, PIECE, Drawing, lines_of, width_of
from .journals import Mark, Merged, RankJournal
from .position import Position, sizes_text
from .summary import answer, call_text, no_file, ranks_of, several_groups, where

_DRAWN_STEPS = 4
_WIDTH, _LEFT, _RIGHT = 1100.0, 150.0, 60.0
_ROW, _BAR = 64.0, 24.0
#: Of the width for time, what the steps take where ranks wait after them; and where the rest begins.
_MOVING, _STANDING = 0.58, 0.66


def svg(merged: Merged) -> str:
    """See the module."""
    drawing = Drawing(_WIDTH)
    y = 12.0
    for i, line in enumerate(answer(merged)):
        y = drawing.paragraph(16, y, _WIDTH - 32, line, size=13 if i else 15, bold=not i)
    scale = _scale(merged)
    top = y + 26
    if scale.stands:
        text = f"nothing moved for {scale.stood:.1f} s"
        drawing.words(scale.now, y + 16, text, size=11, fill=ALARM)
    rows = {rank: top + _ROW * i for i, rank in enumerate(ranks_of(merged))}
    for rank, at in rows.items():
        _Row(drawing, merged, scale, rank, at).draw()
    bottom = top + _ROW * len(rows)
    if scale.stands:
        _break(drawing, scale, top - 6, bottom - 18)
    _who_waits(drawing, merged, rows)
    bottom = _legend(drawing, merged, scale, bottom)
    return drawing.svg(bottom + 12)


# -- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Where a moment is. first, last: of what moved, in seconds of one clock. stood: seconds after that.

    stands: whether some rank does not get on. ahead: by rank, how far its clock is ahead of the common one.
    """

    first: float
    last: float
    stood: float
    stands: bool
    ahead: Mapping[int, float]

    @property
    def now(self) -> float:
        """Where the time in which nothing moved begins."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _STANDING

    def x(self, moment: float, rank: int) -> float:
        width = (_WIDTH - _LEFT - _RIGHT) * (_MOVING if self.stands else 1.0)
        part = (moment - self.ahead[rank] - self.first) / max(self.last - self.first, 1e-6)
        return _LEFT + width * min(max(part, 0.0), 1.0)


def _scale(merged: Merged) -> _Scale:
    ahead = clocks(merged.journals)
    times = [
        time - ahead[j.rank]
        for j in merged.journals
        for m in last_steps(j, merged.journals)
        for time in (m.entered, m.left)
        if time is not None
    ]
    written = [j.written - ahead[j.rank] for j in merged.journals]
    first, last = (min(times), max(times)) if times else (min(written, default=0.0), max(written, default=1.0))
    stands = bool(merged.missing or merged.finding) or any(j.position.waits for j in merged.journals)
    return _Scale(first, last, max(max(written, default=last) - last, 0.0), stands, ahead)


def clocks(journals: Sequence[RankJournal]) -> dict[int, float]:
    """By rank, how many seconds its wall clock is ahead of the first one's.

    A call completes on all ranks at nearly the same time. Where ranks completed none together, and their files seem to
    be more than a minute apart, they are taken to be of one moment.
    """
    ahead: dict[int, float] = {}
    reference: dict[tuple[str, int], float] = {}
    for j in journals:
        done = {(c.group, c.last): m.left for m in j.marks if m.left is not None for c in m.calls}
        both = [done[key] - reference[key] for key in done.keys() & reference.keys()]
        apart = j.written - journals[0].written
        ahead[j.rank] = statistics.median(both) if both else apart if abs(apart) > 60 else 0.0
        for key, left in done.items():
            reference.setdefault(key, left - ahead[j.rank])
    return ahead


def last_steps(journal: RankJournal, journals: Sequence[RankJournal]) -> list[Mark]:
    """Those that are drawn: the same on all ranks, or a rank's own last ones where it is far from the others."""
    every = max((m.step for j in journals for m in j.marks), default=0)
    own = max((m.step for m in journal.marks), default=0)
    last = every if own > every - _DRAWN_STEPS else own
    return [m for m in journal.marks if m.step > last - _DRAWN_STEPS]


# -- one rank ------------------------------------------------------------------------------------------


class _Row:
    def __init__(self, drawing: Drawing, merged: Merged, scale: _Scale, rank: int, y: float) -> None:
        self._drawing, self._scale, self._rank, self._y = drawing, scale, rank, y
        self._journal = next((j for j in merged.journals if j.rank == rank), None)
        self._blamed = merged.finding is not None and rank in merged.finding.ranks
        self._merged = merged
        self._groups = several_groups(merged.journals)
        self._right = _WIDTH - _RIGHT

    def draw(self) -> None:
        colour = ALARM if self._blamed else INK
        self._drawing.words(16, self._y + 17, f"rank {self._rank}", size=13, bold=self._blamed, fill=colour)
        self._drawing.line((_LEFT, self._y + _BAR), (self._right, self._y + _BAR), colour=HAIR)
        if self._journal is None:
            self._gap(_LEFT, no_file(self._merged, self._rank))
            return
        marks = last_steps(self._journal, self._merged.journals)
        for mark in marks:
            if mark.left is not None:
                self._bar(mark, self._scale.x(mark.left, self._rank))
        self._steps(marks)
        labels = [self._label(m) for m in marks if m.left is not None and m.calls]
        if self._scale.stands:
            self._now(self._journal, marks)
        self._calls(labels)

    def _bar(self, mark: Mark, end: float) -> None:
        fill = CALL if mark.calls else ISLAND if mark.kind == "island" else PIECE
        x = self._scale.x(mark.entered, self._rank)
        self._drawing.box(x, self._y, end - x, _BAR, fill, about=_about(mark))

    def _steps(self, marks: Sequence[Mark]) -> None:
        """Where each begins, as far as there is room."""
        free = 0.0
        for mark in marks:
            x = self._scale.x(mark.entered, self._rank)
            if mark.piece == 0 and x >= free:
                self._drawing.line((x, self._y - 4), (x, self._y + _BAR), colour=FAINT)
                text = f"step {mark.step}"
                self._drawing.words(x + 2, self._y - 5, text, size=9, fill=FAINT)
                free = x + width_of(text, 9) + 6

    def _label(self, mark: Mark) -> tuple[float, str]:
        assert mark.left is not None
        middle = (self._scale.x(mark.entered, self._rank) + self._scale.x(mark.left, self._rank)) / 2
        numbers = [f"{c.first}" if c.first == c.last else f"{c.first}-{c.last}" for c in mark.calls]
        return middle, ", ".join(numbers)

    def _calls(self, labels: Sequence[tuple[float, str]]) -> None:
        """Their numbers below the bars; the last ones count, where there is no room for all."""
        free = self._scale.now if self._scale.stands else self._right
        for x, text in reversed(labels):
            half = width_of(text, 10) / 2
            if x + half <= free:
                self._drawing.words(x, self._y + _BAR + 12, text, size=10, fill=FAINT, anchor="middle")
                free = x - half - 4

    def _now(self, journal: RankJournal, marks: Sequence[Mark]) -> None:
        """Where the rank is since nothing moves any more."""
        position = journal.position
        ends = [self._scale.x(m.left, self._rank) for m in marks if m.left is not None]
        open_ = next((m for m in marks if m.left is None), None)
        text = now_text(position, self._groups)
        if position.waits and not (self._blamed and position.exchange):
            x = self._scale.x(open_.entered, self._rank) if open_ is not None else max(ends, default=self._scale.now)
            stroke = ALARM if self._blamed else ""
            about = _about(open_) if open_ is not None else where(position, self._groups)
            self._drawing.box(x, self._y, self._right - x, _BAR, ALARM_FILL, stroke=stroke, about=about)
            self._say(text, self._right - self._scale.now)
            if self._blamed and journal.code is not None:
                self._below(str(journal.code))
        elif self._blamed:
            self._gap(max(ends, default=_LEFT) + 2, text, str(journal.code or ""))
        else:
            self._say(text, self._right - self._scale.now, fill=FAINT)

    def _gap(self, x: float, text: str, below: str = "") -> None:
        """Time in which a rank did nothing that was written down."""
        stroke = ALARM if self._blamed else FAINT
        self._drawing.box(x, self._y, self._right - x, _BAR, PAPER, stroke=stroke, dash="4 3", about=text)
        if self._journal is not None:
            self._say(text, self._right - self._scale.now, fill=stroke)
        else:  # left of the break, which is drawn over it
            self._say(text, self._scale.now - 24 - x, at=x, fill=stroke)
        if below:
            self._below(below)

    def _say(self, text: str, width: float, *, at: float | None = None, fill: str = INK) -> None:
        first, *rest = lines_of(text, width - 12, 11)
        x = (at if at is not None else self._scale.now) + 6
        self._drawing.words(x, self._y + 16, f"{first} ..." if rest else first, size=11, fill=fill)

    def _below(self, text: str) -> None:
        for i, line in enumerate(lines_of(text, self._right - self._scale.now, 11)[:2]):
            self._drawing.words(self._scale.now + 6, self._y + _BAR + 13 + 13 * i, line, size=11, fill=ALARM)


def now_text(position: Position, groups: bool) -> str:
    """What a rank does, in a few words."""
    if position.exchange:
        return f"waits in the exchange '{position.exchange}'"
    if not position.stuck_in_piece:
        return "compiles" if position.phase == "compile" else "outside of the model"
    if not position.calls:
        return f"in piece {position.piece} '{position.name}', in no call"
    return "waits in " + ", ".join(call_text(c.first, c.last, c.group, groups) for c in position.calls)


def _about(mark: Mark) -> str:
    calls = f", {', '.join(map(str, mark.calls))}" if mark.calls else ""
    return f"step {mark.step} of {sizes_text(mark.sizes)}, piece {mark.piece} '{mark.name}' ({mark.kind}){calls}"


# -- around the ranks ---------------------------------------------------------------------------------------


def _break(drawing: Drawing, scale: _Scale, top: float, bottom: float) -> None:
    """The axis is broken: two lines, and nothing between them."""
    x = scale.now - 14
    steps = max(int((bottom - top) / 8), 1)
    zigzag = [(x + (4 if i % 2 else -4), top + (bottom - top) * i / steps) for i in range(steps + 1)]
    drawing.line(*zigzag, colour=PAPER, width=9)
    for shift in (-4, 4):
        drawing.line(*((px + shift, py) for px, py in zigzag), colour=FAINT, width=0.8)


def _who_waits(drawing: Drawing, merged: Merged, rows: Mapping[int, float]) -> None:
    """A line from each rank that waits, which ends in an arrow at each that it waits for."""
    finding = merged.finding
    waiting = [r for r in finding.waiting if r not in finding.ranks and r in rows] if finding is not None else []
    culprits = [r for r in finding.ranks if r in rows] if finding is not None and waiting else []
    if not culprits:
        return
    right, bus = _WIDTH - _RIGHT, _WIDTH - _RIGHT + 26
    middle = {rank: rows[rank] + _BAR / 2 for rank in (*waiting, *culprits)}
    for rank in waiting:
        drawing.line((right + 2, middle[rank]), (bus, middle[rank]), colour=ALARM, width=1.5)
    drawing.line((bus, min(middle.values())), (bus, max(middle.values())), colour=ALARM, width=1.5)
    for rank in culprits:
        drawing.line((right + 8, middle[rank]), (bus, middle[rank]), colour=ALARM, width=1.5)
        drawing.arrow_head(right + 2, middle[rank], ALARM)


def _legend(drawing: Drawing, merged: Merged, scale: _Scale, y: float) -> float:
    entries = [
        (PIECE, "", "piece"),
        (CALL, "", "with collective calls; their numbers below"),
        (ISLAND, "", "island"),
    ]
    if scale.stands:
        entries += [(ALARM_FILL, "", "not complete"), (PAPER, FAINT, "nothing was written down")]
    y = drawing.legend(16, y, entries)
    if merged.finding is not None and set(merged.finding.waiting) - set(merged.finding.ranks):
        drawing.line((24, y + 8), (36, y + 8), colour=ALARM, width=1.5)
        drawing.arrow_head(16, y + 8, ALARM)
        drawing.words(42, y + 12, "who waits for whom", size=11, fill=FAINT)
        y += 18
    span = f"the steps took {(scale.last - scale.first) * 1e3:.1f} ms, as the hosts saw them"
    off = [f"rank {r}'s by {abs(s):.1f} s" for r, s in scale.ahead.items() if abs(s) > 0.5]
    if off:
        span += f"; clocks were lined up: {', '.join(off)}"
    return drawing.paragraph(16, y, _WIDTH - 32, span, size=11, fill=FAINT)
