"""Every neighbourhood that must not be fused: the reason, and the graph left as it was."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from ringfence.compile_passes import Reason, find, fuse
from ringfence.runtime.collectives import ops
from ringfence.runtime.errors import GraphMetadataError
from support import aot_graph, fuse_graph

H = 16
BF16 = torch.bfloat16


def reduced(x: Tensor, op: object = dist.ReduceOp.SUM) -> Tensor:
    y = x * 2
    dist.all_reduce(y, op=op)
    return y


def norm(h: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(h, (H,), w, 1e-6)


def chain(h: Tensor, scale: Tensor, w: Tensor) -> Tensor:
    return (h.float() * scale).to(h.dtype) * w


def rms(h: Tensor, **mean: object) -> Tensor:
    return torch.rsqrt(h.float().pow(2).mean(**({"dim": -1, "keepdim": True} | mean)) + 1e-6)


Program = Callable[[Tensor, Tensor, Tensor], object]


def add_norm(x: Tensor, r: Tensor, w: Tensor) -> object:
    h = reduced(x) + r
    return norm(h, w), h


def reduce_op(op: object) -> Program:
    return lambda x, r, w: norm(reduced(x, op) + r, w)


def graph_break_shape(x: Tensor, r: Tensor, w: Tensor) -> object:
    return reduced(x)


def uses_reduced_twice(x: Tensor, r: Tensor, w: Tensor) -> object:
    y = reduced(x)
    h = y + r
    return norm(h, w), h, y * 3


def float32_sum_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> object:
    h = reduced(x).float() + r.float()
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * scale).to(x.dtype) * w, h.exp()


def float32_root_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> object:
    h = reduced(x).float() + r.float()
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * scale).to(x.dtype) * w, scale


def float32_gamma(h: Tensor, w: Tensor) -> Tensor:
    return (h.float() * rms(h) * w).to(h.dtype)


def cohere_norm(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((wide - mean) * torch.rsqrt(variance + 1e-5))).to(h.dtype)


def layer_norm_chain(h: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(h, (H,), w)


CASES: dict[str, tuple[Reason, Program]] = {
    "average": (Reason.REDUCE_OP, reduce_op(dist.ReduceOp.AVG)),
    "maximum": (Reason.REDUCE_OP, reduce_op(dist.ReduceOp.MAX)),
    "residual that grows the sum": (Reason.RESIDUAL_SHAPE, lambda x, r, w: norm(reduced(x[:1]) + r, w)),
    "scaled by a tensor": (Reason.SCALE_KIND, lambda x, r, w: norm(reduced(x) * w[0] + r, w)),
    "gated": (Reason.SCALE_KIND, lambda x, r, w: norm(reduced(x) * torch.sigmoid(r[:, :1]) + r, w)),
    "another op": (Reason.OP_BETWEEN, lambda x, r, w: norm(torch.relu(reduced(x)) + r, w)),
    "h + h": (Reason.RESIDUAL_IS_REDUCED, lambda x, r, w: norm((y := reduced(x)) + y, w)),
    "residual dtype": (Reason.RESIDUAL_DTYPE, lambda x, r, w: norm((reduced(x) + r.float().exp()).to(BF16), w)),
    "residual is a number": (Reason.RESIDUAL_KIND, lambda x, r, w: norm(reduced(x) + 1.5, w)),
    "weight dtype": (Reason.WEIGHT_DTYPE, lambda x, r, w: float32_gamma(reduced(x) + r, w.float().exp())),
    "weight shape": (Reason.WEIGHT_SHAPE, lambda x, r, w: float32_gamma(reduced(x) + r, w[:1])),
    "weight of two dimensions": (Reason.WEIGHT_SHAPE, lambda x, r, w: float32_gamma(reduced(x) + r, r[:1])),
    "layer norm, written out": (Reason.LAYER_NORM, lambda x, r, w: cohere_norm(reduced(x) + r, w)),
    "layer norm behind a bias": (Reason.LAYER_NORM, lambda x, r, w: layer_norm_chain(r + (reduced(x) + w), w)),
    "layer norm beside a residual": (Reason.LAYER_NORM, lambda x, r, w: layer_norm_chain(h := reduced(x), w) + (h + r)),
    "weight from the sum": (Reason.WEIGHT_NOT_READY, lambda x, r, w: norm(h := reduced(x) + r, h.sum(0))),
    "epsilon is a tensor": (
        Reason.EPS_KIND,
        lambda x, r, w: chain(h := reduced(x) + r, torch.rsqrt(h.float().pow(2).mean(-1, True) + w[0]), w),
    ),
    "epsilon outside the root": (
        Reason.NO_NORM,
        lambda x, r, w: chain(h := reduced(x) + r, 1 / (h.float().pow(2).mean(-1, True).sqrt() + 1e-6), w),
    ),
    "mean over rows": (Reason.MEAN_DIM, lambda x, r, w: chain(h := reduced(x) + r, rms(h, dim=0), w)),
    "mean over everything": (Reason.MEAN_DIM, lambda x, r, w: chain(h := reduced(x) + r, rms(h, dim=(0, 1)), w)),
    "mean that lost its dimension": (
        Reason.MEAN_DIM,
        lambda x, r, w: chain(h := reduced(x) + r, rms(h, keepdim=False), w),
    ),
    "mean of another tensor": (Reason.MEAN_OF_OTHER_TENSOR, lambda x, r, w: chain(reduced(x) + r, rms(r), w)),
    "sum over the wrong count": (
        Reason.NO_NORM,
        lambda x, r, w: chain(h := reduced(x) + r, torch.rsqrt(h.float().pow(2).sum(-1, True) / 7 + 1e-6), w),
    ),
    "norm of two dimensions": (Reason.MEAN_DIM, lambda x, r, w: F.rms_norm(h := reduced(x) + r, h.shape, None, 1e-6)),
    "layer norm": (Reason.LAYER_NORM, lambda x, r, w: layer_norm_chain(reduced(x) + r, w)),
    "no norm": (Reason.NO_NORM, lambda x, r, w: torch.relu(reduced(x) + r)),
    "norm leaves in float32": (Reason.NORM_DTYPE, lambda x, r, w: (h := reduced(x) + r).float() * rms(h)),
    "reduced value used elsewhere": (Reason.VALUE_USED_ELSEWHERE, uses_reduced_twice),
    "float32 sum used elsewhere": (Reason.FLOAT32_SUM_USED_ELSEWHERE, float32_sum_elsewhere),
    "root of the float32 sum used elsewhere": (Reason.FLOAT32_SUM_USED_ELSEWHERE, float32_root_elsewhere),
    "reduced in float32": (Reason.REDUCE_DTYPE, lambda x, r, w: norm(reduced(x.float()).to(BF16) + r, w)),
    "leaves the graph": (Reason.ESCAPES_GRAPH, graph_break_shape),
    "sum leaves the graph": (Reason.ESCAPES_GRAPH, lambda x, r, w: reduced(x) + r),
    "scaled sum leaves the graph as a view": (Reason.ESCAPES_GRAPH, lambda x, r, w: (reduced(x) * 3).view(2, -1)),
    "counters": (Reason.ACTIVATION_DTYPE, lambda x, r, w: reduced((x > 0).long()) + 1),
    "float64": (Reason.ACTIVATION_DTYPE, lambda x, r, w: norm(reduced(x.double()) + r.double(), w.double())),
}


def declined(fn: Program, rows: int = H, **options: object) -> tuple[Reason, str]:
    """The one decline of ``fn``, after checking that the graph kept its all-reduce and its answer."""
    x, r, w = (torch.randn(s).to(BF16) for s in ((rows, H), (rows, H), (H,)))
    gm = aot_graph(fn, x, r, w)
    args = [{"arg0_1": x, "arg1_1": r, "arg2_1": w}[n.name] for n in gm.graph.find_nodes(op="placeholder")]
    before = gm.code
    sites = fuse_graph(gm, **options)
    decline = sites[0].decline
    assert decline is not None, "fused, and must not be"
    if len(sites) == 1:
        assert gm.code == before, "a declined site changed the graph"
    assert [n for n in gm.graph.nodes if "all_reduce" in str(n.target)], args
    return decline.reason, decline.message


# Rows and hidden size are equal, so that a mean over the wrong dimension broadcasts without an error.
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("fake_group")
def test_neighbourhood_is_declined(case: str) -> None:
    reason, fn = CASES[case]
    found, message = declined(fn)
    assert found is reason, message
    assert "'" in message, f"the message names no node: {message}"


@pytest.mark.usefixtures("fake_group")
def test_the_base_case_is_fused() -> None:
    """Every case above is one step away from this one."""
    gm = aot_graph(add_norm, *(torch.randn(s).to(BF16) for s in ((H, H), (H, H), (H,))))
    assert fuse_graph(gm)[0].fused


def whole_norm(*arguments: object, op: torch._ops.OpOverload = torch.ops.aten.rms_norm.default) -> torch.fx.GraphModule:
    """The base case with its norm as one op, which CPU builds of torch decompose."""
    gm = aot_graph(add_norm, *(torch.randn(s).to(BF16) for s in ((4, H), (4, H), (H,))))
    named = {n.name: n for n in gm.graph.nodes}
    (output,) = gm.graph.find_nodes(op="output")
    out = output.args[0][0]
    with gm.graph.inserting_before(out):
        values = [named.get(a, a) if isinstance(a, str) else a for a in arguments]
        new = gm.graph.call_function(op, (named["add"], *values))
        new.meta["val"] = out.meta["val"]
        if op is torch.ops.aten._fused_rms_norm.default:
            new.meta["val"] = (out.meta["val"], named["rsqrt"].meta["val"])
            new = gm.graph.call_function(operator.getitem, (new, 0))
            new.meta["val"] = out.meta["val"]
    out.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()
    return gm


@pytest.mark.parametrize("op", [torch.ops.aten.rms_norm.default, torch.ops.aten._fused_rms_norm.default])
@pytest.mark.usefixtures("fake_group")
def test_whole_norm_op_is_fused(op: torch._ops.OpOverload) -> None:
    gm = whole_norm([H], "arg2_1", 1e-6, op=op)
    x, r, w = (torch.randn(s).to(BF16) for s in ((4, H), (4, H), (H,)))
    expected = norm(x * 2 + r, w)
    (site,) = fuse_graph(gm)
    assert site.fused and site.eps == 1e-6, site.message
    assert torch.equal(gm(x, r, w)[0], expected)
    assert fuse_graph(whole_norm([H], None, None, op=op))[0].eps == torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (([4, H], None, 1e-6), Reason.NORM_DIMS),
        (([H], "arg1_1", 1e-6), Reason.WEIGHT_KIND),
        (([H], "arg2_1", "arg2_1"), Reason.EPS_KIND),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_whole_norm_op_is_declined(arguments: tuple[object, ...], reason: Reason) -> None:
    assert fuse_graph(whole_norm(*arguments))[0].decline.reason is reason  # type: ignore[union-attr]


def edited(edit: Callable[[torch.fx.Node], None]) -> torch.fx.GraphModule:
    """The base case with its all-reduce node changed by hand, for what no front end writes."""
    gm = aot_graph(add_norm, *(torch.randn(s).to(BF16) for s in ((4, H), (4, H), (H,))))
    edit(next(n for n in gm.graph.nodes if n.name == "all_reduce"))
    return gm


@pytest.mark.usefixtures("fake_group")
def test_group_that_is_no_string_is_declined() -> None:
    gm = edited(lambda n: n.update_arg(2, n.args[0]))
    assert fuse_graph(gm)[0].decline.reason is Reason.GROUP_KIND  # type: ignore[union-attr]


@pytest.mark.usefixtures("fake_group")
def test_other_group_is_declined_when_groups_are_named() -> None:
    reason, message = declined(add_norm, groups=("tensor_parallel",))
    assert reason is Reason.OTHER_GROUP
    assert "'world'" in message and "tensor_parallel" in message


@pytest.mark.usefixtures("fake_group")
def test_two_groups_are_fused_each_over_its_own() -> None:
    other = dist.new_group([0, 1])

    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = reduced(x) + r
        y = norm(h, w)
        dist.all_reduce(y, group=other)
        h = y + h
        return norm(h, w), h

    gm = aot_graph(run, *(torch.randn(s).to(BF16) for s in ((4, H), (4, H), (H,))))
    assert all(s.fused for s in fuse_graph(gm))
    groups = [n.args[-2] for n in gm.graph.nodes if n.target is ops.all_reduce_add_rms_norm]
    assert groups == ["0", other.group_name]


@pytest.mark.usefixtures("fake_group")
def test_unused_value_is_declined() -> None:
    gm = edited(lambda n: None)
    (add,) = (n for n in gm.graph.nodes if n.name == "add")
    add.replace_all_uses_with(add.args[1])
    gm.graph.eliminate_dead_code()
    assert fuse_graph(gm)[0].decline.reason is Reason.UNUSED  # type: ignore[union-attr]


@pytest.mark.usefixtures("fake_group")
def test_mutation_between_is_declined() -> None:
    def mutate(n: torch.fx.Node) -> None:
        (residual,) = (p for p in n.graph.find_nodes(op="placeholder") if p.name == "arg1_1")
        with n.graph.inserting_after(n):
            n.graph.call_function(torch.ops.aten.mul_.Tensor, (residual, 2))

    assert fuse_graph(edited(mutate))[0].decline.reason is Reason.MUTATION_BETWEEN  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "target",
    [
        torch.ops._c10d_functional.all_reduce_.default,
        torch.ops._c10d_functional.all_reduce_,
        torch.ops._c10d_functional.all_reduce,
        torch.ops.c10d.allreduce_.default,
    ],
    ids=str,
)
@pytest.mark.usefixtures("fake_group")
def test_collective_that_is_not_functional_aten_is_declined(target: object) -> None:
    gm = edited(lambda n: setattr(n, "target", target))
    (candidate,) = find(gm)
    assert candidate.site.decline is not None and candidate.site.decline.reason is Reason.ALL_REDUCE_FORM
    assert "aot_autograd" in candidate.site.decline.message


@torch.library.custom_op("ringfence_test::reduce_with", mutates_args=())
def reduce_with(x: Tensor, group: str, op: str = "sum", tag: str = "") -> Tensor:
    return x.clone()


@reduce_with.register_fake
def _(x: Tensor, group: str, op: str = "sum", tag: str = "") -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(("op", "reason"), [("sum", None), ("max", Reason.REDUCE_OP), ("avg", Reason.REDUCE_OP)])
def test_custom_op_says_what_it_reduces_with(op: str, reason: Reason | None) -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        return norm(torch.ops.ringfence_test.reduce_with(x, "tp", op, "first layer") + r, w)

    gm = aot_graph(run, *(torch.randn(s) for s in ((4, H), (4, H), (H,))))
    (site,) = (c.site for c in find(gm, all_reduce_ops={"ringfence_test::reduce_with": None}))
    assert (site.decline.reason if site.decline else None) is reason
    assert site.group == "tp"


@pytest.mark.usefixtures("fake_group")
def test_layout_that_later_ops_were_traced_with() -> None:
    def run(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = r.transpose(0, 1) + reduced(x)
        return norm(h, w), h.transpose(0, 1).view(-1, H)

    gm = aot_graph(run, torch.randn(4, 3, H), torch.randn(3, 4, H), torch.randn(H))
    (site,) = fuse_graph(gm)
    assert site.decline is not None and site.decline.reason is Reason.LAYOUT and "contiguous" in site.message


@pytest.mark.usefixtures("fake_group")
def test_dynamic_hidden_size_is_declined() -> None:
    x, r = torch.randn(4, H), torch.randn(4, H)
    gm = aot_graph(lambda x, r: (reduced(x) + r) * rms(x), x, r, dynamic=[(0, 1), (1, 1)])
    assert find(gm)[0].site.decline.reason is Reason.HIDDEN_SIZE_DYNAMIC  # type: ignore[union-attr]


@pytest.mark.usefixtures("fake_group")
def test_declined_functional_collective_keeps_its_wait() -> None:
    gm = aot_graph(
        lambda x, r: funcol.all_reduce(x * 2, "sum", dist.group.WORLD) * r, torch.randn(4, H), torch.randn(4, H)
    )
    fuse_graph(gm)
    assert [n for n in gm.graph.nodes if "wait_tensor" in str(n.target)]


@pytest.mark.usefixtures("fake_group")
def test_candidates_of_another_graph_are_refused() -> None:
    args = [torch.randn(s) for s in ((4, H), (4, H), (H,))]
    one, other = aot_graph(add_norm, *args), aot_graph(add_norm, *args)
    with pytest.raises(GraphMetadataError, match="another graph"):
        fuse(one, find(other))
