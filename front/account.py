"""What a backend remembers of its graphs: a report of each, and what became of its calls."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .compile_passes.report import CompileReport, Reports
from .runtime.replay.remarks import Remarks
from .runtime.replay.runner import PiecewiseRunner
from .runtime.replay.stats import Counts, Stats, graph_stats

log = logging.getLogger("ringfence.backend")


@dataclass(frozen=True)
class _Followed:
    """counts live on when the graph is gone; the memory of its captures does not."""

    index: int
    counts: Counts
    runner: weakref.ref[PiecewiseRunner]


class Account:
    """on_report: is called with each report."""

    def __init__(self, on_report: Callable[[CompileReport], None] | None) -> None:
        self.reports = Reports()
        self.told_that_caches_grow = False
        self._graphs: list[_Followed] = []
        self._on_report = on_report

    def add(self, report: CompileReport, runner: PiecewiseRunner | None = None) -> None:
        if runner is not None:
            self._graphs.append(_Followed(len(self.reports), runner.counts, weakref.ref(runner)))
        self.reports.append(report)
        log.info("%s", report.summary)
        if self._on_report is not None:
            self._on_report(report)

    def refuses(self, error: Exception) -> None:
        """A call is an error before any graph was called: any of them tells it for all."""
        runners = [runner for graph in self._graphs if (runner := graph.runner()) is not None and runner.groups]
        if runners:
            runners[0].refuses(error, frozenset[str]().union(*(runner.groups for runner in runners)))

    def stats(self) -> Stats:
        graphs = []
        for graph in self._graphs:
            runner, report = graph.runner(), self.reports[graph.index]
            held = sum(runner.bytes_held.values()) if runner is not None else 0
            graphs.append(graph_stats(graph.counts, report.name, report.serves, held))
        return Stats(tuple(graphs), sum(not graph.name.endswith("/0") for graph in graphs if graph.name))


class RemarksOnNext(Remarks):
    """Into the report that the account is given next."""

    def __init__(self, account: Account) -> None:
        self._account, self._index = account, len(account.reports)

    def note(self, text: str) -> None:
        self._change(notes=(*self._account.reports[self._index].notes, text))

    def wasted(self, why: str | None) -> None:
        self._change(wasted=why)

    def told_of_waste(self) -> bool:
        return self._account.told_that_caches_grow

    def _change(self, **fields: Any) -> None:
        self._account.reports[self._index] = replace(self._account.reports[self._index], **fields)
