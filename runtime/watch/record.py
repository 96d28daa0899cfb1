"""Record: what the file of a rank says. What was written with the first report stays; what comes later is added.

A hang is looked at where it was found: a rank that is interrupted, closed or looked at afterwards has gone on, and its
stacks and its position then say nothing of the hang.
"""

from __future__ import annotations

import time
from typing import Any

from .report import Report

#: Of what came later, and of the reports before, so many are kept.
_KEPT = 32


class Record:
    """The contents of one rank's file, from the first report on."""

    def __init__(self) -> None:
        self._report: Report | None = None
        self._first: dict[str, Any] = {}
        self._earlier: list[dict[str, Any]] = []

    def holds(self, report: Report | None) -> bool:
        """Whether what was written stays: nothing that is to be written outweighs it."""
        first = self._report
        return first is not None and (report is None or first == report or first.conclusive or not report.conclusive)

    def begin(self, value: dict[str, Any], report: Report | None) -> dict[str, Any]:
        """``value`` is what the file says now; it stays if there is a ``report``."""
        told = report.to_dict() if report is not None else None
        value = {**value, "report": told, "later": [], "earlier": list(self._earlier)}
        if report is not None:
            if self._report is not None:  # it was a victim's, who did not know the cause
                value["later"] = [*self._first["later"], _note(self._first["reason"], self._first["time"])]
            self._report, self._first = report, value
        return value

    def add(self, reason: str, report: Report | None, **more: Any) -> dict[str, Any]:
        """What the file says with what came later; ``more`` of the same report is what was found out meanwhile."""
        first = self._first
        if report is not None and report == self._report:
            first |= more
        elif reason != first["reason"]:
            first["later"] = [*first["later"], _note(reason, time.time())][-_KEPT:]
        return first

    def withdraw(self, why: str) -> dict[str, Any]:
        """It was no hang after all; the next report is a first one again."""
        first = self.add(why, None)
        self._earlier = [*self._earlier, _note(first["reason"], first["time"])][-_KEPT:]
        self._report = None
        return first

    @property
    def report(self) -> Report | None:
        return self._report


def _note(reason: str, at: float) -> dict[str, Any]:
    return {"time": at, "reason": reason}
