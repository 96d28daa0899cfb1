"""The backend: the journey of a graph, one line per stage.

Dynamo graph -> AOT -> find -> prepare (who carries it out) -> fuse -> judge -> clean -> split -> prove -> lower -> run
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .compile_passes.absent import why_no_all_reduce
from .compile_passes.clean import clean_payload
from .compile_passes.collectives import refuse_sites, replace_plain_all_reduces
from .compile_passes.devices import device_of
from .compile_passes.digest import digest, with_shared_sizes
from .compile_passes.dump import dump_graph
from .compile_passes.facts import facts_of
from .compile_passes.find import find
from .compile_passes.functional import written_inputs
from .compile_passes.fuse import fuse
from .compile_passes.groups import collectives_of, describe_groups
from .compile_passes.in_place import write_in_place
from .compile_passes.judge import Decision, Verdict, judge
from .compile_passes.lower import eager_piece, inductor_piece, lower
from .compile_passes.match import Candidate, Site
from .compile_passes.named_ops import check_not_decomposed, ops_in
from .compile_passes.norm_ops import norm_ops_of
from .compile_passes.op_calls import op_names
from .compile_passes.parts import cut
from .compile_passes.prove import prove
from .compile_passes.provenance import input_names, name_inputs
from .compile_passes.reasons import Reason
from .compile_passes.repeats import merge_repeats
from .compile_passes.report import CompileReport
from .compile_passes.returned_views import take_returned_views
from .compile_passes.sizes import padding, size_rule
from .compile_passes.spec import check_parts
from .compile_passes.split import SplitPlan, split
from .compile_passes.switch_off import switch_off
from .compile_passes.symbols import fix_storage_offsets, give_sizes
from .compile_passes.value_numbers import FunctionalNumbers
from .compile_passes.verify import verify
from .compile_passes.waits import settle_waits
from .notes import GRAD_MODE, Outcome, notes
from .options import Options
from .runtime.channel import Channel
from .runtime.collectives.probe import make_probe
from .runtime.collectives.ready import ReadyCollective, Wanted, prepare, reference_collective, why_reference_only
from .runtime.collectives.size_table import TABLE, read_table
from .runtime.collectives.workspace import Workspaces, workspaces_of
from .runtime.errors import CollectiveUnavailableError, HazardError, InputError, OptionsError
from .runtime.groups import Group, nccl_version
from .runtime.hazards.situation import Collective, Situation, facts_of_nccl
from .runtime.replay.capture import CudaGraphs, GraphBackend, SimulatedGraphs
from .runtime.replay.program import ReturnedView
from .runtime.replay.runner import PiecewiseRunner
from .runtime.watch.supervisor import OF_PROCESS, Asked, Supervisor, leave, supervisor_for

log = logging.getLogger(__name__)


class Backend:
    """A ``torch.compile`` backend with a memory: ``torch.compile(model, backend=Backend(...))``.

    Options are the fields of :class:`ringfence.Options`, as keyword arguments. ``reports``
    holds a :class:`CompileReport` for each graph that was compiled, in order; a model
    that breaks the graph, or that is recompiled for new shapes, adds several.
    """

    def __init__(self, **options: Any) -> None:
        self.options = Options.parse(options)
        #: What fused sites are judged as, where that is not what runs here: ``ringfence explain --collective``.
        self.judge_as: Situation | None = None
        self.reports: list[CompileReport] = []
        self._named_ops = {
            "split_ops": self.options.split_ops,
            "all_reduce_ops": tuple(self.options.all_reduce_ops),
            "norm_ops": tuple(self.options.norm_ops),
        }
        self._seen_ops: set[str] = set()
        given = self.options
        self._asked = Asked(
            {name: getattr(given, name) for name in OF_PROCESS if name in options},
            agree_seconds=given.agree_seconds,
            every_step=given.check_every_step,
            raise_on_capture=given.on_capture_failure == "raise",
        )
        supervisor_for(self._asked)  # what differs from another backend's is told here

    @property
    def supervisor(self) -> Supervisor:
        """Journal, watchdog and agreement of this process, which all backends share (docs/operating.md)."""
        return supervisor_for(self._asked)

    def __repr__(self) -> str:
        """``<ringfence.Backend(capture_sizes=(1, 16)), 2 reports>``: the options that are not the defaults."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.given().items())
        count = len(self.reports)
        return f"<ringfence.Backend({given}), {count} report{'' if count == 1 else 's'}>"

    def close(self) -> None:
        """Ask for no watch any more; it ends with the last backend that does. What was compiled goes on working."""
        leave(self._asked)
        self._asked = replace(self._asked, process={})

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
        _check_mode(mode)
        if options:
            raise OptionsError(
                f"options={dict(options)!r} were given beside a ringfence.Backend, which has its own: "
                f"ringfence.Backend({', '.join(f'{k}={v!r}' for k, v in options.items())})"
            )
        with self.supervisor.compiling(self._asked):
            return self._compile_dynamo_graph(gm, example_inputs)

    def _compile_dynamo_graph(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if _needs_grad(gm, example_inputs):
            return self._without_fusion(gm, example_inputs)
        self.options.check_registered()
        _specialise_floats(gm)
        inductor = self.options.piece_compiler == "inductor"
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]

        def compile_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            with self.supervisor.compilation():
                return self._compile(gm, example_inputs, dynamo_names=names)

        compiler = aot_autograd(
            fw_compiler=compile_graph,
            inference_compiler=compile_graph,
            keep_inference_input_mutations=True,  # a copy of the whole cache after each step otherwise
            decompositions=_inductor_decompositions() if inductor else {},
        )
        return compiler(gm, example_inputs)

    def _compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], *, dynamo_names: Sequence[str]
    ) -> Callable[..., Any]:
        """Compile one functional ATen graph. Called by AOT, with fake tensors."""
        options = self.options
        device = device_of(gm)
        groups = describe_groups(gm, device, options.all_reduce_ops)
        channels = self.supervisor.open(groups.values(), device)
        static_inputs = _static_inputs(example_inputs)
        dump_graph("captured", gm)
        for option, names in self._named_ops.items():
            check_not_decomposed(gm, option, names)
        self._seen_ops |= ops_in(gm)

        name_inputs(gm, dynamo_names)
        merge_repeats(gm)
        if options.capture_sizes:
            settle_waits(gm)
        candidates = find(
            gm,
            strict=options.numerics == "strict",
            groups=options.groups,
            all_reduce_ops=options.all_reduce_ops,
            norm_ops=norm_ops_of(gm, options.norm_ops, device),
        )
        absent = why_no_all_reduce(gm) if not candidates else None
        candidates = switch_off(candidates, fuse=options.fuse, skip_sites=options.skip_sites)
        _check_not_empty(gm, candidates)
        if options.verify:
            candidates = verify(candidates, device)
        sizes = size_rule(gm, candidates, static_inputs)
        fuses = any(c.match is not None for c in candidates)
        if options.deterministic and fuses and sizes.tokens is None:
            raise OptionsError("deterministic=True: the token count cannot be read from the sizes of the inputs")
        carried, carrier = self._prepare(candidates, groups, channels, device)
        collectives = {carried: str(carrier.collective)} if carried is not None else {}
        sites = fuse(gm, candidates, collectives=collectives)
        if options.plain_all_reduce and carried is not None and carrier.workspace is not None:
            keep = {s.node for s in sites if s.decline is not None and s.decline.reason is Reason.SWITCHED_OFF}
            keep |= {n.name for n in collectives_of(gm) if not set(op_names(n)).isdisjoint(options.split_ops)}
            replace_plain_all_reduces(gm, carried, str(carrier.collective), keep)
        written = written_inputs(gm)
        dump_graph("fused", gm)
        self._seen_ops |= ops_in(gm)

        workspaces = workspaces_of(carried) if carried is not None and carrier.workspace is not None else None
        graphs = self._graphs(device, workspaces) if options.capture_sizes and sizes.tokens is not None else None
        situation = self.judge_as or carrier.situation
        verdicts, situation = self._judge(gm, situation, groups, carrier.capture_failure, capture=graphs is not None)
        refuse_sites(gm, verdicts)
        clean_payload(gm, {v.site for v in verdicts if v.clean and v.site is not None})
        if options.deterministic:
            _check_deterministic(sites, verdicts, carried, carrier)
        pads = padding(gm, sizes, written) if options.pad_to_capture_size else None
        plan, whole, views = self._split(gm, verdicts)
        captured = options.capture_sizes if graphs is not None else ()
        proof = prove(plan, verdicts, situation, captured, padding=pads is not None)
        if options.on_hazard == "raise" and proof.failed:
            raise HazardError(f"the plan can fail: {proof.message}")
        dump_graph("split", whole)

        chosen, versions, inputs = options.as_dict(), _versions(), input_names(gm, dynamo_names)
        sizes = with_shared_sizes(gm, sizes, groups)
        agreed = digest(
            gm,
            verdicts,
            sizes,
            groups,
            options=chosen,
            versions=versions,
            device=device,
            captures=graphs is not None,
            pads=pads is not None,
            inputs=inputs,
        )
        supervision = self.supervisor.supervise(channels, agreed)  # before compiling takes minutes

        compile_piece = inductor_piece if options.piece_compiler == "inductor" else eager_piece
        program = lower(plan, whole, compile_piece, inputs, static_inputs, written, views)
        runner = PiecewiseRunner(
            program,
            sizes,
            graphs if self.judge_as is None else None,  # what was judged is a plan for another machine
            options.capture_sizes,
            padding=pads,
            closed=lambda: carrier.workspace is not None and carrier.workspace.closed,
            max_tokens=options.max_tokens if options.deterministic and carried is not None else None,
            static_outputs=options.static_outputs,
            journal=self.supervisor.journal,
            supervision=supervision,
            note=functools.partial(self._add_note, len(self.reports)),
            collective=str(situation.collective),
        )
        outcome = Outcome(
            absent,
            candidates,
            sizes,
            written,
            device,
            kernels=carrier.workspace is not None,
            captures=graphs is not None,
            pads=pads is not None,
            unmatched={o: [n for n in names if n not in self._seen_ops] for o, names in self._named_ops.items()},
        )
        self._report(
            CompileReport(
                sites=tuple(sites),
                pieces=plan.pieces,
                verdicts=tuple(verdicts),
                options=chosen,
                versions=versions,
                collective=str(carrier.collective),
                graphs=graphs.name if graphs is not None else None,
                candidates=tuple(map(str, carrier.candidates)),
                notes=tuple(notes(options, outcome)),
                plan=proof,
                judged_as=str(self.judge_as) if self.judge_as is not None else None,
                captured=captured,
                fused_bytes=carrier.workspace.largest if carrier.workspace is not None else None,
            )
        )
        return _boxed(runner)

    def _prepare(
        self,
        candidates: Sequence[Candidate],
        groups: Mapping[str, Group],
        channels: Mapping[str, Channel],
        device: torch.device,
    ) -> tuple[str | None, ReadyCollective]:
        """The group with most sites, and who carries them out; those of other groups are the reference's."""
        options = self.options
        fused = [c.site for c in candidates if c.match is not None and c.site.group is not None]
        if not fused:
            return None, reference_collective(1)
        name = Counter(str(site.group) for site in fused).most_common(1)[0][0]
        group = groups[name]
        reference_only = why_reference_only(group, device)
        if options.collective == "reference" or self.judge_as is not None or reference_only is not None:
            if options.collective not in ("auto", "reference"):
                raise CollectiveUnavailableError(
                    f"collective='{options.collective}' cannot be had: {reference_only}; leave it 'auto' to fall back"
                )
            if options.deterministic and self.judge_as is None:
                why = reference_only or "collective='reference' is not shown to return the same bits"
                raise CollectiveUnavailableError(f"deterministic=True needs a fused kernel: {why}; leave it out")
            return name, reference_collective(group.size, reference_only)
        mine = [site for site in fused if site.group == name]
        table = read_table(options.size_table) if options.size_table is not None else ()
        wanted = Wanted(
            options.collective,
            options.transport,
            hidden=max(site.hidden_size or 0 for site in mine),
            dtype=getattr(torch, Counter(site.dtype for site in mine).most_common(1)[0][0]),
            sizes=options.capture_sizes,
            max_tokens=options.max_tokens,
            deterministic=options.deterministic,
            table=(*table, *TABLE),
            other_dtypes=_other_dtypes(candidates, mine),
        )
        self.supervisor.health.share(workspaces_of(name))
        # Real memory and real launches, in the midst of a trace with fake tensors.
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad(), here:
            if (probed := f"workspaces of group '{name}'") not in self.supervisor.probes:
                self.supervisor.probes[probed] = make_probe(name, device)
            return name, prepare(channels[name], group, device, wanted)

    def _judge(
        self,
        gm: GraphModule,
        situation: Situation,
        groups: Mapping[str, Group],
        capture_failure: str | None,
        *,
        capture: bool,
    ) -> tuple[list[Verdict], Situation]:
        """Verdicts, and the situation with the facts that they rest on.

        Some facts show only in the cut that follows from the verdicts; then it is judged again.
        """
        options = self.options
        nccl = None
        if any(group.backend == "nccl" for group in groups.values()):  # on the nodes of whoever carries the sites
            nccl = replace(situation, collective=Collective.NCCL, flashinfer=None, facts=facts_of_nccl(nccl_version()))
        while True:
            verdicts = judge(
                gm,
                backends={name: group.backend for name, group in groups.items()},
                capture=capture,
                split_ops=options.split_ops,
                all_reduce_ops=options.all_reduce_ops,
                situation=situation,
                capture_failure=capture_failure,
                on_hazard=options.on_hazard,
                profile=options.profile,
                nccl=nccl,
            )
            found = frozenset(e.fact for e in facts_of(*split(gm, cut(gm, verdicts)))) if capture else frozenset()
            if found <= situation.facts:
                return verdicts, situation
            situation = replace(situation, facts=situation.facts | found)

    def _split(
        self, gm: GraphModule, verdicts: Sequence[Verdict]
    ) -> tuple[SplitPlan, GraphModule, dict[int, ReturnedView]]:
        """Cut the graph where the verdicts say, with writes in place and the sizes that each piece needs."""
        eager = self.options.piece_compiler == "eager"
        fix_storage_offsets(gm)
        views = take_returned_views(gm)
        before = FunctionalNumbers(gm) if self.options.check_parts else None
        parts = write_in_place(gm, cut(gm, verdicts), eager_pieces=eager)
        if not eager:
            parts = give_sizes(gm, parts)
        if before is not None:
            check_parts(gm, parts, before, device_of(gm), sizes=not eager)
        return *split(gm, parts), views

    def _graphs(self, device: torch.device, workspaces: Workspaces | None) -> GraphBackend | None:
        """What captures; None where this device has no graphs and nobody asked for the simulation."""
        wanted = self.options.graphs
        if wanted == "cuda" and device.type != "cuda":
            raise OptionsError(f"graphs='cuda', and the inputs are on {device}; use graphs='auto' or 'simulated'")
        if wanted == "simulated":
            return SimulatedGraphs()
        if device.type != "cuda":
            return None
        return CudaGraphs(device, workspaces.control_words) if workspaces is not None else CudaGraphs(device)

    def _add_note(self, index: int, note: str) -> None:
        """What shows of a graph when it is called."""
        report = self.reports[index]
        self.reports[index] = replace(report, notes=(*report.notes, note))

    def _report(self, report: CompileReport) -> None:
        self.reports.append(report)
        log.info("%s", report.summary)
        if self.options.on_report is not None:
            self.options.on_report(report)

    def _without_fusion(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        warnings.warn(f"ringfence: {GRAD_MODE}", UserWarning, stacklevel=2)
        chosen = self.options.as_dict()
        self._report(CompileReport((), (), (), chosen, _versions(), "reference", graphs=None, notes=(GRAD_MODE,)))
        fallback = "inductor" if self.options.piece_compiler == "inductor" else "aot_eager"
        return torch._dynamo.lookup_backend(fallback)(gm, list(example_inputs))


def compiler(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Entry point of ``torch.compile(model, backend="ringfence", options={...})``.

    ``mode`` is torch.compile's own argument; ringfence has options instead.
    """
    _check_mode(mode)
    return Backend(**(options or {}))(gm, example_inputs)


def _check_mode(mode: str | None) -> None:
    if mode not in (None, "default"):
        raise OptionsError(
            f"mode='{mode}' has no meaning for ringfence, which captures the token counts in capture_sizes: leave it "
            "out (transformers: CompileConfig(mode=None, ...)), and say what you want by ringfence's own options"
        )


# -- facts about the graph's inputs ------------------------------------------------


def _needs_grad(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    tensors = [*gm.parameters(), *(x for x in example_inputs if isinstance(x, Tensor))]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _other_dtypes(candidates: Sequence[Candidate], mine: Sequence[Site]) -> tuple[torch.dtype, ...]:
    """What the group of these sites sums, besides the dtype of most of them."""
    most = Counter(site.dtype for site in mine).most_common(1)[0][0]
    found = {c.site.dtype for c in candidates if c.site.group == mine[0].group}
    return tuple(getattr(torch, name) for name in ("float16", "bfloat16", "float32") if name in found - {most})


def _check_deterministic(
    sites: Sequence[Site], verdicts: Sequence[Verdict], carried: str | None, carrier: ReadyCollective
) -> None:
    """Raises :class:`CollectiveUnavailableError` for a fused site that another kernel would carry out."""
    refused = {v.site for v in verdicts if v.decision is Decision.REFUSE}
    for site in sites:
        if not site.fused or carrier.workspace is None:
            continue
        tokens, hidden, dtype = 1, site.hidden_size or 0, getattr(torch, site.dtype)
        if site.group != carried or site.index in refused or not carrier.workspace.strategy(tokens, hidden, dtype):
            raise CollectiveUnavailableError(
                f"deterministic=True: {carrier.collective} does not carry out site {site.index} "
                f"({site.source or site.node}; group {site.group}, hidden size {hidden}, {site.dtype}), and the "
                "reference is not shown to return the same bits; leave deterministic out"
            )


def _check_not_empty(gm: GraphModule, candidates: Sequence[Candidate]) -> None:
    """Raises :class:`InputError` for an all-reduce of no tokens. Other empty tensors, as a cache's, are legal."""
    by_name = {n.name: n for n in gm.graph.nodes}
    for candidate in candidates:
        value = by_name[candidate.site.node].meta.get("val")
        if isinstance(value, Tensor) and 0 in [n for n in value.shape if isinstance(n, int)]:
            raise InputError(
                f"the all-reduce at {candidate.site.source or candidate.site.node} is of an empty tensor "
                f"(shape {list(value.shape)}); a rank that skips a collective leaves the others waiting: pad to at "
                "least one token on every rank"
            )


def _specialise_floats(gm: GraphModule) -> None:
    """Make the model's Python floats constants of the graph, with a guard each.

    Under ``dynamic=True`` Dynamo passes a float such as a norm's epsilon as a zero-dimensional
    CPU tensor. The kernels take epsilon as a number, and a capture would bake in what a CPU
    tensor held. Reading the value guards it; AOT then restarts the trace with the constant.
    A float that is computed from a size stays as it is.
    """
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.SymFloat):
            continue
        expression = value.node.expr
        if isinstance(expression, sympy.Symbol) and symbol_is_type(expression, SymT.FLOAT):
            float(value)


def _static_inputs(example_inputs: Sequence[Any]) -> frozenset[int]:
    """The inputs that Dynamo knows to stay in place: parameters and buffers.

    Only tensors count: a DTensor parameter is unwrapped into its local tensor and its
    mesh, and the mesh is marked too.
    """
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    marked = (metadata.static_input_indices or ()) if metadata is not None else ()
    return frozenset(i for i in marked if isinstance(example_inputs[i], Tensor))


# -- plumbing ------------------------------------------------------------------------


def _inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def _boxed(runner: PiecewiseRunner) -> Callable[[list[Any]], list[Any]]:
    """AOT's calling convention: the arguments come in a list, which the callee empties."""

    def call(args: list[Any]) -> list[Any]:
        values = tuple(args)
        args.clear()
        return runner(*values)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("ringfence", "transformers", "flashinfer-python"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
