"""One program under one setting against its eager twin: right, or whose fault it is."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import ringfence
import ringfence.backend
from ringfence.compile_passes.storage_offsets import slices_of_their_base
from ringfence.rebuilt import only_where_traced, rebuilds_inputs

from . import moves, places, writes  # noqa: F401  (they register their moves)
from .draft import draw_program
from .play import Plan, PlayError, Record, Stage
from .program import Program

#: Largest |ours - eager| / (1 + largest |eager|) of a tensor. A wrong value is off by tenths.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.12, torch.float16: 0.06, torch.float64: 1e-6}


@dataclass(frozen=True)
class Setting:
    """How a program is compiled. ``options`` are the backend's."""

    plan: Plan
    dynamic: bool | None = None
    group: str | None = "fake 2"
    fallback_random: bool = True
    functionalize_v2: bool = True
    fullgraph: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def inductor(self) -> bool:
        return self.options.get("piece_compiler", "inductor") == "inductor"

    def __str__(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in asdict(self).items() if k not in ("plan", "options")) + (
            f"\n  plan {self.plan}\n  options {self.options}"
        )


@dataclass(frozen=True)
class Outcome:
    """kind: ``right``; ``invalid``, where eager refuses; ``upstream``, where plain torch.compile is wrong too;
    ``unsure``, where it fails beside other settings only; ``wrong``."""

    kind: str
    message: str = ""


def check(program: Program, setting: Setting) -> Outcome:
    """Run the program eagerly and compiled; who is to blame where they differ."""
    return check_all(program, [setting])[0]


def check_all(program: Program, settings: Sequence[Setting]) -> list[Outcome]:
    """:func:`check` under several settings that differ in the backend's options only: one trace serves them all.

    What fails beside others and not alone is ``unsure``.
    """
    first = settings[0]
    ensure_group(first.group)
    with warnings.catch_warnings(), _configured(first):
        warnings.simplefilter("ignore")
        eager = Stage(program, first.plan)
        try:
            right = eager.play(eager.module)
        except PlayError as error:
            return [Outcome("invalid", str(error))] * len(settings)
        backends = [ringfence.Backend(**s.options) for s in settings]
        together = _against(program, settings, AtOnce(backends) if len(backends) > 1 else backends[0], right)
        outcomes = []
        for setting, backend, wrong in zip(settings, backends, together, strict=True):
            if wrong is not None and len(settings) > 1:
                alone = _against(program, [setting], ringfence.Backend(**setting.options), right)[0]
                if alone is None:
                    outcomes.append(Outcome("unsure", wrong))
                    continue
                wrong = alone
            outcomes.append(_blame(program, setting, wrong, right))
            backend.close()
    return outcomes


def _blame(program: Program, setting: Setting, wrong: str | None, right: list[Record]) -> Outcome:
    if wrong is None:
        return Outcome("right")
    plain, bare = "inductor" if setting.inductor else "aot_eager", replace(setting, options={})
    upstream = _against(program, [bare], plain, right)[0]
    if upstream is not None and _is_of_numbers(upstream) and (compact := program.compact()) != program:
        # Plain torch.compile counts from wrong places in a storage. Ours must not.
        twin = Stage(compact, setting.plan)
        upstream = _against(compact, [bare], plain, twin.play(twin.module))[0]
    if upstream is not None:
        return Outcome("upstream", f"{wrong}\n  {plain}: {upstream}")
    return Outcome("wrong", wrong)


def _is_of_numbers(message: str) -> bool:
    return " is off by " in message or message.endswith(" differs")


def _against(program: Program, settings: Sequence[Setting], backend: Any, right: list[Record]) -> list[str | None]:
    """How the module that ``backend`` compiles differs from what is right, under each setting."""
    torch._dynamo.reset()
    first, stage = settings[0], Stage(program, settings[0].plan)
    call = torch.compile(stage.module, backend=backend, fullgraph=first.fullgraph, dynamic=first.dynamic)
    found: list[str | None] = []
    try:
        for i, setting in enumerate(settings):
            if isinstance(backend, AtOnce):
                backend.at = i
            try:
                seen = stage.play(call)
            except PlayError as error:
                found.append(str(error))
            else:
                found.append(next(differences(right, seen, held=not setting.options.get("static_outputs")), None))
    finally:
        torch._dynamo.reset()
    return _of_any_rank(found) if first.group == "ranks" else found


def _of_any_rank(found: list[str | None]) -> list[str | None]:
    """What one rank found is looked into by all: a rank that goes on alone would wait for ever."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    told = [[f"rank {r}: {m}" for r, m in enumerate(messages) if m] for messages in zip(*everywhere, strict=True)]
    return [messages[0] if messages else None for messages in told]


class AtOnce:
    """Several backends behind one trace, which costs ten times what they do. ``at``: the one that is called."""

    def __init__(self, backends: Sequence[ringfence.Backend]) -> None:
        self._backends, self.at = backends, 0

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        given: list[dict[str, Any]] = []

        def record(**options: Any) -> Callable[..., None]:
            given.append(options)
            return lambda *_: None

        with mock.patch.object(ringfence.backend, "aot_autograd", record):
            for backend in self._backends:
                backend(gm, example_inputs)
        assert len(given) == len(self._backends)

        rebuilt = False

        def compile_all(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            nonlocal rebuilt
            rebuilt = rebuilds_inputs(gm)
            calls = [_compiled(options["inference_compiler"], gm, inputs) for options in given]

            def call(arguments: list[Any]) -> Any:
                return calls[self.at](arguments)

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        compiled = aot_autograd(**{**given[0], "fw_compiler": compile_all, "inference_compiler": compile_all})
        with slices_of_their_base():
            run: Callable[..., Any] = compiled(gm, example_inputs)
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        return only_where_traced(run, gm, example_inputs, names) if rebuilt else run


def _compiled(compiler: Callable[..., Any], gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The compiled copy of a graph, or a function that raises what compiling it raised."""
    try:
        return compiler(GraphModule(gm, copy.deepcopy(gm.graph)), inputs)  # type: ignore[no-any-return]
    except Exception as error:
        message = f"{type(error).__name__}: {error}"

        def fail(_: list[Any]) -> None:
            raise RuntimeError(f"compiling failed: {message}")

        return fail


def differences(right: list[Record], seen: list[Record], *, held: bool = True) -> Iterator[str]:
    """What differs, step by step. held: whether the last step's outputs, which may be fed back, are the caller's."""
    fresh: dict[str, Tensor] = {}
    for step, (a, b) in enumerate(zip(right, seen, strict=True)):
        ours = dict(b.items())
        for where, value in a.items():
            if not held and (where.startswith("last") or where == "argument 'x'"):
                continue
            message = _differs(value, ours.get(where), fresh, where)
            if message is not None:
                yield f"step {step}: {where} {message}"
        if a.counts != b.counts:
            yield f"step {step}: ops that must run in every step ran {b.counts}, eager {a.counts}"


def _differs(right: Any, seen: Any, fresh: dict[str, Tensor], where: str) -> str | None:
    if isinstance(right, tuple) and right and right[0] == "random":
        return _not_random(right[1], seen[1], fresh, where)
    if isinstance(right, list | tuple):
        if not isinstance(seen, list | tuple) or len(right) != len(seen):
            return f"is {seen!r}, eager {right!r}"
        found = (_differs(r, s, fresh, where) for r, s in zip(right, seen, strict=True))
        return next((f for f in found if f is not None), None)
    if not isinstance(right, Tensor):
        return None if right == seen and type(right) is type(seen) else f"is {seen!r}, eager {right!r}"
    if not isinstance(seen, Tensor) or (right.shape, right.dtype) != (seen.shape, seen.dtype):
        return f"is {_describe(seen)}, eager {_describe(right)}"
    if not right.dtype.is_floating_point:
        return None if torch.equal(right, seen) else "differs"
    if not right.numel():
        return None
    off = (right.double() - seen.double()).abs()
    off[(right == seen) | (right.isnan() & seen.isnan())] = 0
    worst = float(off.max()) / (1 + float(right.double().nan_to_num(0, 0, 0).abs().max()))
    return None if worst <= TOLERANCE[right.dtype] else f"is off by {worst:.2g} ({_describe(right)})"


def _not_random(right: Tensor, seen: Tensor, fresh: dict[str, Tensor], where: str) -> str | None:
    """Random numbers whose bits are not promised: of the right shape, finite, and new in each step."""
    if (right.shape, right.dtype) != (seen.shape, seen.dtype):
        return f"is {_describe(seen)}, eager {_describe(right)}"
    if not bool(seen.double().isfinite().all()):
        return "is not finite"
    before = fresh.get(where)
    fresh[where] = seen
    if before is not None and before.shape == seen.shape and seen.numel() > 16 and torch.equal(before, seen):
        return "holds the random numbers of the last step"
    return None


def _describe(value: Any) -> str:
    return f"{str(value.dtype)[6:]} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


# -- drawing ---------------------------------------------------------------------------


def draw(
    seed: int, *, inductor: float = 0.1, device: str = "cpu", ranks: bool = False
) -> tuple[Program, list[Setting]]:
    """The program of a seed, and the settings that it is compiled under. ranks: for the group that there is."""
    d = random.Random(seed)
    use_inductor = d.random() < inductor
    base = _draw_setting(d, seed, device)
    if ranks:
        base = replace(base, group="ranks")
    program = draw_program(
        seed,
        d.randrange(3, 9) if use_inductor else d.randrange(4, 16),
        dtype=d.choices(["float32", "bfloat16", "float16"], [8, 1, 1])[0],
        distributed=base.group is not None,
        random_ops=not use_inductor or base.fallback_random,
    )
    settings = [replace(base, options=_draw_options(d, program, base.plan, use_inductor)) for _ in range(4)]
    return program, settings[: 2 if use_inductor else 4]


def _draw_setting(d: random.Random, seed: int, device: str) -> Setting:
    dynamic, mark = d.choices([(True, False), (None, True), (None, False), (False, False)], [5, 3, 2, 2])[0]
    sizes = [(d.randrange(2, 6), d.randrange(1, 4), d.randrange(1, 4)) for _ in range(3)]
    order = d.choice(
        [(0, 0, 0), (0, 0, 1, 0, 1)] if dynamic is False else [(0, 1, 2, 0, 1, 2), (0, 1, 0, 0, 2), (0, 0, 1, 1, 0)]
    )
    plan = Plan(
        tuple(sizes[i] for i in order),
        alternate=d.random() < 0.3,
        feed=d.random() < 0.2,
        vary=d.random() < 0.3,
        mark_static=d.random() < 0.35,
        mark_dynamic=mark,
        inference_mode=d.random() < 0.15,
        device=device,
    )
    return Setting(
        plan,
        dynamic,
        # gloo ends the process in collectives of device tensors that it does not serve
        group=("fake 2", "gloo 1" if device == "cpu" else "fake 1", "fake 1", None)[seed // 32 % 4],
        fallback_random=d.random() < 0.5,
        functionalize_v2=d.random() < 0.8,
    )


def _draw_options(d: random.Random, program: Program, plan: Plan, inductor: bool) -> dict[str, Any]:
    options: dict[str, Any] = {} if inductor else {"piece_compiler": "eager"}
    if d.random() < 0.75:
        sizes = sorted({n for n, _, _ in plan.steps})
        options["capture_sizes"] = sizes if d.random() < 0.7 else sizes[:1]
        options["graphs"] = "cuda" if plan.device == "cuda" else "simulated"
        options["on_capture_failure"] = "raise"
        if d.random() < 0.2:
            options["static_outputs"] = True
    if (other := d.random()) < 0.05:
        options["numerics"] = "strict"
    elif other < 0.1:
        options["fuse"] = False
    text = "\n".join([*program.body, *program.returns])
    there = sorted({f"fz::{rest.partition('(')[0]}" for rest in text.split("torch.ops.fz.")[1:]})
    if not inductor:  # whose decompositions may leave nothing of an op of aten
        there += [f"aten::{op}" for op in ("sin", "tanh") if f"= torch.{op}(" in text]
    if there and d.random() < 0.65:
        options["split_ops"] = sorted(d.sample(there, d.randrange(1, len(there) + 1)))
    return options


# -- the surroundings ------------------------------------------------------------------


def ensure_group(group: str | None) -> None:
    """A process group in place of another one: ``"fake 2"``, ``"gloo 1"``, None; ``"ranks"`` leaves it as it is."""
    if group == "ranks" or getattr(ensure_group, "current", "none") == group:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    ensure_group.current = group  # type: ignore[attr-defined]
    if group is None:
        return
    backend, world_size = group.split()
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=int(world_size))


@contextmanager
def _configured(setting: Setting) -> Iterator[None]:
    dynamo = dynamo_config.patch(recompile_limit=64, accumulated_recompile_limit=512, capture_scalar_outputs=True)
    inductor = inductor_config.patch(
        {
            "fallback_random": setting.fallback_random,
            "enable_auto_functionalized_v2": setting.functionalize_v2,
            "compile_threads": 1,
            "cpp.simdlen": 1,
        }
    )
    with dynamo, inductor:
        yield
