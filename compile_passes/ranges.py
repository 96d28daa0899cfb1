"""Ranges: up to how many tokens kernels carry a sum out, and whether this graph is for fewer or for more.

A sum that is larger than what any kernel wins at runs as Inductor would have run it: the all-reduce stays, and what
follows it is fused with what surrounds it. Where the token count is a number, that is decided here. Where it is a
size of the call, the graph becomes one for a range of it: a guard says so, and a call beyond it is compiled apart, by
all ranks of the group together, as their sums have one size. No number depends on the guard: the op looks at its size
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, free_unbacked_symbols, statically_known_true

from ..runtime.groups import Group, ranks_of
from ..runtime.spelling import group_word
from .assignment import Limit
from .match import Candidate, Site
from .reasons import Decline, Reason
from .report_text import ranges as listed
from .roles import tensor


@dataclass(frozen=True)
class Ranged:
    """candidates: what no kernel wins at in this graph is declined. notes: which sites have no range, and why."""

    candidates: list[Candidate]
    notes: tuple[str, ...] = ()


def leave_beyond(
    candidates: Sequence[Candidate], limit_of: Callable[[Site], Limit | None], groups: Mapping[str, Group]
) -> Ranged:
    """Before :func:`fuse`: sites that no kernel wins at stay as they are.

    limit_of: None where a site is fused at any size. groups: all of the graph. Each limit is one of the graph, so sites
    with several make a graph for each range between them. What the model calls by itself stays a call of it.
    """
    found: list[Candidate] = []
    everywhere: dict[str, list[int]] = {}
    for candidate in candidates:
        limit = limit_of(candidate.site) if candidate.fuses else None
        if limit is not None:
            candidate = replace(candidate, site=replace(candidate.site, most_tokens=limit.most))
        if limit is not None and candidate.match is not None:
            value = tensor(candidate.match.all_reduce.value)
            within = is_within(value, limit.counts, str(candidate.site.group), groups)
            if isinstance(within, str):
                text = f"more than {limit.most} tokens run on the reference, inside the op: {within}"
                everywhere.setdefault(text, []).append(candidate.site.index)
            elif not within:
                candidate = candidate.declined(_beyond(limit))
        found.append(candidate)
    return Ranged(found, tuple(f"sites {listed(indices)}: {text}" for text, indices in everywhere.items()))


def _beyond(limit: Limit) -> Decline:
    left = "all-reduce, add and norm are left to the piece compiler"
    if not limit.counts:
        return Decline(Reason.NO_KERNEL, f"{limit.why}; {left}")
    (first, *more) = limit.counts
    others = "other token counts" if more or first.start > 1 else f"more than {limit.most} tokens"
    return Decline(Reason.BEYOND_TABLE, f"this graph is for {others}, and {limit.why}; {left}")


def is_within(value: Tensor, counts: Sequence[range], group: str, groups: Mapping[str, Group]) -> bool | str:
    """Whether this graph is for values ``[..., hidden]`` of as many rows as ``counts`` hold alone, or of others alone.

    Guards the answer, where it depends on the call. A sentence where it may not: the graph is for both.
    """
    rows = math.prod(value.shape[:-1])

    def holds(relation: bool | torch.SymBool) -> bool | str:
        if isinstance(relation, bool):
            return relation
        for known in (True, False):
            if statically_known_true(relation if known else torch.sym_not(relation)):
                return known
        return _uneven(group, groups) or _not_guarded(rows) or bool(relation)

    for span in counts:
        under = holds(rows <= span[-1])
        if under is not False:
            return under if under is not True or span.start == 1 else holds(rows >= span.start)
    return False


def _uneven(group: str, groups: Mapping[str, Group]) -> str | None:
    """Why the ranks of a group may not compile anew together: the graph waits for others, of other sizes perhaps."""
    mine = set(ranks_of(group))
    other = next((name for name in groups if groups[name].size > 1 and not mine.issuperset(ranks_of(name))), None)
    if other is None:
        return None
    return (
        f"ranks of group '{group_word(other)}' may have another token count, and would not compile a graph for it "
        "with these"
    )


def _not_guarded(rows: Any) -> str | None:
    """Why a number of rows may not be guarded."""
    if free_unbacked_symbols(rows):
        return "the token count is not known when the graph is compiled (mark_unbacked, or it depends on data)"
    symbols = rows.node.expr.free_symbols
    for fake in rows.node.shape_env.tracked_fakes or ():
        constraints = getattr(fake.symbolic_context, "constraint_sizes", None) or ()
        sizes = fake.fake.shape if isinstance(fake.fake, Tensor) else ()
        for size, constraint in zip(sizes, constraints, strict=False):
            mine = isinstance(size, torch.SymInt) and not symbols.isdisjoint(size.node.expr.free_symbols)
            if mine and isinstance(constraint, StrictMinMaxConstraint):
                return "one graph was asked for all token counts of a range (mark_dynamic with min or max)"
    return None
