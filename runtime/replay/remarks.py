"""Remarks: what shows of a graph only when it is called, for whoever keeps its report."""

from __future__ import annotations


class Remarks:
    """This one keeps it to itself."""

    def note(self, text: str) -> None:
        """What the user should read, once each."""

    def wasted(self, why: str | None) -> None:
        """Why no capture was replayed; None, once one is."""

    def told_of_waste(self) -> bool:
        """Whether the user was told that captures are not replayed, and why, before any was made."""
        return False
