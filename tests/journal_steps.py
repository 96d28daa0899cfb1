"""Journals of a rank, and steps that it enters and leaves in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringfence.runtime.watch.journal import REPLAY, Journal, Marks, PieceNote, ProgramNote

#: A compute piece, an island with one call, a piece with two calls.
NOTE = ProgramNote(
    (PieceNote("submod_0", False), PieceNote("submod_1", True, ("tp",)), PieceNote("submod_2", False, ("tp", "tp"))),
    "reference",
)


def journal(rank: int = 0, **places: int) -> Journal:
    j = Journal(rank, **places)
    j.register(NOTE)
    j.name_group("tp", (0, 1))
    return j


def step(j: Journal, how: str = REPLAY, sizes: tuple[int, ...] = (4,), enter: int = 3, leave: int = 3) -> Marks:
    """A step that enters and leaves so many pieces; it is ended where it left all."""
    marks = j.begin(0, sizes, how)
    for i in range(enter):
        marks.enter()
        if i < leave:
            marks.leave()
    if leave == 3:
        marks.end()
    return marks


def dumped(folder: Path, *ranks: Journal, **more: Any) -> Path:
    for j in ranks:
        j.dump(folder, "test", **more)
    return folder
