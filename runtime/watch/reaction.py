"""Reaction: what is written, raised or ended when the ranks hang or one of them fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import GroupFailureError, HangError, RecompiledAloneError, RingfenceError
from ..spelling import ranks_text
from . import user_code
from .bounded import BoundedWaits
from .heartbeat import Heartbeat
from .journal import Journal
from .report import Report

#: What the process ends with when a hang, or the failure of another rank, ends it.
EXIT_CODE = 85

#: For all probes together, of the second that writing a journal may take.
_PROBE_SECONDS = 0.6


@dataclass(frozen=True)
class Reaction:
    """What follows a hang. folder: for the journals; None writes none.

    on_hang: "raise", "abort" or "report". probes: name -> what returns JSON-ready values about
    the state of a device's memory, called without any synchronisation. abort_groups: called
    to wake a main thread that waits in a collective. waits: kernels that end theirs by themselves. end: ends the
    process.
    """

    on_hang: str
    folder: str | None = None
    probes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    abort_groups: Callable[[], None] | None = None
    waits: BoundedWaits = field(default_factory=BoundedWaits)
    end: Callable[[int], Any] = os._exit

    def error(self, report: Report) -> RingfenceError:
        """What the main thread raises for it."""
        journals = f"; journals: ringfence journal {self.folder}" if self.folder is not None else ""
        if report.kind == "alone":
            return RecompiledAloneError(f"{report.sentence}{journals}", report.ranks)
        if report.kind == "hang":
            return HangError(f"the ranks hang: {report.sentence}{journals}", report.ranks)
        return GroupFailureError(f"{ranks_text(report.ranks)} broke off: {report.sentence}{journals}", report.ranks)

    def write(self, journal: Journal, others: Heartbeat, report: Report, error: BaseException | None = None) -> None:
        """Write the journal, and again with what the probes found: they may cost all the time that there is."""
        broke = user_code.written(error)
        self._write(journal, others, report, **broke, probes={})
        if self.folder is not None and self.probes:
            self._write(journal, others, report, **broke, probes=self._probe(journal))

    def _write(self, journal: Journal, others: Heartbeat, report: Report, **more: Any) -> None:
        heard = {str(r): p.position.to_dict() for r, p in others.peers.items() if p.position is not None}
        failures = [asdict(r.failure) for r in (*others.reports, report) if r.failure is not None]
        journal.try_dump(
            self.folder,
            f"{report.kind}: {report.sentence}",
            report=report,
            heard=heard,
            silent={str(r): how for r, how in others.silent().items()},
            failures=failures,
            **more,
        )

    def _probe(self, journal: Journal) -> dict[str, Any]:
        probes = dict(self.probes)
        found: dict[str, Any] = {}

        def run() -> None:
            journal.watch_from_here()
            for name, probe in probes.items():
                found[name] = _probed(probe)

        bounded(run, _PROBE_SECONDS)
        late = f"no answer within {_PROBE_SECONDS} s"
        return {name: found.get(name, late) for name in probes}


def abort_groups() -> None:
    """Wake a main thread that waits in NCCL. gloo has no abort."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        group.abort()


def bounded(body: Callable[[], Any], seconds: float) -> None:
    """Give ``body`` some seconds: a full pipe, a dead file server or an abort that hangs must not stop the watchdog."""
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)


def _probed(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a probe looks at memory that may be gone
        return f"{type(error).__name__}: {error}"
