"""Cause: who made a collective of this rank fail, or kept it waiting until it was interrupted."""

from __future__ import annotations

import re
import time
from dataclasses import replace

from torch.distributed import DistError

from .culprit import Failure, Finding, find_alone, find_culprit, stood_still
from .heartbeat import Heartbeat
from .report import Report

#: When one rank was told to end, so long a rank whose collective breaks waits for being told too: launchers do not
#: signal all at once.
SECONDS_TO_BE_TOLD = 5.0

#: What an exception of a collective says when its cause is another rank.
_OF_A_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed? ?out|aborted|socket|remote|peer", re.IGNORECASE
)


def is_of_a_peer(error: BaseException) -> bool:
    """Whether it looks like what a collective raises when another rank is gone."""
    return isinstance(error, RuntimeError) and _OF_A_PEER.search(str(error)) is not None


def is_of_the_store(error: BaseException) -> bool:
    return isinstance(error, DistError)


def cause_of(failure: Failure, others: Heartbeat) -> Report | None:
    """Who made a collective of this rank fail? Waits until a dead rank would have become silent."""
    deadlines, began = others.deadlines, time.monotonic()
    until = began + deadlines.silence + 2 * deadlines.beat
    patient = max(until, began + min(deadlines.steady, SECONDS_TO_BE_TOLD))
    while True:
        if (other := next((r for r in others.reports if r.conclusive), None)) is not None:
            return other
        silent, ended = others.silent(patient=False), others.ended()
        if silent or (ended and time.monotonic() > patient):
            finding = find_culprit(others.positions(), silent, (), others.members, ended)
            if finding is None or not set(finding.ranks) & {*silent, *ended}:
                finding = Finding(tuple(ended), (others.rank,), "; ".join(ended.values()))
            sentence = f"{finding.sentence}; rank {others.rank} got {failure.error} in {failure.where}"
            return Report("failure", others.rank, replace(finding, sentence=sentence))
        if time.monotonic() > until and not ended:
            return None
        time.sleep(deadlines.beat / 4)


def waited_for(others: Heartbeat) -> Report | None:
    """Who keeps a rank waiting now, if one has waited for longer than a step takes."""
    if (told := next((r for r in others.reports if r.conclusive), None)) is not None:
        return told
    positions, deadlines = others.positions(), others.deadlines
    finding = find_alone(positions, others.members, deadlines.alone) or find_culprit(
        positions, others.silent(), (), others.members, others.ended()
    )
    # That they wait for a rank since it was told to end is nobody's fault.
    since = max((others.seconds_since_end(rank) for rank in finding.ranks), default=0.0) if finding is not None else 0.0
    if finding is None or not stood_still(positions, finding, deadlines.alone + since):
        return None
    return Report("hang", others.rank, finding)
