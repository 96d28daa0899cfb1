"""Facts about split graphs: each is seen where it is, and not where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from unsafe_ops import registered_late, with_host_epoch

from ringfence.compile_passes.facts import facts_of, judge_with_facts
from ringfence.compile_passes.fuse import SITE
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.roles import c10d
from ringfence.runtime.hazards.situation import Fact
from support import aot_graph, assigned, fuse_graph, judge

H = 16


def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    summed = c10d.wait_tensor(c10d.all_reduce(x, "sum", "0")) + residual
    return F.rms_norm(summed, (H,), None, 1e-6), summed


def fused(fn: Callable[..., object], *args: Tensor) -> GraphModule:
    gm = aot_graph(fn, *args)
    fuse_graph(gm)
    return gm


def found(gm: GraphModule, verdicts: list[Verdict]) -> list[Fact]:
    evidence = facts_of(gm, cut(gm, verdicts))
    assert all(e.message and e.where for e in evidence)
    return [e.fact for e in evidence]


def careless(gm: GraphModule, *eager: str) -> list[Verdict]:
    """The verdicts of somebody who splits at these nodes only."""
    return [Verdict(name, name, Decision.SPLIT, "mine", "", "") for name in eager]


@pytest.mark.usefixtures("fake_group")
def test_plan_of_the_judge_has_no_facts() -> None:
    def model(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        x, r = layer(x, r)
        x = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        return layer(x, r)

    gm = fused(model, torch.randn(4, H), torch.randn(4, H))
    assert found(gm, judge(gm, backends={"0": "nccl"}, capture=True)) == []


@pytest.mark.usefixtures("fake_group")
def test_predicate_read_between_collectives_of_a_piece() -> None:
    def model(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        x, r = layer(x, r)
        x = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        return layer(x, r)

    gm = fused(model, torch.randn(4, H), torch.randn(4, H))
    assert set(found(gm, careless(gm))) == {Fact.HOST_SYNC_IN_PIECE}
    (cond,) = [n.name for n in gm.graph.nodes if n.target is torch.ops.higher_order.cond]
    assert found(gm, careless(gm, cond)) == []


def test_copy_to_the_host_in_a_piece() -> None:
    with FakeTensorMode():
        gm = make_fx(lambda x: x.exp().cpu())(torch.empty(4, H, device="cuda"))
    assert found(gm, careless(gm)) == [Fact.HOST_SYNC_IN_PIECE]


@pytest.mark.parametrize(
    ("op", "facts"),
    [
        (lambda x: with_host_epoch(x, 7), [Fact.HOST_EPOCH, Fact.UNMARKED_UNSAFE_OP]),
        (registered_late, [Fact.BUFFERS_NOT_REGISTERED]),
    ],
    ids=["host epoch, unmarked", "registered late, marked"],
)
def test_known_unsafe_op_in_a_piece(op: Callable[[Tensor], Tensor], facts: list[Fact]) -> None:
    gm = aot_graph(lambda x: (op(x.exp()) + 1,), torch.randn(4, H))
    assert found(gm, careless(gm)) == facts
    assert found(gm, judge(gm, backends={}, capture=True)) == []


@pytest.mark.usefixtures("fake_group")
def test_collective_cut_in_two() -> None:
    gm = fused(lambda x, r: layer(x.sin(), r.exp()), torch.randn(4, H), torch.randn(4, H))
    (op,) = [n for n in gm.graph.nodes if SITE in n.meta]
    (first,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.sin.default]
    first.meta[SITE] = op.meta[SITE]  # as if it were the first of two launches
    (between,) = [n.name for n in gm.graph.nodes if n.target is torch.ops.aten.exp.default]
    evidence = facts_of(gm, cut(gm, careless(gm, between)))
    assert [(e.fact, e.group) for e in evidence] == [(Fact.PROTOCOL_CUT, "0")]
    assert "submod_0 and submod_2" in evidence[0].message
    assert found(gm, careless(gm)) == []


@pytest.mark.parametrize("streams", [(None, None), (None, 1), (1, 2), (2, 2)])
@pytest.mark.usefixtures("fake_group")
def test_two_streams_on_one_workspace(streams: tuple[int | None, int | None]) -> None:
    gm = fused(lambda x, r: layer(*layer(x, r)), torch.randn(4, H), torch.randn(4, H))
    ops = [n for n in gm.graph.nodes if SITE in n.meta]
    for node, stream in zip(ops, streams, strict=True):
        if stream is not None:
            node.meta["custom"] = {"stream": stream}
    assert found(gm, careless(gm)) == ([Fact.TWO_STREAMS] if streams[0] != streams[1] else [])


@pytest.mark.usefixtures("fake_group")
def test_looking_for_facts_leaves_the_graph_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cut would move a wait, and without a module for each part."""

    def run(x: Tensor) -> Tensor:
        pending = c10d.all_reduce(x * 2, "sum", "0")
        other = x.exp()
        return c10d.wait_tensor(pending) + other

    gm = aot_graph(run, torch.randn(3, H))
    before = list(gm.graph.nodes)
    monkeypatch.setattr("ringfence.compile_passes.split.split_module", None)
    verdicts, _ = judge_with_facts(gm, assigned({"0": "nccl"}, None), capture=True, split_ops=["aten::exp"])
    assert [v.op for v in verdicts if v.decision is Decision.SPLIT] == ["aten::exp"]
    assert list(gm.graph.nodes) == before
    cut(gm, verdicts)
    assert list(gm.graph.nodes) != before
