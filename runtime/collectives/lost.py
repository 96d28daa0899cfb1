"""What a kernel of ringfence's own reports of a wait that ended without success."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HangError
from ..spelling import ranks_text


@dataclass(frozen=True)
class Lost:
    """What a kernel said about a wait that ended without success.

    call: the number of the call among all of its workspace, from 1. token: which row. missing: the ranks that did not
    come. source: the first of them; or, where ``relayed``, the rank that told of them: it had waited in vain, or had
    been told so itself, perhaps of its own absence.
    """

    call: int
    token: int
    source: int
    rank: int
    missing: tuple[int, ...]
    sums: bool
    relayed: bool

    @staticmethod
    def read(words: Sequence[int]) -> Lost:
        """From the eight words that the kernel wrote."""
        _, low, high, token, source, rank, mask, what = words
        missing = tuple(r for r in range(8) if mask >> r & 1)
        return Lost(low | high << 32, token, source, rank, missing, what == 1, what == 2)

    def __str__(self) -> str:
        named = ranks_text(self.missing)
        what = "the sum" if self.sums else "the part"
        where = f"call {self.call} of the workspace, token {self.token}"
        if self.relayed:
            who = "others" if self.source in self.missing else "it"
            return f"rank {self.rank} heard from rank {self.source} that {who} had waited in vain for {named} ({where})"
        return f"rank {self.rank} waited in vain for {what} of {named} ({where})"

    def error(self) -> HangError:
        """What whoever runs the model is told."""
        remedy = (
            "the outputs since then are NaN: start all ranks anew, or compile and call again on all; for a peer "
            "that is slow and not lost, raise kernel_wait_seconds"
        )
        return HangError(f"{self}; {remedy}", self.missing, told=self.relayed)
