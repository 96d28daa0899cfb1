"""In vain: what the watch makes of a kernel of this rank that gave up waiting.

The kernel knows who did not come, and in which call of its workspace. Why, and where that rank is in the user's code,
is what the ranks tell each other. So its words are the evidence of the same verdict that the watch would have come to:
a rank is behind, left out a call, came with other sizes, has failed or is gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from ..errors import HangError
from .cause import SECONDS_TO_BE_TOLD
from .culprit import Finding, find_culprit
from .heartbeat import Heartbeat
from .position import Position
from .report import Report, lost_wait


class InVain:
    """Looked at by the thread that watches at each beat, and by a main thread that meets the error.

    claimed: one of the two tells the others.
    """

    def __init__(self, others: Heartbeat) -> None:
        self._others = others
        self._before: Mapping[int, Position] = {}  # where the others were while kernels waited
        self._since: float | None = None
        self.claimed = False

    def nobody_gave_up(self, positions: Mapping[int, Position]) -> None:
        """Until now; positions: where the ranks are."""
        self._before, self._since, self.claimed = positions, None, False

    def report(self, error: HangError) -> Report | None:
        """Who is to blame; None while another look may tell more, which is never longer than a step may take.

        A rank that did not come is heard again at its next beat, or is silent soon.
        """
        others, deadlines, now = self._others, self._others.deadlines, time.monotonic()
        since = self._since = now if self._since is None else self._since
        over = now > since + min(deadlines.silence + 2 * deadlines.beat, deadlines.steady)
        silent = {rank: how for rank, how in others.silent(patient=False).items() if rank in error.ranks}
        ended = others.ended()
        said = since + deadlines.beat  # what is heard from then on was said after the kernel gave up
        awaited = [r for r in error.ranks if not (r in silent or r in ended or others.heard_since(r, said))]
        if not over and (awaited or (error.told and not silent)):  # who told it knows where it waited
            return None
        to_end = set(error.ranks) & set(others.still_ends())
        if to_end and now < since + min(SECONDS_TO_BE_TOLD, deadlines.steady):  # this rank may be told the same
            return None
        known = not awaited and (silent or not error.told)
        return lost_wait(others.rank, error, self._finding(error, silent, ended) if known else None)

    def _finding(self, error: HangError, silent: Mapping[int, str], ended: Mapping[int, str]) -> Finding | None:
        others = self._others
        # At the same moment: whoever came late has gone on since, with a call that is no call any more.
        before = {r: p for r, p in self._before.items() if r in error.ranks and r not in ended}
        failures = [r.failure for r in others.reports if r.failure is not None]
        positions = {**others.positions(), **before}
        finding = find_culprit(positions, silent, failures, others.members, ended, victims=(others.rank,))
        if finding is None:
            return None
        blamed, missing = set(finding.ranks), set(error.ranks)
        # Who did not come is to blame, or waits itself for who is.
        agrees = blamed <= missing or missing <= blamed | set(finding.waiting)
        return replace(finding, waiting=finding.waiting or (others.rank,)) if agrees else None
