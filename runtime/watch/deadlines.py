"""How long the watch waits for what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """In seconds. steady: without progress in a step. warm_up: the same while a rank compiles, warms up or captures.

    beat: how often ranks tell each other where they are. silence: how long a rank may leave that
    out before it counts as gone. grace: how long the main thread has to come back before the process ends.
    alone: how long it must look as if ranks waited for each other in two places.
    """

    steady: float = 60.0
    warm_up: float = 1800.0
    beat: float = 0.25
    silence: float = 1.25
    grace: float = 0.75
    alone: float = 2.0
