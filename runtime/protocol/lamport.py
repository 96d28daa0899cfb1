"""Lamport: what one-shot and two-shot kernels share when the data is the flag.

The receiver's buffer is full of a sentinel, 0x80000000 (-0.0). A sender stores its data over
it; the receiver polls until no word is the sentinel. Nobody sends the sentinel, because
-0.0 in the data is sanitised to +0.0 first. Buffers rotate, and a call clears the buffer
that the call before it used.
"""

from __future__ import annotations

from ..hazards.situation import Payload
from .calls import Call
from .machine import EMPTY, UNSEEN, CellTable, Op, OpKind, tag
from .rules import LamportRules, Sentinel


def part(call: Call, token: int, rank: int, rules: LamportRules) -> int:
    """The word that a rank's store of its own row leaves for the receiver to see."""
    return tag(call.id, token, rank) + UNSEEN * _unseen(call.payload, rules.sanitises_input, rules)


def total(call: Call, token: int, rules: LamportRules) -> int:
    """The same of the sum over the ranks."""
    return tag(call.id, token) + UNSEEN * _unseen(_sum_of(call.payload), rules.sanitises_sum, rules)


def _unseen(payload: Payload, sanitised: bool, rules: LamportRules) -> bool:
    if payload is Payload.SUBNORMAL:
        return rules.sentinel is Sentinel.FLOAT
    return payload is Payload.NEGATIVE_ZERO and not sanitised


def _sum_of(payload: Payload) -> Payload:
    """The worst word of the sum over ranks whose own worst word is ``payload``.

    A sum of subnormals is flushed to -0.0 in a build with flush-to-zero, which FlashInfer's
    is. An input of -0.0 sums to +0.0, since accumulation starts from +0.0.
    """
    return Payload.NEGATIVE_ZERO if payload is Payload.SUBNORMAL else Payload.ORDINARY


class Mailbox:
    """The rotating buffers of one workspace, in rows of one token: (rank, buffer, row) -> cell."""

    def __init__(self, memory: CellTable, name: str = "") -> None:
        self._memory = memory
        self._name = f"{name} " if name else ""

    def row(self, rank: int, buffer: int, row: int, second_word: bool = False) -> int:
        half = ", second word" if second_word else ""
        return self._memory.cell(rank, f"{self._name}buffer {buffer} row {row}{half}")

    def clear(self, rank: int, buffer: int, rows: range, torn: bool = False) -> tuple[Op, ...]:
        """No op where there is nothing to clear."""
        cells = [
            self.row(rank, buffer, row, second) for row in rows for second in ((False, True) if torn else (False,))
        ]
        detail = f"{len(rows)} row{'s' * (len(rows) != 1)} from row {rows.start} of buffer {buffer}"
        return (Op(OpKind.CLEAR, tuple(cells), (EMPTY,) * len(cells), detail=detail),) if cells else ()
