"""Checked: values as JSON has them, taken for what they have to be. Files come from anywhere; each raises TypeError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: No count, rank or clock is beyond it.
_LARGEST = 2**63


def text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r:.40} is no text")
    return value


def integer(value: Any) -> int:
    if type(value) is not int or not -_LARGEST < value < _LARGEST:
        raise TypeError(f"{value!r:.40} is no count")
    return value


def integer_or_none(value: Any) -> int | None:
    return None if value is None else integer(value)


def number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _LARGEST:
        raise TypeError(f"{value!r:.40} is no number of seconds")
    return float(value)


def integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r:.40} is no list")
    return tuple(integer(item) for item in value)


def counts(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40} has no counts of groups")
    return {text(name): integer(count) for name, count in value.items()}
