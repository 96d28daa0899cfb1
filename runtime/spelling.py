"""Names in messages: what somebody meant who wrote one that is none, and what groups are called."""

from __future__ import annotations

import difflib
from collections.abc import Collection

#: The default process group: in messages, and in graphs where an engine's op takes no group.
WORLD = "world"


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
