"""MoE choice: the sites that options leave as they are, and those that the ranks of a group rewrite together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch.fx import GraphModule, Node

from ..runtime.spelling import group_word
from .groups import collectives_of, group_of
from .moe_sites import MoeCandidate, MoeMatch
from .op_calls import op_names
from .provenance import label
from .reasons import Decline, Reason
from .roles import arguments
from .switch_off import names_site

#: What a rank says of its sites in one group: by place of the reduce-scatter among the group's collectives, what the
#: rewrite would take and make, or why the site stays.
Said = Mapping[int, tuple[object, ...] | str]


def leave_alone(
    candidates: Sequence[MoeCandidate],
    *,
    only: Collection[str] | None,
    skip_sites: Collection[str],
    split_ops: Collection[str],
) -> list[MoeCandidate]:
    """The candidates; those that options leave as they are are declined.

    only: names of the groups that are rewritten; None means all. skip_sites: as for all-reduces. split_ops: a site
    whose collectives are named there stays, because these are to run between pieces.
    """
    found = []
    for candidate in candidates:
        why = _left_alone(candidate, only, skip_sites, frozenset(split_ops))
        found.append(candidate.declined(why) if candidate.match is not None and why is not None else candidate)
    return found


def _left_alone(
    candidate: MoeCandidate, only: Collection[str] | None, skip_sites: Collection[str], split_ops: frozenset[str]
) -> Decline | None:
    site, match = candidate.site, candidate.match
    if only is not None and site.group not in only:
        return Decline(
            Reason.OTHER_GROUP,
            f"it is over group '{group_word(site.group)}', and only {sorted(map(group_word, only))} are to be fused",
        )
    pattern = next((p for p in skip_sites if names_site(p, site)), None)
    if pattern is not None:
        return Decline(Reason.SWITCHED_OFF, f"switched off (skip_sites: '{pattern}')")
    for node in _collectives(match) if match is not None else ():
        if not split_ops.isdisjoint(op_names(node)):
            return Decline(Reason.SWITCHED_OFF, f"switched off (split_ops names {label(node)}: {op_names(node)[0]})")
    return None


def _collectives(match: MoeMatch) -> tuple[Node, ...]:
    """What a rewrite takes away: collectives and the waits for them."""
    gathers = (node for wait in match.gathers for node in (arguments(wait)[0], wait))
    return (*gathers, match.scatter, match.wait)


def said_of(gm: GraphModule, candidates: Sequence[MoeCandidate], group: str) -> Said:
    """What this rank says of its sites in a group; it means the same on ranks whose collectives are the same."""
    place = _places(gm, group)
    said: dict[int, tuple[object, ...] | str] = {}
    for site, match in ((c.site, c.match) for c in candidates if c.site.group == group):
        if match is None:
            said[place[site.node]] = site.message
            continue
        payloads = tuple(place[arguments(wait)[0].name] for wait in match.payloads)
        said[place[site.node]] = (payloads, place[arguments(match.ids)[0].name], match.num_experts, match.group.size)
    return said


def agreed(
    gm: GraphModule, candidates: Sequence[MoeCandidate], group: str, answers: Mapping[int, Said]
) -> list[MoeCandidate]:
    """The candidates; those of the group that not all ranks rewrite in the same way are declined.

    answers: by what each rank is called, what :func:`said_of` is there, this rank's own among them.
    """
    mine, place = said_of(gm, candidates, group), _places(gm, group)
    found = []
    for candidate in candidates:
        why = None
        if candidate.match is not None and candidate.site.group == group:
            why = _disagreed(place[candidate.site.node], mine, answers)
        decline = Decline(Reason.OTHER_RANK, why) if why is not None else None
        found.append(candidate.declined(decline) if decline is not None else candidate)
    return found


def _disagreed(place: int, mine: Said, answers: Mapping[int, Said]) -> str | None:
    for rank, said in answers.items():
        if place not in said:
            return f"rank {rank} has no such site: its collectives are others, or it does not see experts between them"
        other = said[place]
        if isinstance(other, str):
            return f"rank {rank} leaves it as it is: {other}"
        if other != mine[place]:
            return f"rank {rank} gathers in another order, or among another number of experts"
    return None


def _places(gm: GraphModule, group: str) -> dict[str, int]:
    return {node.name: i for i, node in enumerate(n for n in collectives_of(gm) if group_of(n) == group)}
