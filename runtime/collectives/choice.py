"""Choice: which collective carries out the fused sites of a group, decided from facts.

Every rank probes its device and its packages, the facts are exchanged, and :func:`choose` is a
function of all of them: it gives the same answer on every rank, with a reason for each
candidate that was passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import CollectiveUnavailableError
from ..hazards.catalogue import applicable
from ..hazards.hazard import Action
from ..hazards.situation import Payload, Situation, Strategy
from . import table as collectives
from .kernels import Implementation
from .links import FULL, Topology
from .rank_facts import RankFacts, linked, numbered, topology_of
from .size_table import TABLE, SizeRow, elsewhere, find_row, forced_row


@dataclass(frozen=True)
class Considered:
    """A collective that was considered. ``why_not`` is None for the one that was chosen."""

    collective: str
    transport: str | None
    why_not: str | None

    def __str__(self) -> str:
        name = f"{self.collective}/{self.transport}" if self.transport else str(self.collective)
        return f"{name}: {self.why_not or 'chosen'}"


@dataclass(frozen=True)
class Choice:
    """Who carries out the fused sites, up to which sizes (``row``; None for the reference), and why not another."""

    implementation: Implementation
    row: SizeRow | None
    candidates: tuple[Considered, ...]

    @property
    def collective(self) -> str:
        return self.implementation.name

    @property
    def transport(self) -> str | None:
        return self.implementation.transport

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(map(str, self.candidates))


def choose(
    ranks: Sequence[RankFacts],
    *,
    wanted: str = "auto",
    transport: str = "auto",
    deterministic: bool = False,
    dtype: str = "bfloat16",
    table: Sequence[SizeRow] = TABLE,
    failed: Mapping[tuple[str, str | None], str] | None = None,
    numbers: Sequence[int] | None = None,
    among: Sequence[Implementation] | None = None,
) -> Choice:
    """The first candidate that nothing speaks against. ``ranks`` are the facts of all ranks, by rank.

    wanted: "auto", or the collective that the user insists on; then a table row is not needed.
    dtype: that of most sites, which some hazards depend on.
    failed: what was tried before on this group, and how it failed; it is not tried again.
    numbers: the global rank of each. among: in place of all collectives, in order of preference.
    Raises :class:`CollectiveUnavailableError` where the user insists and cannot have it, with the reasons.
    """
    ranks, among = numbered(ranks, numbers), collectives.ALL if among is None else among
    capability, links = ranks[0].capability, topology_of(ranks)
    considered = []
    for one in among:
        ways = [other.transport for other in among if other.name == one.name]
        if wanted not in ("auto", one.name) or (len(ways) > 1 and transport not in ("auto", one.transport)):
            continue
        row = None
        if one.make is not None:
            row = find_row(table, one.name, one.transport, capability, len(ranks), links)
            if row is None and wanted != "auto":
                row = forced_row(one, capability, len(ranks), links)
            if row is not None and Strategy.TWO_SHOT not in one.safe(ranks[0].flashinfer):
                row = replace(row, fused=min(row.fused, row.one_shot), all_reduce=min(row.all_reduce, row.one_shot))
        why_not = (failed or {}).get((one.name, one.transport)) or _why_not(
            ranks, one, row, table, deterministic, dtype
        )
        considered.append(Considered(one.name, one.transport, why_not))
        if why_not is None:
            return Choice(one, row, tuple(considered))
    raise CollectiveUnavailableError(
        f"collective='{wanted}'{', deterministic=True' if deterministic else ''} cannot be had here: "
        + "; ".join(map(str, considered))
    )


def _why_not(
    ranks: Sequence[RankFacts],
    one: Implementation,
    row: SizeRow | None,
    table: Sequence[SizeRow],
    deterministic: bool,
    dtype: str,
) -> str | None:
    if unfit := one.fits(ranks):
        return unfit
    if row is None and one.make is not None:
        return _no_row(ranks, elsewhere(table, one.name, one.transport, ranks[0].capability, len(ranks)))
    if deterministic and (row is None or not row.bitwise):
        return "not shown to return the same bits whatever the token count"
    situation = Situation(
        one.name,
        ranks[0].flashinfer,
        len(ranks),
        capability=ranks[0].capability,
        payload=Payload.ANY,
        dtype=dtype,
        capture=False,
    )
    for hazard in applicable(situation) if one.make is not None else ():
        if hazard.decides is Action.REFUSE:
            return f"{hazard.id}, {hazard.title.lower()}: {hazard.remedy}"
    return None


def _no_row(ranks: Sequence[RankFacts], others: Sequence[SizeRow]) -> str:
    """Nothing was measured on a machine like this. others: rows of the same GPUs, linked in another way."""
    major, minor = ranks[0].capability
    gpus = f"{len(ranks)} GPUs of SM{major}{minor}"
    if not others:
        return f"no row of the size table knows {gpus}; name it to force it"
    slow = "; over these, 10 to 34 times slower than no fusion was reported (hazard M50)"
    known = " and ".join(f"{row.topology.meaning} ({row.source})" for row in others)
    return (
        f"no row of the size table knows {gpus} linked by {linked(ranks)}: it was measured over {known}"
        f"{slow if topology_of(ranks) not in (*FULL, Topology.UNKNOWN) else ''}; "
        "measure here with `ringfence bench`, or name it to force it"
    )
