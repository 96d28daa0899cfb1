"""Words of messages: what was meant by a name that is none, what groups are called, which ranks said what."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

#: The default process group: in messages, and in graphs where an engine's op takes no group.
WORLD = "world"

#: Which ranks failed, and why.
Failures = tuple[tuple[int, str], ...]


def near(given: object, valid: Collection[str]) -> str | None:
    """The name that is spelt most like it."""
    found = difflib.get_close_matches(str(given), valid, 1)
    return found[0] if found else None


def meant(given: object, valid: Collection[str], all_of_them: str = "") -> str:
    """``; did you mean 'explain'?``. Where none is near all of them, behind such words: ``; there are a, b``."""
    one = near(given, valid)
    if one is not None:
        return f"; did you mean '{one}'?"
    return f"; {all_of_them} {', '.join(valid)}" if all_of_them else ""


def group_word(name: str | None) -> str:
    """What messages call a process group: :data:`WORLD` for the default one, which torch numbers ``"0"``."""
    return WORLD if name == "0" else name or ""


def failures_text(failures: Failures) -> str:
    """Who failed, and why: ``rank 0: a; rank 2: b``."""
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in failures)


def by_value(values: Sequence[Any], ranks: Sequence[int] | None = None) -> str:
    """Which ranks hold which value: ``rank 0: a; ranks 1, 2: b``. ranks: what each is called, if not its place."""
    holders: dict[Any, list[int]] = {}
    for rank, value in zip(ranks if ranks is not None else range(len(values)), values, strict=True):
        holders.setdefault(value, []).append(rank)
    return "; ".join(f"{ranks_text(ranks)}: {value}" for value, ranks in holders.items())


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 2``, and of four or more in a row ``ranks 0, 2-7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def first_difference(
    digests: Sequence[tuple[tuple[str, str], ...]],
    ranks: Sequence[int] | None = None,
    told: Sequence[tuple[tuple[str, str], ...]] | None = None,
) -> str:
    """The first part in which ranks differ, and which ranks hold which side.

    told: the same parts in the words that people are shown.
    """
    compared = [dict(parts) for parts in digests]
    shown = [dict(parts) for parts in told] if told is not None else compared
    for name in dict.fromkeys(name for sides in zip_longest(*digests) for name, _ in filter(None, sides)):
        if len({parts.get(name) for parts in compared}) > 1:
            return f"{name} differs: {by_value([parts.get(name, 'nothing') for parts in shown], ranks)}"
    return "no part differs"
