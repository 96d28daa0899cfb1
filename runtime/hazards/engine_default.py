"""What serving engines do with these collectives under piecewise CUDA graphs, as data.

They decide by the name of the backend. ``profile="conservative"`` follows them; the
hazard table (:mod:`.table`) goes by causes instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from .situation import Collective
from .table import Action


@dataclass(frozen=True)
class EngineDefault:
    """``decides`` is SPLIT (never captured in a piece) or CAPTURE."""

    collective: Collective
    decides: Action
    why: str
    source: str


ENGINE_DEFAULTS: tuple[EngineDefault, ...] = (
    EngineDefault(
        Collective.MNNVL,
        Action.SPLIT,
        "mnnvl calls hung in replayed pieces, so the op is kept between them",
        "SGL#23402, V#35793",
    ),
    EngineDefault(
        Collective.TRTLLM,
        Action.CAPTURE,
        "no such hang was seen with trtllm, so it is captured with its piece",
        "SGL#23402, SGL#28789",
    ),
)


def engine_default(collective: str) -> EngineDefault | None:
    """The engines' rule for a collective, or None where they have none."""
    return next((rule for rule in ENGINE_DEFAULTS if rule.collective == collective), None)
