"""Every spelling of all-reduce + add + RMSNorm is one fused op, and computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from ringfence.compile_passes import find
from ringfence.runtime.collectives import ops
from support import TOLERANCE, aot_graph, fuse_graph, relative_error

H = 16


@torch.library.custom_op("ringfence_test::all_reduce", mutates_args=())
def engine_all_reduce(x: Tensor, group_name: str) -> Tensor:
    return x.clone()


@engine_all_reduce.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("ringfence_test::all_reduce_", mutates_args=("x",))
def engine_all_reduce_(x: Tensor, group_name: str) -> None:
    pass


def in_place(y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y


def in_place_with_group(y: Tensor) -> Tensor:
    dist.all_reduce(y, group=dist.group.WORLD)
    return y


def in_place_through_view(y: Tensor) -> Tensor:
    dist.all_reduce(y.view(-1, H))
    return y


def functional(y: Tensor) -> Tensor:
    return funcol.all_reduce(y, "sum", dist.group.WORLD)


def custom(y: Tensor) -> Tensor:
    return torch.ops.ringfence_test.all_reduce(y, "0")


def custom_in_place(y: Tensor) -> Tensor:
    torch.ops.ringfence_test.all_reduce_(y, "0")
    return y


ALL_REDUCES = {f.__name__: f for f in (in_place, functional)}
MORE_ALL_REDUCES = {f.__name__: f for f in (in_place_with_group, in_place_through_view, custom, custom_in_place)}

ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": lambda y, r: y.add_(r),
    "torch.add": lambda y, r: torch.add(r, y),
}


def rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.rms_norm": lambda h, w: F.rms_norm(h, (H,), w, 1e-6),
    "F.rms_norm eps=None": lambda h, w: F.rms_norm(h, (H,), w),
    "llama: cast, then weight": lambda h, w: w * (h.float() * rms(h.float())).to(h.dtype),
    "weight, then cast": lambda h, w: (h.float() * rms(h.float()) * w.float()).to(h.dtype),
    "weight of lower dtype, then cast": lambda h, w: (h.float() * rms(h.float()) * w).to(h.dtype),
    "gemma: 1 + weight": lambda h, w: (h.float() * rms(h.float()) * (1.0 + w.float())).to(h.dtype),
    "x / sqrt": lambda h, w: (h.float() / torch.sqrt(1e-6 + h.float().square().mean(-1, keepdim=True))).to(h.dtype) * w,
    "1 / sqrt * x": lambda h, w: (1 / (h.float().square().mean(-1, True) + 1e-6).sqrt() * h.float()).to(h.dtype) * w,
    "x * x, sum / H, ** -0.5": lambda h, w: (
        h.float() * ((h.float() * h.float()).sum(-1, keepdim=True) / H + 1e-6) ** -0.5 * w
    ).to(h.dtype),
    "mean without keepdim": lambda h, w: (
        (h.float() * torch.rsqrt(h.float().pow(2).mean(-1) + 1e-6).unsqueeze(-1)).to(h.dtype) * w
    ),
}
MORE_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no weight": lambda h, w: F.rms_norm(h, (H,), None, 1e-6),
    "no upcast": lambda h, w: h * rms(h) * w,
    "bias added in low precision": lambda h, w: F.rms_norm(h, (H,), 1.0 + w, 1e-6),
    "viewed to rows and back": lambda h, w: F.rms_norm(h.view(-1, H), (H,), w, 1e-6).view(h.shape),
    "sum * (1 / H)": lambda h, w: (
        (h.float() * torch.rsqrt(h.float().pow(2).sum(-1, keepdim=True) * (1 / H) + 1e-6)).to(h.dtype) * w
    ),
    "weight computed late": lambda h, w: F.rms_norm(h, (H,), (w.float() * 2).to(h.dtype), 1e-6),
}

ENGINE_OPS = {"ringfence_test::all_reduce": None, "ringfence_test::all_reduce_": None}


def program(
    all_reduce: Callable, add: Callable, norm: Callable
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = add(all_reduce(x * 2), r)
        return norm(h, w), h, w * 2  # so that a norm without a weight leaves the graph its third input

    return run


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (3, H)) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(H).to(dtype)


ADD_NORM, NORM = "all_reduce_add_rms_norm", "all_reduce_rms_norm"


def check(
    fn: Callable, args: tuple[Tensor, ...], kind: str = ADD_NORM, *, count: int = 1, inductor: bool = False
) -> None:
    gm = aot_graph(fn, *args, inductor=inductor)
    reference = [o.double() for o in gm(*args)]
    sites = fuse_graph(gm, all_reduce_ops=ENGINE_OPS)
    assert [(s.fused, s.kind) for s in sites] == [(True, kind)] * count, [s.message for s in sites]
    targets = [n.target for n in gm.graph.nodes]
    assert targets.count(ops.all_reduce_add_rms_norm) + targets.count(ops.all_reduce_rms_norm) == count
    assert not [t for t in targets if "all_reduce.default" in str(t) or "wait_tensor" in str(t)]
    for actual, expected in zip(gm(*args), reference, strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[args[0].dtype]


#: Who decomposes a norm has no part in an all-reduce: each norm under both, each all-reduce under both, not all four.
FRONTS = [
    *((norm, *pair) for norm in NORMS for pair in (("in_place", False), ("functional", True))),
    *(("F.rms_norm", *pair) for pair in (("in_place", True), ("functional", False))),
]


@pytest.mark.parametrize(("norm", "all_reduce", "inductor"), FRONTS)
@pytest.mark.usefixtures("fake_group")
def test_spelling_is_fused_with_every_add(norm: str, all_reduce: str, inductor: bool) -> None:
    """The adds are sites of one graph, on values of their own."""

    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        outputs: tuple[Tensor, ...] = ()
        for i, add in enumerate(ADDS.values()):
            outputs += program(ALL_REDUCES[all_reduce], add, NORMS[norm])(x[i], r[i], w[i])
        return outputs

    shapes = ((len(ADDS), 3, H), (len(ADDS), 3, H), (len(ADDS), H))
    args = tuple(torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    check(run, args, count=len(ADDS), inductor=inductor)


@pytest.mark.parametrize("norm", MORE_NORMS)
@pytest.mark.usefixtures("fake_group")
def test_other_norm_is_fused(norm: str) -> None:
    check(program(in_place, ADDS["y + r"], MORE_NORMS[norm]), inputs(torch.bfloat16))


@pytest.mark.parametrize("all_reduce", MORE_ALL_REDUCES)
@pytest.mark.usefixtures("fake_group")
def test_other_all_reduce_is_fused(all_reduce: str) -> None:
    check(program(MORE_ALL_REDUCES[all_reduce], ADDS["y + r"], NORMS["F.rms_norm"]), inputs(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # all others are bfloat16
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("fake_group")
def test_three_dimensions_are_fused(norm: str, dtype: torch.dtype) -> None:
    check(program(in_place, ADDS["r + y"], NORMS[norm]), inputs(dtype, (2, 3, H)))


@pytest.mark.parametrize("norm", NORMS | MORE_NORMS)
@pytest.mark.usefixtures("fake_group")
def test_norm_without_residual_is_fused(norm: str) -> None:
    """The first layer, and post-norm models; the reduced value may be used again."""

    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        y = in_place(x * 2)
        return (NORMS | MORE_NORMS)[norm](y, w), y + r, y, w * 2

    check(run, inputs(torch.bfloat16), NORM)


@pytest.mark.usefixtures("fake_group")
def test_views_between_all_reduce_and_add_are_hoisted() -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = in_place(x.view(-1, H) * 2).view(r.shape) + r
        return F.rms_norm(h, (H,), w, 1e-6), h

    check(run, inputs(torch.bfloat16, (2, 3, H)))


@pytest.mark.usefixtures("fake_group")
def test_norm_alone_and_residual_alone_are_outputs() -> None:
    norm_only = aot_graph(lambda x, r, w: F.rms_norm(in_place(x * 2) + r, (H,), w, 1e-6), *inputs(torch.bfloat16))
    assert fuse_graph(norm_only)[0].fused
    # AOT removes a dead norm, so a graph in which only the sum is used is made by hand.
    residual_only = aot_graph(program(in_place, ADDS["y + r"], NORMS["F.rms_norm"]), *inputs(torch.bfloat16))
    (output,) = residual_only.graph.find_nodes(op="output")
    output.args = ((output.args[0][1],),)
    assert fuse_graph(residual_only)[0].fused
    args = inputs(torch.bfloat16)
    (summed,) = residual_only(*args)
    assert torch.equal(summed, args[0] * 2 + args[1])


@pytest.mark.usefixtures("fake_group")
def test_float32_residual_is_noted_under_kernel_and_declined_under_strict() -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = in_place(x * 2).float() + r.float()
        return (h * rms(h)).to(x.dtype) * w, h.to(x.dtype)

    args = inputs(torch.bfloat16)
    check(run, args)
    (site,) = (c.site for c in find(aot_graph(run, *args)))
    assert "unrounded float32 sum" in site.message
    (strict,) = (c.site for c in find(aot_graph(run, *args), strict=True))
    assert strict.decline is not None and strict.decline.reason == "rounding_differs"


@pytest.mark.usefixtures("fake_group")
def test_float32_sum_that_is_rounded_before_the_norm_is_exact() -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = (in_place(x * 2).float() + r.float()).to(x.dtype)
        return F.rms_norm(h, (H,), w, 1e-6), h

    args = inputs(torch.bfloat16)
    gm = aot_graph(run, *args)
    expected = gm(*args)
    (site,) = fuse_graph(gm, strict=True)
    assert site.fused, site.message
    assert all(map(torch.equal, gm(*args), expected))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("fake_group")
def test_strict_fuses_only_what_is_bitwise_equal(norm: str) -> None:
    args = inputs(torch.bfloat16)
    gm = aot_graph(program(in_place, ADDS["y + r"], NORMS[norm]), *args)
    expected = gm(*args)
    (site,) = fuse_graph(gm, strict=True)
    assert site.fused == (norm in STRICT), site.message
    for actual, reference in zip(gm(*args), expected, strict=True):
        assert torch.equal(actual, reference)


STRICT = {
    "F.rms_norm",
    "F.rms_norm eps=None",
    "weight, then cast",
    "weight of lower dtype, then cast",
    "gemma: 1 + weight",
    "x * x, sum / H, ** -0.5",
}


@pytest.mark.usefixtures("fake_group")
def test_dynamic_token_count_is_fused() -> None:
    x, r, w = inputs(torch.bfloat16, (5, H))
    fn = program(in_place, ADDS["y + r"], NORMS["llama: cast, then weight"])
    gm = aot_graph(fn, x, r, w, dynamic=[(0, 0), (1, 0)])
    (site,) = fuse_graph(gm)
    assert site.fused and site.hidden_size == H
    symbols = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], torch.SymInt)]
    assert symbols, "the graph is not dynamic, so this test shows nothing"
    x, r, _ = inputs(torch.bfloat16, (9, H))
    norm, h, _ = gm(*[9] * len(symbols), x, r, w)
    assert torch.equal(h, x * 2 + r)
    assert relative_error(norm, NORMS["llama: cast, then weight"](h, w)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.usefixtures("fake_group")
def test_residual_computed_after_the_all_reduce() -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        y = in_place(x * 2)
        late = torch.sigmoid(r) * 3
        h = y + late
        return F.rms_norm(h, (H,), w, 1e-6), h

    check(run, inputs(torch.bfloat16))


@pytest.mark.usefixtures("fake_group")
def test_chain_of_sites_follows_replaced_nodes() -> None:
    """The residual of a site is the sum of the one before, whose node is gone by then."""

    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        for _ in range(4):
            r = in_place(x * 2) + r
            x = F.rms_norm(r, (H,), w, 1e-6)
        return x, r

    args = inputs(torch.float32)
    gm = aot_graph(run, *args)
    reference = gm(*args)
    assert [s.fused for s in fuse_graph(gm)] == [True] * 4
    for actual, expected in zip(gm(*args), reference, strict=True):
        assert relative_error(actual, expected) <= 4 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
def test_two_norms_of_one_sum_share_the_fused_sum() -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = in_place(x * 2) + r
        return F.rms_norm(h, (H,), w, 1e-6), F.rms_norm(h, (H,), w * 2, 1e-6), h

    check(run, inputs(torch.bfloat16))


@pytest.mark.usefixtures("fake_group")
def test_dtensor_row_parallel_linear_is_fused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(H, 2 * H, bias=False), torch.nn.Linear(2 * H, H, bias=False)
            self.norm = torch.nn.RMSNorm(H)

        def forward(self, x: Tensor, r: Tensor) -> object:
            h = self.down(torch.relu(self.up(x))) + r
            return self.norm(h), h

    mesh = init_device_mesh("cpu", (2,))
    block = parallelize_module(Block(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    gm = aot_graph(block, torch.randn(3, H), torch.randn(3, H))
    (site,) = fuse_graph(gm)
    assert site.fused and site.kind == ADD_NORM, site.message


@pytest.mark.parametrize(
    "scale",
    [torch.randn(1, 1, H), torch.randn(1, 3, 1), torch.randn(1, 3, H), torch.randn(1), torch.tensor(0.3)],
    ids=["a sample's", "a gate", "whole", "one element", "no dimension"],
)
@pytest.mark.usefixtures("fake_group")
def test_weightless_norm_is_fused_whatever_scales_it(scale: Tensor) -> None:
    """Modulations of diffusion models, gates of routers: what is no weight of H elements ends the norm."""

    def run(x: Tensor, r: Tensor, scale: Tensor) -> object:
        y = x * 2
        dist.all_reduce(y)
        h = r + y
        return F.rms_norm(h, (H,), None, 1e-6) * (1 + scale), h

    x, r = torch.randn(1, 3, H), torch.randn(1, 3, H)
    gm = aot_graph(run, x, r, scale)
    (site,) = fuse_graph(gm)
    assert site.fused and not site.roundings, site.message
    (fused,) = gm.graph.find_nodes(op="call_function", target=ops.all_reduce_add_rms_norm)
    assert fused.args[2] is None
    expected = F.rms_norm(2 * x + r, (H,), None, 1e-6) * (1 + scale)
    given = {"arg0_1": x, "arg1_1": r, "arg2_1": scale}
    out = gm(*(given[n.name] for n in gm.graph.find_nodes(op="placeholder")))[0]
    assert relative_error(out, expected) <= TOLERANCE[torch.float32]
