"""Rules: what FlashInfer releases changed in the protocols, as parameters of the models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from ..errors import VersionError
from ..versions import in_range


class Sentinel(StrEnum):
    """How a receiver asks whether a word is the sentinel 0x80000000.

    FLOAT: ``value == 0.f && signbit(value)`` on float32, built with flush-to-zero; true of
    every word from 0x80000000 to 0x807FFFFF. BITWISE: true of the sentinel alone.
    """

    FLOAT = "float"
    BITWISE = "bitwise"


class Words(StrEnum):
    """Which words of a 16-byte pack a receiver of sums looks at before it takes the pack."""

    FIRST = "first"
    ALL = "all"


class Clear(StrEnum):
    """How much a call clears of the buffer before.

    RECORDED: what the call before wrote, as recorded on the device. CURRENT: the size of the
    clearing call itself (before TRT#6237). NONE: nothing.
    """

    RECORDED = "recorded"
    CURRENT = "current"
    NONE = "none"


class Epoch(StrEnum):
    """Who counts the calls: a word on the device, or the host, whose number a capture bakes in."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True)
class LamportRules:
    """A protocol in which the data is the flag: a receiver polls until no word is the sentinel.

    own_flag_first: of trtllm's two-shot, which has barriers: a block raises the flag that its peer waits for before
    those of blocks that its grid does not have.
    """

    sentinel: Sentinel = Sentinel.BITWISE
    sanitises_input: bool = True
    sanitises_sum: bool = True
    words: Words = Words.ALL
    buffers: int = 3
    clear: Clear = Clear.RECORDED
    polls_own: bool = False
    epoch: Epoch = Epoch.DEVICE
    own_flag_first: bool = False


@dataclass(frozen=True)
class MoeRules:
    """The one-sided all-to-all.

    separate_flags: dispatch and combine have flags of their own.
    shared_memory: a flag that is raised for a peer lands in the peer's memory.
    mask_on_device: the mask of active ranks is read at run time, and not baked in by a capture.
    combine_offset_fixed: the combine region is behind the largest rows of all calls, and not behind those of its own.
    barrier_after_init: ranks meet after each has cleared its workspace, and before the first call.
    """

    separate_flags: bool = True
    shared_memory: bool = True
    mask_on_device: bool = True
    combine_offset_fixed: bool = False
    barrier_after_init: bool = False


@dataclass(frozen=True)
class MnnvlRange:
    """The MNNVL rules from a release on, and the source."""

    since: str
    rules: LamportRules
    source: str


#: Newest last. trtllm_mnnvl_allreduce.cuh at these tags.
MNNVL: tuple[MnnvlRange, ...] = (
    MnnvlRange(
        "0.6.0",
        LamportRules(sentinel=Sentinel.FLOAT, sanitises_sum=False, words=Words.FIRST, polls_own=True),
        "FI#2118 brings today's structure; the float compare is what FI#3053 met",
    ),
    MnnvlRange(
        "0.6.12",
        LamportRules(sanitises_sum=False, words=Words.FIRST, polls_own=True),
        "FI#3304: the sentinel is compared bitwise",
    ),
    MnnvlRange(
        "0.6.13",
        LamportRules(),
        "FI#3385: sums are sanitised, all words are checked, up to 8 ranks keep their own part in registers",
    ),
)

#: The newest release whose protocols were read; later ones are taken to have the same.
NEWEST_READ = "0.7.2.post1"

#: The trtllm backend: bitwise per element since FI#1136, own slot polled, no sum is pushed. Until 0.7.1 two-shot raises
#: a block's own flag first (read in Barrier::sync of trtllm_allreduce_fusion.cuh, 0.6.18.post1 to 0.7.2).
TRTLLM = LamportRules(polls_own=True)
_OWN_FLAG_LAST = "0.7.2"

#: Ranks meet after they have initialised a workspace (trtllm_moe_alltoall.py).
_MEET_AFTER_INIT = "0.7.0"
#: ``active_rank_mask`` is a kernel argument (TRT#16200), so a capture bakes it in.
MOE = MoeRules(mask_on_device=False)


def mnnvl_rules(version: str) -> LamportRules:
    """The MNNVL protocol of this FlashInfer. Later releases than those read count as the last one read."""
    _known(version)
    return [row.rules for row in MNNVL if in_range(version, row.since, None)][-1]


def trtllm_rules(version: str) -> LamportRules:
    """The protocol of the trtllm backend: one-shot is the same in all of the known range, two-shot changed in 0.7.2."""
    _known(version)
    return replace(TRTLLM, own_flag_first=in_range(version, None, _OWN_FLAG_LAST))


def moe_rules(version: str) -> MoeRules:
    """The one-sided MoE all-to-all. Where its combine region is, the class of the library says; not its functions."""
    _known(version)
    return replace(MOE, barrier_after_init=in_range(version, _MEET_AFTER_INIT, None))


def _known(version: str) -> None:
    if not in_range(version, MNNVL[0].since, None):
        raise VersionError(
            f"the protocols of FlashInfer {version} are not known here; known are {MNNVL[0].since} and later, "
            "so upgrade flashinfer-python"
        )
