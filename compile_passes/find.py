"""Find: every all-reduce of a graph becomes a :class:`Site`.

The walk starts at the collective, not at the norm, so that an all-reduce which
nothing fuses is still in the report, with the reason.

    partial -> all_reduce -> [wait, copy, views] -> [adds and scalings: sums.py] -> RMSNorm: norms.py

:func:`find` changes nothing. It returns one :class:`Candidate` per all-reduce: the
Site that the report prints and, where the site can be fused, the nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ..runtime.collectives.epilogue import DTYPES
from ..runtime.groups import same_groups
from ..runtime.spelling import group_word
from . import op_options, roles
from .all_reduce import ALL_REDUCES, AllReduce, nested_all_reduces, recognise_all_reduce
from .engine_ops import GroupOf
from .given import check_graph, named_ops, with_what_writes
from .match import Candidate, Match, Site
from .norm_ops import NormCall, NormOp, is_foreign, names_of, norm_ops_of, op_of, read_call
from .norms import Norm, norm_of_call, recognise_rms_norm
from .op_calls import op_names
from .provenance import label, module_of, source_of
from .reasons import Decline, Reason, Rounding
from .roles import aten, dtype_text, tensor
from .sums import last_step, read_sum


def find(
    gm: GraphModule,
    *,
    strict: bool = False,
    groups: Collection[str] | None = None,
    all_reduce_ops: Collection[str] | Mapping[str, GroupOf] | None = None,
    norm_ops: Collection[str] | Mapping[str, NormOp | float | str] | None = None,
) -> list[Candidate]:
    """One candidate for every all-reduce of a functional ATen graph, in graph order; those of nested regions last.

    ``strict`` declines a site whose source rounds differently from the fused op.
    ``groups``, when given, are the process groups to fuse over, by any of their names.
    ``all_reduce_ops`` and ``norm_ops`` name engines' own ops, as the options of :class:`ringfence.Options` do.
    A norm op may also be given with the reason why it is none (:func:`norm_ops_of`).

    Raises :class:`GraphMetadataError` for nodes without ``val`` metadata, :class:`OptionsError` for an op that torch
    does not know, and :class:`ArgumentError` for what is no graph.
    """
    check_graph(gm, "find")
    if groups is not None:
        groups = op_options.groups(groups)
    all_reduce_ops, norm_ops = named_ops(gm, all_reduce_ops, norm_ops)
    # By id, because torch's ops have a hash of their own in Python, and most nodes need not be asked.
    targets = {id(node.target): node.target for node in gm.graph.nodes if node.op == "call_function"}
    foreign = any(map(is_foreign, targets.values()))
    starts = {key for key, target in targets.items() if all_reduce_ops or target in ALL_REDUCES}
    asked = (node for node in gm.graph.nodes if id(node.target) in starts)
    recognised = {node: recognise_all_reduce(node, all_reduce_ops) for node in asked}
    all_reduces = {node: found for node, found in recognised.items() if found is not None}
    rows = norm_ops if norm_ops is not None else norm_ops_of(gm) if foreign else {}
    calls = _norm_calls(gm, rows) if rows else {}
    if groups is not None:
        reduced = {a.group for a in all_reduces.values() if isinstance(a, AllReduce) and isinstance(a.group, str)}
        groups = {*groups, *same_groups(reduced, groups)}
    outcomes = _outcomes(all_reduces, calls, groups, strict)
    index = {node: i for i, node in enumerate(all_reduces)}
    candidates = []
    for node, all_reduce in all_reduces.items():
        found = outcomes[node]
        match = found if isinstance(found, Match) else None
        site = _site(index[node], node, all_reduce, found)
        if match is not None and match.all_reduce.start is not node:
            site = replace(site, merged_into=index[match.all_reduce.start])
        candidates.append(Candidate(site, match))
    for region, node, all_reduce in nested_all_reduces(gm, all_reduce_ops) if foreign else ():
        site = _site(len(candidates), node, all_reduce, _nested(region, node))
        candidates.append(Candidate(replace(site, node=region.name), None))
    return with_what_writes(gm, candidates)


def _norm_calls(gm: GraphModule, rows: Mapping[str, NormOp | str]) -> dict[Node, NormCall | str]:
    ops = ((node, op_of(node)) for node in gm.graph.nodes)
    named = ((node, next((rows[n] for n in names_of(op) if n in rows), None)) for node, op in ops if op is not None)
    return {node: row if isinstance(row, str) else read_call(node, row) for node, row in named if row is not None}


def _site(index: int, node: Node, all_reduce: AllReduce | Decline, found: Match | Decline) -> Site:
    group = all_reduce.group if isinstance(all_reduce, AllReduce) else None
    match = found if isinstance(found, Match) else None
    value = match.norm.out if match is not None else all_reduce.value if isinstance(all_reduce, AllReduce) else node
    described = tensor(value) if roles.is_tensor(value) else None
    last = described.shape[-1] if described is not None and described.ndim else None
    reduced = all_reduce.value if isinstance(all_reduce, AllReduce) else node
    return Site(
        index=index,
        node=node.name,
        kind=match.epilogue.op if match is not None else None,
        decline=found if isinstance(found, Decline) else None,
        group=group if isinstance(group, str) else None,
        dtype=dtype_text(tensor(reduced).dtype) if roles.is_tensor(reduced) else "unknown",
        hidden_size=last if isinstance(last, int) else None,
        eps=match.norm.eps if match is not None else None,
        has_residual=match is not None and match.epilogue.residual,
        source=source_of(node),
        module=module_of(node),
        roundings=match.roundings if match is not None else (),
    )


# -- which sums are fused ----------------------------------------------------------


def _outcomes(
    all_reduces: Mapping[Node, AllReduce | Decline],
    calls: Mapping[Node, NormCall | str],
    groups: Collection[str] | None,
    strict: bool,
) -> dict[Node, Match | Decline]:
    """For each all-reduce by its first node: the match that it is part of, or why there is none."""
    outcomes: dict[Node, Match | Decline] = {}
    adding = {node: call for node, call in calls.items() if isinstance(call, NormCall)}
    sums: dict[Node, list[AllReduce]] = {}
    for node, found in all_reduces.items():
        declined = found if isinstance(found, Decline) else _usable(found, groups)
        if declined is not None:
            outcomes[node] = declined
        elif isinstance(found, AllReduce):
            sums.setdefault(last_step(found.value, adding), []).append(found)
    claimed: set[Node] = set()
    for end, together in sums.items():
        first: Decline | None = None
        for chosen in _choices(together):
            match = _match(end, chosen, calls)
            if isinstance(match, Match):
                match = _policy(match, strict, claimed, all_reduces)
            if isinstance(match, Match):
                claimed |= {match.end, match.norm.out}
                outcomes |= {a.start: match for a in chosen}
                break
            first = first or match
        for left in together:
            if left.start not in outcomes:
                outcomes[left.start] = first or _claimed(end)
    return outcomes


def _choices(together: Sequence[AllReduce]) -> Iterator[tuple[AllReduce, ...]]:
    """Which of the all-reduces that lead to one sum the fused op may carry out, the best first.

    All of one group at once, else one: the last, behind which least is added.
    """
    if len(together) > 1:
        kinds = Counter((a.group, tensor(a.value).dtype) for a in together)
        (kind, count), *_ = kinds.most_common()
        if count > 1:
            yield tuple(a for a in together if (a.group, tensor(a.value).dtype) == kind)
    for one in reversed(together):
        yield (one,)


def _claimed(end: Node) -> Decline:
    return Decline(Reason.CLAIMED, f"the norm of {label(end)} is fused with another all-reduce of the same sum")


# -- what surrounds it -----------------------------------------------------------


def _match(end: Node, all_reduces: Sequence[AllReduce], calls: Mapping[Node, NormCall | str]) -> Match | Decline:
    """The match of these all-reduces, each of which leads to ``end`` by adds and scalings alone."""
    call = calls.get(end)
    call = call if isinstance(call, NormCall) else None
    terms = read_sum(end, all_reduces, call)
    if isinstance(terms, Decline):
        return terms
    dtype = tensor(all_reduces[0].value).dtype
    if call is not None:
        norm = norm_of_call(call, dtype)
        return Match(terms, norm) if isinstance(norm, Norm) else norm
    if not isinstance(tensor(end).shape[-1], int):
        return _dynamic(end)
    norm = recognise_rms_norm(end, dtype, calls)
    if tensor(end).dtype != dtype:
        norm = _norm_of_wide_sum(end, norm, dtype)
    if isinstance(norm, Norm):
        return Match(terms, norm)
    if norm.reason is Reason.NO_NORM and _leaves(end):
        return _left(end)
    return norm if terms.steps else _in_the_way(end, norm)


def _leaves(value: Node) -> bool:
    """Whether a value only leaves the graph, perhaps through views or into an input."""
    queue = list(value.users)
    for node in queue:
        if roles.reshaped(node) is not None or roles.copied_value(node) is not None:
            queue += node.users
        elif node.op != "output" and not roles.calls(node, aten.copy_.default):
            return False
    return bool(queue)


def _left(value: Node) -> Decline:
    return Decline(
        Reason.ESCAPES_GRAPH,
        f"the sum {label(value)} leaves this compiled region; if a norm follows, compile the whole model to fuse it "
        "with the next layer's norm: layers that are compiled one by one, or a graph break, end a region before it",
    )


def _in_the_way(value: Node, norm: Decline) -> Decline:
    """Why no norm reads a reduced value, or a sum with it: what does."""
    users = list(value.users)
    if norm.reason is Reason.LAYER_NORM:
        return norm
    if len(users) > 1 and any(map(roles.is_add, users)):
        others = ", ".join(f"{label(u)}: {u.target}" for u in users if not roles.is_add(u))
        return Decline(
            Reason.VALUE_USED_ELSEWHERE,
            f"the reduced value {label(value)} is also read by {others or 'a second add'}; "
            "the fused op returns only the sum with the residual",
        )
    if norm.reason is not Reason.NO_NORM or len(users) != 1:
        return norm
    user = users[0]
    if roles.mul_operands(user) is not None and roles.same_shape(user, value):
        return Decline(
            Reason.SCALE_KIND,
            f"{label(user)} multiplies the reduced value by a tensor, which may differ between the ranks; "
            "multiply what is added up instead, in front of the all-reduce, or use a Python number",
        )
    return Decline(
        Reason.OP_BETWEEN, f"{label(user)}: {op_names(user)[0]} stands between the all-reduce and an add or RMSNorm"
    )


def _usable(all_reduce: AllReduce, groups: Collection[str] | None) -> Decline | None:
    start, value = all_reduce.start, all_reduce.value
    if all_reduce.op.lower() != "sum":
        return Decline(Reason.REDUCE_OP, f"{label(start)} reduces with '{all_reduce.op}'; the fused kernels sum")
    if all_reduce.group is None:
        op = op_names(start)[0]
        return Decline(
            Reason.GROUP_KIND,
            f"{label(start)} names no process group; say which one it runs over: "
            f"all_reduce_ops={{'{op}': group}}, 'world' for all ranks (None, or a list, says that the call names it)",
        )
    if not isinstance(all_reduce.group, str):
        return Decline(
            Reason.GROUP_KIND,
            f"the group of {label(start)} is {type(all_reduce.group).__name__}, not a name; "
            "turn torch.distributed.config.compile_on_one_rank off, or name the group in all_reduce_ops",
        )
    if groups is not None and all_reduce.group not in groups:
        return Decline(
            Reason.OTHER_GROUP,
            f"{label(start)} reduces over group '{group_word(all_reduce.group)}', and only "
            f"{sorted(map(group_word, groups))} are to be fused",
        )
    users = list(value.users)
    if not users:
        return Decline(Reason.UNUSED, f"nothing reads the reduced value {label(value)}")
    if tensor(value).dtype not in DTYPES:
        return Decline(
            Reason.ACTIVATION_DTYPE,
            f"{label(value)} is {dtype_text(tensor(value).dtype)}; the kernels take float16, bfloat16 and float32",
        )
    if _leaves(value):
        return _left(value)
    shape = tensor(value).shape
    if not shape or not isinstance(shape[-1], int):
        return _dynamic(value)
    if len(users) == 1 and roles.cast_input(users[0]) is value and not roles.is_widening(users[0]):
        return Decline(
            Reason.REDUCE_DTYPE,
            f"{label(start)} reduces in {dtype_text(tensor(value).dtype)} and the model goes on in "
            f"{dtype_text(tensor(users[0]).dtype)}; reduce in the activation dtype to fuse",
        )
    return None


def _nested(region: Node, node: Node) -> Decline:
    return Decline(
        Reason.NESTED_REGION,
        f"{label(node)} stands in the nested region {label(region)}, which is compiled once for all that call it and "
        "is not looked into; to fuse it, take torch.compiler.nested_compile_region off",
    )


def _dynamic(value: Node) -> Decline:
    return Decline(
        Reason.HIDDEN_SIZE_DYNAMIC,
        f"the last dimension of {label(value)} is not a fixed size: with dynamic=True every size of a plain tensor is "
        "dynamic. Make the weights parameters or buffers of a module, or leave dynamic out and mark the token "
        "dimension alone: torch._dynamo.mark_dynamic(x, 0)",
    )


def _norm_of_wide_sum(add: Node, norm: Norm | Decline, dtype: torch.dtype) -> Norm | Decline:
    """The norm of a sum in float32: of that sum, or of the rounded one."""
    rounded = [u for u in add.users if roles.cast_input(u) is add and tensor(u).dtype == dtype]
    if isinstance(norm, Norm):
        norm = replace(norm, roundings=(*norm.roundings, Rounding.FLOAT32_RESIDUAL))
    elif rounded:
        norm = recognise_rms_norm(rounded[0], dtype)
    stray = _escape(add, norm.out, rounded) if isinstance(norm, Norm) else None
    if stray is not None:
        return Decline(
            Reason.FLOAT32_SUM_USED_ELSEWHERE,
            f"the unrounded sum {label(add)} also reaches {label(stray)}; the fused op returns it "
            f"rounded to {dtype_text(dtype)}",
        )
    return norm


def _escape(add: Node, out: Node, rounded: Collection[Node]) -> Node | None:
    """A node that depends on the sum, but neither through the norm nor through its rounding."""
    needed, queue = set(), [out]
    while queue:
        node = queue.pop()
        if node not in needed and node is not add:
            needed.add(node)
            queue.extend(node.all_input_nodes)
    seen, queue = set(), [add]
    while queue:
        for user in queue.pop().users:
            if user not in needed and user not in rounded:
                return user
            if user is not out and user not in rounded and user not in seen:
                seen.add(user)
                queue.append(user)
    return None


# -- policy ----------------------------------------------------------------------


def _policy(match: Match, strict: bool, claimed: Collection[Node], all_reduces: Collection[Node]) -> Match | Decline:
    if match.end in claimed or match.norm.out in claimed:
        return _claimed(match.end)
    late = match.late_weight
    reduced = _ancestor_among(late, all_reduces)
    if reduced is not None:
        return Decline(
            Reason.WEIGHT_NOT_READY,
            f"weight {label(late[-1])} is computed from {label(reduced)}, behind {label(match.end)}, where the fused "
            "op needs it",
        )
    for node in (match.sum, match.norm.out):
        if node is not None and not roles.is_contiguous(tensor(node)):
            return Decline(
                Reason.LAYOUT,
                f"{label(node)} has strides {list(tensor(node).stride())}, and what reads it was traced with them; the "
                "fused op returns contiguous tensors: make the residual contiguous",
            )
    if strict and match.roundings:
        reason = Reason.BIAS if set(match.roundings) == {Rounding.BIAS} else Reason.ROUNDING_DIFFERS
        return Decline(reason, f"{label(match.end)}: {'; '.join(match.roundings)} (numerics='strict')")
    mutation = _mutation_between(match.all_reduce.start, late[-1] if late else match.end)
    if mutation is not None:
        return Decline(
            Reason.MUTATION_BETWEEN,
            f"{label(mutation)}: {mutation.target} mutates a tensor between the all-reduce and "
            f"{label(match.norm.out)}, so they may not move past it",
        )
    return match


def _ancestor_among(nodes: Collection[Node], wanted: Collection[Node]) -> Node | None:
    """The first of ``wanted`` that ``nodes`` are computed from."""
    seen, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node in wanted:
            return node
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return None


def _mutation_between(first: Node, last: Node) -> Node | None:
    node = first.next
    while node is not last and node.op != "root":
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return node
        node = node.next
    return None
