"""Drawing: what the pictures are made of, as SVG: boxes, lines, words that wrap, a legend.

On white; where the page around it is dark and whoever draws it knows media queries, on dark.

And the lines of both texts, for a terminal.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

#: Colours, by what they mean.
INK, FAINT, PAPER, FRAME, HAIR = "#1f2430", "#697086", "#ffffff", "#b9c0cf", "#d3d8e2"
ALARM, ALARM_FILL = "#b00020", "#ffd9de"
#: A part that is captured, what is in it; a part that runs eagerly; what was left as it is; a step of a rank.
PIECE, CALL, ISLAND, LEFT = "#dbe6f6", "#8fb1e3", "#b0b8c8", "#f3d9a4"
STEP, STEP_FRAME = "#eef3fb", "#9fb4d6"

#: The same on dark.
DARK = {
    INK: "#e6edf3",
    FAINT: "#9aa4b2",
    PAPER: "#0d1117",
    FRAME: "#3d444d",
    HAIR: "#2a313c",
    ALARM: "#ff7b85",
    ALARM_FILL: "#4d1820",
    PIECE: "#1d3557",
    CALL: "#2f5f9e",
    ISLAND: "#59616f",
    LEFT: "#6e5010",
    STEP: "#16243a",
    STEP_FRAME: "#4a6692",
}

#: The width of a letter, by the height of the font. Wider than most are, so that words stay where they belong.
_LETTER = 0.58

#: XML has no way to write these.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Drawing:
    """A picture ``width`` wide; how high it is shows at the end."""

    def __init__(self, width: float) -> None:
        self.width = width
        self.fills: set[str] = set()  # of the boxes so far
        self._root = Element(
            "svg",
            {"xmlns": "http://www.w3.org/2000/svg", "font-family": "Helvetica, Arial, DejaVu Sans, sans-serif"},
        )
        dark = (f'[fill="{on}"]{{fill:{to}}}[stroke="{on}"]{{stroke:{to}}}' for on, to in DARK.items())
        ElementTree.SubElement(self._root, "style").text = f"@media(prefers-color-scheme:dark){{{''.join(dark)}}}"
        self._paper = self.box(0, 0, width, 0, PAPER)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "", dash: str = "",
        about: str = "", round_: float = 0,
    ) -> Element:  # fmt: skip
        """about: what is shown where somebody points at it."""
        self.fills.add(fill)
        attributes = {"x": _n(x), "y": _n(y), "width": _n(max(width, 0.5)), "height": _n(height), "fill": fill}
        attributes |= {"stroke": stroke} if stroke else {}
        attributes |= {"stroke-dasharray": dash} if dash else {}
        attributes |= {"rx": _n(round_)} if round_ else {}
        box = ElementTree.SubElement(self._root, "rect", attributes)
        if about:
            ElementTree.SubElement(box, "title").text = _xml(about)
        return box

    def line(self, *points: tuple[float, float], colour: str = FAINT, width: float = 1, dash: str = "") -> None:
        attributes = {"points": " ".join(f"{_n(x)},{_n(y)}" for x, y in points), "fill": "none", "stroke": colour}
        attributes |= {"stroke-width": _n(width)} | ({"stroke-dasharray": dash} if dash else {})
        ElementTree.SubElement(self._root, "polyline", attributes)

    def arrow_head(self, x: float, y: float, colour: str) -> None:
        """Its point is at (x, y), and it comes from the right."""
        points = f"{_n(x)},{_n(y)} {_n(x + 8)},{_n(y - 4)} {_n(x + 8)},{_n(y + 4)}"
        ElementTree.SubElement(self._root, "polygon", {"points": points, "fill": colour})

    def words(
        self, x: float, y: float, text: str, *, size: float = 12, fill: str = INK, bold: bool = False,
        anchor: str = "start",
    ) -> None:  # fmt: skip
        """One line, whose letters stand on ``y``."""
        attributes = {"x": _n(x), "y": _n(y), "font-size": _n(size), "fill": fill, "text-anchor": anchor}
        attributes |= {"font-weight": "bold"} if bold else {}
        ElementTree.SubElement(self._root, "text", attributes).text = _xml(text)

    def paragraph(
        self, x: float, y: float, width: float, text: str, *, size: float = 12, fill: str = INK, bold: bool = False
    ) -> float:
        """Words in lines no longer than ``width``, from ``y`` down; where the next begin."""
        for line in lines_of(text, width, size):
            y += size * 1.4
            self.words(x, y - size * 0.35, line, size=size, fill=fill, bold=bold)
        return y

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str, str]]) -> float:
        """Boxes that say what their colour means, (fill, stroke, meaning), in rows; where the next begin."""
        at, y = x, y + 20
        for fill, stroke, meaning in entries:
            needs = 28 + width_of(meaning, 11) + 18
            if at > x and at + needs > self.width:
                at, y = x, y + 18
            self.box(at, y - 10, 20, 12, fill, stroke=stroke, dash="3 2" if fill == PAPER else "")
            self.words(at + 26, y, meaning, size=11, fill=FAINT)
            at += needs
        return y + 8

    def svg(self, height: float) -> str:
        self._paper.set("height", _n(height))
        self._root.attrib |= {"viewBox": f"0 0 {_n(self.width)} {_n(height)}", "width": _n(self.width)}
        ElementTree.indent(self._root)
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"


def lines_of(text: str, width: float, size: float = 12) -> list[str]:
    """The lines into which words are broken to be no wider; a word that is, is broken too."""
    return textwrap.wrap(text, max(int(width / (size * _LETTER)), 8), break_on_hyphens=False)


def wrapped(line: str, width: int = 80) -> str:
    """For a terminal; what is not on the first line is indented."""
    return textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def width_of(text: str, size: float) -> float:
    return len(text) * size * _LETTER


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
