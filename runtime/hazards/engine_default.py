"""What serving engines do with these collectives under piecewise CUDA graphs, as data.

They decide by the name of the backend. ``profile="conservative"`` follows them; the
hazard table (:mod:`.table`) goes by causes instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .situation import Collective


@dataclass(frozen=True)
class EngineDefault:
    """``captures``: whether anything of a graph with such calls is captured, the pieces between the calls too."""

    collective: Collective
    captures: bool
    why: str
    source: str


ENGINE_DEFAULTS: tuple[EngineDefault, ...] = (
    EngineDefault(
        Collective.MNNVL,
        False,
        "mnnvl calls hung in replayed pieces, and between them too, so nothing of a graph with such calls is captured",
        "SGL#23402, V#35793",
    ),
    EngineDefault(
        Collective.TRTLLM,
        True,
        "no such hang was seen with trtllm, so it is captured with its piece",
        "SGL#23402, SGL#28789",
    ),
)


def engine_default(collective: str) -> EngineDefault | None:
    """The engines' rule for a collective, or None where they have none."""
    return next((rule for rule in ENGINE_DEFAULTS if rule.collective == collective), None)


def barred_from_capture(collectives: Iterable[str]) -> EngineDefault | None:
    """The rule that bars the capture of a graph with calls of these; None where none does."""
    rules = (engine_default(collective) for collective in collectives)
    return next((rule for rule in rules if rule is not None and not rule.captures), None)
