"""Fused sites judged by the hazard table: what each option does with each kind of row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ringfence.assign import nccl_situation
from ringfence.compile_passes.assignment import Assignment
from ringfence.compile_passes.clean import clean_payload
from ringfence.compile_passes.fuse import SITE
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.judge import judge as judge_assigned
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.roles import c10d
from ringfence.compile_passes.split import split
from ringfence.runtime.collectives.ready import ReadyCollective
from ringfence.runtime.errors import HazardError, VersionError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Fact, Payload, Situation, Strategy
from support import aot_graph, fuse_graph, judge

H = 16
MNNVL, TRTLLM = Collective.MNNVL, Collective.TRTLLM
IN_GRAPH, SPLIT, REFUSE = Decision.IN_GRAPH, Decision.SPLIT, Decision.REFUSE


def layers(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(2):
        residual = c10d.wait_tensor(c10d.all_reduce(x.sin(), "sum", "0")) + residual
        x = F.rms_norm(residual, (H,), None, 1e-6)
    return x, residual


@pytest.fixture
def fused(fake_group: None) -> GraphModule:
    gm = aot_graph(layers, torch.randn(4, H), torch.randn(4, H))
    assert all(s.fused for s in fuse_graph(gm))
    return gm


def verdicts(gm: GraphModule, situation: Situation, capture: bool = True, **options: str) -> list[Verdict]:
    found = judge(gm, backends={"0": "nccl"}, capture=capture, situation=situation, **options)
    assert [v.site for v in found] == [0, 1]
    return found


def decide(gm: GraphModule, situation: Situation, capture: bool = True, **options: str) -> tuple[Decision, str]:
    first, second = verdicts(gm, situation, capture, **options)
    assert (first.decision, first.rule) == (second.decision, second.rule)
    return first.decision, first.rule


@pytest.mark.parametrize("collective", [MNNVL, TRTLLM])
def test_sound_release_is_captured(fused: GraphModule, collective: Collective) -> None:
    assert decide(fused, Situation(collective, "0.7.2.post1")) == (IN_GRAPH, "device_epoch")


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    ("on_hazard", "decision", "rule"),
    [("split", REFUSE, "M1"), ("refuse", REFUSE, "M1"), ("clean", IN_GRAPH, "M1")],
)
def test_float_compare_of_the_sentinel_is_not_cured_by_a_split(
    fused: GraphModule, on_hazard: str, decision: Decision, rule: str, capture: bool
) -> None:
    """M1 hangs eager calls too, so it decides also where nothing is captured."""
    situation = Situation(MNNVL, "0.6.10", strategy=Strategy.ONE_SHOT)
    assert decide(fused, situation, capture, on_hazard=on_hazard) == (decision, rule)
    verdict = verdicts(fused, situation, capture, on_hazard=on_hazard)[0]
    assert (verdict.hazard, verdict.invariant, verdict.clean) == ("M1", "I1", on_hazard == "clean")
    assert verdict.fact is not None and "FlashInfer before 0.6.12" in verdict.fact
    assert verdict.remedy is not None and "0.6.12" in verdict.remedy and verdict.remedy in verdict.message


@pytest.mark.parametrize("strategy", [None, Strategy.TWO_SHOT])
def test_cleaned_inputs_do_not_make_clean_sums(fused: GraphModule, strategy: Strategy | None) -> None:
    """1.0 and -1.00001 are clean, and their sum is a small negative number, which two-shot sends on."""
    situation = Situation(MNNVL, "0.6.10", strategy=strategy)
    assert decide(fused, situation, on_hazard="clean") == (REFUSE, "M1")


def test_cleaning_stands_beside_what_another_row_decides(fused: GraphModule) -> None:
    situation = Situation(MNNVL, "0.6.10", strategy=Strategy.ONE_SHOT, facts=frozenset({Fact.UNMARKED_UNSAFE_OP}))
    for verdict in verdicts(fused, situation, on_hazard="clean"):
        assert verdict.decision is SPLIT and verdict.clean


@pytest.mark.parametrize("collective", [Collective.CUSTOM, Collective.SYMMETRIC_MEMORY])
def test_group_over_nccl_says_nothing_of_another_carrier(fused: GraphModule, collective: Collective) -> None:
    assert decide(fused, Situation(collective))[1] == "unknown_collective"


def test_hazard_can_be_an_error(fused: GraphModule) -> None:
    with pytest.raises(HazardError, match=r"M1.*Upgrade FlashInfer to 0\.6\.12"):
        verdicts(fused, Situation(MNNVL, "0.6.10"), on_hazard="raise")
    verdicts(fused, Situation(MNNVL, "0.7.0"), on_hazard="raise")


@pytest.mark.parametrize(("payload", "decision"), [(Payload.ORDINARY, IN_GRAPH), (Payload.SUBNORMAL, REFUSE)])
def test_payload_that_is_known_decides(fused: GraphModule, payload: Payload, decision: Decision) -> None:
    assert decide(fused, Situation(MNNVL, "0.6.11", payload=payload))[0] is decision


def test_unknown_version_may_be_the_worst(fused: GraphModule) -> None:
    verdict = verdicts(fused, Situation(MNNVL))[0]
    assert verdict.decision is REFUSE and verdict.fact is not None and "version is not known" in verdict.fact


def test_unreadable_version_is_refused() -> None:
    with pytest.raises(VersionError, match=r"'latest' is not a version"):
        Situation(MNNVL, "latest")


def test_host_epoch_is_split_and_only_where_something_is_captured(fused: GraphModule) -> None:
    situation = Situation(Collective.TRTLLM_CUSTOM, "0.7.0", facts=frozenset({Fact.HOST_EPOCH}))
    decision, rule = decide(fused, situation)
    assert (decision, rule) == (SPLIT, "M15")
    assert decide(fused, situation, on_hazard="refuse") == (REFUSE, "M15")
    assert decide(fused, situation, on_hazard="clean") == (SPLIT, "M15")
    assert decide(fused, situation, capture=False) == (IN_GRAPH, "no_capture")


def test_warning_leaves_the_site_in_its_piece_and_names_the_row(fused: GraphModule) -> None:
    situation = Situation(TRTLLM, "0.7.0", facts=frozenset({Fact.PDL, Fact.PRODUCER_RIGHT_BEFORE_PDL}))
    verdict = verdicts(fused, situation)[0]
    assert verdict.hazard == "M17" and verdict.remedy


def test_named_split_op_stays_split_beside_a_warning(fused: GraphModule) -> None:
    situation = Situation(MNNVL, "0.6.12", strategy=Strategy.TWO_SHOT)
    found = judge(
        fused,
        backends={"0": "nccl"},
        capture=True,
        situation=situation,
        split_ops=["ringfence::all_reduce_add_rms_norm"],
    )
    assert {v.decision for v in found} == {SPLIT}


@pytest.mark.parametrize("version", ["0.6.10", "0.7.0"])
@pytest.mark.parametrize("collective", [MNNVL, TRTLLM, Collective.REFERENCE])
def test_conservative_profile_goes_by_the_name(fused: GraphModule, collective: Collective, version: str) -> None:
    """Whether the graph is captured is not decided here, op by op."""
    decision, rule = decide(fused, Situation(collective, version), False, profile="conservative")[:2]
    assert decision is IN_GRAPH and (rule == "field") == (collective is MNNVL)


def test_refused_site_runs_between_pieces(fused: GraphModule) -> None:
    plan, _ = split(fused, cut(fused, verdicts(fused, Situation(MNNVL, "0.6.10"))))
    assert [p.ops for p in plan.pieces if p.island] == [("ringfence::all_reduce_add_rms_norm",)] * 2


def test_cleaned_sites_are_those_whose_verdict_says_so(fused: GraphModule) -> None:
    found = verdicts(fused, Situation(MNNVL, "0.6.10", strategy=Strategy.ONE_SHOT), on_hazard="clean")
    clean_payload(fused, {v.site for v in found if v.clean and v.site is not None})
    assert [n.args[0].target for n in fused.graph.nodes if SITE in n.meta] == [torch.ops.aten.view.dtype] * 2


# -- what stays with NCCL ------------------------------------------------------------------------

NCCL_OPS = {"ringfence::all_reduce_add_rms_norm", "_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"}


@pytest.fixture
def mixed(fake_group: None) -> GraphModule:
    """A fused site, and an all-reduce that nothing fuses."""

    def run(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        summed = c10d.wait_tensor(c10d.all_reduce(x, "sum", "0")) + r
        return F.rms_norm(summed, (H,), None, 1e-6), c10d.wait_tensor(c10d.all_reduce(r, "sum", "0")).relu()

    gm = aot_graph(run, torch.randn(4, H), torch.randn(4, H))
    fuse_graph(gm)
    return gm


def over_nccl(nodes: int, capability: tuple[int, int] = (9, 0), *facts: Fact) -> Situation:
    return Situation(Collective.NCCL, nodes=nodes, capability=capability, facts=frozenset(facts))


OLD = Fact.NCCL_BEFORE_2_30_4


@pytest.mark.parametrize(
    ("nccl", "decision", "rule"),
    [
        (None, IN_GRAPH, "nccl"),
        (over_nccl(2, (12, 1)), IN_GRAPH, "nccl"),
        (over_nccl(1, (12, 1), OLD), IN_GRAPH, "nccl"),
        (over_nccl(2, (9, 0), OLD), IN_GRAPH, "M48"),
        (over_nccl(2, (12, 1), OLD), SPLIT, "M34"),
        (over_nccl(1, (9, 0), Fact.NCCL_SYMMETRIC_MEMORY), SPLIT, "M34"),
    ],
)
@pytest.mark.parametrize("on_hazard", ["split", "refuse", "clean"])
def test_captured_nccl_is_judged_by_its_version(
    mixed: GraphModule, nccl: Situation | None, decision: Decision, rule: str, on_hazard: str
) -> None:
    """Both what nothing fuses and the reference collective of a site; an older NCCL cannot be refused, only split."""
    found = judge(mixed, backends={"0": "nccl"}, capture=True, on_hazard=on_hazard, nccl=nccl)
    assert {v.op for v in found} == NCCL_OPS and {(v.decision, v.rule) for v in found} == {(decision, rule)}
    if rule != "nccl":
        assert all(v.hazard == rule and "NCCL 2.30.4 or later" in (v.remedy or "") for v in found)
        assert not any("FlashInfer" in v.message + str(v.fact) for v in found)


def test_nccl_is_judged_only_where_it_is_captured_and_carries_the_call(mixed: GraphModule) -> None:
    old = over_nccl(2, (12, 1), OLD)
    for found in (
        judge(mixed, backends={"0": "nccl"}, capture=False, nccl=old),
        judge(mixed, backends={"0": "gloo"}, capture=True, nccl=old),
        [v for v in judge(mixed, backends={"0": "nccl"}, capture=True, situation=Situation(MNNVL, "0.7.0"), nccl=old)
         if v.site is not None],
        judge(mixed, backends={"0": "nccl"}, capture=True, split_ops=NCCL_OPS, nccl=old),
    ):  # fmt: skip
        assert found and all(v.hazard is None for v in found)
    with pytest.raises(HazardError, match=r"M34.*NCCL 2\.30\.4"):
        judge(mixed, backends={"0": "nccl"}, capture=True, on_hazard="raise", nccl=old)


@pytest.mark.parametrize(
    ("version", "register", "rule"),
    [
        ("2.28.9", None, "M48"),
        ("2.30.4", None, "M55"),
        ("2.30.4", "0", "nccl"),
        ("2.27.5", None, "nccl"),
        (None, None, "nccl"),
    ],
)
def test_backend_asks_with_the_nodes_of_the_carrier_and_the_version_that_is_here(
    mixed: GraphModule, monkeypatch: pytest.MonkeyPatch, version: str | None, register: str | None, rule: str
) -> None:
    monkeypatch.setattr("ringfence.assign.nccl_version", lambda: version)
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    if register is not None:
        monkeypatch.setenv("NCCL_GRAPH_REGISTER", register)
    for nodes, backend_of_group, expected in ((2, "nccl", rule), (1, "nccl", "nccl"), (2, "gloo", "host_collective")):
        situation = Situation(Collective.REFERENCE, nodes=nodes, capability=(9, 0))
        groups = {"0": Group("0", backend_of_group, 2, 0)}
        ready = {"0": ReadyCollective(Collective.REFERENCE, situation)}
        found = judge_assigned(mixed, Assignment(groups, ready, nccl=nccl_situation(groups, ready, None)), capture=True)
        assert {v.rule for v in found} == {expected}
