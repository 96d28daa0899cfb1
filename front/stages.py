"""Stages: what each stage of a compile leaves to the next, and the passes that one is made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule

from .assign import check_deterministic, graphs_for, judge_outer
from .compile_passes.absent import why_no_all_reduce
from .compile_passes.aliases import read_by_place
from .compile_passes.assignment import Assignment
from .compile_passes.called import called_sites
from .compile_passes.clean import clean_payload
from .compile_passes.collectives import carried_groups, refuse_sites
from .compile_passes.devices import device_of
from .compile_passes.dump import dump_graph
from .compile_passes.facts import judge_with_facts
from .compile_passes.find import find
from .compile_passes.functional import return_inputs_themselves, written_inputs
from .compile_passes.graph_inputs import Constants, FloatInput, check_not_empty, floats_that_fuse
from .compile_passes.in_place import write_in_place
from .compile_passes.judge import Verdict
from .compile_passes.lower import eager_piece, inductor_piece, lower
from .compile_passes.match import Candidate, Site
from .compile_passes.moe_sites import MoeSite
from .compile_passes.norm_ops import norm_ops_of
from .compile_passes.outer import OuterCapture
from .compile_passes.parts import cut
from .compile_passes.prove import PlanVerdict, prove
from .compile_passes.provenance import names_by_dynamo, without_scope
from .compile_passes.repeats import merge_repeats
from .compile_passes.returned_numbers import take_returned_numbers
from .compile_passes.returned_views import take_returned_views, views_of_inputs
from .compile_passes.sizes import padding, size_rule
from .compile_passes.spec import check_parts
from .compile_passes.split import Piece, SplitPlan, split
from .compile_passes.storage_offsets import fix_storage_offsets
from .compile_passes.switch_off import switch_off
from .compile_passes.symbols import give_sizes
from .compile_passes.value_numbers import FunctionalNumbers
from .compile_passes.verify import verify
from .compile_passes.waits import settle_waits
from .moe_agree import dispatch_where_agreed
from .options import Options
from .runtime.channel import Channel
from .runtime.errors import ChangingFloatWarning, HazardError, OptionsError
from .runtime.groups import Group
from .runtime.replay.capture import GraphBackend
from .runtime.replay.outer import with_seams
from .runtime.replay.program import Padding, Program, ReturnedView, SizeRule
from .runtime.watch.recompile import graph_being_compiled
from .runtime.watch.supervisor import Supervisor


@dataclass(frozen=True)
class TracedGraph:
    """A graph as AOT traced it, and what is known of it before any pass.

    device: of its accelerator tensors. groups: the process groups of its collectives. channels: among the ranks of
    those where there is somebody to talk to. inputs: the names of its inputs. static: those that stay in place, and
    of_modules: those that a module owns, by position.
    """

    gm: GraphModule
    device: torch.device
    groups: Mapping[str, Group]
    channels: Mapping[str, Channel]
    inputs: tuple[str, ...]
    static: frozenset[int]
    of_modules: frozenset[int]


@dataclass(frozen=True)
class FoundSites:
    """What there is to fuse. absent: what the graph has in place of an all-reduce, where it has none."""

    candidates: Sequence[Candidate]
    moe_sites: Sequence[MoeSite]
    absent: str | None
    sizes: SizeRule


@dataclass(frozen=True)
class Judged:
    """The verdicts, which the graph follows from now on, and the assignment with the facts that they rest on.

    graphs: what captures; None: nothing does. captured: the token counts that this graph can meet. outer: what a
    capture may hold that somebody else makes.
    """

    verdicts: Sequence[Verdict]
    assigned: Assignment
    graphs: GraphBackend | None
    captured: tuple[int, ...]
    outer: OuterCapture


@dataclass(frozen=True)
class CallersMemory:
    """What of a call's memory is the caller's, by position among the inputs and outputs.

    written: inputs that the graph writes into. kept: those and others that are used where they are. caches: what is
    written and stays in place, though no module owns it. views: outputs that are taken behind the graph. pads: what
    grows where a smaller size is padded; None where none is.
    """

    written: frozenset[int]
    kept: frozenset[int]
    caches: frozenset[int]
    views: Mapping[int, ReturnedView]
    pads: Padding | None


@dataclass(frozen=True)
class Plan:
    """What is proved and reported: the sites, what was decided of each op, and the pieces that follow from it."""

    sites: Sequence[Site]
    verdicts: Sequence[Verdict]
    split: SplitPlan


def settle(gm: GraphModule, options: Options) -> dict[int, ReturnedView]:
    """What later passes need not know: repeats, waits, and numbers that only the caller reads, which are returned."""
    return_inputs_themselves(gm)
    merge_repeats(gm)
    numbers = take_returned_numbers(gm)
    if options.capture_sizes:
        settle_waits(gm)
    return numbers


def settle_floats(
    gm: GraphModule,
    names: Sequence[str],
    floats: Mapping[str, FloatInput],
    options: Options,
    constants: Constants,
) -> None:
    """Trace anew where a float of the model has to be a constant; others stay inputs, which may change.

    It has to be one where a site can be fused only so; and where pieces are captured under ``dynamic=True``, as long as
    it has the value of its first graph: a captured piece reads no number of the host's. MoE layers are told by
    patterns with numbers, so there all are constants. floats: by the names of their inputs; ``names`` of all inputs, by
    Dynamo.
    """
    if not floats:
        constants.specialise(())
        return
    inputs = {i: name for i, name in enumerate(names_by_dynamo(gm, names)) if name in floats}
    if options.moe_dispatch or len(inputs) < len(floats):
        if options.moe_dispatch:
            _tell_of_changes(floats, constants, _BY_PATTERNS, "leave moe_dispatch out")
        constants.specialise(floats.values())
        return
    needed: set[int] = set()
    if options.fuse:
        trial = GraphModule(gm, copy.deepcopy(gm.graph))
        settle(trial, options)
        device = device_of(gm)
        needed = floats_that_fuse(trial, inputs, lambda trial: _candidates(trial, device, options))
        _tell_of_changes({inputs[i]: floats[inputs[i]] for i in sorted(needed)}, constants, _TAKEN_IN, _LEAVE_ALONE)
    if (options.capture_sizes or options.outer_capture) and not torch._dynamo.config.assume_static_by_default:
        needed |= {i for i, name in inputs.items() if constants.is_first(name, floats[name].value)}
    constants.specialise([floats[inputs[i]] for i in sorted(needed)])


_TAKEN_IN = "a fused site takes it in, as an epsilon or as a factor of its sum, and kernels take these as numbers"
_BY_PATTERNS = "moe_dispatch=True tells experts by patterns with numbers"
_LEAVE_ALONE = "apply it behind the norm; or leave its site alone by skip_sites, where it is an input that may change"


def _tell_of_changes(floats: Mapping[str, FloatInput], constants: Constants, why: str, remedy: str) -> None:
    """Warn of one that becomes a constant again and again. floats: by the names of their inputs."""
    for name, one in floats.items():
        if constants.keeps_changing(name, one.value):
            warnings.warn(
                f"ringfence: each value of the float '{without_scope(name.strip('_'))}' is a graph of its own "
                f"({graph_being_compiled().name} is one of them), until Dynamo's recompile_limit leaves the model "
                f"uncompiled: {why}. Where it changes from call to call, keep it constant or {remedy}; where layers "
                "that share their code differ in it, compile the model as one or raise recompile_limit",
                ChangingFloatWarning,
                stacklevel=2,
            )


def _candidates(gm: GraphModule, device: torch.device, options: Options) -> list[Candidate]:
    """As :func:`find` has them; those that are switched off are declined."""
    found = find(
        gm,
        strict=options.numerics == "strict",
        groups=options.groups,
        all_reduce_ops=options.all_reduce_ops,
        norm_ops=norm_ops_of(gm, options.norm_ops, device),
    )
    return switch_off(found, fuse=options.fuse, skip_sites=options.skip_sites)


def find_sites(graph: TracedGraph, options: Options, supervisor: Supervisor) -> FoundSites:
    """Experts are rewritten where all ranks agree; then every all-reduce is a candidate, and so are our own calls."""
    gm, device = graph.gm, graph.device
    moe_sites = dispatch_where_agreed(gm, graph.groups, graph.channels, device, options, supervisor)
    candidates = _candidates(gm, device, options)
    check_not_empty(gm, candidates)
    checked = verify(candidates, device) if options.verify else candidates
    candidates = [*checked, *called_sites(gm, len(checked))]
    absent = why_no_all_reduce(gm) if not candidates and not moe_sites else None
    sizes = size_rule(gm, candidates, graph.static)
    if options.deterministic and sizes.tokens is None and any(c.fuses for c in candidates):
        raise OptionsError("deterministic=True: the token count cannot be read from the sizes of the inputs")
    return FoundSites(candidates, moe_sites, absent, sizes)


def judge_graph(
    graph: TracedGraph, sites: Sequence[Site], assigned: Assignment, sizes: SizeRule, options: Options
) -> Judged:
    """Each op is judged, and the graph follows: refused sites are the reference's, cleaned ones flush."""
    gm = graph.gm
    assigned = assigned.of(carried_groups(gm))
    capture = bool(options.capture_sizes) and sizes.tokens is not None
    graphs = graphs_for(options, graph.device, assigned) if capture else None
    verdicts, assigned = judge_with_facts(
        gm,
        assigned,
        capture=graphs is not None or options.outer_capture,
        split_ops=options.split_ops,
        all_reduce_ops=options.all_reduce_ops,
        on_hazard=options.on_hazard,
        profile=options.profile,
    )
    refuse_sites(gm, verdicts)
    clean_payload(gm, {v.site for v in verdicts if v.clean and v.site is not None})
    if options.deterministic:
        check_deterministic(sites, verdicts, assigned)
    outer = judge_outer(gm, assigned, verdicts, options) if graphs is None else OuterCapture()
    return Judged(verdicts, assigned, graphs, sizes.met(options.capture_sizes) if graphs is not None else (), outer)


def callers_memory(
    graph: TracedGraph, sizes: SizeRule, numbers: Mapping[int, ReturnedView], options: Options
) -> CallersMemory:
    """numbers: those that were taken out of what the graph returns. Views are taken out of it here."""
    gm = graph.gm
    written = written_inputs(gm)
    views = {**numbers, **take_returned_views(gm, views_of_inputs())}
    kept = written | read_by_place(gm)
    pads = padding(gm, sizes, kept) if options.pad_to_capture_size else None
    return CallersMemory(written, kept, graph.static & written - graph.of_modules, views, pads)


def split_graph(graph: TracedGraph, judged: Judged, options: Options) -> tuple[SplitPlan, GraphModule]:
    """Cut the graph where the verdicts say, with writes in place and the sizes that each piece needs."""
    gm, eager = graph.gm, options.piece_compiler == "eager"
    fix_storage_offsets(gm)
    before = FunctionalNumbers(gm) if options.check_parts else None
    parts = write_in_place(gm, cut(gm, judged.verdicts), eager_pieces=eager)
    if not eager:
        parts = give_sizes(gm, parts)
    if before is not None:
        check_parts(gm, parts, before, graph.device if judged.graphs is not None else None, sizes=not eager)
    plan, whole = split(gm, parts)
    dump_graph("split", whole)
    return plan, whole


def prove_plan(plan: Plan, judged: Judged, pads: Padding | None, options: Options) -> PlanVerdict:
    """Raises :class:`HazardError` for a plan that can fail, where the user asked for that."""
    proof = prove(plan.split, plan.verdicts, judged.assigned, judged.captured, padding=pads is not None)
    if options.on_hazard == "raise" and proof.failed:
        raise HazardError(f"the plan can fail: {proof.message}")
    return proof


def lower_graph(
    graph: TracedGraph, split: SplitPlan, whole: GraphModule, memory: CallersMemory, options: Options
) -> Program:
    """The pieces compiled, and lined up for the runner."""
    compile_piece = inductor_piece if options.piece_compiler == "inductor" else eager_piece
    program = lower(split, whole, compile_piece, graph.inputs, graph.static, memory.kept, memory.views, memory.caches)
    return with_seams(program, graph.device) if options.outer_capture else program


def as_lowered(pieces: Sequence[Piece], program: Program) -> tuple[Piece, ...]:
    """The pieces, with why one runs op by op, which shows as it is compiled."""
    reasons = {step.name: step.op_by_op for step in program.steps}
    return tuple(replace(piece, op_by_op=reasons.get(piece.name)) for piece in pieces)
