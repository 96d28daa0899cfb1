"""The backend: the journey of a graph, one line per stage.

Dynamo graph -> AOT -> repeats, waits -> find -> assign (who carries it out) -> ranges -> fuse -> judge, clean ->
in place -> split -> prove -> agree -> lower -> run
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Never, Self, Unpack

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from .account import Account
from .aot import boxed, compiled, inductor_decompositions
from .assign import assign, check_deterministic, described, graphs_for, judge_outer, name_collectives
from .compile_passes.absent import why_no_all_reduce
from .compile_passes.aliases import read_by_place
from .compile_passes.assignment import Assignment, Limit
from .compile_passes.called import called_sites
from .compile_passes.clean import clean_payload
from .compile_passes.collectives import carried_groups, refuse_sites
from .compile_passes.devices import device_of
from .compile_passes.digest import digest, with_shared_sizes
from .compile_passes.dump import dump_graph
from .compile_passes.facts import judge_with_facts
from .compile_passes.find import find
from .compile_passes.functional import return_inputs_themselves, written_inputs
from .compile_passes.graph_inputs import check_not_empty, needs_grad, specialise_floats, static_inputs
from .compile_passes.groups import describe_groups, groups_of
from .compile_passes.in_place import write_in_place
from .compile_passes.judge import Verdict
from .compile_passes.lower import eager_piece, inductor_piece, lower
from .compile_passes.match import Candidate, Site
from .compile_passes.named_ops import check_not_decomposed, ops_in
from .compile_passes.norm_ops import norm_ops_of
from .compile_passes.outer import OuterCapture
from .compile_passes.parts import cut
from .compile_passes.prove import PlanVerdict, prove
from .compile_passes.provenance import input_names, inputs_of_modules, name_inputs, served
from .compile_passes.ranges import Ranged, leave_beyond
from .compile_passes.repeats import merge_repeats
from .compile_passes.report import CompileReport
from .compile_passes.returned_numbers import take_returned_numbers
from .compile_passes.returned_views import take_returned_views, views_of_inputs
from .compile_passes.sizes import padding, size_rule
from .compile_passes.spec import check_parts
from .compile_passes.split import SplitPlan, split
from .compile_passes.switch_off import switch_off
from .compile_passes.symbols import fix_storage_offsets, give_sizes
from .compile_passes.value_numbers import FunctionalNumbers
from .compile_passes.verify import verify
from .compile_passes.waits import settle_waits
from .installed import versions
from .keywords import OptionKeywords
from .moe_agree import dispatch_where_agreed
from .moe_assign import assign_moe
from .notes import GRAD_MODE, Outcome, notes
from .options import Options
from .runtime.errors import HazardError, OptionsError
from .runtime.groups import same_groups
from .runtime.hazards.situation import Situation
from .runtime.replay.outer import guarded, with_seams
from .runtime.replay.program import Padding, SizeRule
from .runtime.replay.runner import PiecewiseRunner
from .runtime.watch.supervision import Asked
from .runtime.watch.supervisor import OF_PROCESS, Supervisor, leave, supervisor_for
from .torch_compile import OneObject, check_arguments


class Backend(OneObject):
    """A ``torch.compile`` backend with a memory: ``torch.compile(model, backend=Backend(...))``.

    Options are the fields of :class:`ringfence.Options`, as keyword arguments; an ``Options`` may be given first, of
    which those say what differs. ``reports`` holds a :class:`CompileReport` for each graph that was compiled, in
    order; a model that breaks the graph, or that is recompiled for new shapes, adds several. As a context manager
    it is closed at the end.

    Raises :class:`OptionsError`.
    """

    def __init__(
        self,
        given: Options | None = None,
        /,
        *by_place: Never,
        planned: Situation | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        """planned: what fused sites are judged as, where the plan is for another machine (``ringfence explain``)."""
        if by_place or not isinstance(given, Options | None):
            raise OptionsError("options are given by name, and torch.compile takes an instance: backend=Backend(...)")
        named: Mapping[str, Any] = {**(given.given() if given is not None else {}), **options}
        self.options = Options.parse(named)
        self._planned = planned
        super().__init__(Account(self.options.on_report))
        self._named_ops = {
            "split_ops": self.options.split_ops,
            "all_reduce_ops": tuple(self.options.all_reduce_ops),
            "norm_ops": tuple(self.options.norm_ops),
            "experts_ops": self.options.experts_ops,
        }
        self._seen_ops: set[str] = set()
        self._said_groups: dict[str, str] = {}  # by engine op, see describe_groups
        self._versions = versions()  # read once: it asks the file system
        self.asked = Asked(
            {name: getattr(self.options, name) for name in OF_PROCESS if name in named},
            agree_seconds=self.options.agree_seconds,
            every_step=self.options.check_every_step,
            raise_on_capture=self.options.on_capture_failure == "raise",
        )
        supervisor_for(self.asked)  # what differs from another backend's is told here

    @property
    def supervisor(self) -> Supervisor:
        """Journal, watchdog and agreement of this process, which all backends share (``ringfence docs operating``)."""
        return supervisor_for(self.asked)

    def __repr__(self) -> str:
        """``<ringfence.Backend(capture_sizes=(1, 16)), 2 reports>``: the options that are not the defaults."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.given().items())
        count = len(self.reports)
        return f"<ringfence.Backend({given}), {count} report{'' if count == 1 else 's'}>"

    def close(self) -> None:
        """Ask for no watch any more; it ends with the last backend that does. What was compiled goes on working."""
        self._unused()
        leave(self.asked)
        self.asked = replace(self.asked, process={})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one Dynamo graph.

        ``mode`` and ``options`` are what torch.compile was given beside the backend: an :class:`OptionsError`.
        """
        check_arguments(mode, options)
        self._use.begin(gm)
        with self.supervisor.compiling(self.asked):
            return compiled(lambda: self._compile_dynamo_graph(gm, example_inputs))

    def _compile_dynamo_graph(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if needs_grad(gm, example_inputs):
            return self._without_fusion(gm, example_inputs)
        self.options.check_registered()
        specialise_floats(gm)
        inductor = self.options.piece_compiler == "inductor"
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]

        def compile_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            with self.supervisor.compilation():
                return self._compile(gm, example_inputs, names)

        compiler = aot_autograd(
            fw_compiler=compile_graph,
            inference_compiler=compile_graph,
            keep_inference_input_mutations=True,  # a copy of the whole cache after each step otherwise
            decompositions=inductor_decompositions() if inductor else {},
        )
        return compiler(gm, example_inputs)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any], names: Sequence[str]) -> Callable[..., Any]:
        """Compile one functional ATen graph, for AOT: its tensors are fake. names: of the inputs, by Dynamo."""
        options, device = self.options, device_of(gm)
        options.register_groups()
        groups = describe_groups(gm, device, options.all_reduce_ops, self._said_groups)
        channels = self.supervisor.open(groups.values(), device)
        if self._planned is not None:
            groups = {name: replace(group, backend="nccl") for name, group in groups.items()}
        inputs, static = input_names(gm, names), static_inputs(example_inputs)
        self._look_for_named_ops(gm)
        of_modules = inputs_of_modules(gm, names)
        dump_graph("captured", gm)

        name_inputs(gm, names)
        return_inputs_themselves(gm)
        merge_repeats(gm)
        numbers = take_returned_numbers(gm)
        if options.capture_sizes:
            settle_waits(gm)
        moe_sites = dispatch_where_agreed(gm, groups, channels, device, options, self.supervisor)
        candidates = self._find(gm, device)
        absent = why_no_all_reduce(gm) if not candidates and not moe_sites else None
        sizes = self._sizes(gm, candidates, static)
        assigned = assign(candidates, groups, channels, device, options, self.supervisor, self._planned)
        assigned = assign_moe(gm, assigned, channels, device, options, self.supervisor)
        ranged = self._leave_beyond(candidates, assigned)
        sites = self._fuse(gm, ranged.candidates, assigned)
        carriers, assigned = described(assigned), assigned.of(carried_groups(gm))
        written = written_inputs(gm)
        self._seen_ops |= ops_in(gm)
        dump_graph("fused", gm)

        graphs = (
            graphs_for(self.options, device, assigned) if options.capture_sizes and sizes.tokens is not None else None
        )
        captured = options.capture_sizes if graphs is not None else ()
        verdicts, assigned = self._judge(gm, assigned, sites, bool(captured) or options.outer_capture)
        outer = judge_outer(gm, assigned, verdicts, options) if graphs is None else OuterCapture()
        views = numbers | take_returned_views(gm, views_of_inputs())
        kept = written | read_by_place(gm)
        pads = padding(gm, sizes, kept) if options.pad_to_capture_size else None
        plan, whole = self._split(gm, verdicts, device if graphs is not None else None)
        proof = self._prove(plan, verdicts, assigned, captured, pads)
        dump_graph("split", whole)

        sizes = with_shared_sizes(gm, sizes, groups)
        agreed = digest(
            gm,
            verdicts,
            sizes,
            groups,
            options=options.as_dict(),
            versions=self._versions,
            device=device,
            captures=graphs is not None,
            pads=pads is not None,
            inputs=inputs,
        )
        supervision = self.supervisor.supervise(channels, agreed)  # before compiling takes minutes

        compile_piece = inductor_piece if options.piece_compiler == "inductor" else eager_piece
        program = lower(plan, whole, compile_piece, inputs, static, kept, views, static & written - of_modules)
        if options.outer_capture:
            program = with_seams(program, device)
        runner = PiecewiseRunner(
            program,
            sizes,
            graphs if self._planned is None else None,  # the plan is for another machine
            options.capture_sizes,
            padding=pads,
            closed=lambda: assigned.closed,
            max_tokens=options.max_tokens if options.deterministic and assigned.ready else None,
            static_outputs=options.static_outputs,
            journal=self.supervisor.journal,
            supervision=supervision,
            note=functools.partial(self._account.note, len(self.reports)),
            wasted=functools.partial(self._account.wasted, len(self.reports)),
            collective=assigned.judged,
        )
        outcome = Outcome(
            inputs,
            absent,
            candidates,
            sizes,
            written,
            device,
            assigned,
            graphs is not None,
            pads is not None,
            self._unmatched(),
            outer,
            moe_sites,
        )
        self._report(
            CompileReport(
                sites=tuple(sites),
                moe_sites=tuple(moe_sites),
                pieces=plan.pieces,
                verdicts=tuple(verdicts),
                options=options.as_dict(),
                versions=self._versions,
                graphs=graphs.name if graphs is not None else None,
                collectives=carriers,
                notes=(*ranged.notes, *notes(options, outcome)),
                plan=proof,
                judged_as=str(self._planned) if self._planned is not None else None,
                captured=captured,
                serves=served(gm, inputs, static | kept),
                name=supervision.graph,
            ),
            runner,
        )
        return boxed(guarded(self.looking(runner), outer.barred, device, cut=options.outer_capture))

    def _report(self, report: CompileReport, runner: PiecewiseRunner | None = None) -> None:
        self._account.add(self._use.told(report), runner)

    def _look_for_named_ops(self, gm: GraphModule) -> None:
        for option, names in self._named_ops.items():
            check_not_decomposed(gm, option, names)
        self._seen_ops |= ops_in(gm)

    def _unmatched(self) -> dict[str, list[str]]:
        """Ops that options name and that no graph had so far."""
        return {o: [name for name in names if name not in self._seen_ops] for o, names in self._named_ops.items()}

    def _find(self, gm: GraphModule, device: torch.device) -> list[Candidate]:
        options = self.options
        found = find(
            gm,
            strict=options.numerics == "strict",
            groups=same_groups(groups_of(gm), options.groups) if options.groups is not None else None,
            all_reduce_ops=options.all_reduce_ops,
            norm_ops=norm_ops_of(gm, options.norm_ops, device),
        )
        candidates = switch_off(found, fuse=options.fuse, skip_sites=options.skip_sites)
        check_not_empty(gm, candidates)
        checked = verify(candidates, device) if options.verify else candidates
        return [*checked, *called_sites(gm, len(checked))]

    def _sizes(self, gm: GraphModule, candidates: Sequence[Candidate], static: frozenset[int]) -> SizeRule:
        sizes = size_rule(gm, candidates, static)
        if self.options.deterministic and sizes.tokens is None and any(c.fuses for c in candidates):
            raise OptionsError("deterministic=True: the token count cannot be read from the sizes of the inputs")
        return sizes

    def _limit(self, assigned: Assignment, site: Site) -> Limit | None:
        return assigned.limit(site.group, site.hidden_size or 0, getattr(torch, site.dtype))

    def _leave_beyond(self, candidates: Sequence[Candidate], assigned: Assignment) -> Ranged:
        if self.options.deterministic:  # every call is within the limit, or refused
            return Ranged(list(candidates))
        return leave_beyond(candidates, functools.partial(self._limit, assigned), assigned.groups)

    def _fuse(self, gm: GraphModule, candidates: Sequence[Candidate], assigned: Assignment) -> list[Site]:
        return name_collectives(gm, candidates, assigned, self.options)

    def _judge(
        self, gm: GraphModule, assigned: Assignment, sites: Sequence[Site], capture: bool
    ) -> tuple[list[Verdict], Assignment]:
        """Verdicts, which the graph follows from now on, and the assignment with the facts that they rest on."""
        options = self.options
        verdicts, assigned = judge_with_facts(
            gm,
            assigned,
            capture=capture,
            split_ops=options.split_ops,
            all_reduce_ops=options.all_reduce_ops,
            on_hazard=options.on_hazard,
            profile=options.profile,
        )
        refuse_sites(gm, verdicts)
        clean_payload(gm, {v.site for v in verdicts if v.clean and v.site is not None})
        if options.deterministic:
            check_deterministic(sites, verdicts, assigned)
        return verdicts, assigned

    def _split(
        self, gm: GraphModule, verdicts: Sequence[Verdict], captured_on: torch.device | None
    ) -> tuple[SplitPlan, GraphModule]:
        """Cut the graph where the verdicts say, with writes in place and the sizes that each piece needs."""
        eager = self.options.piece_compiler == "eager"
        fix_storage_offsets(gm)
        before = FunctionalNumbers(gm) if self.options.check_parts else None
        parts = write_in_place(gm, cut(gm, verdicts), eager_pieces=eager)
        if not eager:
            parts = give_sizes(gm, parts)
        if before is not None:
            check_parts(gm, parts, before, captured_on, sizes=not eager)
        return split(gm, parts)

    def _prove(
        self,
        plan: SplitPlan,
        verdicts: Sequence[Verdict],
        assigned: Assignment,
        captured: Sequence[int],
        pads: Padding | None,
    ) -> PlanVerdict:
        proof = prove(plan, verdicts, assigned, captured, padding=pads is not None)
        if self.options.on_hazard == "raise" and proof.failed:
            raise HazardError(f"the plan can fail: {proof.message}")
        return proof

    def _without_fusion(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        warnings.warn(f"ringfence: {GRAD_MODE}", UserWarning, stacklevel=2)
        chosen = self.options.as_dict()
        self._report(CompileReport((), (), (), chosen, self._versions, graphs=None, notes=(GRAD_MODE,)))
        fallback = "inductor" if self.options.piece_compiler == "inductor" else "aot_eager"
        return torch._dynamo.lookup_backend(fallback)(gm, list(example_inputs))


def compiler(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Entry point of ``torch.compile(model, backend="ringfence", options={...})``.

    ``mode`` is torch.compile's own argument; ringfence has options instead.
    """
    check_arguments(mode)
    return Backend(**(options or {}))(gm, example_inputs)
