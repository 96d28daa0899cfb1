"""Trace a program, rewrite it, run both, and compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from neighbourhoods.function import Function
from neighbourhoods.programs import Program
from neighbourhoods.spellings import ROUND_TRIPS
from neighbourhoods.stand_in import CUSTOM_OPS, Run, c10d
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

from ringfence.compile_passes import Candidate, Rounding, Site, find, fuse
from ringfence.compile_passes.repeats import merge_repeats
from ringfence.runtime.collectives import ops


def trace(program: Program) -> GraphModule:
    """The graph that AOT would hand to the backend, with symbols where the program is dynamic."""
    function = Function(program)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [_fake(mode, x, program.dynamic) for x in function.inputs()]
    run: Callable[..., Any] = lambda *args: function(*args)  # noqa: E731
    if program.front in ("aot", "inductor"):
        run = dispatch_functionalize(run)
    tracer = make_fx(
        run,
        decomposition_table=select_decomp_table() if program.front == "inductor" else {},
        tracing_mode="real" if program.dynamic == "nothing" else "symbolic",
        pre_dispatch=program.front == "pre_dispatch",
    )
    with mode, torch.no_grad():
        gm = tracer(*fakes)
    gm.graph.eliminate_dead_code()
    if program.cse and program.front in ("aot", "inductor"):
        gm = GraphModule(gm, fx_graph_cse(gm.graph))
    gm.recompile()
    return gm


def _fake(mode: FakeTensorMode, x: Tensor, dynamic: str) -> Tensor:
    def kind(dim: int) -> DimDynamic:
        tokens = x.ndim > 1 and dim == x.ndim - 2
        return DimDynamic.DYNAMIC if dynamic == "everything" or (dynamic == "tokens" and tokens) else DimDynamic.STATIC

    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext([kind(d) for d in range(x.ndim)]))


def find_sites(program: Program, gm: GraphModule) -> list[Candidate]:
    return find(gm, strict=program.strict, groups=program.groups, all_reduce_ops=CUSTOM_OPS)


def execute(program: Program, gm: GraphModule, untrue: Collection[str] = ()) -> list[Tensor]:
    """``untrue``: nodes whose metadata are not what torch's own op returns."""
    run = Run(gm)
    run.untrue = frozenset(untrue)
    with torch.no_grad():
        return [x for x in tree_leaves(run.run(*Function(program).inputs())) if isinstance(x, Tensor)]


def _untrue(program: Program, gm: GraphModule) -> list[str]:
    """The nodes of a graph as it was traced that are not what they promise: the meta kernel of some op is wrong."""
    found: list[str] = []

    class Look(Run):
        def run_node(self, n: Node) -> Any:
            try:
                return super().run_node(n)
            except AssertionError:
                found.append(n.name)
                return Interpreter.run_node(self, n)

    with torch.no_grad():
        Look(gm).run(*Function(program).inputs())
    return found


def _all_reduces(gm: GraphModule) -> int:
    def is_one(target: object, args: tuple[Any, ...]) -> bool:
        names = (str(target), str(args[0]) if args else "")
        return target is c10d.all_reduce.default or any(n.startswith("neighbourhoods.all_reduce") for n in names)

    return sum(n.op == "call_function" and is_one(n.target, n.args) for n in gm.graph.nodes)


def _fused(gm: GraphModule) -> int:
    targets = (ops.all_reduce_add_rms_norm, ops.all_reduce_rms_norm)
    return sum(n.op == "call_function" and n.target in targets for n in gm.graph.nodes)


_OF_TERMS = {Rounding.MERGED, Rounding.SCALED, Rounding.RESIDUALS, Rounding.BIAS}

#: One unit in the last place, which a float32 sum in another order may flip; for float32 that sum itself.
_ULP = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

#: Several roundings at another place: a norm in the activation dtype rounds after every step.
_ROUNDINGS = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}


def _errors(actual: Tensor, expected: Tensor, hidden: int, share: float) -> Tensor:
    """|actual - expected| by element, relative to it and to a share of the rms of its row.

    Of what is shorter than a row of activations, one element may be all, and may have cancelled: all rows count there.
    """
    a, b = actual.double().reshape(-1, max(1, actual.shape[-1] if actual.ndim else 1)), expected.double()
    b = b.reshape(a.shape)
    squares = b.square().nanmean(-1, keepdim=True)
    floor = (squares if b.shape[-1] >= hidden else squares.nanmean()).sqrt() * share + 1e-12
    errors = (a - b).abs() / (b.abs() + floor)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, errors.nan_to_num(nan=torch.inf))


def difference(
    program: Program, actual: Sequence[Tensor], expected: Sequence[Tensor], sites: Sequence[Site] = ()
) -> str | None:
    """How two runs of a program differ by more than its options allow, or None."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs instead of {len(expected)}"
    used = {name for b in program.blocks for name in (b.middle, b.end, b.factor)}
    dtype, chain = program.dtype, len(program.blocks)
    # Terms that are added in another order may cancel: their roundings are as large as they were.
    terms = _OF_TERMS & {r for s in sites for r in s.roundings}
    if program.strict:
        bound = _ULP[dtype]
    else:  # The coarsest rounding in the source counts: the fused op may leave it out.
        bound = max(_ROUNDINGS[d] for d in {dtype, *(ROUND_TRIPS[n] for n in used & {"bfloat16", "float16"})})
    bound *= 2 if terms else 1
    bound *= chain**2  # a sum behind another site may cancel, and its norm then enlarges what came before
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
        errors = _errors(a, b, program.hidden, share=0.01 if chain == 1 and not terms else 1.0)
        wrong, unequal = int((errors > bound).sum()), int((errors > 0).sum())
        # A step function downstream of another rounding flips now and then; left out, it is wrong everywhere.
        steps = bool(used & {"int32", "float8", "bool"}) and not program.strict
        # In half precision a float32 sum in another order is seldom seen at all.
        moved = program.strict and dtype is not torch.float32 and unequal > 2 + 0.02 * errors.numel()
        if wrong > (0.25 * errors.numel() if steps else 0) or moved:
            return (
                f"output {i} differs in {unequal} of {errors.numel()} elements, in {wrong} by more than {bound:.1e}; "
                f"at most by {float(errors.max()):.1e}"
            )
    return None


def problem(program: Program) -> tuple[str | None, list[Site], str]:
    """What is wrong with the rewritten program, its sites, and both graphs as text."""
    gm = trace(program)
    text = gm.code
    untrue = _untrue(program, gm)
    expected, before = execute(program, gm, untrue), _all_reduces(gm)
    merge_repeats(gm)
    sites = fuse(gm, find_sites(program, gm))
    text += "\n# ---- becomes ----\n" + gm.code
    gm.graph.lint()
    fused, after = _fused(gm), _all_reduces(gm)
    merged = [s for s in sites if s.merged_into is not None]
    if fused != sum(s.fused for s in sites) - len(merged):
        return f"{sum(s.fused for s in sites)} sites are reported as fused, and {fused} are", sites, text
    if any(sites[s.merged_into].merged_into is not None or not sites[s.merged_into].fused for s in merged):
        return "a site is merged into one that is not fused", sites, text
    if fused + len(merged) + after != before or len(sites) != before:
        return f"{before} all-reduces became {fused} fused and {after} others in {len(sites)} sites", sites, text
    return difference(program, execute(program, gm, untrue), expected, sites), sites, text
