"""What a row of the hazard table says: one known way in which a collective hangs, corrupts or crashes.

A source is a public thread ("FI#3304", see :data:`REPOSITORIES`), what was read in a
released source, or a measurement. ``shown_by`` names the test that shows the mechanism,
or that the shipped policy avoids it; a row without one says why it has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .situation import Collective, Explained, When

#: What the abbreviations in sources stand for.
REPOSITORIES: Mapping[str, str] = MappingProxyType(
    {
        "FI": "flashinfer-ai/flashinfer",
        "PT": "pytorch/pytorch",
        "SGL": "sgl-project/sglang",
        "TRT": "NVIDIA/TensorRT-LLM",
        "TS": "lightseekorg/tokenspeed",
        "V": "vllm-project/vllm",
    }
)


class Action(Explained):
    """What a row decides about a plan to which it applies."""

    CAPTURE = "capture", "no reason to keep the call out of a captured piece"
    SPLIT = "split", "run the call eagerly, between captured pieces"
    REFUSE = "refuse", "do not run this plan; splitting does not help"
    CLEAN_PAYLOAD = "clean_payload", "flush the words that a receiver would take for the sentinel"
    WARN = "warn", "run it, and say so"
    RUNTIME_GUARD = "runtime_guard", "run it; the guard that the row names acts when it happens"


class Certainty(Explained):
    """How well the cause is known."""

    CERTAIN = "certain", "the cause was found and the fix released, or it was reproduced"
    ANALYSIS = "contributor's analysis", "a contributor's explanation, which the maintainers did not confirm"
    INFERRED = "inferred", "read from the source or the protocol; nobody reported it"
    OPEN = "open", "seen, and not explained yet"
    DISPROVED = "disproved", "suspected once, and shown not to happen"


class Invariant(Explained):
    """What holds in a plan that cannot hang."""

    I1 = "I1", "The FlashInfer release has no known fault in the kernels that the plan calls."
    I2 = "I2", "Every rank issues the same calls, of the same sizes and strategies, in the same order on a workspace."
    I3 = "I3", "Which graph runs, and how far it is padded, follows only from values that are equal on all ranks."
    I4 = "I4", "The calls on one workspace are totally ordered and never overlap."
    I5 = "I5", "All launches of one collective stay in one piece, or in one eager island."
    I6 = "I6", "A captured collective keeps its epoch, slot and flags on the device."
    I7 = (
        "I7",
        "Workspaces are created once, by vote, before the first capture, for the largest call, and frozen.",
    )
    I8 = "I8", "A capture executes nothing, and all ranks have finished the same warm-up calls before it begins."
    I9 = "I9", "The strategy of each captured call is fixed, equal on all ranks, and fits the workspace."
    I10 = (
        "I10",
        "Programmatic dependent launch lets no kernel read what is not written yet, or starve its producer.",
    )
    I11 = "I11", "Every block that spins and every block it waits for can be resident at the same time."
    I12 = "I12", "Copies on other streams are joined before a step's first replay."
    I13 = "I13", "No host waits for another rank's host while a rank spins on the device."
    I14 = "I14", "What captured pieces read and write keeps its address, and stays allocated until the op is complete."
    I15 = "I15", "Padded rows and lengths are defined before each replay, and no call is empty."
    I16 = "I16", "A failure on one rank stops all of them over the host, and the workspace is built anew."
    I17 = "I17", "Every wait has a deadline, and a journal says which rank entered which call."
    I18 = (
        "I18",
        "Before it serves, each collective is tried on this machine, eager and replayed, with hostile payloads.",
    )


@dataclass(frozen=True)
class Check:
    """Something of ringfence that stands before a mechanism. where: ``path::name`` in the repository."""

    where: str
    says: str

    def __str__(self) -> str:
        return f"{self.says} ({self.where})"


@dataclass(frozen=True)
class Hazard:
    """One mechanism. It applies where any of ``when`` holds.

    instead: other decisions that avoid it too, for a user who prefers one.
    guard: what acts at run time, of a row that decides RUNTIME_GUARD.

    A row that no run of ours reaches (:mod:`.reached`) says why, in one of two ways. prevented_by: no plan of
    ours is such a situation. not_seen: nothing says so of a plan; the row is for people, and for ``check``.
    """

    id: str
    title: str
    symptom: str
    mechanism: str
    when: tuple[When, ...]
    decides: Action
    invariants: tuple[Invariant, ...]
    remedy: str
    source: str
    certainty: Certainty
    instead: tuple[Action, ...] = ()
    shown_by: str | None = None
    not_shown: str | None = None
    guard: Check | None = None
    prevented_by: Check | None = None
    not_seen: str | None = None


MNNVL, CUTEDSL, TRTLLM = Collective.MNNVL, Collective.MNNVL_CUTEDSL, Collective.TRTLLM
MOE = Collective.MOE_ALL_TO_ALL
ALL_REDUCES = (MNNVL, CUTEDSL, TRTLLM)
SUMMING = (*ALL_REDUCES, Collective.TRTLLM_CUSTOM)
WITH_WORKSPACE = (*SUMMING, MOE)
