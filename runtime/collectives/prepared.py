"""What was prepared for a group: who carries out the calls that name no collective, eagerly and in captures."""

from __future__ import annotations

from dataclasses import dataclass

from ..spelling import group_word


@dataclass(frozen=True)
class Prepared:
    """What :func:`ringfence.prepare` returns. Equal on all ranks of the group, but for ``nbytes``.

    collective: who carries out its calls. why: each candidate that was considered, with the reason.
    hidden, dtype, max_tokens: what was asked for. largest: the bytes of the largest input that the collective takes;
    larger ones, and other dtypes, go to the reference, as all do where it is 0.
    nbytes: of this rank's device memory that it took, workspaces and kernels; 0 where others had made it before.
    captured: whether its calls may be captured in a graph of the caller's. If not, they run between two of its segments
    (vLLM's and SGLang's breakable graphs), else by the reference, else they are refused.
    capture: the rule or hazard that decided that, and why. notes: what the user should know.
    """

    group: str
    collective: str
    why: tuple[str, ...]
    hidden: int
    dtype: str
    max_tokens: int
    largest: int
    nbytes: int
    captured: bool
    capture: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line for a log, and one for each candidate."""
        tokens = f"up to {self.largest // self.row_bytes} tokens of {self.hidden} {self.dtype}"
        serves = tokens if self.largest else "all calls"
        first = (
            f"ringfence: group '{group_word(self.group)}': {self.collective}, {serves}, {self.nbytes / 2**20:.1f} MiB; "
            f"in a capture of the caller's: {'captured' if self.captured else 'not captured'} ({self.capture})"
        )
        return "\n".join((first, *(f"collective {why}" for why in self.why), *(f"note: {note}" for note in self.notes)))

    @property
    def row_bytes(self) -> int:
        """Of one token."""
        return self.hidden * (4 if self.dtype == "float32" else 2)
