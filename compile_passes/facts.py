"""Facts: what is true of a cut graph, in the words of the hazard table.

The judge keeps these from happening in plans of its own. An engine that cuts its graph
itself can ask :func:`facts_of` about the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ..runtime.hazards.situation import Fact
from .assignment import Assignment
from .fuse import SITE
from .given import check_each, check_graph
from .groups import find_group
from .host import Unsafe, stream_of, surroundings_of, unsafe_for
from .judge import Verdict, judge
from .moe_calls import misuses
from .op_calls import op_calls
from .parts import GraphPart, foreseen, part_name
from .rules import KNOWN_UNSAFE


@dataclass(frozen=True)
class Evidence:
    """A fact, where it was seen (a node or a part of the plan) and in one sentence how.

    ``group`` is the process group whose collectives it is about; None for all.
    """

    fact: Fact
    where: str
    message: str
    group: str | None = None


def facts_of(gm: GraphModule, parts: Sequence[GraphPart]) -> tuple[Evidence, ...]:
    """Everything in a cut graph that a hazard may rest on, in the order of its parts.

    ``parts`` are those of :func:`.parts.cut`; a part is named as :func:`.split.split` would. Nothing here is about the
    workspace: :mod:`ringfence.runtime.collectives` makes none that does not fit, and none during a capture.
    """
    check_graph(gm, "facts_of")
    check_each(parts, GraphPart, "facts_of", "cut(gm, verdicts)")
    return (*_captured_ops(gm, parts), *_across_parts(parts))


def _captured_ops(gm: GraphModule, parts: Sequence[GraphPart]) -> Iterator[Evidence]:
    """Ops inside captured pieces that a replay would leave out or repeat."""
    about = surroundings_of(gm)
    for i, part in enumerate(parts):
        if part.island:
            continue
        for call in (c for n in part.nodes for c in op_calls(n)):
            op, _ = call.names
            what = f"'{call.node.name}' ({op}) in the captured {part_name(i)}"
            unsafe = unsafe_for(call, about)
            if unsafe - {Unsafe.TAGGED, Unsafe.NAMED}:
                yield Evidence(Fact.HOST_SYNC_IN_PIECE, call.node.name, f"{what} needs the host")
            if op in KNOWN_UNSAFE:
                yield Evidence(KNOWN_UNSAFE[op], call.node.name, f"{what}: {KNOWN_UNSAFE[op].meaning}")
                if Unsafe.TAGGED not in unsafe:
                    message = f"{what} carries no torch.Tag.cudagraph_unsafe"
                    yield Evidence(Fact.UNMARKED_UNSAFE_OP, call.node.name, message)


def _across_parts(parts: Sequence[GraphPart]) -> Iterator[Evidence]:
    """Collectives cut in two, and collectives of one workspace, which is its group's, on several streams."""
    homes_of: dict[int, list[str]] = {}
    groups: dict[int, str | None] = {}
    streams: dict[str | None, dict[int | None, str]] = {}
    for i, part in enumerate(parts):
        for node in part.nodes:
            if SITE not in node.meta:
                continue
            group = find_group(node)
            site = node.meta[SITE]
            groups[site] = groups.get(site) or group
            homes = homes_of.setdefault(site, [])
            if part_name(i) not in homes:
                homes.append(part_name(i))
            streams.setdefault(group, {}).setdefault(stream_of(node), node.name)
    for site, homes in homes_of.items():
        if len(homes) > 1:
            message = f"the launches of site {site} lie in {' and '.join(homes)}"
            yield Evidence(Fact.PROTOCOL_CUT, homes[0], message, groups[site])
    for group, found in streams.items():
        if len(found) > 1:
            names = ", ".join(f"'{node}' on {_stream_name(stream)}" for stream, node in found.items())
            message = f"fused collectives are on streams: {names}"
            yield Evidence(Fact.TWO_STREAMS, next(iter(found.values())), message, group)


def _stream_name(stream: int | None) -> str:
    return "the stream of the call" if stream is None else f"stream {stream}"


def judge_with_facts(
    gm: GraphModule,
    assigned: Assignment,
    *,
    capture: bool,
    **options: Any,
) -> tuple[list[Verdict], Assignment]:
    """Verdicts, and the assignment with the facts that they rest on.

    Some facts show only in the cut that follows from the verdicts; then it is judged again. ``options`` are those
    of :func:`judge`.
    """
    while True:
        verdicts = judge(gm, assigned, capture=capture, **options)
        found: dict[str | None, frozenset[Fact]] = {}
        kernels = any(assigned.moe_situation(group) is not None for group in (None, *assigned.moe))
        of_moe = frozenset(fact for _, fact, _ in misuses(gm)) if kernels else frozenset[Fact]()
        for evidence in facts_of(gm, foreseen(gm, verdicts)) if capture else ():
            found[evidence.group] = found.get(evidence.group, frozenset()) | {evidence.fact}
        known = assigned.with_facts(found, of_moe)
        if known == assigned:
            return verdicts, assigned
        assigned = known
