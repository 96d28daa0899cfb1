"""Engines' own RMSNorm ops: known by name, listed by the user, or run; and declined with a reason that says which."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringfence import Backend
from ringfence.compile_passes import Reason, Rounding, Site, find, fuse
from ringfence.compile_passes.norm_ops import KNOWN, NormOp, norm_ops_of, read_schema
from ringfence.compile_passes.verify import verify
from ringfence.runtime.errors import OptionsError
from support import TOLERANCE, aot_graph, relative_error

H = 16
CPU = torch.device("cpu")


def rms(x: Tensor, w: Tensor, eps: float, bias: float = 0.0) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * (w.float() + bias)).to(x.dtype)


@torch.library.custom_op("norm_ops_test::rms_norm", mutates_args=())
def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return rms(x, w, eps)


@rms_norm.register_fake
def _(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("norm_ops_test::gemma_rmsnorm", mutates_args=("out",))
def gemma_rmsnorm(out: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool = False) -> None:
    out.copy_(rms(input, weight, eps, 1.0))


@torch.library.custom_op("norm_ops_test::fused_add_rms_norm", mutates_args=("x", "residual"))
def fused_add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> None:
    residual.add_(x)
    x.copy_(rms(residual, w, eps))


@torch.library.custom_op("norm_ops_test::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms(x + residual, w, eps), x + residual


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("norm_ops_test::other_rms_norm", mutates_args=())
def other_rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Called like one, and a LayerNorm."""
    return F.layer_norm(x, (x.shape[-1],), w, None, eps)


@other_rms_norm.register_fake
def _(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("norm_ops_test::plus_one", mutates_args=())
def plus_one(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return rms(x, w, eps, 1.0)


@plus_one.register_fake
def _(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("norm_ops_test::device_rms_norm", mutates_args=())
def device_rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    if x.ndim == 2:  # not as the model calls it
        raise RuntimeError("no kernel for this device")
    return rms(x, w, eps)


@device_rms_norm.register_fake
def _(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


engine = torch.ops.norm_ops_test
Program = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def ar(x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    return y


def returned(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = r + ar(x)
    return engine.rms_norm(h, w, 1e-6), h


def alone(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = ar(x)
    return engine.rms_norm(h, w, 1e-6), h + r


def written(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = r + ar(x) * 0.22
    out = torch.empty_like(h)
    engine.gemma_rmsnorm(out, h, w, 1e-5)
    return out, h


def in_place(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y, r = ar(x), r.clone()
    engine.fused_add_rms_norm(y, r, w, 1e-6)
    return y, r


def in_place_views(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y, r = ar(x), r.clone()
    engine.fused_add_rms_norm(y.view(-1, H), r.view(-1, H), w, 1e-6)
    return y, r


def sum_unread(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y, r = ar(x), r.clone()
    engine.fused_add_rms_norm(y, r, w, 1e-6)
    return (y,)


def added(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return engine.add_rms_norm(ar(x) + ar(r.sin()), r, w, 1e-6)  # type: ignore[no-any-return]


def swapped(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return engine.add_rms_norm(r, ar(x), w, 1e-6)  # type: ignore[no-any-return]


def layers(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    r = r.clone()
    for _ in range(3):
        x = ar(x)
        engine.fused_add_rms_norm(x, r, w, 1e-6)
    return x, r


FUSED = (returned, alone, written, in_place, in_place_views, sum_unread, added, swapped, layers)


def graph_of(program: Program, dtype: torch.dtype = torch.float32) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    args = [torch.randn(s).to(dtype) for s in ((2, 3, H), (2, 3, H), (H,))]
    gm = aot_graph(program, *args)
    named = {f"arg{i}_1": a for i, a in enumerate(args)}
    return gm, [named[n.name] for n in gm.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("program", FUSED, ids=lambda p: p.__name__)
@pytest.mark.usefixtures("fake_group")
def test_op_that_computes_an_rms_norm_is_fused(program: Program, dtype: torch.dtype) -> None:
    gm, args = graph_of(program, dtype)
    expected = [o.double() for o in gm(*args)]
    rows = norm_ops_of(gm, {"norm_ops_test::add_rms_norm": 0.0}, CPU)
    assert all(isinstance(row, NormOp) for row in rows.values()), rows
    strict = find(gm, strict=True, norm_ops=rows)
    assert all(c.site.decline and c.site.decline.reason is Reason.ROUNDING_DIFFERS for c in strict)
    sites = fuse(gm, verify(find(gm, norm_ops=rows), CPU))
    assert all(s.fused and Rounding.NORM_OP in s.roundings for s in sites), [s.message for s in sites]
    left = [str(n.target) for n in gm.graph.nodes if "norm_ops_test" in str((n.target, n.args))]
    assert not left and not [n for n in gm.graph.nodes if "auto_functionalized" in str(n.target)], gm.code
    for ours, wanted in zip(gm(*args), expected, strict=True):
        assert relative_error(ours, wanted) <= 2 * TOLERANCE[dtype]


def declined(program: Program, rows: dict[str, NormOp | str] | None = None) -> Site:
    gm, _ = graph_of(program)
    before = gm.code
    (site,) = fuse(gm, find(gm, norm_ops=norm_ops_of(gm, None, CPU) if rows is None else rows))
    assert not site.fused and gm.code == before
    assert site.decline is not None and site.decline.reason is Reason.NORM_OP, site.message
    return site


@pytest.mark.usefixtures("fake_group")
def test_op_that_is_only_called_like_one_is_declined() -> None:
    def other(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = r + ar(x)
        return engine.other_rms_norm(h, w, 1e-6), h

    def on_a_device(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = r + ar(x)
        return engine.device_rms_norm(h, w, 1e-6), h

    assert "computes something else" in declined(other).message
    message = declined(on_a_device).message
    assert "no kernel for this device" in message and "norm_ops=['norm_ops_test::device_rms_norm']" in message


@pytest.mark.usefixtures("fake_group")
def test_op_that_nobody_tried_is_named_with_the_option() -> None:
    for program in (returned, in_place):
        gm, _ = graph_of(program)
        (candidate,) = find(gm)
        message = candidate.site.message
        assert candidate.site.decline is not None and candidate.site.decline.reason is Reason.NORM_OP, message
        assert "norm_ops=['norm_ops_test::" in message


@pytest.mark.usefixtures("fake_group")
def test_a_part_of_a_tensor_is_not_taken_for_the_whole() -> None:
    def part(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, r = ar(x), r.clone()
        engine.fused_add_rms_norm(y[:1], r[:1], w, 1e-6)
        return y, r

    gm, _ = graph_of(part)
    (candidate,) = find(gm, norm_ops=norm_ops_of(gm, {"norm_ops_test::fused_add_rms_norm": 0.0}, CPU))
    assert not candidate.site.fused


@pytest.mark.parametrize(
    ("schema", "roles"),
    [
        ("_C::rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()", ("input", None, "result")),
        (
            "_C::fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
            ("input", "residual", None),
        ),
        (
            "sgl_kernel::rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
            ("input", None, "output"),
        ),
        (
            "vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
            ("x", None, None),
        ),
        (
            "vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon)"
            " -> (Tensor, Tensor)",
            ("x", "x_residual", None),
        ),
        ("trtllm::flashinfer_rmsnorm(Tensor input, Tensor weight, float eps) -> Tensor", ("input", None, None)),
    ],
)
def test_schemas_of_engines(schema: str, roles: tuple[str | None, ...]) -> None:
    parsed = torch._C.parse_schema(schema)
    assert parsed.name in KNOWN
    row = read_schema(parsed, KNOWN[parsed.name])
    assert isinstance(row, NormOp) and (row.x, row.residual, row.out) == roles and row.weight == "weight"


def test_schema_with_more_in_it_is_none() -> None:
    for schema in (
        "_C::rms_norm(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()",
        "e::rms_norm(Tensor x, Tensor w) -> Tensor",
        "e::rms_norm(Tensor[] x, Tensor w, float eps) -> Tensor",
    ):
        assert isinstance(read_schema(torch._C.parse_schema(schema)), str)


@pytest.mark.usefixtures("fake_group")
def test_backend_runs_what_it_does_not_know_and_takes_a_users_word() -> None:
    def fused(program: Program, **options: object) -> Site:
        torch._dynamo.reset()
        backend = Backend(piece_compiler="eager", **options)
        args = [torch.randn(s) for s in ((2, 3, H), (2, 3, H), (H,))]
        with torch.no_grad():
            ours, theirs = torch.compile(program, backend=backend, fullgraph=True)(*args), program(*args)
        assert all(
            relative_error(a, b.double()) <= 2 * TOLERANCE[torch.float32] for a, b in zip(ours, theirs, strict=True)
        )
        return backend.reports[0].sites[0]

    def on_a_device(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = r + ar(x)
        return engine.device_rms_norm(h, w, 1e-6), h

    assert fused(returned).fused and fused(in_place).fused
    assert not fused(on_a_device).fused
    assert fused(on_a_device, norm_ops=["norm_ops_test::device_rms_norm"]).fused

    def layer_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = r + ar(x)
        return engine.other_rms_norm(h, w, 1e-6), h

    def plus_one(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = r + ar(x)
        return engine.plus_one(h, w, 1e-6), h

    site = fused(layer_norm, norm_ops=["norm_ops_test::other_rms_norm"])
    assert not site.fused and "other_rms_norm, and on generated inputs it does not compute an RMSNorm" in site.message
    site = fused(plus_one, norm_ops=["norm_ops_test::plus_one"])
    assert not site.fused and "with 1.0 it does: norm_ops={'norm_ops_test::plus_one': 1.0}" in site.message
    assert fused(plus_one, norm_ops={"norm_ops_test::plus_one": 1.0}).fused
    with pytest.raises(OptionsError, match="added to the weight"):
        Backend(norm_ops={"norm_ops_test::device_rms_norm": "gemma"})
