"""Plan: from a split plan to what each rank launches, and the question whether that can hang.

A split plan is a row of pieces, captured and replayed, and of islands, run eagerly. What a
rank's device sees of it is its sequence of collective calls, which the runner makes like this
(:mod:`ringfence.runtime.replay.runner`): in the first step of a captured size each piece runs
eagerly once and is then recorded, which launches nothing. Later steps of that size replay.
So the device cannot tell them apart. A step is padded to the next captured size; a larger
one runs eagerly. So a rank that pads differently, or lacks a call, makes
another program, and ranks are described one by one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ..errors import PlanError
from ..hazards.situation import Collective, Payload, Strategy
from .bound import Bound
from .calls import Call, Calls, distinct, each
from .compiler import Compiler
from .decide import decide
from .explore import Result
from .fold import (
    KEPT_RANKS,
    UNFOLDED_STATES,
    UNFOLDED_WORDS,
    Sizes,
    decide_folded,
    line_folds,
    mnnvl_folds,
    smallest,
    trtllm_folds,
)
from .lamport import part, total
from .machine import UNSEEN, Machine, State
from .mnnvl import MnnvlCompiler, mnnvl_compiler, polls_own
from .moe_a2a import MoeCompiler
from .ringfence import RULES, LineRules, RingfenceCompiler, ringfence_compiler
from .rules import LamportRules, MoeRules, mnnvl_rules, moe_rules, trtllm_rules
from .trtllm import trtllm_compiler

#: What the models cover. FlashInfer's mnnvl serves 32 and 64 ranks too.
WORLD_SIZES = (2, 4, 8, 16)

#: Collectives whose protocol has a model.
MODELLED = (Collective.MNNVL, Collective.TRTLLM, Collective.RINGFENCE, Collective.MOE_ALL_TO_ALL)

#: Of these, all-reduces.
MODELLED_SUMS = tuple(collective for collective in MODELLED if collective is not Collective.MOE_ALL_TO_ALL)

#: Of these, those that come with ringfence itself, and depend on no version of FlashInfer.
OWN = (Collective.RINGFENCE,)
MOST_OWN_RANKS = 8


Rules: TypeAlias = LamportRules | LineRules | MoeRules


@dataclass(frozen=True)
class PlannedSite:
    """A collective in a plan. ``strategy`` None leaves it to the number of tokens."""

    name: str
    strategy: Strategy | None = None


@dataclass(frozen=True)
class PlannedPiece:
    """A stretch of a split plan with its collectives in order. An island is never captured."""

    name: str
    island: bool
    sites: tuple[PlannedSite, ...]


@dataclass(frozen=True)
class PlannedRank:
    """What one rank's runner is given.

    steps: how many tokens each step has.
    two_shot_from: from how many tokens on a site that leaves it open is two-shot; None is never.
    """

    pieces: tuple[PlannedPiece, ...]
    steps: tuple[int, ...]
    capture_sizes: tuple[int, ...] = ()
    padding: bool = True
    two_shot_from: int | None = None
    payload: Payload = Payload.ORDINARY


def even_pieces(
    layers: int, sites_per_layer: int, pieces: int, strategy: Strategy | None = None
) -> tuple[PlannedPiece, ...]:
    """``pieces`` captured pieces with the sites of all layers spread over them as evenly as can be."""
    return _spread(
        [
            PlannedSite(f"layer {i // sites_per_layer} site {i % sites_per_layer}", strategy)
            for i in range(layers * sites_per_layer)
        ],
        pieces,
    )


def moe_pieces(layers: int, pieces: int) -> tuple[PlannedPiece, ...]:
    """As :func:`even_pieces`, for layers of a MoE dispatch and a combine each."""
    halves = (Strategy.DISPATCH, Strategy.COMBINE)
    return _spread([PlannedSite(f"layer {i} {half}", half) for i in range(layers) for half in halves], pieces)


def _spread(sites: Sequence[PlannedSite], pieces: int) -> tuple[PlannedPiece, ...]:
    cuts = [len(sites) * i // pieces for i in range(pieces + 1)]
    return tuple(PlannedPiece(f"piece {i}", False, tuple(sites[cuts[i] : cuts[i + 1]])) for i in range(pieces))


def exercise(
    pieces: tuple[PlannedPiece, ...], sizes: tuple[int, ...], world_size: int, *, padding: bool = True
) -> PlannedRank:
    """A rank that captures each size, replays it, goes down and up again, and once runs uncaptured.

    Sites that leave the strategy open are two-shot from the largest size on.
    """
    largest = sizes[-1] if sizes else 1
    steps = (*sizes, *reversed(sizes), *sizes, largest + 1)
    return PlannedRank(pieces, steps, sizes, padding, two_shot_from=max(largest, world_size + 1))


@dataclass(frozen=True)
class _Launched:
    """A call before it has an id. ``key`` is the same on ranks that mean the same call: (step, site)."""

    key: tuple[int, int]
    tokens: int
    strategy: Strategy
    epoch: int
    where: str


def programs(ranks: Sequence[PlannedRank]) -> tuple[Calls, ...]:
    """The calls of every rank. A call has the same id on all ranks that make it in the same step."""
    launched = {rank: list(_launched(rank)) for rank in dict.fromkeys(ranks)}
    keys = sorted({call.key for calls in launched.values() for call in calls})
    ids = {key: i for i, key in enumerate(keys)}
    made = {
        rank: tuple(
            Call(ids[c.key], c.strategy, c.tokens, rank.payload, epoch=c.epoch, where=c.where)
            for c in calls
            if c.tokens > 0  # FlashInfer's grid has a block per token: without tokens there is no launch
        )
        for rank, calls in launched.items()
    }
    return tuple(made[rank] for rank in ranks)


def _launched(rank: PlannedRank) -> Iterator[_Launched]:
    """The runner's loop on paper. The host counts a call when it launches or records it."""
    counted = itertools.count()
    recorded: dict[tuple[int, int], int] = {}  # (size, site) -> the host's count, baked in
    for step, asked in enumerate(rank.steps):
        size = _capture_size(rank, asked)
        tokens = size or asked
        place = 0
        for piece in rank.pieces:
            places = range(place, place := place + len(piece.sites))
            captured = size is not None and not piece.island
            replay = captured and all((tokens, i) in recorded for i in places)
            for i, site in zip(places, piece.sites, strict=True):
                epoch = recorded[tokens, i] if replay else next(counted)
                manner = "replay" if replay else "first run" if captured else "eager"
                where = f"step {step}, {piece.name}, {manner}"
                yield _Launched((step, i), tokens, _strategy(rank, site, tokens), epoch, where)
            if captured and not replay:
                recorded |= {(tokens, i): next(counted) for i in places}


def _capture_size(rank: PlannedRank, tokens: int) -> int | None:
    if rank.padding:
        return min((size for size in rank.capture_sizes if size >= tokens), default=None)
    return tokens if tokens in rank.capture_sizes else None


def _strategy(rank: PlannedRank, site: PlannedSite, tokens: int) -> Strategy:
    if site.strategy is not None:
        return site.strategy
    two_shot = rank.two_shot_from is not None and tokens >= rank.two_shot_from
    return Strategy.TWO_SHOT if two_shot else Strategy.ONE_SHOT


def reduced(ranks: Sequence[Calls]) -> tuple[Calls, ...]:
    """The same programs with few tokens instead of many.

    Rules treat tokens alike: a call covers the tokens below its count, no two of them share a
    word, and of two tokens covered by the same calls (and, in two-shot, owned by the same rank)
    one tells all that the other would. So counts are replaced in order by the smallest that
    keep their order and, for two-shot, their remainder by the world size. Where ranks differ
    in a count or a strategy, rows of one call may lie where another rank has rows of another
    token; then which failure comes first can depend on the counts, that there is one cannot.
    """
    some = distinct(ranks)
    counts = sorted({call.tokens for call in _all(some)})
    step = len(ranks) if any(call.strategy is Strategy.TWO_SHOT for call in _all(some)) else 1
    small: dict[int, int] = {}
    last = 0
    for count in counts:
        last = last + 1 + (count - last - 1) % step
        last += step * (last < min(count, step))
        small[count] = last
    return each(ranks, lambda calls: tuple(replace(call, tokens=small[call.tokens]) for call in calls))


def with_grids(ranks: Sequence[Calls], *, by_size: bool = False) -> tuple[Calls, ...]:
    """Calls with a grid each: equal where ranks agree on the tokens, which the grid depends on.

    by_size: also over time, in two-shot: the first token count has one grid, and any other a larger one. A launcher's
    grids are neither larger nor smaller with the tokens (129 tokens 132 blocks, 144 tokens 72), so two tell all.
    """
    counts: dict[int, set[int]] = {}
    for call in _all(distinct(ranks)):
        counts.setdefault(call.id, set()).add(call.tokens)
    order = {id: sorted(tokens) for id, tokens in counts.items()}
    first = next((call.tokens for call in _all(ranks) if call.strategy is Strategy.TWO_SHOT), None)
    larger = max(map(len, order.values()), default=0)  # than any difference between ranks, which it must not undo

    def grid(call: Call) -> int:
        turns = by_size and call.strategy is Strategy.TWO_SHOT and call.tokens != first
        return call.ctas + order[call.id].index(call.tokens) + turns * larger

    if all(len(tokens) == 1 for tokens in counts.values()) and not by_size:
        return tuple(ranks)
    return each(ranks, lambda calls: tuple(replace(call, ctas=grid(call)) for call in calls))


def rules_for(collective: str, version: str) -> Rules:
    """The protocol of this collective in this FlashInfer.

    Raises :class:`PlanError` or :class:`~ringfence.runtime.errors.VersionError`.
    """
    match collective:
        case Collective.MNNVL:
            return mnnvl_rules(version)
        case Collective.TRTLLM:
            return trtllm_rules(version)
        case Collective.RINGFENCE:
            return RULES
        case Collective.MOE_ALL_TO_ALL:
            return moe_rules(version)
    raise PlanError(f"no model of collective '{collective}'; there are {_listed(MODELLED)}")


def compiler_for(collective: str, rules: Rules, ranks: Sequence[Calls]) -> Compiler[Any]:
    """The protocol of this collective by these rules, for ranks that make these calls."""
    if isinstance(rules, MoeRules):
        return MoeCompiler(len(ranks), rules=rules)
    if isinstance(rules, LineRules):
        return ringfence_compiler(ranks, rules)
    return (mnnvl_compiler if collective == Collective.MNNVL else trtllm_compiler)(ranks, rules)


def machine_for(collective: str, version: str, ranks: Sequence[Calls]) -> Machine:
    """The protocol of this collective in this FlashInfer, run by these programs, one per rank.

    Raises :class:`PlanError` or :class:`~ringfence.runtime.errors.VersionError`.
    """
    _check_ranks(collective, ranks)
    rules = rules_for(collective, version)
    return _unfolded(collective, rules, _gridded(collective, rules, ranks))


def check(collective: str, version: str, ranks: Sequence[Calls], bound: Bound | None = None) -> Result[State]:
    """Whether these programs, one per rank, can deadlock, read stale data or lose a write.

    Ranks and sizes are folded (:mod:`.fold`) where all ranks make the same calls. Raises :class:`PlanError`,
    :class:`~ringfence.runtime.errors.VersionError`, and what ``bound`` raises.
    """
    _check_ranks(collective, ranks)
    rules, bound = rules_for(collective, version), bound or Bound()
    ranks = _gridded(collective, rules, ranks)
    first = ranks[0]
    if all(calls is first or calls == first for calls in ranks) and not any(call.active for call in first):
        return check_alike(collective, rules, first, len(ranks), bound)
    if collective != Collective.MOE_ALL_TO_ALL and _same_sizes(ranks):
        owners = 1 if isinstance(rules, LineRules) else len(ranks)
        few = each(ranks, lambda calls: smallest(calls, owners))
        found = decide(compiler_for(collective, rules, few).machine(few), bound=bound)
        if not found.safe:
            return found
    return decide(_unfolded(collective, rules, ranks), bound=bound)


def check_alike(collective: str, rules: Rules, calls: Calls, world_size: int, bound: Bound) -> Result[State]:
    """As :func:`check`, of ranks that all make these calls."""
    folds: Sequence[Sizes] = ({},)
    mixed = small = False
    if collective == Collective.TRTLLM:
        folds = tuple(trtllm_folds(calls))
    elif collective == Collective.RINGFENCE:
        folds = tuple(line_folds(calls))
    elif collective == Collective.MNNVL:
        folds = tuple(mnnvl_folds(calls, world_size))
        mixed = len({call.strategy is Strategy.TWO_SHOT for call in calls}) == 2
        most = max(call.tokens for call in reduced([calls] * world_size)[0]) if mixed else 0
        small = mixed and most * world_size**2 <= UNFOLDED_WORDS

    def unfolded() -> Result[State]:
        return decide(_unfolded(collective, rules, [calls] * world_size), bound=Bound(UNFOLDED_STATES))

    kept = [functools.partial(_kept_ranks, collective, rules, world_size, spare) for spare in range(1 + mixed)]
    return decide_folded(calls, folds, kept, unfolded if small else None, bound)


def _gridded(collective: str, rules: Rules, ranks: Sequence[Calls]) -> Sequence[Calls]:
    """The calls with the grids that their sizes give them, before a size stands for others."""
    if isinstance(rules, LamportRules) and collective == Collective.TRTLLM:
        return with_grids(ranks, by_size=rules.own_flag_first)
    return ranks


def _unfolded(collective: str, rules: Rules, ranks: Sequence[Calls]) -> Machine:
    """``ranks`` have their grids."""
    if collective != Collective.MOE_ALL_TO_ALL:
        ranks = reduced(ranks)
    return compiler_for(collective, rules, ranks).machine(ranks)


def _kept_ranks(collective: str, rules: Rules, world_size: int, spare: int, calls: Calls) -> Compiler[Any]:
    """The protocol among the ranks that a fold keeps. ``spare``: by how much the second half of a workspace is off."""
    if isinstance(rules, LamportRules) and collective == Collective.MNNVL:
        rules = replace(rules, polls_own=polls_own(rules, world_size))
    compiler = compiler_for(collective, rules, [calls] * min(world_size, KEPT_RANKS))
    if isinstance(compiler, MnnvlCompiler):
        return replace(compiler, capacity=compiler.capacity + 2 * spare)
    if isinstance(compiler, RingfenceCompiler):
        return replace(compiler, stride=max(map(compiler.lines, (Strategy.ONE_SHOT, Strategy.TWO_SHOT))))
    return compiler


def _check_ranks(collective: str, ranks: Sequence[Calls]) -> None:
    if len(ranks) not in WORLD_SIZES:
        raise PlanError(f"a world of {len(ranks)} ranks; the models cover {_listed(WORLD_SIZES)}")
    if collective in OWN and len(ranks) > MOST_OWN_RANKS:
        raise PlanError(f"a world of {len(ranks)} ranks; ringfence's own kernels serve 2 to {MOST_OWN_RANKS}")
    if not any(ranks):
        raise PlanError("the plan has no collective, so there is nothing that could hang; check the model's splits")


def _same_sizes(ranks: Sequence[Calls]) -> bool:
    """Whether ranks that make a call make it of one size and strategy."""
    sizes: dict[int, tuple[int, Strategy]] = {}
    return all(sizes.setdefault(c.id, (c.tokens, c.strategy)) == (c.tokens, c.strategy) for c in _all(distinct(ranks)))


def unseen(collective: str, version: str, payload: Payload) -> tuple[bool, bool]:
    """Whether receivers miss what a rank sends of this payload, and the sum of it: all that a payload changes."""
    call = Call(0, payload=payload)
    match collective:
        case Collective.MNNVL:
            return part(call, 0, 0, rules := mnnvl_rules(version)) >= UNSEEN, total(call, 0, rules) >= UNSEEN
        case Collective.TRTLLM:
            return part(call, 0, 0, trtllm_rules(version)) >= UNSEEN, False
    return False, False


def _all(ranks: Sequence[Calls]) -> Iterator[Call]:
    return (call for calls in ranks for call in calls)


def _listed(values: Iterable[object]) -> str:
    *most, last = [str(value) for value in values]
    return f"{', '.join(most)} or {last}"
