"""Judge: may this op be inside a captured piece?

Two tables are read, both data. :data:`RULES` is about any op: the first row that
applies decides, and its verdict says what it rests on. For a fused site the hazard table
(:mod:`ringfence.runtime.hazards.catalogue`) is asked as well: which known mechanisms does this
collective meet, in this version, on this machine? The stricter answer holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from torch.fx import GraphModule, Node

from ..runtime.errors import HazardError
from ..runtime.hazards.catalogue import applicable
from ..runtime.hazards.engine_default import engine_default
from ..runtime.hazards.situation import Collective, Situation, Strategy
from ..runtime.hazards.table import Action, Hazard
from . import op_options
from .all_reduce import is_all_reduce
from .assignment import Assignment
from .constants import mark_constants
from .fuse import SITE
from .given import check_graph, check_one
from .groups import find_group, is_ours_or_torchs
from .host import Surroundings, surroundings_of, unsafe_for
from .moe_calls import is_moe
from .op_calls import OpCall, op_calls
from .roles import dtype_text, first_node, tensor
from .rules import RULES, OpFacts
from .rules import Decision as Decision


@dataclass(frozen=True)
class Verdict:
    """What was decided for one node. ``rule`` is the id of the row that decided, of either table.

    ``site`` is the index of the fused site, None for other ops. ``hazard`` is the row of
    the hazard table that decided or that is to be watched, with the ``invariant`` that
    fails, the ``fact`` that it rests on and the ``remedy``. ``clean`` says that the
    site's payload is to be cleaned (:mod:`.clean`). ``group`` is the process group of a collective.
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
    group: str | None = None


def judge(
    gm: GraphModule,
    assigned: Assignment,
    *,
    capture: bool,
    split_ops: Collection[str] = (),
    all_reduce_ops: Collection[str] = (),
    on_hazard: str = "split",
    profile: str = "causes",
) -> list[Verdict]:
    """A verdict for every op that a rule has something to say about, in graph order.

    ``assigned`` says of each process group what serves it, who carries out its fused sites, and
    what the hazard table is asked about them; ``capture`` is whether any size will be captured.
    ``on_hazard`` is what follows from a hazard that asks for more than a warning:

    - "split": run the site between pieces if that avoids it, else refuse it;
    - "refuse": refuse the site;
    - "raise": raise :class:`HazardError`;
    - "clean": clean the payload if that avoids it (one-shot only), else as "split".

    ``profile="conservative"`` goes by the rule of the field instead
    (:mod:`ringfence.runtime.hazards.engine_default`): whoever captures has asked it before.

    Raises :class:`ArgumentError` and :class:`OptionsError`.
    """
    check_graph(gm, "judge")
    check_one(assigned, Assignment, "judge", "Assignment(groups=describe_groups(gm, device))")
    check_one(assigned.groups, Mapping, "Assignment(groups=...)", "describe_groups(gm, device)")
    split_ops = op_options.strings("split_ops", split_ops)
    op_options.one_of("on_hazard", on_hazard, get_args(op_options.OnHazard))
    op_options.one_of("profile", profile, get_args(op_options.Profile))
    mark_constants(gm)
    about = surroundings_of(gm)

    def of(call: OpCall, outer: Node) -> Verdict | None:
        node = call.node
        group = find_group(node)
        facts = _facts(call, group, assigned, capture, split_ops, all_reduce_ops, about)
        if not facts.matters:
            return None
        rule = next(r for r in RULES if r.applies(facts))
        message = rule.message.format(
            backend=facts.backend, carrier=facts.carrier, capture_failure=facts.capture_failure
        )
        if node is not outer:
            message = f"{message} (it is in a region that '{outer.name}' calls)"
        site = node.meta.get(SITE)
        verdict = Verdict(outer.name, facts.op, rule.decision, rule.id, message, rule.source, site, group=group)
        situation = _situation(assigned, group, node) if facts.carrier is not None else None
        if situation is not None:  # an all-reduce without a norm too
            source = first_node(node) or node.all_input_nodes[0]  # of a dispatch, in a list
            mine = replace(situation, dtype=dtype_text(tensor(source).dtype), capture=capture)
            if profile == "conservative":
                verdict = _by_the_field(verdict, mine)
            else:
                verdict = _by_hazards(verdict, mine, on_hazard)
        if assigned.nccl is not None and verdict.rule == "nccl":  # nothing else could carry it out, so no refusal
            mine = replace(assigned.nccl, capture=capture)
            verdict = _by_hazards(verdict, mine, on_hazard if on_hazard == "raise" else "split")
        return verdict

    found = ([v for call in op_calls(node) if (v := of(call, node)) is not None] for node in gm.graph.nodes)
    return [max(verdicts, key=_strictness) for verdicts in found if verdicts]  # the first of the strictest


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
    """The rule is about the graph: where it bars the capture, this op's decision decides nothing."""
    rule = engine_default(situation.collective)
    if rule is None or rule.captures:
        return verdict
    return replace(verdict, rule="field", message=rule.why, source=f"{rule.source} (profile=conservative)")


def captures_reference(assigned: Assignment, group: str | None) -> bool:
    """Whether a capture may hold the reference collective of a group."""
    if assigned.backend(group) != "nccl" or assigned.nccl is None:
        return False
    called = Verdict("", "", Decision.IN_GRAPH, "nccl", "", "")
    return _by_hazards(called, replace(assigned.nccl, capture=True), "split").decision is Decision.IN_GRAPH


def _situation(assigned: Assignment, group: str | None, node: Node) -> Situation | None:
    """What the hazard table is asked about a call of ours; None: nothing, the reference has it."""
    return assigned.moe_situation(group) if is_moe(node) else assigned.situation(group)


def _carrier(assigned: Assignment, group: str | None, node: Node) -> str:
    """Who carries a call of ours out: a dispatch is no all-reduce, and the workspace of one does not serve it."""
    if not is_moe(node):
        return assigned.collective(group)
    situation = assigned.moe_situation(group)
    return situation.collective if situation is not None else Collective.REFERENCE


# -- facts about a node --------------------------------------------------------------


def _facts(
    call: OpCall,
    group: str | None,
    assigned: Assignment,
    capture: bool,
    split_ops: Collection[str],
    all_reduce_ops: Collection[str],
    about: Surroundings,
) -> OpFacts:
    node, (op, full) = call.node, call.names
    known = is_ours_or_torchs(node)
    ours = known and op.split("::")[0] == "ringfence"
    return OpFacts(
        op=op,
        backend=assigned.backend(group),
        carrier=_carrier(assigned, group, node) if ours else None,
        capture_failure=assigned.capture_failure(group, moe=is_moe(node)) if ours else None,
        named_split=op in split_ops or full in split_ops,
        capture=capture,
        collective=known or is_all_reduce(node, all_reduce_ops),
        unsafe=unsafe_for(call, about),
        engine_op=not known and is_all_reduce(node, all_reduce_ops),
    )
