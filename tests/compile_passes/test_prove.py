"""The plan as a whole: what the model says of what the passes made."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.fx.traceback as fx_traceback
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.assignment import Assignment
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.prove import MOST_STATES, PlanVerdict, prove
from ringfence.compile_passes.roles import c10d
from ringfence.compile_passes.split import Piece, SplitPlan, split
from ringfence.runtime.collectives.moe_ready import MoeReady, reference_pair
from ringfence.runtime.collectives.ready import ReadyCollective
from ringfence.runtime.errors import HazardError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Payload, Situation, Strategy
from support import aot_graph, assigned, fuse_graph, judge

pytestmark = pytest.mark.usefixtures("fake_group")
H = 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layers(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(3):
        residual = c10d.wait_tensor(c10d.all_reduce(x.sin(), "sum", "0")) + residual
        x = F.rms_norm(residual, (H,), None, 1e-6).exp()
    return x, residual


def graph(dtype: torch.dtype = torch.bfloat16) -> GraphModule:
    gm = aot_graph(layers, torch.randn(4, H).to(dtype), torch.randn(4, H).to(dtype))
    fuse_graph(gm)
    return gm


def proved(situation: Situation, sizes: tuple[int, ...] = (4, 8), **options: object) -> PlanVerdict:
    gm = graph()
    verdicts = judge(gm, backends={"0": "nccl"}, capture=bool(sizes), situation=situation, **options)  # type: ignore[arg-type]
    plan, _ = split(gm, cut(gm, verdicts))
    assert [i for p in plan.pieces for i in p.sites] == [0, 1, 2]
    return prove(plan, verdicts, assigned({"0": "nccl"}, situation), sizes, padding=False)


@pytest.mark.parametrize("sizes", [(), (4,), (4, 8)])
@pytest.mark.parametrize("split_ops", [[], ["aten::exp"]])
@pytest.mark.parametrize("collective", [Collective.MNNVL, Collective.TRTLLM])
def test_sound_plan_is_safe(collective: Collective, split_ops: list[str], sizes: tuple[int, ...]) -> None:
    verdict = proved(Situation(collective, "0.7.2", world_size=2), sizes, split_ops=split_ops)
    assert (verdict.kind, verdict.hazard, verdict.failed) == ("safe", None, False)
    assert verdict.states > 15


@pytest.mark.parametrize("split_ops", [[], ["aten::exp"], ["ringfence::all_reduce_add_rms_norm"]])
@pytest.mark.parametrize("sizes", [(), (4, 8)])
def test_float_compare_hangs_in_every_cut(split_ops: list[str], sizes: tuple[int, ...]) -> None:
    """Under the field's rule the calls are made, between pieces: that does not help."""
    situation = Situation(Collective.MNNVL, "0.6.10")
    verdict = proved(situation, sizes, split_ops=split_ops, profile="conservative")
    assert (verdict.kind, verdict.hazard, verdict.failed) == ("deadlock", "M1", True)
    assert verdict.invariant == "I1" and verdict.remedy is not None and "0.6.12" in verdict.message
    assert any("push" in step for step in verdict.trace)


def test_refused_sites_make_no_call_that_could_hang() -> None:
    verdict = proved(Situation(Collective.MNNVL, "0.6.10"))
    assert (verdict.kind, verdict.message) == (
        "safe",
        "no call is left to mnnvl, so no call waits in kernels of a collective",
    )


def test_plan_that_fails_is_an_error_where_that_was_asked_for() -> None:
    """The table only warns of M2; the model finds the run in which it hangs."""
    backend = ringfence.Backend(
        planned=Situation(Collective.MNNVL, "0.6.12", strategy=Strategy.TWO_SHOT),
        piece_compiler="eager",
        on_hazard="raise",
        capture_sizes=[4, 8],
        graphs="simulated",
    )
    x, residual = torch.randn(4, H).bfloat16(), torch.randn(4, H).bfloat16()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(layers, backend=backend, fullgraph=True)(x, residual)
    assert isinstance(caught.value.inner_exception, HazardError) and "M" in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clean_payload_makes_an_affected_release_safe(dtype: torch.dtype) -> None:
    """Through the backend: the same model, judged as FlashInfer 0.6.10, without and with the flush."""
    found = {}
    for on_hazard in ("uncleaned", "clean"):
        torch._dynamo.reset()
        options = {"on_hazard": "clean"} if on_hazard == "clean" else {"profile": "conservative"}
        backend = ringfence.Backend(
            planned=Situation(Collective.MNNVL, "0.6.10", strategy=Strategy.ONE_SHOT), piece_compiler="eager", **options
        )
        x, residual = torch.randn(4, H).to(dtype), torch.randn(4, H).to(dtype)
        with torch.no_grad():
            actual = torch.compile(layers, backend=backend, fullgraph=True)(x, residual)
            expected = layers(x, residual)
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
        (report,) = backend.reports
        assert report.plan is not None
        found[on_hazard] = report.plan.kind, {(v.decision, v.clean) for v in report.verdicts}
    uncleaned, cleaned = found["uncleaned"], found["clean"]
    assert uncleaned == ("deadlock", {(Decision.IN_GRAPH, False)})
    if dtype == torch.float16:  # whose rows one-shot loses, cleaned or not (M49)
        assert cleaned == ("safe", {(Decision.REFUSE, False)})
    else:
        assert cleaned == ("safe", {(Decision.IN_GRAPH, True)})


def test_payload_known_to_be_ordinary_is_safe() -> None:
    assert proved(Situation(Collective.MNNVL, "0.6.10", payload=Payload.ORDINARY)).kind == "safe"


@pytest.mark.parametrize(
    ("situation", "why"),
    [
        (Situation(Collective.REFERENCE), "no model of reference"),
        (Situation(Collective.TRTLLM), "say which one"),
        (Situation(Collective.TRTLLM, "0.5.3"), "0.5.3 are not known"),
        (Situation(Collective.TRTLLM, "0.7.0", world_size=3), "a world of 3 ranks"),
    ],
)
def test_what_was_not_explored_is_said(situation: Situation, why: str) -> None:
    verdict = proved(situation)
    assert verdict.kind == "not_modelled" and why in verdict.message and verdict.states == 0


def many_layers(count: int, situation: Situation, sizes: tuple[int, ...]) -> PlanVerdict:
    """What a plan of ``count`` fused sites is found to be."""
    verdicts = [
        Verdict(f"n{i}", "ringfence::all_reduce", Decision.IN_GRAPH, "", "", "", site=i, group="0")
        for i in range(count)
    ]
    plan = SplitPlan((Piece(0, "submod_0", False, (), count, tuple(range(count))),))
    ready = {"0": ReadyCollective(situation.collective, situation)}
    assignment = Assignment({"0": Group("0", "nccl", situation.world_size, 0)}, ready)
    return prove(plan, verdicts, assignment, sizes, padding=True)


@pytest.mark.parametrize(
    ("collective", "ranks"), [(Collective.MNNVL, 16), (Collective.TRTLLM, 16), (Collective.RINGFENCE, 8)]
)
def test_a_large_plan_is_proved_in_a_second(collective: Collective, ranks: int) -> None:
    """160 sites, 35 sizes, as many ranks as it serves: on a machine that runs other tests meanwhile it gets more."""
    sizes = (1, 2, 4, *range(8, 257, 8))
    for strategy in (None, Strategy.ONE_SHOT, Strategy.TWO_SHOT):
        started = time.process_time()
        verdict = many_layers(160, Situation(collective, "0.7.2", world_size=ranks, strategy=strategy), sizes)
        assert time.process_time() - started < 5
        assert verdict.kind == "safe" and verdict.states < MOST_STATES


def of_groups(count: int, situation: Situation) -> PlanVerdict:
    """What a plan with two fused sites in each of ``count`` groups is found to be."""
    names = [str(i // 2) for i in range(2 * count)]
    verdicts = [
        Verdict(f"n{i}", "ringfence::all_reduce", Decision.IN_GRAPH, "", "", "", site=i, group=name)
        for i, name in enumerate(names)
    ]
    plan = SplitPlan((Piece(0, "submod_0", False, (), len(names), tuple(range(len(names)))),))
    groups = {name: Group(name, "nccl", situation.world_size, 0) for name in names}
    ready = {name: ReadyCollective(situation.collective, situation) for name in names}
    return prove(plan, verdicts, Assignment(groups, ready), (1, 2, 4), padding=True)


@pytest.mark.parametrize("collective", [Collective.RINGFENCE, Collective.TRTLLM])
def test_all_groups_together_have_one_bound(collective: Collective, monkeypatch: pytest.MonkeyPatch) -> None:
    situation = Situation(collective, "0.7.2", world_size=4)
    one = of_groups(1, situation)
    assert one.kind == "safe" and of_groups(4, situation).kind == "safe"
    most = 5 * one.states // 2
    monkeypatch.setattr("ringfence.compile_passes.prove.MOST_STATES", most)
    assert of_groups(2, situation).kind == "safe"
    verdict = of_groups(4, situation)
    assert verdict.kind == "not_decided" and most < verdict.states < most + one.states


@pytest.mark.parametrize("strategy", [Strategy.ONE_SHOT, Strategy.TWO_SHOT, None])
@pytest.mark.parametrize("release", ["0.6.10", "0.6.11"])
def test_a_failure_is_found_within_the_bound_of_a_compile(strategy: Strategy | None, release: str) -> None:
    verdict = many_layers(160, Situation(Collective.MNNVL, release, world_size=8, strategy=strategy), (1, 2, 4, 8, 16))
    assert (verdict.kind, verdict.hazard) == ("deadlock", "M1")


def test_a_plan_beyond_the_bound_is_not_called_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    situation = Situation(Collective.MNNVL, "0.7.0", world_size=4)
    verdict = many_layers(30_000, situation, (4,))
    assert verdict.kind == "not_decided" and not verdict.failed
    assert "30000 sites in 4 steps are 120000 calls" in verdict.message and "ringfence check" in verdict.message
    monkeypatch.setattr("ringfence.compile_passes.prove.MOST_STATES", 50)
    verdict = many_layers(2, situation, (4,))
    assert verdict.kind == "not_decided" and "bound of 50 states" in verdict.message and verdict.states > 50


def test_plan_without_a_fused_collective_is_safe() -> None:
    gm = aot_graph(lambda x: (x.exp(),), torch.randn(4, H))
    situation = Situation(Collective.MNNVL, "0.6.10")
    verdicts = judge(gm, backends={"0": "nccl"}, capture=True, situation=situation)
    plan, _ = split(gm, cut(gm, verdicts))
    proof = prove(plan, verdicts, assigned({"0": "nccl"}, situation), (4,), padding=False)
    assert proof.message == "nothing is fused, so no call waits in kernels of a collective"


def test_groups_are_proved_one_by_one_and_the_worst_speaks() -> None:
    """mnnvl of a release that hangs in group "1", of a sound one in "0"; "2" has the reference, which has no model."""
    verdicts = [
        Verdict(f"n{i}", "ringfence::all_reduce", Decision.IN_GRAPH, "", "", "", site=i, group=str(i)) for i in range(3)
    ]
    plan = SplitPlan((Piece(0, "submod_0", False, (), 3, (0, 1, 2)),))
    groups = {str(i): Group(str(i), "nccl", 2, 0) for i in range(3)}
    kinds = {}
    for release in ("0.6.10", "0.7.0"):
        ready = {
            "0": ReadyCollective(Collective.MNNVL, Situation(Collective.MNNVL, "0.7.0")),
            "1": ReadyCollective(Collective.MNNVL, Situation(Collective.MNNVL, release, strategy=Strategy.ONE_SHOT)),
        }
        kinds[release] = prove(plan, verdicts, Assignment(groups, ready), (4,), padding=False)
    assert (kinds["0.6.10"].kind, kinds["0.6.10"].hazard) == ("deadlock", "M1")
    assert kinds["0.7.0"].kind == "safe" and kinds["0.7.0"].states > 15


def test_facts_of_the_cut_are_judged_too() -> None:
    """Two streams on one workspace show in the graph; the table refuses them (M37)."""

    def on_streams(gm: GraphModule, inputs: object) -> object:
        for i, node in enumerate(n for n in gm.graph.nodes if "all_reduce" in str(n.target)):
            node.meta["custom"] = {"stream": i}
        return backend(gm, inputs)

    backend = ringfence.Backend(
        planned=Situation(Collective.TRTLLM, "0.7.0"), piece_compiler="eager", capture_sizes=[4], graphs="simulated"
    )
    x, residual = torch.randn(4, H), torch.randn(4, H)
    for streams in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), fx_traceback.preserve_node_meta():
            torch.compile(layers, backend=on_streams if streams else backend, fullgraph=True)(x, residual)
    one, two = ({(v.decision, v.rule) for v in report.verdicts} for report in backend.reports)
    assert one == {(Decision.IN_GRAPH, "device_epoch")}
    assert two == {(Decision.REFUSE, "M37")}


def of_pairs(*halves: str, island: bool = False, ranks: int = 2, sizes: tuple[int, ...] = (4, 8)) -> PlanVerdict:
    """What a plan of these dispatches and combines by kernels is found to be."""
    decision = Decision.SPLIT if island else Decision.IN_GRAPH
    verdicts = [
        Verdict(f"n{i}", f"ringfence::moe_{half}", decision, "", "", "", group="ep") for i, half in enumerate(halves)
    ]
    situation = Situation(Collective.MOE_ALL_TO_ALL, "0.7.2", world_size=ranks)
    workspace: Any = object()
    moe = {"ep": MoeReady("moe_all_to_all", situation, workspace=workspace)}
    plan = SplitPlan((Piece(0, "submod_0", False, (), len(halves), ()),))
    return prove(plan, verdicts, Assignment({"ep": Group("ep", "nccl", ranks, 0)}, moe=moe), sizes, padding=True)


@pytest.mark.parametrize("island", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dispatches_and_combines_in_turn_are_proved(ranks: int, island: bool) -> None:
    verdict = of_pairs("dispatch", "combine", "dispatch", "combine_into", island=island, ranks=ranks)
    assert verdict.kind == "safe" and verdict.states > 15 and f"{ranks} ranks" in verdict.message
    assert of_pairs(*("dispatch", "combine") * 94).kind == "safe"


def test_a_dispatch_that_no_combine_answers_is_found_to_fail() -> None:
    verdict = of_pairs("dispatch", "dispatch", "combine")
    assert verdict.failed and verdict.trace, verdict


def test_the_references_pairs_make_no_call_that_could_hang() -> None:
    verdicts = [Verdict("n0", "ringfence::moe_dispatch", Decision.SPLIT, "", "", "", group="ep")]
    plan = SplitPlan((Piece(0, "submod_0", True, (), 1, ()),))
    assignment = Assignment({"ep": Group("ep", "gloo", 2, 0)}, moe={"ep": reference_pair(2)})
    verdict = prove(plan, verdicts, assignment, (4,), padding=True)
    assert (verdict.kind, verdict.states) == ("safe", 0)
