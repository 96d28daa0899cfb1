"""Wrapping a function of vLLM, which has no registry of hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..targets import Target, resolve

#: Under which a wrapper keeps what it wraps, so that it is put in once however often that is asked for.
_WRAPS = "__ringfence_wraps__"


def wrap(target: Target, around: Callable[..., Any]) -> None:
    """Call ``around(what was there, *arguments)`` in its place; an earlier wrapper of ours goes."""
    owner, name = _place(target)
    inner = getattr(owner, name)
    inner = getattr(inner, _WRAPS, inner)

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    setattr(wrapper, _WRAPS, inner)
    setattr(owner, name, wrapper)


def _place(target: Target) -> tuple[Any, str]:
    owner, _, name = target.path.rpartition(".")
    return resolve(owner), name
