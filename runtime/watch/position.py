"""Position: where a rank is. What ranks tell each other, what is written down, and what culprits are found by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..spelling import group_word
from . import checked

#: What a rank does that compiles a graph of which no more is known.
COMPILES = "compiles a graph"

#: How a step ran.
UNCAPTURED, CAPTURE, REPLAY = "uncaptured", "capture", "replay"


def sizes_text(sizes: Sequence[int]) -> str:
    """``sizes (8,)``; a graph without a dynamic size has none: ``fixed sizes``."""
    return f"sizes {tuple(sizes)}" if sizes else "fixed sizes"


@dataclass(frozen=True)
class PieceNote:
    """What the journal knows of a piece: ``calls`` are the groups of its collectives, in order."""

    name: str
    island: bool
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProgramNote:
    """A program as it is written down. collective: that of its fused sites. name: of its graph.

    shared: which of a step's sizes all ranks have, in an order that all have; None: all of them. lockstep: all ranks
    capture and replay in the same steps.
    """

    pieces: tuple[PieceNote, ...]
    collective: str = ""
    name: str = ""
    shared: tuple[int, ...] | None = None
    lockstep: bool = True

    @property
    def groups(self) -> frozenset[str]:
        """Those that it makes calls of."""
        return frozenset(group for piece in self.pieces for group in piece.calls)


@dataclass(frozen=True)
class CallSpan:
    """Collective calls of one group, from number ``first`` to number ``last``."""

    group: str
    first: int
    last: int

    def __str__(self) -> str:
        numbers = f"call {self.first}" if self.first == self.last else f"calls {self.first} to {self.last}"
        return f"{numbers} of group '{group_word(self.group)}'"


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    phase: ``"step"``, ``"warm-up"`` (a capture, or the first step of a program), ``"compile"``, or ``"idle"``: outside.
    step, piece, name, kind, sizes: of the oldest piece that is not complete; of the last one when idle.
    calls: the collective calls in that piece (where only whole steps are marked, in that step).
    submitted, completed: how many collective calls of each group the host has entered, and how many are done.
    graph: whose program the step runs, where this process has several.
    exchange: the topic of the exchange in which this rank waits for the others, beside steps; empty where it does not.
    among: the ranks of that exchange.
    compiles: ``compiles forward 0/2 anew, because ...``; empty where it compiles nothing.
    refused: by group, the calls of the model that ended with an error before their step began, since the last step, or
    right before the step that this rank is in. refusal: why the last of them did; empty in a step.
    still: seconds since anything moved.
    moved: pieces entered and left, ever: it changes when anything moves.
    """

    rank: int
    phase: str
    step: int
    sizes: tuple[int, ...] = ()
    piece: int | None = None
    name: str = ""
    kind: str = ""
    collective: str = ""
    calls: tuple[CallSpan, ...] = ()
    submitted: Mapping[str, int] = field(default_factory=dict)
    completed: Mapping[str, int] = field(default_factory=dict)
    exchange: str = ""
    still: float = 0.0
    moved: int = 0
    graph: str = ""
    among: tuple[int, ...] = ()
    compiles: str = ""
    refused: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""

    @property
    def stuck_in_piece(self) -> bool:
        """Whether a piece has been submitted that is not complete."""
        return self.phase in ("step", "warm-up") and self.piece is not None

    @property
    def waits(self) -> bool:
        """Whether this rank may be waiting for another one: in a piece, or in an exchange."""
        return self.stuck_in_piece or bool(self.exchange)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Position:
        """Raises KeyError, TypeError or ValueError for what :meth:`to_dict` did not write."""
        fields = dict(value)
        if "strategy" in fields:  # what the field was called once; a strategy is one-shot or two-shot
            fields["collective"] = fields.pop("strategy")
        texts = ("phase", "name", "kind", "collective", "exchange", "graph", "compiles", "refusal")
        forms: dict[str, Callable[[Any], Any]] = dict.fromkeys(texts, checked.text) | {
            "rank": checked.integer,
            "step": checked.integer,
            "moved": checked.integer,
            "piece": checked.integer_or_none,
            "sizes": checked.integers,
            "among": checked.integers,
            "submitted": checked.counts,
            "completed": checked.counts,
            "refused": checked.counts,
            "still": checked.number,
            "calls": _calls,
        }
        return cls(**{name: forms[name](field) for name, field in fields.items()})


def _calls(value: Any) -> tuple[CallSpan, ...]:
    calls = (CallSpan(**call) for call in value)
    return tuple(CallSpan(checked.text(c.group), checked.integer(c.first), checked.integer(c.last)) for c in calls)
