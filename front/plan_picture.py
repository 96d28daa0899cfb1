"""Plan picture: what becomes of a model, as SVG: its layers, the sites in them, the pieces and islands, and why.

A block is one layer, or several that are equal. Down the block stand its all-reduces in order; at its side, the pieces
that they are captured in and the islands between these. What is declined, refused or split off is numbered, and below
the picture each number says why, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .compile_passes.judge import Decision
from .compile_passes.match import Site
from .compile_passes.report import CompileReport
from .runtime.drawing import (
    ALARM,
    ALARM_FILL,
    CALL,
    FAINT,
    FRAME,
    INK,
    ISLAND,
    LEFT,
    PAPER,
    PIECE,
    Drawing,
    lines_of,
)

_WIDTH, _MARGIN, _SIDE, _ROW = 980.0, 16.0, 250.0, 26.0

_LAYER = re.compile(r"^(?P<list>.*?)\.(?P<number>\d+)(?:\.(?P<rest>.*))?$")

#: Names of nodes are numbered on from layer to layer.
_NUMBERED = re.compile(r"'([a-z_]+?)_\d+'")


@dataclass(frozen=True)
class SiteRow:
    """What is drawn of one site: where in its layer it is, what became of it, and the part that it runs in.

    part: "piece", "island", or "" for an all-reduce that is not fused. why: the sentence that the row points at.
    """

    where: str
    what: str
    outcome: str
    part: str
    why: str


@dataclass(frozen=True)
class LayerBlock:
    """Layers ``first`` to ``last`` of a list, each with these rows; ``path`` alone is what stands in no list."""

    path: str
    first: int | None
    last: int | None
    rows: tuple[SiteRow, ...]
    pieces: int
    islands: int

    @property
    def title(self) -> str:
        if self.first is None:
            return self.path or "outside of modules"
        if self.first == self.last:
            return f"{self.path}.{self.first}"
        return f"{self.path}.{self.first} to {self.path.rpartition('.')[2]}.{self.last}"

    @property
    def times(self) -> int:
        return 1 if self.first is None or self.last is None else self.last - self.first + 1


def blocks(report: CompileReport) -> list[LayerBlock]:
    """The layers of a report, equal neighbours in one block."""
    found: list[LayerBlock] = []
    for block in _single(report):
        last = found[-1] if found else None
        follows = last is not None and last.last is not None and block.first == last.last + 1
        if last is not None and follows and _same(last, block):
            found[-1] = LayerBlock(last.path, last.first, block.last, last.rows, last.pieces, last.islands)
        else:
            found.append(block)
    return found


def _same(one: LayerBlock, other: LayerBlock) -> bool:
    return (one.path, one.rows, one.islands) == (other.path, other.rows, other.islands)


def _single(report: CompileReport) -> Iterator[LayerBlock]:
    """One block for each layer, or for what is in none."""
    part_of = {site: piece for piece in report.pieces for site in piece.sites}
    refused = {v.site: f"{v.rule}: {v.remedy or v.message}" for v in report.refused}
    rows: list[SiteRow] = []
    key: tuple[str, int | None] | None = None
    parts: dict[int, bool] = {}
    for site in report.sites:
        path, number, rest = _place(site.module)
        if key != (path, number):
            if key is not None:
                yield _block(key, rows, parts)
            key, rows, parts = (path, number), [], {}
        piece = part_of.get(site.index)
        if piece is not None:
            parts[piece.index] = piece.island
        rows.append(_row(site, rest, piece.island if piece is not None else None, refused.get(site.index)))
    if key is not None:
        yield _block(key, rows, parts)


def _block(key: tuple[str, int | None], rows: Sequence[SiteRow], parts: dict[int, bool]) -> LayerBlock:
    path, number = key
    islands = sum(parts.values())
    return LayerBlock(path, number, number, tuple(rows), len(parts) - islands, islands)


def _place(module: str | None) -> tuple[str, int | None, str]:
    found = _LAYER.match(module or "")
    if found is None:
        return module or "", None, ""
    return found["list"], int(found["number"]), found["rest"] or ""


def _row(site: Site, rest: str, island: bool | None, refused: str | None) -> SiteRow:
    what = (site.kind or "all_reduce").replace("_add", " + add").replace("_rms_norm", " + norm").replace("_", "-")
    part = "" if island is None else "island" if island else "piece"
    if site.decline is not None:
        why = _NUMBERED.sub(r"'\1'", f"{site.decline.reason}: {site.decline.message}")
        return SiteRow(rest, what, f"declined: {site.decline.reason}", part, why)
    if refused is not None:
        return SiteRow(rest, what, "fused, refused", part, refused)
    merged = "fused, merged into one call" if site.merged_into is not None else "fused"
    return SiteRow(rest, what, merged, part, "")


# -- the drawing ----------------------------------------------------------------------------------------


def svg(report: CompileReport, about: str) -> str:
    """about: whose plan it is."""
    drawing = Drawing(_WIDTH)
    y = drawing.paragraph(_MARGIN, 12, _WIDTH - 2 * _MARGIN, about, size=15, bold=True)
    alarm = bool(report.refused) or (report.plan is not None and report.plan.failed)
    y = drawing.paragraph(_MARGIN, y, _WIDTH - 2 * _MARGIN, report.summary, size=13, fill=ALARM if alarm else INK)
    y += 14
    whys: dict[str, int] = {}
    for block in blocks(report):
        y = _draw(drawing, block, y, whys) + 10
    if not report.sites:
        y = drawing.paragraph(_MARGIN, y, _WIDTH - 2 * _MARGIN, "there is no all-reduce in this graph")
    y = _parts(drawing, report, y)
    for sentence, number in whys.items():
        y = drawing.paragraph(_MARGIN, y + 4, _WIDTH - 2 * _MARGIN, f"{number}  {sentence}", size=11)
    for note in _sentences(report):
        y = drawing.paragraph(_MARGIN, y + 4, _WIDTH - 2 * _MARGIN, note, size=11, fill=FAINT)
    y = drawing.legend(_MARGIN, y, [entry for entry in _LEGEND if entry[0] in drawing.fills])
    return drawing.svg(y + 12)


_LEGEND = [
    (CALL, "", "all-reduce fused with its norm"),
    (LEFT, "", "all-reduce left as it is"),
    (ALARM_FILL, ALARM, "refused: the reference carries it out"),
    (PIECE, "", "piece"),
    (ISLAND, "", "island"),
]


def _draw(drawing: Drawing, block: LayerBlock, y: float, whys: dict[str, int]) -> float:
    height = max(_ROW * len(block.rows) + 8, 48)
    drawing.box(_MARGIN, y, _WIDTH - 2 * _MARGIN, height, PAPER, stroke=FRAME, round_=4)
    title = lines_of(block.title, _SIDE - 20, 12)[:2]
    for i, line in enumerate(title):
        drawing.words(_MARGIN + 10, y + 20 + 15 * i, line, bold=True)
    if block.times > 1:
        equal = f"{block.times} equal layers"
        drawing.words(_MARGIN + 10, y + 20 + 15 * len(title), equal, size=11, fill=FAINT)
    for i, row in enumerate(block.rows):
        _draw_row(drawing, row, y + 4 + _ROW * i, whys)
    return y + height


def _draw_row(drawing: Drawing, row: SiteRow, y: float, whys: dict[str, int]) -> None:
    left, right = _MARGIN + _SIDE, _WIDTH - _MARGIN - 8
    fill = ALARM_FILL if "refused" in row.outcome else LEFT if row.outcome.startswith("declined") else CALL
    stroke = ALARM if fill == ALARM_FILL else ""
    drawing.words(left, y + 16, row.where[-34:], size=11)
    bar = left + 240
    drawing.box(bar, y + 3, 210, _ROW - 8, fill, stroke=stroke, about=row.why, round_=3)
    drawing.words(bar + 8, y + 16, row.what, size=11)
    part = bar + 218
    if row.part:
        drawing.box(part, y + 3, 52, _ROW - 8, ISLAND if row.part == "island" else PIECE, round_=3)
        drawing.words(part + 26, y + 16, row.part, size=10, anchor="middle")
    text = row.outcome
    if row.why:
        text = f"{text} ({whys.setdefault(row.why, len(whys) + 1)})"
    for line in lines_of(text, right - part - 60, 11)[:1]:
        drawing.words(part + 60, y + 16, line, size=11, fill=ALARM if stroke else INK)


def _parts(drawing: Drawing, report: CompileReport, y: float) -> float:
    """All pieces and islands on one line, in order; a stripe is as wide as it has ops."""
    if not report.pieces:
        return y
    width = _WIDTH - 2 * _MARGIN
    islands = sum(piece.island for piece in report.pieces)
    text = "one piece" if not islands else f"{len(report.pieces) - islands} pieces and {islands} islands"
    total = sum(piece.nodes for piece in report.pieces)
    y = drawing.paragraph(_MARGIN, y, width, f"the graph from its first op to its last: {text}, {total} ops", size=11)
    x = _MARGIN
    for piece in report.pieces:
        wide = width * piece.nodes / max(total, 1)
        about = f"{piece.name}: {'island' if piece.island else 'piece'}, {piece.nodes} ops {', '.join(piece.ops)}"
        drawing.box(x, y + 4, wide, 16, ISLAND if piece.island else PIECE, stroke=PAPER, about=about)
        x += wide
    return y + 26


def _sentences(report: CompileReport) -> list[str]:
    """What else the picture has to say: why the graph is split, what the proof says, which layers were traced."""
    ops: dict[str, dict[str, None]] = {}
    for verdict in report.verdicts:
        if verdict.decision is Decision.SPLIT:
            ops.setdefault(verdict.message, {})[verdict.op] = None
    split = [f"island: {', '.join(names)}: {why}" for why, names in ops.items()]
    plan = (
        [f"plan: {report.plan.kind}: {report.plan.message}"] if report.plan is not None and report.plan.failed else []
    )
    return [*plan, *split, *(note for note in report.notes if "layers were traced" in note)]
