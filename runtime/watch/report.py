"""Report: what a rank tells all others when something went wrong, and what every rank writes down of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import HangError
from ..spelling import ranks_text
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
            checked.text(told.get("evidence", "")),
        )
        failure = Failure.from_dict(value["failure"]) if value.get("failure") is not None else None
        return cls(str(value["kind"]), int(value["reporter"]), finding, failure, int(value["stamp"]))


def failed(failure: Failure) -> Report:
    """What a rank reports of its own exception."""
    return Report("failure", failure.rank, blamed_for(failure), failure)


def ended(rank: int, how: str, place: str) -> Report:
    """Of a rank that ends in order. how: ``was told to end (SystemExit: 0)``; place: ``in step 7``."""
    return Report("end", rank, Finding((), (), f"rank {rank} {how}, {place}", f"rank {rank} {how}"))


def in_brief(ends: Sequence[Report]) -> str:
    """``ranks 0, 1 were told to end (SystemExit: 0)``: how ranks ended, without the places."""
    ranks: dict[str, list[int]] = {}
    for report in ends:
        ranks.setdefault(report.brief.sentence.removeprefix(f"rank {report.reporter} "), []).append(report.reporter)
    return "; ".join(
        f"{ranks_text(some)} {how.replace('was ', 'were ', 1) if len(some) > 1 else how}" for how, some in ranks.items()
    )


def lost_wait(rank: int, error: HangError, finding: Finding | None = None) -> Report:
    """Of a kernel on ``rank`` that has given up waiting, and named who did not come.

    finding: what positions say of it. Where they say nothing, what the kernel said stands alone.
    """
    said = str(error)
    if finding is None:
        return Report("hang", rank, Finding(error.ranks, (rank,), said))
    short = finding.short or finding.sentence
    whole = replace(finding, sentence=f"{finding.sentence}; {said}", short=short, evidence=said)
    return Report("hang", rank, whole)
