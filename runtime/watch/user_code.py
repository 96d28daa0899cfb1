"""User code: the line of the program that is served in which a thread stands, or in which an exception was thrown.

Looked for by the rank that writes, which knows its own modules; who reads the journal may be on another machine.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from . import checked

#: Frames of these say what waits, not who made it wait. The standard library is left out too.
_NOT_THE_USERS = frozenset({"torch", "ringfence"})
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class CodePlace:
    """A line: ``job.py:30 in serve: time.sleep(3600)``. file: as an import would find it. text: the line itself."""

    file: str
    line: int
    function: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}" + f": {self.text}" * bool(self.text)

    @classmethod
    def from_dict(cls, value: Any) -> CodePlace | None:
        """None for None, which is written where nothing is known. Raises TypeError for what was not written here."""
        if value is None:
            return None
        place = cls(**value)
        file, function, text = map(checked.text, (place.file, place.function, place.text))
        return cls(file, checked.integer(place.line), function, text)


def of_thread(ident: int) -> CodePlace | None:
    """Where a thread stands; the main thread where there is no such thread (any more)."""
    frames = sys._current_frames()
    frame = frames.get(ident) or frames.get(threading.main_thread().ident or 0)
    return _innermost(list(traceback.walk_stack(frame))) if frame is not None else None


def of_error(error: BaseException) -> CodePlace | None:
    """Where an exception was thrown, or the call that led there."""
    return _innermost(list(traceback.walk_tb(error.__traceback__))[::-1])


def written(error: BaseException | None) -> Mapping[str, Any]:
    """What a journal holds of an exception that broke this rank off; nothing without one."""
    if error is None:
        return {"traceback": []}
    place = of_error(error)
    found = {"code": asdict(place)} if place is not None else {}
    return {"traceback": traceback.format_exception(error), **found}


def _innermost(stack: list[tuple[FrameType, int]]) -> CodePlace | None:
    """Of a stack, innermost first: the user's own code before what is installed, and that before nothing."""
    found = list(_candidates(stack))
    mine = next((place for place, installed in found if not installed), None)
    return mine or next((place for place, _ in found), None)


def _candidates(stack: list[tuple[FrameType, int]]) -> Iterator[tuple[CodePlace, bool]]:
    for frame, line in stack:
        path = frame.f_code.co_filename
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if path.startswith("<") or package in _NOT_THE_USERS or package in sys.stdlib_module_names:
            continue
        text = linecache.getline(path, line, frame.f_globals).strip()
        installed = any(part in path for part in _INSTALLED)
        yield CodePlace(_as_imported(path), line, frame.f_code.co_name, text), installed


def _as_imported(path: str) -> str:
    """Without the folder in which an import would look: short, and the same on every host."""
    absolute = os.path.abspath(path)
    folders = (os.path.abspath(entry or os.curdir) for entry in sys.path)
    within = [f for f in folders if f != os.sep and absolute.startswith(f + os.sep)]
    return absolute[len(max(within, key=len)) + 1 :] if within else path
