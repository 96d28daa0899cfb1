"""Judge: may this op be inside a captured piece?

Two tables are read, both data. :data:`RULES` is about any op: the first row that
applies decides, and its verdict says what it rests on. For a fused site the hazard table
(:mod:`ringfence.runtime.hazards.catalogue`) is asked as well: which known mechanisms does this
collective meet, in this version, on this machine? The stricter answer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch.fx import GraphModule, Node

from ..runtime.errors import HazardError
from ..runtime.hazards.catalogue import applicable
from ..runtime.hazards.engine_default import engine_default
from ..runtime.hazards.situation import Collective, Fact, Situation, Strategy
from ..runtime.hazards.table import Action, Hazard
from .all_reduce import is_all_reduce
from .fuse import SITE
from .groups import find_group, is_ours_or_torchs
from .host import op_names, reads_data, sizes_given_as_data, touches_host, waits_for_device
from .roles import dtype_text, first_node, tensor


class Decision(StrEnum):
    """Where an op runs: inside a piece, eagerly between pieces, or not at all.

    A fused site that is refused is carried out by the reference collective, between pieces.
    """

    IN_GRAPH = "IN_GRAPH"
    SPLIT = "SPLIT"
    REFUSE = "REFUSE"


@dataclass(frozen=True)
class Verdict:
    """What was decided for one node. ``rule`` is the id of the row that decided, of either table.

    ``site`` is the index of the fused site, None for other ops. ``hazard`` is the row of
    the hazard table that decided or that is to be watched, with the ``invariant`` that
    fails, the ``fact`` that it rests on and the ``remedy``. ``clean`` says that the
    site's payload is to be cleaned (:mod:`.clean`).
    """

    node: str
    op: str
    decision: Decision
    rule: str
    message: str
    source: str
    site: int | None = None
    hazard: str | None = None
    invariant: str | None = None
    fact: str | None = None
    remedy: str | None = None
    clean: bool = False


@dataclass(frozen=True)
class OpFacts:
    """What the rules may ask about a node.

    ``carrier`` is who carries out a fused site; ``engine_op`` says that it is an all-reduce of an engine, of whose
    inside nothing is known.
    """

    op: str
    backend: str | None
    carrier: Collective | None
    named_split: bool
    capture: bool
    collective: bool
    data_dependent: bool
    touches_host: bool
    tagged_unsafe: bool
    engine_op: bool = False
    capture_failure: str | None = None


@dataclass(frozen=True)
class Rule:
    id: str
    applies: Callable[[OpFacts], bool]
    decision: Decision
    message: str
    source: str


#: Backends whose collectives are carried out by the host, or by nobody.
_HOST_BACKENDS = frozenset({"gloo", "mpi", "ucc", "fake", "threaded"})

#: Who keeps the epoch, slot and flags of a call in words on the device.
_DEVICE_EPOCH = frozenset({Collective.MNNVL, Collective.TRTLLM, Collective.MNNVL_CUTEDSL})

#: Ops of engines and of FlashInfer that must not be in a captured piece, though nothing marks them.
KNOWN_UNSAFE: Mapping[str, Fact] = {
    "flashinfer::trtllm_custom_all_reduce": Fact.HOST_EPOCH,
    "_C_custom_ar::all_reduce": Fact.BUFFERS_NOT_REGISTERED,
    "sgl_kernel::all_reduce": Fact.BUFFERS_NOT_REGISTERED,
}

RULES: tuple[Rule, ...] = (
    Rule(
        "split_op",
        lambda f: f.named_split,
        Decision.SPLIT,
        "named in split_ops",
        "option split_ops",
    ),
    Rule(
        "no_capture",
        lambda f: not f.capture,
        Decision.IN_GRAPH,
        "nothing is captured, so nothing needs to be split off",
        "option capture_sizes",
    ),
    Rule(
        "data_dependent",
        lambda f: f.data_dependent,
        Decision.SPLIT,
        "a shape or value that it reads or returns depends on data; a replay would repeat the one seen at capture",
        "CUDA C++ Programming Guide, CUDA Graphs: a synchronising call invalidates the capture",
    ),
    Rule(
        "host_memory",
        lambda f: f.touches_host,
        Decision.SPLIT,
        "it moves a value between the host and the device; a replay would repeat the one seen at capture",
        "CUDA C++ Programming Guide, CUDA Graphs: kernel arguments are recorded, pageable copies synchronise",
    ),
    Rule(
        "cudagraph_unsafe",
        lambda f: f.tagged_unsafe,
        Decision.SPLIT,
        "it carries torch.Tag.cudagraph_unsafe",
        "torch/_C Tag.cudagraph_unsafe: its author says that it cannot be captured",
    ),
    Rule(
        "known_unsafe",
        lambda f: f.op in KNOWN_UNSAFE,
        Decision.SPLIT,
        "it is known that it cannot be captured in a piece, and it does not carry torch.Tag.cudagraph_unsafe",
        "hazards M15 and M32",
    ),
    Rule(
        "self_test",
        lambda f: f.capture_failure is not None,
        Decision.SPLIT,
        "{capture_failure}",
        "the start-up self-test of its workspace",
    ),
    Rule(
        "device_epoch",
        lambda f: f.carrier in _DEVICE_EPOCH,
        Decision.IN_GRAPH,
        "{carrier} keeps the epoch and the flags of its calls on the device, so a replay goes on from the last call",
        "invariant I6; read in FlashInfer 0.6.0 to 0.7.x",
    ),
    Rule(
        "host_collective",
        lambda f: f.collective and f.backend in _HOST_BACKENDS and f.carrier in (None, Collective.REFERENCE),
        Decision.SPLIT,
        "runs on the host over {backend}; a replayed piece would not run it again",
        "docs/design.md, what decides capture",
    ),
    Rule(
        "nccl",
        lambda f: (
            f.collective
            and not f.engine_op
            and f.backend == "nccl"
            and f.carrier in (None, Collective.NCCL, Collective.REFERENCE)
        ),
        Decision.IN_GRAPH,
        "over NCCL it is stream work with its epoch on the device",
        "NCCL user guide, Using NCCL with CUDA Graphs (2.9 and later)",
    ),
    Rule(
        "unknown_collective",
        lambda f: f.collective,
        Decision.SPLIT,
        "nothing is known about it under capture; an epoch held by the host would be baked into the graph",
        "docs/design.md, what decides capture",
    ),
)


def judge(
    gm: GraphModule,
    *,
    backends: Mapping[str, str],
    capture: bool,
    split_ops: Collection[str] = (),
    all_reduce_ops: Collection[str] = (),
    situation: Situation | None = None,
    capture_failure: str | None = None,
    on_hazard: str = "split",
    profile: str = "causes",
    nccl: Situation | None = None,
    rules: Sequence[Rule] = RULES,
) -> list[Verdict]:
    """A verdict for every op that a rule has something to say about, in graph order.

    ``backends`` maps the names of process groups to "gloo", "nccl", ...; ``capture``
    is whether any size will be captured. ``situation`` says who carries out the fused sites,
    and where; without one it is the reference collective. ``capture_failure`` is why that
    collective must not be captured, though it runs. ``on_hazard`` is what follows
    from a hazard that asks for more than a warning:

    - "split": run the site between pieces if that avoids it, else refuse it;
    - "refuse": refuse the site;
    - "raise": raise :class:`HazardError`;
    - "clean": clean the payload if that avoids it (one-shot only), else as "split".

    ``nccl`` is what the hazard table is asked about a collective that stays in its piece over NCCL, whether a site's
    reference or one that nothing fuses; without one it is not asked.

    ``profile="conservative"`` decides fused sites by the rule of the field instead
    (:mod:`ringfence.runtime.hazards.engine_default`).
    """
    given = sizes_given_as_data(gm)
    verdicts = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        facts = _facts(node, backends, capture, split_ops, all_reduce_ops, situation, given)
        if facts.carrier is not None:
            facts = replace(facts, capture_failure=capture_failure)
        unsafe = facts.data_dependent or facts.touches_host or facts.tagged_unsafe or facts.op in KNOWN_UNSAFE
        if not (facts.named_split or facts.collective or unsafe):
            continue
        rule = next(r for r in rules if r.applies(facts))
        message = rule.message.format(
            backend=facts.backend, carrier=facts.carrier, capture_failure=facts.capture_failure
        )
        verdict = Verdict(node.name, facts.op, rule.decision, rule.id, message, rule.source, node.meta.get(SITE), None)
        if facts.carrier is not None and situation is not None:  # an all-reduce without a norm too
            source = first_node(node)
            assert source is not None, "a fused op takes its input first"
            mine = replace(situation, dtype=dtype_text(tensor(source).dtype), capture=capture)
            if profile == "conservative":
                verdict = _by_the_field(verdict, mine)
            else:
                verdict = _by_hazards(verdict, mine, on_hazard)
        if nccl is not None and verdict.rule == "nccl":  # nothing else could carry it out, so no refusal
            mine = replace(nccl, capture=capture)
            verdict = _by_hazards(verdict, mine, on_hazard if on_hazard == "raise" else "split")
        verdicts.append(verdict)
    return verdicts


# -- hazards -----------------------------------------------------------------------


def _by_hazards(verdict: Verdict, situation: Situation, on_hazard: str) -> Verdict:
    """The verdict of the strictest row of the hazard table that applies; the rule's where none asks for more."""
    outcomes = [_outcome(verdict, hazard, situation, on_hazard) for hazard in applicable(situation)]
    strictest = max([verdict, *outcomes], key=_strictness)  # the first of them
    return replace(strictest, clean=strictest.decision is not Decision.REFUSE and any(o.clean for o in outcomes))


def _strictness(verdict: Verdict) -> tuple[int, bool, bool]:
    order = (Decision.IN_GRAPH, Decision.SPLIT, Decision.REFUSE)
    return order.index(verdict.decision), verdict.clean, verdict.hazard is not None


def _outcome(verdict: Verdict, hazard: Hazard, situation: Situation, on_hazard: str) -> Verdict:
    ways = {hazard.decides, *hazard.instead}
    when = next(w for w in hazard.when if w.holds(situation))
    unread = situation.flashinfer is None and (when.low or when.high)
    unknown = " (FlashInfer's version is not known)" if unread else ""
    because = replace(
        verdict,
        rule=hazard.id,
        message=f"{hazard.id}, {hazard.title.lower()}{unknown}: {hazard.remedy}",
        source=hazard.source,
        hazard=hazard.id,
        invariant=str(hazard.invariants[0]) if hazard.invariants else None,
        fact=f"{when}; the version is not known, so it may be the worst" if unread else str(when),
        remedy=hazard.remedy,
    )
    if hazard.decides is Action.CAPTURE:
        return verdict
    if hazard.decides in (Action.WARN, Action.RUNTIME_GUARD):
        return because
    if on_hazard == "raise":
        raise HazardError(f"'{verdict.node}' ({verdict.op}): {because.message} (because of {because.fact})")
    # In two-shot the owner sends the sum on, and a sum of clean values may be such a word again.
    if on_hazard == "clean" and Action.CLEAN_PAYLOAD in ways and situation.strategy is Strategy.ONE_SHOT:
        return replace(because, clean=True, message=f"{because.message} Its payload is cleaned instead.")
    if on_hazard != "refuse" and Action.SPLIT in ways:
        return replace(because, decision=Decision.SPLIT)
    message = f"{because.message} It runs on the reference collective instead, between pieces."
    return replace(because, decision=Decision.REFUSE, message=message)


def _by_the_field(verdict: Verdict, situation: Situation) -> Verdict:
    rule = engine_default(situation.collective)
    if rule is None or rule.decides is not Action.SPLIT or not situation.capture:
        return verdict
    return replace(
        verdict, decision=Decision.SPLIT, rule="field", message=rule.why, source=f"{rule.source} (profile=conservative)"
    )


# -- facts about a node --------------------------------------------------------------


def _facts(
    node: Node,
    backends: Mapping[str, str],
    capture: bool,
    split_ops: Collection[str],
    all_reduce_ops: Collection[str],
    situation: Situation | None,
    given: frozenset[object],
) -> OpFacts:
    op, full = op_names(node)
    group = find_group(node)
    known = is_ours_or_torchs(node)
    ours = known and op.split("::")[0] == "ringfence"
    carrier = (situation.collective if situation is not None else Collective.REFERENCE) if ours else None
    return OpFacts(
        op=op,
        backend=backends.get(group) if group is not None else None,
        carrier=carrier,
        named_split=op in split_ops or full in split_ops,
        capture=capture,
        collective=known or is_all_reduce(node, all_reduce_ops),
        engine_op=not known and is_all_reduce(node, all_reduce_ops),
        data_dependent=reads_data(node, given) or waits_for_device(node),
        touches_host=touches_host(node),
        tagged_unsafe=torch.Tag.cudagraph_unsafe in getattr(node.target, "tags", ()),
    )
