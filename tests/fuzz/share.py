"""A share of the programs: few, which together make every move. The same seed is the same share."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .check import draw

#: Of so many programs for each that is wanted.
_FROM = 12


def share(count: int, seed: int, **how: Any) -> list[int]:
    """So many seeds from ``seed`` on, whose programs make each move as often as the others. how: as in :func:`draw`."""
    moves = {at: draw(at, **how)[0].moves for at in range(seed, seed + _FROM * count)}
    chosen: list[int] = []
    made: Counter[str] = Counter()
    for _ in range(count):
        best = max(moves, key=lambda at: (sum(2.0 ** -made[name] for name in moves[at]), -at))
        made.update(moves.pop(best))
        chosen.append(best)
    return chosen
