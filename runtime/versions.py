"""Versions, ordered as PEP 440 orders them. torch does not bring ``packaging`` along."""

from __future__ import annotations

import functools
import re

from .errors import VersionError

#: Compare it, and nothing else. The build ("+cu130") is no part of the order.
Version = tuple[tuple[int, ...], int, int, int, tuple[int, int]]

_FORM = re.compile(
    r"v?(?P<release>\d+(\.\d+)*)((?P<phase>a|b|rc)(?P<pre>\d+))?(\.post(?P<post>\d+))?(\.dev(?P<dev>\d+))?(\+[a-z0-9.]+)?"
)
_DEVELOPMENT, _RELEASE = -1, 3
_PHASES = {"a": 0, "b": 1, "rc": 2}


@functools.lru_cache(maxsize=256)
def parse_version(text: str) -> Version:
    """0.6.18.dev1 < 0.6.18rc2 < 0.6.18 < 0.6.18.post1. Raises :class:`VersionError`."""
    match = _FORM.fullmatch(text.strip().lower())
    if match is None:
        raise VersionError(f"'{text}' is not a version; write it as pip prints it, such as 0.6.12 or 0.6.11.post3")
    part = match.groupdict()
    release = [int(number) for number in part["release"].split(".")]
    while release and release[-1] == 0:  # 0.6 is 0.6.0
        release.pop()
    alone = part["phase"] is None and part["post"] is None and part["dev"] is not None
    phase = _PHASES[part["phase"]] if part["phase"] else _DEVELOPMENT if alone else _RELEASE
    post = -1 if part["post"] is None else int(part["post"])
    dev = (1, 0) if part["dev"] is None else (0, int(part["dev"]))
    return tuple(release), phase, int(part["pre"] or 0), post, dev


def in_range(version: str, low: str | None, high: str | None) -> bool:
    """Whether low <= version < high; None leaves that end open."""
    parsed = parse_version(version)
    return (low is None or parse_version(low) <= parsed) and (high is None or parsed < parse_version(high))
