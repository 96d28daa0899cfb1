"""Lamport: what one-shot and two-shot kernels share when the data is the flag.

The receiver's buffer is full of a sentinel, 0x80000000 (-0.0). A sender stores its data over
it; the receiver polls until no word is the sentinel. Nobody sends the sentinel, because
-0.0 in the data is sanitised to +0.0 first. Buffers rotate, and a call clears the buffer
that the call before it used.
"""

from __future__ import annotations

from .calls import Payload
from .machine import UNSEEN, Action, Memory, Op
from .versions import LamportRules, Sentinel


def tag(call: int) -> int:
    """The word of this call, in the model. 0 is the sentinel."""
    return call + 1


def word(call: int, payload: Payload, sanitised: bool, rules: LamportRules) -> int:
    """What a store of this payload leaves for the receiver to see."""
    unseen = (payload is Payload.SUBNORMAL and rules.sentinel is Sentinel.FLOAT) or (
        payload is Payload.NEGATIVE_ZERO and not sanitised
    )
    return tag(call) + UNSEEN * unseen


def sum_of(payload: Payload, rules: LamportRules) -> Payload:
    """The worst word of the sum over ranks whose own worst word is ``payload``.

    A sum of subnormals is flushed to -0.0 in a build with flush-to-zero, which FlashInfer's
    is. An input of -0.0 sums to +0.0, since accumulation starts from +0.0.
    """
    return Payload.NEGATIVE_ZERO if payload is Payload.SUBNORMAL else Payload.ORDINARY


class Mailbox:
    """The rotating buffers of one workspace, in rows of one token: (rank, buffer, row) -> cell."""

    def __init__(self, memory: Memory, name: str = "") -> None:
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
        return (Op(Action.CLEAR, tuple(cells), detail=detail),) if cells else ()
