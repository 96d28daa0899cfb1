"""Explaining: what would become of a model on other machines than this one, without running it.

A model is compiled as one of N ranks: that of a Hugging Face config with fake tensors, so that no weight is read and no
number computed; that of a function with its own. Sites are found, judged and proved as on GPUs over NCCL, and as the
collective and the GPU that are asked about.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from .aot import boxed
from .backend import Backend
from .compile_passes.assignment import Assignment, Limit
from .compile_passes.match import Site
from .compile_passes.op_options import positive
from .compile_passes.report import CompileReport
from .fake_model import CONTEXT, FakeModel, ModelCall, fake_model, quantised_by, read_config
from .layers import Folding
from .machines import Planned, planned
from .options import Options
from .runtime.collectives.size_table import TABLE, read_table
from .runtime.errors import OptionsError, RingfenceError, TargetError, on_one_line, text_of
from .runtime.protocol.plan import MODELLED_SUMS
from .runtime.replay.runner import PiecewiseRunner
from .stages import Judged, Plan, TracedGraph
from .unfold import Unfolding

#: Options that may be about one layer alone, so that none may stand for another.
_ABOUT_LAYERS = ("skip_sites", "verify")

#: Captures are simulated, because the plan is for another machine: it shows what would be captured there.
_SIMULATED = {"piece_compiler": "eager", "graphs": "simulated"}

DTYPES = ("bfloat16", "float16", "float32")

#: Options of the choice among collectives: without a GPU none is made.
_OF_CHOICE = ("transport", "size_table", "deterministic")

#: Options that show when a model runs.
_OF_RUNS = (
    "plain_all_reduce",
    "static_outputs",
    "on_hang",
    "kernel_wait_seconds",
    "step_seconds",
    "warm_up_seconds",
    "agree_seconds",
    "check_every_step",
    "on_capture_failure",
    "journal_dir",
)


@dataclass(frozen=True)
class AskedAs:
    """What a plan is to be judged as; nothing is asked where all but ``tp`` are None.

    transport, size_table, deterministic: the options of the choice among collectives, which is made on a GPU.
    """

    tp: int
    collective: str | None = None
    flashinfer: str | None = None
    gpu: str | None = None
    transport: str = "auto"
    size_table: str | None = None
    deterministic: bool = False

    def with_options(self, options: Mapping[str, Any]) -> AskedAs:
        """And as the backend's options ask. Raises :class:`OptionsError`."""
        given = Options.parse({**_SIMULATED, **options})
        wanted = given.collective if given.collective != "auto" else None
        if wanted is not None and self.collective not in (None, wanted):
            raise OptionsError(f"--collective {self.collective}, and --option collective={wanted}: give one of them")
        if self.gpu is None:
            return replace(self, collective=self.collective or wanted)
        return replace(
            self,
            collective=self.collective or wanted,
            transport=given.transport,
            size_table=given.size_table,
            deterministic=given.deterministic,
        )

    def planned(self, dtype: str, unfit: Mapping[tuple[str, str | None], str] | None = None) -> Planned:
        """unfit: collectives that do not take this model, and why."""
        table = read_table(self.size_table) if self.size_table is not None else ()
        by: dict[str, Any] = {
            "transport": self.transport,
            "deterministic": self.deterministic,
            "table": (*table, *TABLE),
        }
        return planned(self.tp, self.collective, self.flashinfer, self.gpu, dtype, unfit, by)

    def reference(self) -> str | None:
        """A note where nobody said whose the fused sites are to be."""
        if self.gpu is not None or self.collective is not None:
            return None
        others = " or ".join(map(str, MODELLED_SUMS))
        return (
            "the collective is the reference (an all-reduce, then add and norm), because neither --gpu nor "
            "--collective says what to judge as: --gpu h200 takes what 'auto' chooses on such GPUs, --collective "
            f"{others} the one that it names"
        )

    def idle(self, options: Mapping[str, Any]) -> str | None:
        """A note about given options on which nothing of a plan depends."""
        given = Options.parse({**_SIMULATED, **options}).given()
        without_gpu = [name for name in _OF_CHOICE if name in given and self.gpu is None]
        names = without_gpu + [name for name in _OF_RUNS if name in given]
        with_gpu = f"; with --gpu: {', '.join(without_gpu)}" if without_gpu else ""
        return f"nothing in a plan depends on these options: {', '.join(names)}{with_gpu}" if names else None


@dataclass(frozen=True)
class Explanation:
    """A report and the call that it is about. folding: which layers stand for which; None where each was traced."""

    about: str
    report: CompileReport
    folding: Folding | None = None


class _NotRun(Exception):
    """Of a compiled graph that is called: there is nothing to run it on."""


def _not_run(args: list[Any]) -> Any:
    raise _NotRun


class _Compiler(Backend):
    """Compiles for other machines: nothing is captured, and what layers stand for is put back in before the proof."""

    def __init__(self, planned: Planned, folding: Folding | None, options: Mapping[str, Any], *, runs: bool) -> None:
        super().__init__(planned=planned.situation, **{**_SIMULATED, **options})
        self.is_called_by_forward()  # where no graph comes, explain says so
        self._runs = runs
        self._machine = planned
        self._unfolding = Unfolding(folding) if folding is not None else None
        self._places: dict[str, int] = {}

    def _compile(self, *args: Any) -> Callable[..., Any]:
        compiled = super()._compile(*args)
        return compiled if self._runs else boxed(_not_run)

    def _limit(self, assigned: Assignment, site: Site) -> Limit | None:
        return self._machine.limit(site)

    def _judge(self, graph: TracedGraph, *args: Any) -> Judged:
        if self._unfolding is not None:  # later some of the nodes that are judged are gone
            self._places = self._unfolding.places(graph.gm.graph.nodes)
        return super()._judge(graph, *args)

    def _in_full(self, graph: TracedGraph, plan: Plan, whole: GraphModule) -> Plan:
        if self._unfolding is None:
            return plan
        sites, index = self._unfolding.sites(plan.sites)
        verdicts = self._unfolding.verdicts(plan.verdicts, self._places, index)
        return Plan(sites, verdicts, self._unfolding.plan(plan.split, whole, index))

    def _report(self, report: CompileReport, runner: PiecewiseRunner | None = None) -> None:
        if self._unfolding is not None:
            report = replace(report, moe_sites=tuple(self._unfolding.moe_sites(report.moe_sites)))
        super()._report(self._machine.told(report), runner)


def explain_config(
    config: Any,
    tp: int,
    calls: Sequence[ModelCall],
    *,
    dtype: str,
    asked: AskedAs,
    options: Mapping[str, Any],
    expert_parallel: bool = False,
    fold: bool = True,
) -> list[Explanation]:
    """What becomes of a Hugging Face model, for each of the calls. Raises :class:`TargetError`, or what a compile does.

    fold: let equal layers stand for each other.
    """
    dtype = _dtype_of(dtype)
    asked.with_options(options).planned(dtype)
    found = []
    with quiet(), fake_group(tp):
        for call in calls:
            model = fake_model(config, tp, getattr(torch, dtype), expert_parallel=expert_parallel)
            _check_names(options)
            tokens, kwargs = model.inputs(call)
            folding = _folded(model, tokens, kwargs, options, fold)
            found.append(_explained_fake(model, call, (tokens,), kwargs, folding, asked, dtype, options))
    return found


def _explained_fake(
    model: FakeModel,
    call: ModelCall,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    folding: Folding | str,
    asked: AskedAs,
    dtype: str,
    options: Mapping[str, Any],
) -> Explanation:
    folded = folding if isinstance(folding, Folding) and folding.cuts else None
    with model.mode:
        report = _judged(model.model, args, kwargs, asked, dtype, folded, options, runs=False)
    notes = list(folding_notes(folding))
    if (method := quantised_by(model.model.config)) is not None:
        notes.append(
            f"quantization_config ({method}) is not applied: a quantised layer is made of its weights and its kernels, "
            f"so every layer is the plain one in {dtype} here. What follows the all-reduces is the same; transformers "
            "may shard a quantised model by another plan, and its kernels may break the graph (ringfence docs generate)"
        )
    if model.hooked:
        notes.append(
            f"without the backward hooks of {len(model.hooked)} modules ({model.hooked[0]}, ...), which break the "
            "graph; before you compile it, call remove_backward_hooks(model) from ringfence.hugging_face"
        )
    return Explanation(str(call), replace(report, notes=(*report.notes, *notes)), folded)


def explain_function(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, asked: AskedAs, options: Mapping[str, Any]
) -> Explanation:
    """What becomes of any model, which is called once. A process group of as many ranks is there."""
    with quiet():
        _check_names(options)
        return Explanation("", _judged(model, args, kwargs, asked, "bfloat16", None, options, runs=True))


def _check_names(options: Mapping[str, Any]) -> None:
    """Of ops and groups, which need the model's modules and its process group: before it is traced.

    Raises :class:`OptionsError`.
    """
    given = Options.parse({**_SIMULATED, **options})
    given.check_registered()
    given.register_groups()


def _judged(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    asked: AskedAs,
    dtype: str,
    folding: Folding | None,
    options: Mapping[str, Any],
    *,
    runs: bool,
) -> CompileReport:
    """The report; once more where the kernels that were chosen do not take the model's hidden size."""
    asked = asked.with_options(options)
    machine = asked.planned(dtype)
    report = _compiled(model, args, kwargs, _Compiler(machine, folding, options, runs=runs))
    most = max((site.hidden_size or 0 for site in report.fused), default=0)
    unfit: dict[tuple[str, str | None], str] = {}
    while unmet := machine.unmet(most, dtype):
        unfit |= unmet
        machine = asked.planned(dtype, unfit)
    if unfit:
        report = _compiled(model, args, kwargs, _Compiler(machine, folding, options, runs=runs))
    notes = [note for note in (asked.reference() if report.fused else None, asked.idle(options)) if note is not None]
    return replace(report, notes=(*report.notes, *notes))


def _compiled(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], backend: Backend) -> CompileReport:
    torch._dynamo.reset()
    try:
        with torch.no_grad(), contextlib.suppress(_NotRun):
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, RingfenceError):
            raise error.inner_exception from error
        raise TargetError(f"the model does not compile: {text_of(error)}") from error
    except Unsupported as error:
        raise TargetError(f"the model breaks the graph, so no pass can see across: {text_of(error)}") from error
    except RingfenceError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise TargetError(f"the model raised {on_one_line(error)}") from error
    finally:
        torch._dynamo.reset()
    if not backend.reports:
        raise TargetError("the model ran without compiling a graph; is it a torch.nn.Module or function?")
    return backend.reports[-1]


def _folded(
    model: FakeModel, tokens: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any], fold: bool
) -> Folding | str:
    about = [f"{name} may be about one layer alone" for name in _ABOUT_LAYERS if options.get(name)]
    if fold and not about:
        return model.folded(tokens, kwargs)
    model.warm(tokens, kwargs)
    return about[0] if about else "as it was asked"


def folding_notes(folding: Folding | str) -> Iterator[str]:
    """Which layers speak for which, for people."""
    if isinstance(folding, str):
        yield f"every layer was traced: {folding}"
    elif folding.cuts:
        count, kept = len(folding.kinds), len(folding.kept)
        kinds = len(set(folding.kinds))
        yield (
            f"{kept} of {count} layers were traced, the others do what these do ({kinds} "
            f"kind{'s' if kinds > 1 else ''}; each was run once on fake tensors and its ops compared)"
        )


@contextlib.contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """A default process group of so many ranks, this one the first, whose collectives do nothing."""
    if dist.is_initialized():
        raise OptionsError("explain makes a process group of its own; call it before init_process_group, or elsewhere")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        if dist.is_initialized():  # a user's function may have destroyed it
            dist.destroy_process_group()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what other libraries say on the way. What ringfence warns of is said."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # an error is an exception, whose message is ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", message="ringfence")
            yield
    finally:
        logging.disable(before)


def _dtype_of(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OptionsError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return name


def explain(
    model: Any,
    *,
    tp: int,
    decode: bool = False,
    batch: int = 1,
    tokens: int = 8,
    context: int = CONTEXT,
    dtype: Any = "bfloat16",
    collective: str | None = None,
    flashinfer: str | None = None,
    gpu: str | None = None,
    expert_parallel: bool = False,
    **options: Any,
) -> CompileReport:
    """What would become of a Hugging Face model on ``tp`` ranks, from its config: no weights, no GPU, no other rank.

    model: a config (``LlamaConfig(...)``), or the path of a folder with a ``config.json``. decode: a step of one token
    over a static cache of ``context`` tokens; otherwise ``tokens`` tokens without a cache. dtype: of the activations,
    "bfloat16", "float16" or "float32". collective, flashinfer, gpu: what the fused sites are judged as, as in
    ``ringfence explain --collective trtllm --flashinfer 0.7.2 --gpu h200``. expert_parallel: by the model's plan for
    its experts. options: the backend's, as ``capture_sizes=[1, 2, 4]``.

    Needs transformers, and that this process has no default process group. Raises :class:`TargetError` for what is no
    such config, and :class:`OptionsError`.
    """
    for name, value in (("batch", batch), ("tokens", tokens), ("context", context)):
        positive(name, value)
    if positive("tp", tp) < 2:
        raise OptionsError(f"tp={tp} is no tensor-parallel world size of two or more")
    config = read_config(Path(model)) if isinstance(model, str | Path) else model
    call = ModelCall(batch, 1, context) if decode else ModelCall(batch, tokens)
    asked = AskedAs(tp, collective, flashinfer, gpu)
    (found,) = explain_config(
        config, tp, [call], dtype=dtype, asked=asked, options=options, expert_parallel=expert_parallel
    )
    return found.report
