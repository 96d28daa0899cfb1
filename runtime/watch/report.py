"""Report: what a rank tells all others when something went wrong, and what every rank writes down of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import HangError
from . import checked
from .culprit import Failure, Finding, blamed_for


@dataclass(frozen=True)
class Report:
    """Who is to blame, and for what.

    kind: "hang"; "failure", an exception broke a step off; "alone", one rank compiles what the others do not; "end", a
    rank was told to end, which is no mistake. stamp: no two of one reporter have the same.
    """

    kind: str
    reporter: int
    finding: Finding
    failure: Failure | None = None
    stamp: int = field(default_factory=time.monotonic_ns)

    @property
    def sentence(self) -> str:
        return self.finding.sentence

    @property
    def brief(self) -> Report:
        """Without the places, for whoever has just read the whole sentence."""
        return replace(self, finding=replace(self.finding, sentence=self.finding.short or self.sentence))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those to blame."""
        return self.finding.ranks

    @property
    def conclusive(self) -> bool:
        """A victim reports what hit it, and looks for the cause; others should wait for what it finds."""
        return self.kind != "end" and (self.failure is None or not self.failure.victim)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Report:
        """Raises KeyError, TypeError or ValueError for what :meth:`to_dict` did not write."""
        told = value["finding"]
        finding = Finding(
            checked.integers(told["ranks"]),
            checked.integers(told["waiting"]),
            checked.text(told["sentence"]),
            checked.text(told.get("short", "")),
            checked.text(told.get("remedy", "")),
        )
        failure = Failure.from_dict(value["failure"]) if value.get("failure") is not None else None
        return cls(str(value["kind"]), int(value["reporter"]), finding, failure, int(value["stamp"]))


def failed(failure: Failure) -> Report:
    """What a rank reports of its own exception."""
    return Report("failure", failure.rank, blamed_for(failure), failure)


def lost_wait(rank: int, error: HangError) -> Report:
    """Of a kernel on ``rank`` that has given up waiting, and named who did not come."""
    return Report("hang", rank, Finding(error.ranks, (rank,), str(error)))
