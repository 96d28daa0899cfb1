"""MoE calls: what a graph's dispatches and combines must keep to, whoever carries them out.

The capacity of a dispatch decides where each rank's rows lie in the memory of every other. So it must be the same
number on all ranks: one of the engine's that they agreed on, an int among the inputs, and not what a rank counts or
reads by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.fx.node import map_arg

from ..runtime.collectives import moe
from ..runtime.collectives.moe_one_sided import MoeSizes
from ..runtime.collectives.moe_ready import needed
from ..runtime.errors import RefusedError
from ..runtime.hazards.situation import Collective, Fact
from .aliases import viewed
from .host import stream_of
from .moe_sites import MoeMatch, experts_of
from .op_calls import nodes_of, op_arguments, op_names, written_arguments
from .provenance import label
from .roles import arguments, asks_for_shape, aten, calls, tensor

#: Key of ``node.meta`` of a dispatch whose capacity is the same on all ranks because a gather of it would be even.
EVEN = "ringfence_even"
_NAMES = frozenset(f"ringfence::{op.name().split('::')[1].split('.')[0]}" for op in moe.MOE_OPS)
_REMEDY = (
    "ranks that pass different capacities write over each other's rows, and nothing tells; pass a number that they "
    "agreed on (the largest token count that any of them has) as an int input of the graph"
)


def is_moe(node: Node) -> bool:
    """Whether it is a dispatch or a combine, also one that AOT wraps because it writes."""
    return node.op == "call_function" and op_names(node)[0] in _NAMES


def is_dispatch(node: Node) -> bool:
    return node.op == "call_function" and op_names(node)[0] == "ringfence::moe_dispatch"


def capacity_of(dispatch: Node) -> int | torch.SymInt:
    """The capacity of a dispatch, as far as the graph tells it."""
    value: Any = op_arguments(dispatch)["capacity"]
    return value.meta["val"] if isinstance(value, Node) else value  # type: ignore[no-any-return]


def misuses(gm: GraphModule) -> Iterator[tuple[Node, Fact, str]]:
    """Where a graph breaks what calls on a workspace ask for: the node, the fact, and how.

    All calls of a group are on one stream. A dispatch's rows are read before its combine and written by nobody, and the
    next dispatch follows that combine: not in the graph's order alone, which a compiler keeps only where a value says
    so. A dispatch and its combine may lie in different pieces. The reference, whose rows are its caller's, asks for
    nothing of that.
    """
    nodes = list(gm.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    calls_ = [node for node in nodes if is_moe(node)]
    streams: dict[object, set[int | None]] = {}
    earlier = _out_of_turn(nodes)
    for i, node in enumerate(calls_):
        seen = streams.setdefault(op_arguments(node)["group"], set())
        seen.add(stream_of(node))
        if len(seen) > 1:
            yield node, Fact.TWO_STREAMS, f"{label(node)} is on another stream than an earlier call of its group"
        if not is_dispatch(node):
            continue
        group = op_arguments(node)["group"]
        if (before := earlier.get(node)) is not None:
            text = (
                f"{label(node)} needs nothing that follows from {label(before)}, so a compiler may move it before that"
            )
            yield node, Fact.DISPATCH_UNANSWERED, text
        later = [n for n in calls_[i + 1 :] if op_arguments(n)["group"] == group]
        if later and is_dispatch(later[0]):
            text = f"{label(later[0])} follows {label(node)}, which no combine has answered"
            yield later[0], Fact.DISPATCH_UNANSWERED, text
        end = place[later[0]] if later else len(nodes)
        rows = _rows_of(node)
        followed = _needed_for(later[0]) if later and not is_dispatch(later[0]) else None
        for reader in (r for row in rows for r in row.users if r not in rows and not asks_for_shape(r)):
            if place[reader] > end or (reader.op == "output" and later):
                yield reader, Fact.PLANES_OUTLIVE, f"{label(reader)} reads rows of {label(node)} after their combine"
            elif followed is not None and reader not in followed:
                text = (
                    f"{label(reader)} reads rows of {label(node)} and their combine does not need it, so a compiler may"
                )
                yield reader, Fact.PLANES_OUTLIVE, f"{text} move it behind that"
            elif any(written in rows for written in written_arguments(reader)):
                yield reader, Fact.PLANES_OUTLIVE, f"{label(reader)} writes into rows of {label(node)}"


def _out_of_turn(nodes: Sequence[Node]) -> dict[Node, Node]:
    """Dispatches that need nothing of the combine of their group before them, with that."""
    found: dict[Node, Node] = {}
    last: dict[object, Node] = {}
    after: dict[Node, dict[object, Node]] = {}  # by group, the latest combine that a node needs
    for node in nodes:
        needs: dict[object, Node] = {}
        for source in node.all_input_nodes:
            needs |= {g: max(n, needs.get(g, n)) for g, n in after[source].items()}
        if is_moe(node):
            group = op_arguments(node)["group"]
            if not is_dispatch(node):
                last[group] = needs[group] = node
            elif group in last and needs.get(group) is not last[group]:
                found[node] = last[group]
        after[node] = needs
        for written in written_arguments(node):
            after[written] = after[written] | needs
    return found


def _needed_for(node: Node) -> set[Node]:
    """It, and all that its value follows from."""
    found, queue = {node}, [node]
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in found]
        found.update(new)
        queue += new
    return found


def _rows_of(dispatch: Node) -> set[Node]:
    """The tensors that a dispatch returns, but for the route, and views of them."""
    items = [n for n in dispatch.users if n.args[1] != 2]
    rows = {n for item in items for n in (item.users if item.args[1] == 0 else [item])}
    queue = list(rows)
    while queue:
        views = [u for u in queue.pop().users if viewed(u) in rows and u not in rows]
        rows.update(views)
        queue += views
    return rows


def check_capacities(gm: GraphModule) -> None:
    """Raises :class:`RefusedError` for a dispatch whose capacity is a rank's own number, or read from data."""
    given = {s for node in gm.graph.find_nodes(op="placeholder") for s in free_unbacked_symbols(node.meta.get("val"))}
    for node in nodes_of(gm):
        if not is_dispatch(node) or EVEN in node.meta:
            continue
        capacity = capacity_of(node)
        if free_unbacked_symbols(capacity) - given:
            raise RefusedError(f"the capacity of {label(node)} is read from data on the host: {_REMEDY}")
        ids: Any = op_arguments(node)["topk_ids"]
        if free_symbols(capacity) & free_symbols(tensor(ids).shape[0]):
            raise RefusedError(f"the capacity of {label(node)} is {capacity}, this rank's own token count: {_REMEDY}")


# -- who carries them out ------------------------------------------------------------------


def calls_of(gm: GraphModule) -> dict[str, list[Node]]:
    """The dispatches and combines of each group, in order."""
    found: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if is_moe(node):
            found.setdefault(str(op_arguments(node)["group"]), []).append(node)
    return found


def in_pairs(calls_: Sequence[Node]) -> bool:
    """Whether each dispatch is answered in the same graph."""
    halves = [is_dispatch(node) for node in calls_]
    return halves == [True, False] * (len(halves) // 2)


def sizes_of(calls_: Sequence[Node], capacities: Sequence[int]) -> MoeSizes | str:
    """What kernels need to carry out the pairs of one group, or why they cannot be asked for here.

    capacities: what a capacity that is an input may be; of a dispatch that stands for an even gather it is what that
    had when it was traced, too.
    """
    pairs = []
    for dispatch, combine in zip(calls_[::2], calls_[1::2], strict=True):
        given = op_arguments(dispatch)
        payloads, ids = [tensor(payload) for payload in given["payloads"]], tensor(given["topk_ids"])
        partial = tensor(op_arguments(combine)["partial"])
        pairs.append((payloads, ids, partial, _largest(capacity_of(dispatch), EVEN in dispatch.meta, capacities)))
    return _together(pairs)


def sizes_of_sites(matches: Sequence[MoeMatch], capacities: Sequence[int]) -> MoeSizes | str:
    """The same of sites before they are rewritten, of one group."""
    pairs = []
    for match in matches:
        given = [tensor(arguments(arguments(wait)[0])[0]) for wait in (*match.payloads, match.ids)]
        pairs.append((given[:-1], given[-1], tensor(match.partial), _largest(given[-1].shape[0], True, capacities)))
    return _together(pairs)


def _together(pairs: Sequence[tuple[Sequence[Tensor], Tensor, Tensor, int | None]]) -> MoeSizes | str:
    """What serves all of them: payloads, ids, what is combined, and the capacity where it is known."""
    found: MoeSizes | None = None
    for payloads, ids, partial, capacity in pairs:
        if not all(isinstance(t.shape[1], int) for t in (*payloads, ids, partial)):
            return "the width of a row is not known before it is called"
        if capacity is None:
            return "the capacity is not known before it is called: give capture_sizes or max_tokens"
        row = sum(payload.shape[1] * payload.element_size() for payload in payloads)
        mine = needed(row, ids.shape[1], partial.shape[1] * partial.element_size(), capacity)
        found = mine if found is None else found | mine
    return found if found is not None else "there is none"


def _largest(capacity: int | torch.SymInt, even: bool, capacities: Sequence[int]) -> int | None:
    if isinstance(capacity, int):
        seen = capacity
    elif even and capacity.node.has_hint():
        seen = 1 << (int(capacity.node.hint) - 1).bit_length()  # it varies: a graph for each that comes would be many
    else:
        return max(capacities, default=None)
    return max((seen, *capacities))  # one workspace for all sizes that come


def carried_out_by(calls_: Sequence[Node], collective: str, *, fuses: bool = False) -> None:
    """Let all calls of a group name who carries them out.

    Around kernels, what is launched for ids is made the graph's: they take numbers of four bytes, and where ids are
    seen to be of experts that there are, nobody clamps them. Where nobody reads the ids of empty rows, nobody writes
    them; fuses: what is computed of each number joins its reader, so that is asked for the first time there.
    """
    for node in calls_:
        named = collective
        if is_dispatch(node) and collective == Collective.MOE_ALL_TO_ALL:
            named += moe.KNOWN_IDS if _knows_ids(node) else ""
            _narrow_ids(node)
            _ids_of_empty_rows(node, fuses)
        name_collective(node, named)


def name_collective(node: Node, collective: str) -> None:
    """Let a dispatch or a combine name who carries it out; with a combine, what experts are given to write for it."""
    if not is_dispatch(node):
        route: Any = op_arguments(node)["route"]
        for buffer in [user for user in route.users if calls(user, moe.moe_combine_buffer)]:
            buffer.args = (*buffer.args[:-1], collective)
    if "collective" in node.kwargs:  # of a call that AOT wraps because it writes
        node.kwargs = {**node.kwargs, "collective": collective}
    else:
        node.args = (*node.args[:-1], collective)


def _knows_ids(dispatch: Node) -> bool:
    """Whether each id is of an expert that there is: by a gather form, the graph, or the caller's word."""
    given = op_arguments(dispatch)
    among = experts_of(given["topk_ids"])
    seen = among is not None and among <= int(given["num_experts"])
    return seen or EVEN in dispatch.meta or str(given["collective"]).endswith(moe.KNOWN_IDS)


def _narrow_ids(dispatch: Node) -> None:
    payloads, ids, *others = dispatch.args
    assert isinstance(ids, Node)
    wide, graph, convert = tensor(ids).dtype, dispatch.graph, torch.ops.prims.convert_element_type.default
    if wide == torch.int32:
        return
    with graph.inserting_before(dispatch):
        narrow = graph.call_function(convert, (ids, torch.int32))
    narrow.meta = {**ids.meta, "val": tensor(ids).to(torch.int32)}
    dispatch.args = (payloads, narrow, *others)
    rows, received, *rest = dispatch.meta["val"]
    dispatch.meta["val"] = (rows, received.to(torch.int32), *rest)
    for item in _received_ids(dispatch):
        with graph.inserting_after(item):
            back = graph.call_function(convert, (item, wide))
        back.meta = dict(item.meta)
        item.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)  # type: ignore[misc]
        item.meta["val"] = tensor(item).to(torch.int32)


def _received_ids(dispatch: Node) -> list[Node]:
    return [n for n in dispatch.users if n.args[1] == 1]


def _ids_of_empty_rows(dispatch: Node, fuses: bool) -> None:
    """Let none be written by a kernel of their own where nobody reads them, or where a reader's kernel can do it."""
    payloads, ids, capacity, num_experts, empty_id, *others = dispatch.args
    items = _received_ids(dispatch)
    if empty_id is None or (any(item.users for item in items) and not fuses):
        return
    dispatch.args = (payloads, ids, capacity, num_experts, None, *others)
    for item in items:
        if item.users:
            _told_by_counts(dispatch, item, capacity, empty_id)


def _told_by_counts(dispatch: Node, item: Node, capacity: Any, empty_id: Any) -> None:
    """``empty_id`` in place of the ids of rows that nobody sent: those from its count on, in the block of each rank."""
    graph, readers = dispatch.graph, list(item.users)
    last = item

    def add(target: Any, *args: Any, **named: Any) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.call_function(target, args, named)
        values, others = map_arg((args, named), lambda n: n.meta["val"])
        with tensor(item).fake_mode:  # type: ignore[attr-defined]
            last.meta = dict(item.meta) | {"val": target(*values, **others)}
        return last

    about = {"dtype": torch.int32, "device": tensor(item).device, "requires_grad": False}
    counts = add(operator.getitem, dispatch, 3)
    numbers = add(torch.ops.prims.iota.default, capacity, start=0, step=1, **about)
    filled = add(aten.lt.Tensor, numbers, add(aten.unsqueeze.default, counts, 1))
    kept = add(aten.where.ScalarOther, add(aten.view.default, filled, [-1, 1]), item, empty_id)
    for reader in readers:
        reader.replace_input_with(item, kept)
