"""The hazard table: every known way in which a fused collective hangs, corrupts or crashes."""

from __future__ import annotations

from .hazard import REPOSITORIES, Action, Certainty, Hazard, Invariant
from .rows import capture, kernels, links, machines, moe, payload, ranks, replay, surroundings

__all__ = ["HAZARDS", "REPOSITORIES", "Action", "Certainty", "Hazard", "Invariant"]

#: By id.
HAZARDS: tuple[Hazard, ...] = (
    *payload.ROWS,
    *kernels.ROWS,
    *ranks.ROWS,
    *capture.ROWS,
    *replay.ROWS,
    *machines.ROWS,
    *links.ROWS,
    *surroundings.ROWS,
    *moe.ROWS,
)
