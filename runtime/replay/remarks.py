"""Remarks: what shows of a graph only when it is called, for whoever keeps its report."""

from __future__ import annotations


class Remarks:
    """This one keeps it to itself."""

    def note(self, text: str) -> None:
        """What the user should read, once each."""

    def wasted(self, why: str | None) -> bool:
        """Why no capture was replayed; None, once one is. Returns whether the user was told that before."""
        return False
