"""Dispatch and combine in a graph that ringfence compiles: what is refused, judged, compared and left alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringfence
from ringfence.compile_passes.assignment import Assignment
from ringfence.compile_passes.facts import judge_with_facts
from ringfence.compile_passes.judge import Decision
from ringfence.compile_passes.lower import inductor_piece
from ringfence.runtime.collectives import moe_reference
from ringfence.runtime.errors import RefusedError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Situation
from ringfence.runtime.watch.agree import PlanDigest, first_difference
from ringfence.runtime.watch.supervision import Supervision
from support import aot_graph, judge, start_fake_group

E, H = 4, 16


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    start_fake_group(2)
    yield
    dist.destroy_process_group()


def layer(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=capacity, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0].sin(), sent.route) + 1


def into(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=capacity, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0].sin(), sent.route, out=torch.zeros_like(x)) + 1


def own_count(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
    return layer(x, ids, x.shape[0])


def twice_own_count(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
    return layer(x, ids, 2 * ids.shape[0] + capacity)


def from_data(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
    return layer(x, ids, ids.max().item() + capacity)  # type: ignore[arg-type]


def compile_layer(fn: Callable[..., Tensor], capacity: int = 8, tokens: int = 5, **options: Any) -> list[PlanDigest]:
    digests: list[PlanDigest] = []

    def supervise(_: Any, digest: PlanDigest) -> Supervision:
        digests.append(digest)
        return Supervision()

    torch._dynamo.reset()
    backend = ringfence.Backend(piece_compiler="eager", **options)
    backend.supervisor.supervise = supervise  # type: ignore[method-assign]
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled(torch.randn(tokens, H), torch.randint(0, E, (tokens, 2)), capacity)
    return digests


@pytest.mark.parametrize("capture_sizes", [(), (5,)])
@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (own_count, "this rank's own token count"),
        (twice_own_count, "this rank's own token count"),
        (from_data, "read from data on the host"),
    ],
)
def test_a_capacity_that_ranks_cannot_have_agreed_on(
    fn: Callable[..., Tensor], says: str, capture_sizes: tuple[int, ...]
) -> None:
    with pytest.raises(Exception, match=says) as caught:
        compile_layer(fn, capture_sizes=capture_sizes, graphs="simulated")
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, RefusedError) and "as an int input of the graph" in str(error)


def test_ranks_compare_capacity_experts_and_widths_and_not_their_tokens() -> None:
    """The capacity is an input of the engine's, so its value is compared before each capture, and with every step."""
    (digest,) = compile_layer(layer)
    first, second = [text for name, text in digest.parts if name.startswith("call ")]
    assert "capacity n0, 4 experts: float32 [..., n1], int64 [..., n2]" in first and "by reference" in first
    assert "moe_combine" in second and "2*n0*n1 float32" in second
    assert digest.parts == compile_layer(layer, tokens=7)[0].parts

    def wider(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
        return layer(torch.cat((x, x), 1), ids, capacity)

    difference = first_difference([digest.parts, compile_layer(wider)[0].parts])
    assert difference is not None and "float32 [..., 2*n1]" in difference
    eight, nine = (
        compile_layer(fn)[0] for fn in (lambda x, ids, _: layer(x, ids, 8), lambda x, ids, _: layer(x, ids, 9))
    )
    difference = first_difference([eight.parts, nine.parts])
    assert difference is not None and "capacity 8" in difference and "capacity 9" in difference


@pytest.mark.parametrize("fn", [layer, into])
def test_over_gloo_they_run_between_pieces_and_over_nccl_in_one(fn: Callable[..., Tensor]) -> None:
    gm = aot_graph(lambda x, ids: fn(x, ids, 8), torch.randn(5, H), torch.randint(0, E, (5, 2)))
    for backend, decision, rule in (("gloo", Decision.SPLIT, "host_collective"), ("nccl", Decision.IN_GRAPH, "nccl")):
        verdicts = judge(gm, backends={"world": backend}, capture=True)
        assert [v.op.partition("moe_")[2][:8] for v in verdicts] == ["dispatch", "combine" + "_into"[: fn is into]]
        assert {(v.decision, v.rule) for v in verdicts} == {(decision, rule)}, verdicts
    served = Situation(Collective.MNNVL, "0.7.2")  # the group's all-reduces have a workspace, which is none of theirs
    verdicts = judge(gm, backends={"world": "gloo"}, situation=served, capture=True)
    assert {v.rule for v in verdicts} == {"host_collective"}


def test_a_model_that_calls_them_is_not_told_that_nothing_is_fused() -> None:
    torch._dynamo.reset()
    backend = ringfence.Backend(piece_compiler="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ringfence.NotFusedWarning)
        torch.compile(layer, backend=backend)(torch.randn(5, H), torch.randint(0, E, (5, 2)), 8)
    assert not any("no all-reduce" in note for note in backend.reports[0].notes), backend.reports[0].notes


def outliving(x: Tensor, ids: Tensor) -> Tensor:
    sent = ringfence.moe.dispatch([x, x], ids, capacity=8, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0], sent.route) + sent.payloads[1].view(16, H).sum()


def returned(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    sent = ringfence.moe.dispatch([x], ids, capacity=8, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0], sent.route), sent.payloads[0]


def unanswered(x: Tensor, ids: Tensor) -> Tensor:
    one, two = (ringfence.moe.dispatch([y], ids, capacity=8, num_experts=E) for y in (x, x.sin()))
    made = [ringfence.moe.combine(sent.payloads[0], sent.route) for sent in (two, one)]
    return made[0] + made[1]


def side_by_side(x: Tensor, ids: Tensor) -> Tensor:
    """In order as they stand, which no value says."""
    return layer(x, ids, 8) + layer(x.sin(), ids, 8)


def counted(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Read before the combine as they stand, which no value says."""
    sent = ringfence.moe.dispatch([x], ids, capacity=8, num_experts=E)
    load = sent.ids.sum()
    y = ringfence.moe.combine(sent.payloads[0], sent.route)
    return y, load + y.sum()


def in_turn(x: Tensor, ids: Tensor) -> Tensor:
    return layer(layer(x, ids, 8), ids, 9)


def into_twice(x: Tensor, ids: Tensor) -> Tensor:
    """The second needs what the first wrote."""
    return into(into(x, ids, 8), ids, 9)


@pytest.mark.parametrize(
    ("fn", "hazard", "says"),
    [
        (outliving, "M69", "planes_outlive"),
        (returned, "M69", "planes_outlive"),
        (unanswered, "M69", "dispatch_unanswered|planes_outlive"),
        (side_by_side, "M69", "dispatch_unanswered"),
        (counted, "M69", "planes_outlive"),
        (in_turn, None, ""),
        (into_twice, None, ""),
    ],
)
def test_m69_rows_that_outlive_their_combine_and_unanswered_dispatches(
    fn: Callable[..., Any], hazard: str | None, says: str
) -> None:
    """Judged as FlashInfer's, whose rows are a workspace's memory; the reference returns memory of the caller's own."""
    gm = aot_graph(fn, torch.randn(5, H), torch.randint(0, E, (5, 2)))
    planned = Assignment({"world": Group("world", "nccl", 2, 0)}, planned=Situation(Collective.MOE_ALL_TO_ALL, "0.7.2"))
    verdicts, _ = judge_with_facts(gm, planned, capture=True)
    assert {v.hazard for v in verdicts} == {hazard}
    assert all(v.decision is (Decision.REFUSE if hazard else Decision.IN_GRAPH) for v in verdicts)
    assert hazard is None or re.search(says, str(verdicts[0].fact)), verdicts[0]
    verdicts, _ = judge_with_facts(gm, replace(planned, planned=None), capture=True)
    assert {v.rule for v in verdicts} == {"nccl"}


def test_m37_calls_of_a_group_on_two_streams() -> None:
    gm = aot_graph(in_turn, torch.randn(5, H), torch.randint(0, E, (5, 2)))
    next(n for n in gm.graph.nodes if "moe_combine" in str(n.target)).meta["custom"] = {"stream": 1}
    planned = Assignment({"world": Group("world", "nccl", 2, 0)}, planned=Situation(Collective.MOE_ALL_TO_ALL, "0.7.2"))
    verdicts, _ = judge_with_facts(gm, planned, capture=True)
    assert {(v.hazard, v.decision) for v in verdicts} == {("M37", Decision.REFUSE)}


def test_inductor_writes_nothing_into_what_a_dispatch_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes may be a workspace's memory, and a later result of the same size would fit into them."""
    workspace = torch.zeros(2 * 8 * H)
    real = moe_reference.dispatch

    def from_workspace(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
        received, *others = real(*args)
        plane = torch.frombuffer(workspace.numpy(), dtype=torch.float32).view(2 * 8, H)
        plane.copy_(received[0])
        return [plane], *others

    def readers(x: Tensor, ids: Tensor) -> Tensor:
        sent = ringfence.moe.dispatch([x], ids, capacity=8, num_experts=E)
        y = torch.relu(sent.payloads[0] * 3 + 1)
        return ringfence.moe.combine(y, sent.route) + 1

    monkeypatch.setattr(moe_reference, "dispatch", from_workspace)
    x, ids = torch.rand(5, H) + 1, torch.randint(0, E, (5, 2))
    with torch.no_grad():
        piece = inductor_piece(aot_graph(readers, x, ids, inductor=True))
        with torch._inductor.config.patch(fx_graph_cache=False):
            piece(x, ids)
    sent = real([x], ids, 8, E, -1, "world", 2)[0][0]
    assert torch.equal(workspace.view(16, H), sent) and bool(workspace.any())
