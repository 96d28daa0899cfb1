"""MoE sites: where a graph sends tokens to the ranks of their experts, and what may be done about it.

    all_gather(hidden, ids, weights) -> experts of this rank -> reduce_scatter        gather form
    all_to_all(rows, splits) -> experts -> all_to_all(back, the splits swapped)       host splits

The first is a dispatch and a combine, where the experts take each row by itself (:mod:`.expert_rows`). The second
reads its splits on the host and depends on the order of rows, so it is reported and left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..runtime.collectives.epilogue import DTYPES
from ..runtime.collectives.moe_checks import MOST_PAYLOADS
from ..runtime.collectives.moe_reference import first_expert
from ..runtime.groups import Group
from .expert_rows import silent_experts
from .op_calls import op_names, written_arguments
from .provenance import label, module_of, source_of
from .reasons import Decline, Reason, Rounding
from .roles import CASTS, VIEWS, arguments, aten, bound_arguments, c10d, calls, dtype_text, is_tensor, same_size, tensor
from .rows import NotRowWise

_GATHER = c10d.all_gather_into_tensor.default
_SCATTER = c10d.reduce_scatter_tensor.default
_ALL_TO_ALL = c10d.all_to_all_single.default
_IDS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class MoeSite:
    """One exchange of tokens with the experts' ranks, and what became of it.

    node: the reduce-scatter, or the all-to-all that brings tokens back. decline is None where it was rewritten.
    payloads: how many tensors travel beside the ids. The others are as in :class:`~.match.Site`.
    """

    index: int
    node: str
    decline: Decline | None
    group: str | None
    dtype: str
    hidden_size: int | None
    payloads: int
    num_experts: int | None
    source: str | None
    module: str | None
    roundings: tuple[Rounding, ...] = ()

    @property
    def rewritten(self) -> bool:
        return self.decline is None

    @property
    def message(self) -> str:
        return self.decline.message if self.decline is not None else "; ".join(self.roundings)


@dataclass(frozen=True)
class MoeMatch:
    """A gather form. gathers: the waits for them, in graph order; ids is one of these.

    region: what is computed of the gathered values, in graph order; partial is the last of it.
    """

    scatter: Node
    wait: Node
    gathers: tuple[Node, ...]
    ids: Node
    region: tuple[Node, ...]
    partial: Node
    group: Group
    num_experts: int

    @property
    def payloads(self) -> tuple[Node, ...]:
        return tuple(g for g in self.gathers if g is not self.ids)

    @property
    def mine(self) -> range:
        """The experts of this rank."""
        ends = (first_expert(self.group.rank + i, self.num_experts, self.group.size) for i in (0, 1))
        return range(*ends)

    @property
    def elsewhere(self) -> int:
        """An expert of another rank: what the ids of an empty row are, so that the experts' own mask leaves it out."""
        return first_expert((self.group.rank + 1) % self.group.size, self.num_experts, self.group.size)


@dataclass(frozen=True)
class MoeCandidate:
    """A site and, where it is to be rewritten, its match."""

    site: MoeSite
    match: MoeMatch | None

    def declined(self, why: Decline) -> MoeCandidate:
        return MoeCandidate(replace(self.site, decline=why, roundings=()), None)


def find_moe(
    gm: GraphModule, groups: Mapping[str, Group], *, experts_ops: Collection[str] = (), strict: bool = False
) -> list[MoeCandidate]:
    """One candidate for each MoE site of a functional ATen graph, in graph order.

    groups: the process groups of the graph. experts_ops: an engine's own kernels of experts, which are believed to take
    rows one by one and to leave out experts of other ranks. strict: no site whose sum would round elsewhere.
    """
    found: list[MoeCandidate] = []
    for node in gm.graph.nodes:
        candidate = None
        if calls(node, _SCATTER):
            candidate = _gather_form(len(found), node, groups, experts_ops, strict)
        elif calls(node, _ALL_TO_ALL):
            candidate = _host_splits(len(found), node)
        if candidate is not None:
            found.append(candidate)
    return found


# -- the gather form ---------------------------------------------------------------------


def _gather_form(
    index: int, scatter: Node, groups: Mapping[str, Group], experts_ops: Collection[str], strict: bool
) -> MoeCandidate | None:
    """None where the reduce-scatter has nothing to do with experts: no integers are gathered for what it sums."""
    partial: Any = scatter.args[0]
    name = bound_arguments(scatter)["group_name"]
    region, gathers = _region(partial)
    integers = [g for g in gathers if is_tensor(g) and not tensor(g).dtype.is_floating_point]
    if not integers:
        return None
    experts = {g: e for g in integers if (e := experts_of(_gathered(g))) is not None}
    site = _site(index, scatter, name, len(gathers) - 1, next(iter(experts.values()), None))
    decline = _shape_of_site(scatter, partial, gathers, region, name, groups, experts)
    if decline is not None:
        return MoeCandidate(replace(site, decline=decline), None)
    ((ids, num_experts),) = experts.items()
    match = MoeMatch(scatter, next(iter(scatter.users)), gathers, ids, region, partial, groups[str(name)], num_experts)
    if match.group.size > 2:  # of two, the one addition is rounded once whoever does it
        site = replace(site, roundings=(Rounding.COMBINE,))
        if strict:
            return MoeCandidate(site, None).declined(Decline(Reason.ROUNDING_DIFFERS, Rounding.COMBINE))
    try:
        silent = silent_experts(partial, region, gathers, ids, num_experts, experts_ops, match.mine)
        why = _not_silent(match, silent)
    except NotRowWise as error:
        why = str(error)
    if why is None:
        return MoeCandidate(site, match)
    message = (
        f"the experts are not shown to take each row by itself: {why}; an engine's own kernels of experts are named in "
        "experts_ops"
    )
    return MoeCandidate(site, None).declined(Decline(Reason.EXPERTS_NOT_ROW_WISE, message))


def _region(partial: Any) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """What is computed of gathered values on the way to ``partial``, and the waits for the gathers."""
    seen: set[Node] = set()
    gathers: set[Node] = set()
    queue = [partial] if isinstance(partial, Node) else []
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_gathered(node):
            gathers.add(node)
        else:
            queue += node.all_input_nodes
    dependent: set[Node] = set(gathers)
    for node in sorted(seen):
        if node not in gathers and not is_size(node) and any(n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    return tuple(sorted(dependent - gathers)), tuple(sorted(gathers))


def is_size(node: Node) -> bool:
    """Whether it asks for the size of a tensor, which no value of that decides."""
    return calls(node, aten.sym_size.int)


def _is_gathered(node: Node) -> bool:
    return calls(node, c10d.wait_tensor.default) and calls(node.args[0], _GATHER)


def _gathered(wait: Node) -> Node:
    """What each rank gave to a gather."""
    return wait.args[0].args[0]  # type: ignore[union-attr, return-value]


def _shape_of_site(
    scatter: Node,
    partial: Node,
    gathers: tuple[Node, ...],
    region: tuple[Node, ...],
    name: object,
    groups: Mapping[str, Group],
    experts: Mapping[Node, int],
) -> Decline | None:
    """Why it is no dispatch and combine, whatever the experts do."""
    group = groups.get(str(name))
    if bound_arguments(scatter)["reduce_op"] != "sum":
        return Decline(Reason.REDUCE_OP, f"{label(scatter)} reduces with '{bound_arguments(scatter)['reduce_op']}'")
    if group is None or group.size < 2:
        return Decline(Reason.GROUP_KIND, f"the group of {label(scatter)} is not known, or has one rank")
    for wait in gathers:
        if bound_arguments(wait.args[0])["group_name"] != name:  # type: ignore[arg-type]
            return Decline(Reason.OTHER_GROUP, f"{label(wait)} gathers over another group than {label(scatter)} sums")
    if len(experts) != 1:
        return Decline(
            Reason.IDS_NOT_KNOWN,
            f"{'no' if not experts else 'more than one'} gathered tensor of {label(scatter)} is known to be numbers of "
            "experts: the second result of topk over the experts' scores, with padding at most",
        )
    given = [_gathered(wait) for wait in gathers]
    if any(tensor(g).ndim != 2 or not same_size(tensor(g).shape[0], tensor(given[0]).shape[0]) for g in given):
        return Decline(Reason.GATHER_SHAPE, f"what is gathered for {label(scatter)} is not [tokens, width] throughout")
    if next(iter(experts.values())) < group.size:
        return Decline(Reason.GROUP_KIND, f"the group of {label(scatter)} has more ranks than there are experts")
    if tensor(given[0]).shape[0] == 0 or not 1 <= len(given) - 1 <= MOST_PAYLOADS:
        return Decline(Reason.GATHER_SHAPE, f"{len(given) - 1} payloads of {tensor(given[0]).shape[0]} tokens")
    if tensor(partial).dtype not in DTYPES or tensor(partial).ndim != 2:
        text = f"{label(scatter)} sums {dtype_text(tensor(partial).dtype)} {list(tensor(partial).shape)}"
        return Decline(Reason.ACTIVATION_DTYPE, f"{text}; what is combined is [tokens, hidden] of a float")
    return _closed(scatter, partial, gathers, region)


def _closed(scatter: Node, partial: Node, gathers: tuple[Node, ...], region: tuple[Node, ...]) -> Decline | None:
    """Why something else than the sum depends on the gathered rows, or the experts do something besides."""
    inside = {*region, scatter}
    if len(scatter.users) != 1 or not calls(next(iter(scatter.users)), c10d.wait_tensor.default):
        return Decline(Reason.VALUE_USED_ELSEWHERE, f"{label(scatter)} is looked at before it is waited for")
    looked_at: list[Node] = [*gathers, *region, *(arguments(wait)[0] for wait in gathers)]
    for node in looked_at:
        outside = (u for u in node.users if u not in inside and u not in gathers and not is_size(u))
        reader = next(outside, None)
        if reader is not None:
            return Decline(
                Reason.VALUE_USED_ELSEWHERE,
                f"{label(reader)} reads {label(node)} too, and a dispatch brings the rows of this rank's experts only",
            )
    for node in region:
        namespace = op_names(node)[0].split("::")[0]
        if namespace in ("_c10d_functional", "c10d", "_dtensor", "ringfence"):
            return Decline(Reason.COLLECTIVE_BETWEEN, f"{label(node)}: {op_names(node)[0]} stands among the experts")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return Decline(Reason.EXPERTS_NOT_ROW_WISE, f"{label(node)}: {op_names(node)[0]} draws random numbers")
        if any(True for _ in written_arguments(node)):
            return Decline(Reason.MUTATION_BETWEEN, f"{label(node)}: {op_names(node)[0]} writes into an argument")
    return None


def experts_of(ids: object) -> int | None:
    """Among how many experts these numbers choose; None where that is not known."""
    if calls(ids, operator.getitem) and calls(ids.args[0], aten.topk.default) and ids.args[1] == 1:
        topk = ids.args[0]
        scores: Any = topk.args[0]
        dim = topk.args[2] if len(topk.args) > 2 else -1
        size = tensor(scores).shape[-1]
        return size if isinstance(size, int) and tensor(scores).ndim == 2 and dim in (-1, 1) else None
    if calls(ids, *VIEWS, *CASTS, aten.clone.default, aten.contiguous.default):
        return experts_of(ids.args[0]) if tensor(ids).dtype in _IDS and tensor(ids).ndim == 2 else None
    if calls(ids, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        return _either_of(ids.args[1], ids.args[2])
    if calls(ids, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _either_of(ids.args[0], ids.args[2])
    return None


def _either_of(a: object, b: object) -> int | None:
    """Of numbers with padding: a constant in place of some, or of two choices."""
    known = [e for e in (experts_of(a), experts_of(b)) if e is not None]
    numbers = [n for n in (_number(a), _number(b)) if n is not None]
    if len(known) + len(numbers) != 2 or len(set(known)) != 1:
        return None
    return known[0] if all(0 <= n < known[0] for n in numbers) else None


def _number(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if calls(value, aten.zeros_like.default, aten.zeros.default):
        return 0
    if calls(value, aten.scalar_tensor.default, aten.full.default, aten.full_like.default):
        number = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return number if isinstance(number, int) and not isinstance(number, bool) else None
    return None


def _not_silent(match: MoeMatch, silent: frozenset[int] | None) -> str | None:
    """Why a token might lose something by not being sent everywhere."""
    if silent is None:
        return f"nothing shows that {label(match.partial)} is zero for a token of other ranks' experts"
    outside = [e for e in range(match.num_experts) if e not in match.mine and e not in silent]
    if outside:
        return (
            f"expert {outside[0]} adds to the sum of rank {match.group.rank}, and a dispatch takes its tokens "
            f"elsewhere: in blocks, experts {match.mine.start} to {match.mine.stop - 1} are this rank's"
        )
    return None


# -- splits on the host ----------------------------------------------------------------------


def _host_splits(index: int, back: Node) -> MoeCandidate | None:
    """The all-to-all that undoes another one: its lists of splits are the other's, swapped."""
    out, given = back.args[1], back.args[2]
    if not any(isinstance(split, Node) for split in (*out, *given)):  # type: ignore[misc]
        return None
    there = next((n for n in _earlier(back) if (n.args[2], n.args[1]) == (out, given)), None)
    if there is None:
        return None
    site = _site(index, back, bound_arguments(back)["group_name"], 1, None)
    message = (
        f"{label(there)} and {label(back)} send tokens to experts and back by splits that the host reads from data, so "
        "they run between pieces, and each waits for the device; call ringfence.moe.dispatch and combine instead, "
        "whose parts are of equal size"
    )
    return MoeCandidate(replace(site, decline=Decline(Reason.HOST_SPLITS, message)), None)


def _earlier(node: Node) -> Iterator[Node]:
    for other in node.graph.nodes:
        if other is node:
            return
        if calls(other, _ALL_TO_ALL) and other.args[3] == node.args[3]:
            yield other


def _site(index: int, node: Node, group: object, payloads: int, num_experts: int | None) -> MoeSite:
    value: Any = node.args[0]
    last = tensor(value).shape[-1] if is_tensor(value) and tensor(value).ndim else None
    return MoeSite(
        index,
        node.name,
        None,
        str(group) if isinstance(group, str) else None,
        dtype_text(tensor(value).dtype) if is_tensor(value) else "unknown",
        last if isinstance(last, int) else None,
        payloads,
        num_experts,
        source_of(node),
        module_of(node),
    )
