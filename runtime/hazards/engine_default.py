"""What serving engines do with these collectives under piecewise CUDA graphs, as data.

They decide by the name of the backend. ``profile="conservative"`` follows them; the
hazard table (:mod:`.hazards`) goes by causes instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionsError
from .situation import Collective
from .table import Action


@dataclass(frozen=True)
class EngineDefault:
    """``decides`` is SPLIT (never captured in a piece) or CAPTURE."""

    collective: Collective
    decides: Action
    why: str
    source: str


FIELD_RULES: tuple[EngineDefault, ...] = (
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


def engine_default(collective: str, *, auto: Collective | None = None) -> EngineDefault | None:
    """The engines' rule for the collective that was asked for, or None where they have none.

    ``auto`` is what "auto" resolves to on this machine. Raises :class:`OptionsError` for a
    collective that does not exist, and for "auto" without what it resolves to.
    """
    if collective == "auto":
        if auto is None:
            raise OptionsError("collective='auto' has not been resolved; say which collective it stands for")
        collective = auto
    names = [str(known) for known in Collective]
    if collective not in names:
        raise OptionsError(f"collective={collective!r} is not one of {['auto', *names]}")
    return next((rule for rule in FIELD_RULES if rule.collective == collective), None)
