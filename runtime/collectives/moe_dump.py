"""MoE dump: what a workspace's flags say of a dispatch or a combine that does not return. Pure: words in, values out.

A rank counts its calls in one word, dispatches and combines in turn: each adds one before its main kernel begins. When
a rank has sent all that a call sends, it stores that number into its flag at every rank, and then waits until the flags
of all ranks here hold it. So who has not arrived is known exactly, in a replay too.

Source: moeAlltoAllKernels.cu of FlashInfer 0.6.18.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..spelling import ranks_text
from .moe_one_sided import MoeMemory


def describe_moe(
    memory: MoeMemory,
    call: int,
    dispatch_flags: Sequence[int],
    combine_flags: Sequence[int],
    received: Sequence[int],
    ranks: Sequence[int],
) -> dict[str, Any]:
    """What a person is shown of one workspace; the schema is docs/report.md.

    call: the number of this rank's last call. The flags are of each rank, as are the rows that it sent in the last
    dispatch. ranks: the global rank of each rank of the group.
    """
    half = "dispatch" if call % 2 else "combine"
    flags, of_next = (dispatch_flags, combine_flags) if call % 2 else (combine_flags, dispatch_flags)
    silent = [r for r in range(memory.world_size) if call and flags[r] != call]
    ahead = [r for r in range(memory.world_size) if of_next[r] == call + 1]
    words = {
        "call": call,
        "dispatch_flags": list(dispatch_flags),
        "combine_flags": list(combine_flags),
        "received": list(received),
    }
    others = [ranks[r] for r in silent if r != memory.rank]
    value: dict[str, Any] = {"words": words, "silent": others}
    if not call:
        return value | {"says": "no dispatch has begun on this rank"}
    pair = f"{half} {(call + 1) // 2}"
    if any(flags[r] > call for r in silent):
        says = f"{pair} and a flag of {max(flags)}: the ranks' calls are not in step"
    elif others:
        says = f"{pair} waits: {_named(others)} not come to it"
    elif silent:
        says = f"{pair} has not sent everything yet"
    else:
        next_one = f"; {_named([ranks[r] for r in ahead])} come to the next call" if ahead else ""
        says = f"no call of this rank waits in it: all have come to {pair}{next_one}"
    return value | {"says": says}


def _named(ranks: Sequence[int]) -> str:
    return f"{ranks_text(tuple(ranks))} {'has' if len(ranks) == 1 else 'have'}"
