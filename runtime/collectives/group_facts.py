"""The facts of all ranks of a group, brought together, with what copies between their memories brought."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from ..channel import Channel
from ..errors import PeerFailedError, RankMismatch
from ..spelling import failures_text, first_difference
from .links import FULL
from .peer_copy import CudaMemory, try_copies
from .rank_facts import RankFacts, peers_out_of_reach, probe, topology_of
from .workspace import Workspaces


class WantedOfAll(Protocol):
    """What a collective is wanted for: by what name, and what must be equal on all ranks."""

    @property
    def collective(self) -> str: ...
    @property
    def parts(self) -> tuple[tuple[str, str], ...]: ...


def facts_of_all(
    channel: Channel, device: torch.device, wanted: WantedOfAll | None = None, workspaces: Workspaces | None = None
) -> list[RankFacts]:
    """What every rank knows of itself, by rank; invalid workspaces of the group are given back on the way.

    wanted: what has to be the same on all. Every rank must call. Raises :class:`PeerFailedError` where one cannot
    tell, :class:`RankMismatch` where they want different things.
    """
    facts: RankFacts | str
    try:
        facts = probe(device)
    except Exception as error:  # the others are told, instead of left waiting
        facts = f"{type(error).__name__}: {error}"
    mine = wanted.parts if wanted is not None else ()
    answers = channel.exchange("facts of each rank", (facts, mine, workspaces.invalid if workspaces else None))
    asked = [parts for _, parts, _ in answers]
    if len(set(asked)) > 1:
        raise RankMismatch(f"the ranks want different collectives: {first_difference(asked, channel.ranks)}")
    if workspaces is not None and (invalid := next((why for _, _, why in answers if why is not None), None)):
        workspaces.discard(channel, invalid)
    failures = tuple(
        (rank, why) for rank, (why, _, _) in zip(channel.ranks, answers, strict=True) if isinstance(why, str)
    )
    if failures:
        raise PeerFailedError(failures_text(failures), failures)
    return [facts for facts, _, _ in answers]


def with_copies(
    channel: Channel, device: torch.device, ranks: Sequence[RankFacts], wanted: WantedOfAll, workspaces: Workspaces
) -> tuple[list[RankFacts], tuple[str, ...]]:
    """The facts with what copies between all pairs brought, and notes. Tried once for each group.

    Not where NCCL was told to keep off peer memory and no kernel would use it either: a copy may hang the device.
    """
    linked = topology_of(ranks) in FULL or wanted.collective not in ("auto", "reference")
    told_off = any(facts.nccl_p2p_off for facts in ranks) and not linked
    if device.type != "cuda" or told_off or peers_out_of_reach(ranks) is not None:
        return list(ranks), ()
    if workspaces.copies is None:
        workspaces.copies = try_copies(channel, CudaMemory)
    copies = workspaces.copies
    if copies.untried is not None:
        return list(ranks), (f"copies between the ranks' memories could not be tried: {copies.untried}",)
    if not copies.lost:
        return list(ranks), ()
    note = (
        f"peer memory does not work here: {copies.lost[0]}. NCCL uses it too and may hang or corrupt: set "
        "NCCL_P2P_DISABLE=1, or turn PCIe access control (ACS) off (hazard M51)"
    )
    return [dataclasses.replace(facts, lost=copies.lost) for facts in ranks], (note,)
