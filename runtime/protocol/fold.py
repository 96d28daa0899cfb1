"""Fold: a plan of many sizes and ranks as a few plans of two or three small sizes on four ranks.

An engine captures 35 sizes on 16 ranks, and a search whose calls have up to 512 tokens would go on for ever. But
a word of a workspace knows little of a size: only whether a call of that size uses it. And few ranks know a word:
its owner and those that write it. So a plan is safe if it is safe for each word and the ranks around it.

The argument, for ranks that make the same calls, whose rules treat ranks and tokens alike:

1. Take a plan and leave out some tokens, or all that some ranks do and all that is done to them. What is left has
   fewer steps in the same order, so less is known of what comes before what, and :mod:`.order` doubts whatever it
   doubted before. A doubt is about two steps and one word: two ranks at most that write, one that reads. So a plan
   is safe if it is safe for any three ranks and one more that stands for the others, with the first token, which
   all calls have, and one more. And where what is left fails, the plan fails: give each token or rank that was left
   out its steps beside those of one that was not and that is in the same calls. Either they can be made, or fail.
2. A word of a one-shot MNNVL call is one token's and one sender's in calls of every size. A call uses it or not:
   sizes are on either side of a threshold, and stand for 1 token or for more.
3. A word of a two-shot call likewise, but a token has an owner: token t rank t % R. So sizes stand for as many
   tokens as the ranks that are kept own of the first round of R and of one round more; the clear of the parts covers
   whole rounds, used or not. Rank 0, which owns a token in every call, is always kept. One-shot and two-shot calls
   of one workspace share words, by the size of the workspace, so each threshold of the one is tried with each of
   the other, and the second half of the workspace at an even place and at an odd one.
4. A word of our own collective is a line of an inbox, and its lines lie otherwise by one-shot than by two-shot: one
   that a sender writes in the one, the same or another writes in the other, as a part or as a sum, or the receiver
   itself, as a sum. A call uses it or not, by its size: sizes of each strategy stand for 1 token or for 2, and each
   threshold of the one is tried with each of the other. The second token begins at one line by both, and among the
   ranks that are kept each of these relations is that of some line there. The first token is enough to order calls:
   by both strategies each rank waits in each call for each other one. Its numbers count calls, so what depends on
   none of them (grids, the epoch of the host where a mutant has it) stays as it is.
5. A word of a one-shot trtllm call is row (sender * tokens + token), so calls of other sizes have another sender
   there. A doubt is about two steps: sizes stand for 1 token (unused), 2 or 3, whose senders differ. Its two-shot
   is a barrier, and asks for the grid and not for the tokens; no grid is folded. Nor does an all-to-all ask.

The other direction is not taken on trust: a plan that folds fails only with the trace of one of its folds, and where
one-shot and two-shot are mixed (3 tries more than the workspace may have) a plan small enough is asked unfolded too.
tests/hangs/test_fold.py compares both, with protections left out.

All folds of one compiler share one :class:`~.walk.Walk`: they are made of the same few kinds of call.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ..errors import NotDecidedError
from ..hazards.situation import Strategy
from .bound import Bound
from .calls import Call, Calls
from .compiler import Compiler
from .decide import decide
from .explore import Result
from .machine import State
from .walk import Walk

#: Which small number of tokens stands for a size, by strategy.
Sizes: TypeAlias = Mapping[tuple[Strategy, int], int]

#: Up to how many words a call may have in a plan that is asked unfolded, and what that may cost.
UNFOLDED_WORDS, UNFOLDED_STATES = 1_500, 100_000

#: Three ranks that a doubt can be about, and one that stands for the others.
KEPT_RANKS = 4


def mnnvl_folds(kinds: Iterable[Call], world_size: int) -> Iterator[Sizes]:
    ones, twos = _counts(kinds)
    large = 4 if twos else 2  # so that it reaches the words of the sums, which are the second half
    for most in (0, *ones) if twos else (ones[:-1] or (0,)):
        one = {(Strategy.ONE_SHOT, count): 1 if count <= most else large for count in ones}
        for two in _owned(twos, world_size):
            yield one | {(Strategy.TWO_SHOT, count): few for count, few in zip(twos, two, strict=True)}


def trtllm_folds(kinds: Iterable[Call]) -> Iterator[Sizes]:
    ones, _ = _counts(kinds)
    for unused, small in itertools.combinations((0, *ones), 2) if ones else ((0, 0),):
        yield {(Strategy.ONE_SHOT, c): 1 if c <= unused else 2 if c <= small else 3 for c in ones}


def line_folds(kinds: Iterable[Call]) -> Iterator[Sizes]:
    ones, twos = _counts(kinds)
    for one, two in itertools.product((0, *ones[:-1]), (0, *twos[:-1])):
        few = {(Strategy.ONE_SHOT, count): 1 if count <= one else 2 for count in ones}
        yield few | {(Strategy.TWO_SHOT, count): 1 if count <= two else 2 for count in twos}


def _counts(kinds: Iterable[Call]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of one-shot calls and of two-shot calls."""
    some = list(kinds)
    return tuple(
        tuple(sorted({call.tokens for call in some if (call.strategy is Strategy.TWO_SHOT) is two}))
        for two in (False, True)
    )  # type: ignore[return-value]


def _owned(counts: Sequence[int], world_size: int) -> Iterable[tuple[int, ...]]:
    """How many tokens of the first round and of one more the kept ranks own, of each size; each row once."""
    if not counts:
        return ((),)
    marks = sorted({count for count in counts if count < world_size} | {count % world_size for count in counts})
    # Of ranks between two marks none owns a token that the others do not: three of them are enough.
    alike = [[rank for rank in range(1, world_size) if bisect(marks, rank) == i] for i in range(len(marks) + 1)]
    others = [rank for ranks in alike for rank in ranks[: KEPT_RANKS - 1]]
    found: dict[tuple[int, ...], None] = {}
    for kept in itertools.combinations(others, min(world_size, KEPT_RANKS) - 1):
        for first in sorted({world_size * max(count // world_size + after, 1) for count in counts for after in (0, 1)}):
            found[tuple(_tokens_of((0, *kept), count, first, world_size) for count in counts)] = None
    return found


def _tokens_of(kept: tuple[int, ...], count: int, first: int, world_size: int) -> int:
    """The tokens of the kept ranks below ``world_size``, and those of the round that begins with token ``first``."""
    if count < world_size:
        return sum(rank < count for rank in kept)
    return len(kept) + sum(first + rank < count for rank in kept)


def smallest(calls: Calls, two_shot: int) -> Calls:
    """The program with the tokens that every call has: enough to find what goes wrong where ranks differ.

    two_shot: how many of them show a two-shot call: where tokens have owners, one of each rank.
    """
    return tuple(replace(c, tokens=min(c.tokens, two_shot if c.strategy is Strategy.TWO_SHOT else 1)) for c in calls)


def decide_folded(
    calls: Calls,
    folds: Sequence[Sizes],
    compilers: Sequence[Callable[[Calls], Compiler[Any]]],
    unfolded: Callable[[], Result[State]] | None,
    bound: Bound,
) -> Result[State]:
    """Whether ranks that all make these calls can fail.

    compilers: of a program with every call that may come, for the ranks that are kept; each is asked. unfolded: asked
    before a fold is believed that it fails.
    """
    assert folds, "a plan without a fold would be safe unasked"
    plain = compilers[0](calls[:1]).kind
    runs = [(kind, sum(1 for _ in same)) for kind, same in itertools.groupby(calls, plain)]
    kinds = dict.fromkeys(kind for kind, _ in runs)
    small = dict.fromkeys((kind, _tokens(kind, fold)) for fold in folds for kind in kinds)
    steps = 1
    for compiler_for in compilers:
        compiler = compiler_for(tuple(replace(kind, tokens=tokens) for kind, tokens in small))
        found = _decided(calls, runs, kinds, folds, Walk(compiler, bound), unfolded)
        steps += found.states
        if not found.safe:
            return replace(found, states=steps)
    return Result(None, steps)


def _decided(
    calls: Calls,
    runs: Sequence[tuple[Call, int]],
    kinds: Iterable[Call],
    folds: Sequence[Sizes],
    walk: Walk,
    unfolded: Callable[[], Result[State]] | None,
) -> Result[State]:
    compiler, start = walk.compiler, walk.start()
    small = functools.cache(lambda kind, tokens: compiler.kind(replace(kind, tokens=tokens)))
    for fold in folds:
        stands_for = {kind: small(kind, _tokens(kind, fold)) for kind in kinds}
        if _followed(walk, start, [(stands_for[kind], count) for kind, count in runs]):
            continue
        program = tuple(replace(call, tokens=_tokens(call, fold)) for call in calls)
        result = decide(compiler.machine([program] * compiler.world_size), walk=walk, bound=walk.bound)
        if not result.safe and not _refuted(unfolded):
            return result
    return Result(None, walk.steps)


def _followed(walk: Walk, state: int | None, runs: Iterable[tuple[Call, int]]) -> bool:
    """Whether the walk comes to the end of these runs of one kind each."""
    for kind, same in itertools.groupby(runs, lambda run: run[0]):
        if state is None:
            return False
        state = walk.follow(state, kind, sum(count for _, count in same))
    return state is not None


def _refuted(unfolded: Callable[[], Result[State]] | None) -> bool:
    if unfolded is None:
        return False
    try:
        return unfolded().safe
    except NotDecidedError:
        return False


def _tokens(call: Call, fold: Sizes) -> int:
    return fold.get((call.strategy, call.tokens), 1)
