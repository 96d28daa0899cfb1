"""The backend: the journey of a graph, one line per stage.

Dynamo graph -> AOT -> repeats, waits -> find -> assign (who carries it out) -> ranges -> fuse -> judge, clean ->
in place -> split -> prove -> agree -> lower -> run
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Never, Self, Unpack

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from .account import Account, RemarksOnNext
from .aot import boxed, compiled, inductor_decompositions
from .assign import assign, described, name_collectives
from .compile_passes.assignment import Assignment, Limit
from .compile_passes.bases import name_bases
from .compile_passes.devices import device_of
from .compile_passes.digest import digest, with_shared_sizes
from .compile_passes.dump import dump_graph
from .compile_passes.graph_inputs import Constants, float_inputs, needs_grad, static_inputs
from .compile_passes.groups import describe_groups, groups_there
from .compile_passes.match import Site
from .compile_passes.named_ops import check_not_decomposed, ops_in, ops_replaced
from .compile_passes.provenance import input_names, inputs_of_modules, name_inputs, served
from .compile_passes.ranges import Ranged, leave_beyond
from .compile_passes.report import CompileReport
from .compile_passes.storage_offsets import slices_of_their_base
from .installed import versions
from .keywords import OptionKeywords
from .moe_assign import assign_moe
from .notes import GRAD_MODE, WITHOUT_FUSION, notes
from .options import Options
from .rebuilt import only_where_traced, rebuilds_inputs
from .runtime.channel import COMPILING
from .runtime.errors import OptionsError, RingfenceError
from .runtime.hazards.situation import Situation
from .runtime.replay.outer import guarded
from .runtime.replay.program import Program, SizeRule
from .runtime.replay.runner import PiecewiseRunner
from .runtime.watch.recompile import graph_being_compiled
from .runtime.watch.refusal import refuse
from .runtime.watch.settings import OF_PROCESS
from .runtime.watch.supervision import Asked, Supervision
from .runtime.watch.supervisor import Supervisor, leave, supervisor_for
from .stages import (
    CallersMemory,
    FoundSites,
    Judged,
    Plan,
    TracedGraph,
    as_lowered,
    callers_memory,
    find_sites,
    judge_graph,
    lower_graph,
    prove_plan,
    settle,
    settle_floats,
    split_graph,
)
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
        self._constants = Constants()
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
        """Ask for no watch any more; it ends with the last backend that does. Calls go on as before, unwatched."""
        self._unused()
        leave(self.asked)
        self.asked = replace(self.asked, process={})

    @property
    def progress(self) -> tuple[int, ...]:
        """Another one after each step that has begun, each call that was refused, and each compilation."""
        journal = self.supervisor.journal
        return journal.begun, journal.missed, journal.refusals, journal.changes

    def refuses(self, error: Exception, before: tuple[int, ...]) -> None:
        """A call of the model is an error. Where it came to no graph, the other ranks are told here.

        before: :attr:`progress` when it began.
        """
        if self.progress == before:
            self._account.refuses(error)

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
        inductor = self.options.piece_compiler == "inductor"
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        floats, rebuilt = float_inputs(gm), False

        def compile_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            nonlocal rebuilt
            rebuilt = rebuilds_inputs(gm)
            settle_floats(gm, names, floats, self.options, self._constants)
            with self.supervisor.compilation():
                return self._compile(gm, example_inputs, names)

        compiler = aot_autograd(
            fw_compiler=compile_graph,
            inference_compiler=compile_graph,
            keep_inference_input_mutations=True,  # a copy of the whole cache after each step otherwise
            decompositions=inductor_decompositions() if inductor else {},
        )
        with slices_of_their_base():
            run: Callable[..., Any] = compiler(gm, example_inputs)
        return only_where_traced(run, gm, example_inputs, names) if rebuilt else run

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any], names: Sequence[str]) -> Callable[..., Any]:
        """Compile one functional ATen graph, for AOT: its tensors are fake. names: of the inputs, by Dynamo."""
        graph = self._read(gm, example_inputs, names)
        numbers = settle(gm, self.options)
        found = find_sites(graph, self.options, self.supervisor)
        assigned = self._assign(graph, found)
        ranged = self._leave_beyond(found, assigned)
        replaced = ops_replaced(ranged.candidates)
        sites = self._fuse(gm, ranged, assigned)
        judged = self._judge(graph, sites, assigned, found.sizes)
        memory = callers_memory(graph, found.sizes, numbers, self.options)
        pieces, whole = split_graph(graph, judged, self.options)
        plan = self._in_full(graph, Plan(sites, judged.verdicts, pieces), whole)
        proof = prove_plan(plan, judged, memory.pads, self.options)
        sizes = with_shared_sizes(gm, found.sizes, graph.groups)
        supervision = self._agree(graph, judged, memory, sizes)  # before compiling takes minutes
        program = lower_graph(graph, pieces, whole, memory, self.options)
        runner = self._runner(program, sizes, judged, memory, supervision)
        said = [*ranged.notes, *notes(self.options, graph, found, judged, memory, self._unmatched(), replaced)]
        report = CompileReport(
            sites=tuple(plan.sites),
            moe_sites=tuple(found.moe_sites),
            pieces=as_lowered(plan.split.pieces, program),
            verdicts=tuple(plan.verdicts),
            options=self.options.as_dict(),
            versions=self._versions,
            graphs=judged.graphs.name if judged.graphs is not None else None,
            collectives=described(assigned),
            notes=tuple(said),
            plan=proof,
            judged_as=str(self._planned) if self._planned is not None else None,
            captured=judged.captured,
            serves=served(gm, graph.inputs, graph.static | memory.kept),
            name=supervision.graph,
        )
        self._report(report, runner)
        run, cut = self.looking(runner.boxed), self.options.outer_capture
        return boxed(guarded(run, judged.outer.barred, graph.device, cut=cut, refuses=runner.refuses))

    def _report(self, report: CompileReport, runner: PiecewiseRunner | None = None) -> None:
        self._account.add(self._use.told(report), runner)

    def _read(self, gm: GraphModule, example_inputs: Sequence[Any], names: Sequence[str]) -> TracedGraph:
        """What the graph runs on, and channels to the ranks that it runs with."""
        options, device = self.options, device_of(gm)
        try:
            options.check_registered()
            options.register_groups()
            groups = describe_groups(gm, device, options.all_reduce_ops, self._said_groups)
        except RingfenceError as error:  # before the ranks meet, who would wait for this one
            refuse(groups_there(gm, device), device, f"its graph cannot be compiled: {error}", COMPILING)
            raise
        channels = self.supervisor.open(groups.values(), device)
        if self._planned is not None:
            groups = {name: replace(group, backend="nccl") for name, group in groups.items()}
        for option, ops in self._named_ops.items():
            check_not_decomposed(gm, option, ops)
        self._seen_ops |= ops_in(gm)
        dump_graph("captured", gm)
        name_inputs(gm, names)
        of_modules = inputs_of_modules(gm, names)
        return TracedGraph(
            gm, device, groups, channels, input_names(gm, names), static_inputs(example_inputs), of_modules
        )

    def _unmatched(self) -> dict[str, list[str]]:
        """Ops that options name and that no graph had so far."""
        return {o: [name for name in names if name not in self._seen_ops] for o, names in self._named_ops.items()}

    def _assign(self, graph: TracedGraph, found: FoundSites) -> Assignment:
        groups, channels, device = graph.groups, graph.channels, graph.device
        options, supervisor = self.options, self.supervisor
        assigned = assign(found.candidates, groups, channels, device, options, supervisor, self._planned)
        return assign_moe(graph.gm, assigned, channels, device, options, supervisor)

    def _limit(self, assigned: Assignment, site: Site) -> Limit | None:
        return assigned.limit(site.group, site.hidden_size or 0, getattr(torch, site.dtype))

    def _leave_beyond(self, found: FoundSites, assigned: Assignment) -> Ranged:
        if self.options.deterministic:  # every call is within the limit, or refused
            return Ranged(list(found.candidates))
        return leave_beyond(found.candidates, functools.partial(self._limit, assigned), assigned.groups)

    def _fuse(self, gm: GraphModule, ranged: Ranged, assigned: Assignment) -> list[Site]:
        sites = name_collectives(gm, ranged.candidates, assigned, self.options)
        self._seen_ops |= ops_in(gm)
        name_bases(gm)
        dump_graph("fused", gm)
        return sites

    def _judge(self, graph: TracedGraph, sites: Sequence[Site], assigned: Assignment, sizes: SizeRule) -> Judged:
        return judge_graph(graph, sites, assigned, sizes, self.options)

    def _in_full(self, graph: TracedGraph, plan: Plan, whole: GraphModule) -> Plan:
        """What is proved and reported of a plan. whole: the split graph."""
        return plan

    def _agree(self, graph: TracedGraph, judged: Judged, memory: CallersMemory, sizes: SizeRule) -> Supervision:
        """Compare with the other ranks what must be equal on all."""
        agreed = digest(
            graph.gm,
            judged.verdicts,
            sizes,
            graph.groups,
            options=self.options.as_dict(),
            versions=self._versions,
            device=graph.device,
            captures=judged.graphs is not None,
            pads=memory.pads is not None,
            inputs=graph.inputs,
        )
        return self.supervisor.supervise(graph.channels, agreed)

    def _runner(
        self, program: Program, sizes: SizeRule, judged: Judged, memory: CallersMemory, supervision: Supervision
    ) -> PiecewiseRunner:
        options, assigned = self.options, judged.assigned
        return PiecewiseRunner(
            program,
            sizes,
            judged.graphs if self._planned is None else None,  # the plan is for another machine
            options.capture_sizes,
            padding=memory.pads,
            closed=lambda: assigned.closed,
            max_tokens=options.max_tokens if options.deterministic and assigned.ready else None,
            static_outputs=options.static_outputs,
            journal=self.supervisor.journal,
            supervision=supervision,
            remarks=RemarksOnNext(self._account),
            collective=assigned.judged,
        )

    def _without_fusion(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.warn_once_of_grad(WITHOUT_FUSION)
        chosen, name = self.options.as_dict(), graph_being_compiled().name
        report = CompileReport((), (), (), chosen, self._versions, graphs=None, name=name, notes=(WITHOUT_FUSION,))
        self._report(replace(report, passed_over=GRAD_MODE))
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
