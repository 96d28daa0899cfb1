"""Colours of the pictures: all of them have a dark one, and words can be read on what is below them, on both."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from ringfence.runtime import drawing
from ringfence.runtime.drawing import DARK, Drawing

ROOT = Path(__file__).resolve().parents[2]


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted(map(luminance, (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_words_can_be_read(dark: bool) -> None:
    names = ("PAPER", "CALL", "LEFT", "ISLAND", "PIECE", "ALARM_FILL", "STEP")
    pairs = [*product(["INK"], names), ("FAINT", "PAPER"), ("ALARM", "PAPER")]
    for words, below in pairs:
        colours = [getattr(drawing, name) for name in (words, below)]
        one, other = [DARK[colour] for colour in colours] if dark else colours
        assert contrast(one, other) >= 4.5, (words, below, contrast(one, other))


def test_each_colour_is_named_once_and_has_a_dark_one() -> None:
    named = {value for name, value in vars(drawing).items() if name.isupper() and isinstance(value, str)}
    assert named == set(DARK)
    elsewhere = [
        path.name
        for folder in ("front", "compile_passes", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "drawing.py" and re.search(r'"#[0-9a-f]{6}"', path.read_text())
    ]
    assert not elsewhere
    text = Drawing(10).svg(10)
    for on, to in DARK.items():
        assert f'[fill="{on}"]{{fill:{to}}}' in text and f'[stroke="{on}"]{{stroke:{to}}}' in text
