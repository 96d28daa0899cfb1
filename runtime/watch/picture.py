"""Picture: the last steps of all ranks side by side, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from .journals import Mark, Merged
from .position import sizes_text

_DRAWN_STEPS = 4


def svg(merged: Merged, width: int = 1100, row: int = 46) -> str:
    """The last steps of all ranks side by side: time runs right; what is not complete is red, islands are darker."""
    marks = {j.rank: _last_steps(j.marks) for j in merged.journals}
    times = [t for some in marks.values() for m in some for t in (m.entered, m.left) if t is not None]
    first, last = (min(times), max([*times, *(j.written for j in merged.journals)])) if times else (0.0, 1.0)
    # What hangs has no end: the bars of the time before take nine tenths of the width.
    moving = max([t for t in times], default=last)
    left, right = 90, width - 20
    scale = (right - left) * 0.9 / max(moving - first, 1e-6)

    def x_of(t: float) -> float:
        return min(left + (t - first) * scale, right)

    top = 56
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {top + row * max(len(marks), 1) + 30}",
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="white")
    _text(root, 10, 20, merged.sentence, bold=True)
    _text(root, 10, 38, merged.divergence or "")
    for place, (rank, some) in enumerate(marks.items()):
        y = top + row * place
        blamed = merged.finding is not None and rank in merged.finding.ranks
        _text(root, 10, y + row // 2, f"rank {rank}", bold=blamed, fill="#b00020" if blamed else "#222")
        for mark in some:
            x, end = x_of(mark.entered), right if mark.left is None else x_of(mark.left)
            fill = "#ff9aa6" if mark.left is None else "#9db8dd" if mark.kind == "island" else "#dbe6f6"
            box = ElementTree.SubElement(
                root, "rect", x=f"{x:.1f}", y=str(y), width=f"{max(end - x, 1):.1f}", height=str(row - 12), fill=fill
            )
            piece = f"piece {mark.piece} '{mark.name}' ({mark.kind}) {mark.calls}"
            about = f"step {mark.step} of {sizes_text(mark.sizes)}, {piece}"
            ElementTree.SubElement(box, "title").text = about
    span = f"{(moving - first) * 1e3:.1f} ms to the last mark; red: not complete when the journals were written"
    _text(root, left, top + row * max(len(marks), 1) + 14, span)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _last_steps(marks: Sequence[Mark]) -> list[Mark]:
    last = max((m.step for m in marks), default=0)
    return [m for m in marks if m.step > last - _DRAWN_STEPS]


def _text(root: ElementTree.Element, x: int, y: int, words: str, bold: bool = False, fill: str = "#222") -> None:
    weight = "bold" if bold else "normal"
    text = ElementTree.SubElement(root, "text", {"x": str(x), "y": str(y), "fill": fill, "font-weight": weight})
    text.text = words
