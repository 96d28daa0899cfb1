"""Who is to blame? From where each rank stands, which one do the others wait for.

The rank that spins is usually the victim. A collective call completes nowhere until every rank
of its group has entered it, so whoever has entered fewer calls than the others wait in is the
one; and whoever has completed a call that others are still in left one out before.

Used by the watchdog, on what ranks tell each other while they run, and by ``ringfence journal``,
on what they wrote down.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spelling import group_word, ranks_text
from . import checked
from .position import COMPILES, CallSpan, Position, sizes_text

#: For ranks of which one compiles alone.
REMEDY = (
    "ranks must compile the same graphs in the same order, so what selects a graph must be the same on all of them. "
    "Where it is a size, mark it on every rank before the first call: torch._dynamo.mark_unbacked(x, 0) where a rank "
    "may have 0 or 1 of it, mark_dynamic(x, 0) otherwise; or pad, so that all ranks see the same sizes"
)


@dataclass(frozen=True)
class Failure:
    """An exception that broke a step off on a rank.

    victim: it came out of a collective, so another rank may be its cause.
    """

    rank: int
    where: str
    error: str
    victim: bool = False

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Failure:
        """Raises TypeError for what a journal does not hold."""
        failure = cls(**value)
        where, error = checked.text(failure.where), checked.text(failure.error)
        return cls(checked.integer(failure.rank), where, error, bool(failure.victim))


@dataclass(frozen=True)
class Finding:
    """ranks: to blame. waiting: for them. sentence: both, and where. short: without the places. remedy: if any.

    evidence: what a kernel said that gave up waiting for them; the sentence ends with it.
    """

    ranks: tuple[int, ...]
    waiting: tuple[int, ...]
    sentence: str
    short: str = ""
    remedy: str = ""
    evidence: str = ""


def where(position: Position, said: CallSpan | None = None) -> str:
    """``step 4 of sizes (8,), piece 7 'submod_7' (island), call 12 of group 'world'``. said: a call to leave out."""
    if position.step < 0:
        return "no step yet"
    text = f"step {position.step} of {sizes_text(position.sizes)}" + f" of {position.graph}" * bool(position.graph)
    if position.piece is not None:
        text += f", piece {position.piece} '{position.name}' ({position.kind})"
    return ", ".join([text, *(str(c) for c in position.calls if c != said or c.first != c.last)])


def find_culprit(
    positions: Mapping[int, Position],
    silent: Mapping[int, str],
    failures: Sequence[Failure] = (),
    members: Mapping[str, Sequence[int]] | None = None,
    ended: Mapping[int, str] | None = None,
    victims: Collection[int] = (),
) -> Finding | None:
    """The ranks that the others wait for; None where nobody waits.

    positions: by rank, the last that is known. silent: ranks that no longer answer, and how
    that shows. failures: in the order in which they were reported. members: the ranks of each
    group; a group that is not in it is taken to hold all. ended: ranks that said so, and how; their positions
    are those of that moment. victims: ranks whose kernels have waited in vain, so that no count of calls blames them.
    """
    ended = ended or {}
    waiting = tuple(sorted(r for r, p in positions.items() if p.waits and r not in silent))
    first = next((f for f in failures if not f.victim), None)
    if first is not None:
        others = tuple(r for r in waiting if r != first.rank)
        return blamed_for(first, others)
    if silent:
        gone = tuple(sorted(silent))
        said = "; ".join(f"rank {r} {silent[r]}" for r in gone)
        step = max([positions[r].step for r in waiting], default=-1)
        # What was heard long before the others waited says nothing: steps are shorter than a beat.
        recent = [r for r in gone if r in positions and positions[r].step >= step - 1]
        last = "; ".join(f"rank {r} was last heard of {_when(positions[r], 'in')}" for r in recent)
        short = f"{said}; {_wait(waiting)} for {'it' if len(gone) == 1 else 'them'}" if waiting else said
        return Finding(gone, waiting, "; ".join(filter(None, [said, _who_waits(positions, waiting), last])), short)
    stuck = sorted((c.first, r, c) for r in waiting for c in positions[r].calls)
    for _, rank, call in stuck:
        finding = _behind_or_past(positions, rank, call, (members or {}).get(call.group) or tuple(positions), ended)
        if finding is not None and not set(finding.ranks) & set(victims):
            return finding
    left = tuple(r for r in sorted(ended) if r not in waiting)
    if left and waiting:
        said = "; ".join(ended[r] for r in left)
        return Finding(left, waiting, "; ".join(filter(None, [said, _who_waits(positions, waiting)])))
    alone = tuple(r for r in waiting if positions[r].stuck_in_piece and not positions[r].calls and r not in victims)
    if alone:
        rank = alone[0]
        others = tuple(r for r in waiting if r not in alone)
        short = f"{ranks_text(alone)} do{'es' * (len(alone) == 1)} not get on, in a piece that holds no call"
        return Finding(
            alone,
            others,
            f"{ranks_text(alone)} does not get on in {where(positions[rank])}, which holds no call",
            short,
        )
    if stuck:
        together = tuple(dict.fromkeys(r for _, r, _ in stuck))
        places = _who_waits(positions, together)
        odd, short = came_with({r: positions[r].sizes for r in together}) or ((), "")
        if odd:
            others = tuple(r for r in together if r not in odd) or together
            return Finding(odd, others, f"{short}: {places}", short)
    if stuck and not victims:
        short = f"every rank has entered {stuck[0][2]} and none gets on"
        return Finding(together, together, f"every rank has entered the call and none gets on: {places}", short)
    if failures:
        return blamed_for(failures[0], waiting)
    return None


def blamed_for(failure: Failure, waiting: tuple[int, ...] = ()) -> Finding:
    """The rank whose exception it was."""
    said = f"rank {failure.rank} failed"
    return Finding((failure.rank,), waiting, f"{said} in {failure.where}: {failure.error}", f"{said}: {failure.error}")


def came_with(sizes: Mapping[int, tuple[int, ...]]) -> tuple[tuple[int, ...], str] | None:
    """The ranks that came with other sizes than most, and ``rank 1 came with 1 token, the others with 16``.

    None where all came with the same. Where there is no "most", all are named.
    """
    ranks_of: dict[tuple[int, ...], list[int]] = {}
    for rank in sorted(sizes):
        ranks_of.setdefault(sizes[rank], []).append(rank)
    if len(ranks_of) < 2:
        return None
    most, *rest = sorted(ranks_of, key=lambda s: -len(ranks_of[s]))
    if len(ranks_of[rest[0]]) == len(ranks_of[most]):
        odd, named = tuple(sorted(sizes)), [most, *rest]
    else:
        odd, named = tuple(sorted(r for s in rest for r in ranks_of[s])), rest
    sides = [f"{ranks_text(ranks_of[s])} {'came ' * (not i)}with {_what_came(s)}" for i, s in enumerate(named)]
    others = [f"the others with {_what_came(most).removesuffix(' tokens')}"] if most not in named else []
    return odd, ", ".join(sides + others)


def _what_came(sizes: tuple[int, ...]) -> str:
    return f"{sizes[0]} token{'s' * (sizes[0] != 1)}" if len(sizes) == 1 else sizes_text(sizes)


def stood_still(positions: Mapping[int, Position], finding: Finding, seconds: float) -> bool:
    """Whether a rank has waited so long for those to blame that it is more than the time of a step."""
    return any(positions[r].still >= seconds for r in finding.waiting if r in positions)


def find_alone(
    positions: Mapping[int, Position], members: Mapping[str, Sequence[int]], seconds: float
) -> Finding | None:
    """Ranks that stand in an exchange while others, whom they wait for there, stand in a call and wait for them.

    However slow they are, none comes to the other. None where there are no such ranks, or not for ``seconds`` yet.
    """
    settled = [p for p in positions.values() if p.still >= seconds]
    for there in (p for p in settled if p.exchange):
        for here in (p for p in settled if p.rank in there.among and p.stuck_in_piece and not p.exchange):
            for call in here.calls:
                missed = there.submitted.get(call.group, 0) <= call.first
                if missed and there.rank in (members.get(call.group) or positions):
                    return _alone(positions, there, here)
    return None


def find_refused(
    positions: Mapping[int, Position], members: Mapping[str, Sequence[int]], seconds: float
) -> Finding | None:
    """Ranks whose last call of the model was an error, where others began that call and wait for them in it.

    Calls that all ranks refuse, as one of too many tokens, are nobody's fault. None where there are no such ranks, or
    not for ``seconds`` yet: a rank may call again.
    """
    settled = [p for p in positions.values() if p.still >= seconds]
    for there in (p for p in settled if p.refusal and p.phase == "idle" and not p.exchange):
        for here in (p for p in settled if p.stuck_in_piece and not p.exchange):
            for call in here.calls:
                ranks, group = members.get(call.group) or tuple(positions), call.group
                only_there = there.refused.get(group, 0) > here.refused.get(group, 0)
                if only_there and there.rank in ranks and there.submitted.get(group, 0) <= call.first:
                    return _behind_or_past(positions, here.rank, call, ranks, {})
    return None


def _alone(positions: Mapping[int, Position], there: Position, here: Position) -> Finding:
    def alike(one: Position, other: Position) -> bool:
        return (one.exchange, one.compiles, one.calls) == (other.exchange, other.compiles, other.calls)

    alone = tuple(sorted(r for r, p in positions.items() if alike(p, there)))
    waiting = tuple(sorted(r for r, p in positions.items() if alike(p, here)))
    does = there.compiles or f"waits for the others in the exchange '{there.exchange}'"
    does_not = f"{ranks_text(waiting)} do{'es' * (len(waiting) == 1)} not"
    short = f"{ranks_text(alone)} {does}; {does_not}, and neither comes to the other"
    return Finding(alone, waiting, alone_text(alone, waiting, does, where(here)), short, REMEDY)


def alone_text(alone: Sequence[int], waiting: Sequence[int], does: str, place: str) -> str:
    """does: what the ranks do that nobody else does. place: where the others wait for them meanwhile."""
    return (
        f"{ranks_text(alone)} {does}; {ranks_text(waiting)} do{'es' * (len(waiting) == 1)} not, and "
        f"wait{'s' * (len(waiting) == 1)} for {ranks_text(alone)} in {place}. Neither comes to the other: {REMEDY}"
    )


def compiles_too_long(position: Position) -> Finding:
    """A rank that nobody need wait for yet."""
    return Finding((position.rank,), (), f"rank {position.rank} {_what_it_does(position)}")


def _behind_or_past(
    positions: Mapping[int, Position], rank: int, call: CallSpan, members: Sequence[int], ended: Mapping[int, str]
) -> Finding | None:
    """Who keeps ``rank`` waiting in ``call``?"""
    known = [r for r in members if r in positions]
    inside = tuple(r for r in known if any(c.group == call.group and c.first == call.first for c in positions[r].calls))
    behind = [r for r in known if positions[r].submitted.get(call.group, 0) <= call.first]
    call_text = f"call {call.first} of group '{group_word(call.group)}'"
    if behind:
        least = min(positions[r].submitted.get(call.group, 0) for r in behind)
        culprits = tuple(r for r in behind if positions[r].submitted.get(call.group, 0) == least)
        did = "; ".join(ended.get(r) or f"rank {r} {_what_it_does(positions[r])}" for r in culprits)
        return Finding(
            culprits,
            tuple(r for r in inside if r not in culprits),
            f"{ranks_text(culprits)} did not come to {call_text} ({where(positions[rank], call)} on rank {rank}), "
            f"in which {_wait(inside)}: {did}",
            f"{ranks_text(culprits)} did not come to {call_text}, in which {_wait(inside)}",
        )
    # Of a device only whole steps are known, so this may be a range of calls that a host is still working through.
    within = [r for r in known if positions[r].submitted.get(call.group, 0) <= call.last]
    if within:
        r = min(within, key=lambda r: positions[r].submitted.get(call.group, 0))
        entered = positions[r].submitted.get(call.group, 0)
        return Finding(
            (r,),
            tuple(w for w in inside if w != r),
            f"rank {r} has entered calls before {entered} of group '{group_word(call.group)}', and rank {rank} all of "
            f"its step ({where(positions[rank])}): {ended.get(r) or f'rank {r} {_what_it_does(positions[r])}'}",
            f"rank {r} has entered calls before {entered} of group '{group_word(call.group)}'; rank {rank} waits, "
            f"in {call}",
        )
    past = tuple(r for r in known if positions[r].completed.get(call.group, 0) > call.last)
    if past and len(past) <= len(inside):
        return Finding(
            past,
            inside,
            f"{ranks_text(past)} left out a call of group '{group_word(call.group)}': "
            f"{'they have' if len(past) > 1 else 'it has'} completed call {call.last}, in which "
            f"{_wait(inside, 'still ')} ({where(positions[rank], call)})",
            f"{ranks_text(past)} left out a call of group '{group_word(call.group)}'; "
            f"{_wait(inside, 'still ')} in {call}",
        )
    if past:
        return Finding(
            inside,
            past,
            f"{ranks_text(inside)} made a call more than the others: still in {where(positions[rank])}, which "
            f"{ranks_text(past)} have completed",
            f"{ranks_text(inside)} made a call more than the others: {call}",
        )
    return None


def _what_it_does(position: Position) -> str:
    if position.exchange:
        text = f"waits for the others in the exchange '{position.exchange}', {_when(position)}"
        return text if position.compiles in ("", COMPILES) else f"{text}: it {position.compiles}"
    if position.phase == "compile":
        return f"compiles since {position.still:.1f} s, {_when(position)}"
    if position.stuck_in_piece:
        return f"is in {where(position)}"
    if position.step < 0 and not position.refusal:
        return "has not called the model"
    refused = f"; its last call was an error: {position.refusal}" if position.refusal else ""
    return f"is outside of the model since {position.still:.1f} s, {_when(position)}{refused}"


def place_of(position: Position) -> str:
    """``in step 4 ..., piece 7``, where a rank stands, or ``after step 3 ...``, where it is outside of the model."""
    return f"in {where(position)}" if position.stuck_in_piece else _when(position)


def _when(position: Position, word: str = "after") -> str:
    return "before its first step" if position.step < 0 else f"{word} {where(position)}"


def _who_waits(positions: Mapping[int, Position], waiting: Sequence[int]) -> str:
    """``ranks 0, 2 wait in step ...``: the same sentence once."""
    places: dict[str, list[int]] = {}
    for rank in waiting:
        at = positions[rank]
        place = where(at) if at.stuck_in_piece else f"the exchange '{at.exchange}', {_when(at)}"
        places.setdefault(place, []).append(rank)
    return "; ".join(f"{_wait(r)} in {place}" for place, r in places.items())


def _wait(ranks: Sequence[int], still: str = "") -> str:
    return f"{ranks_text(ranks)} {still}wait{'s' * (len(ranks) == 1)}"
