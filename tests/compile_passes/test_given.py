"""What the passes say of things that they do not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import ringfence
from ringfence.runtime.replay.program import Program, SizeRule


def graph() -> GraphModule:
    return torch.fx.symbolic_trace(lambda x: -x)


NO_GRAPH = (
    lambda gm: ringfence.find(gm),
    lambda gm: ringfence.fuse(gm, []),
    lambda gm: ringfence.judge(gm, ringfence.Assignment(), capture=True),
    lambda gm: ringfence.describe_groups(gm, "cpu"),
    lambda gm: ringfence.cut(gm, []),
    lambda gm: ringfence.split(gm, []),
    lambda gm: ringfence.size_rule(gm, [], frozenset()),
    lambda gm: ringfence.lower(ringfence.SplitPlan(()), gm, ringfence.eager_piece, [], frozenset()),
)


@pytest.mark.parametrize("call", NO_GRAPH)
def test_what_is_no_graph_is_refused_with_how_to_get_one(call: Callable[[Any], object]) -> None:
    with pytest.raises(ringfence.ArgumentError, match=r"GraphModule, not None; aot_autograd"):
        call(None)
    with pytest.raises(ringfence.ArgumentError, match=r"type Linear; torch.compile\(model"):
        call(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("call", "source"),
    [
        (lambda gm, wrong: ringfence.fuse(gm, wrong), r"find\(gm\)"),
        (lambda gm, wrong: ringfence.size_rule(gm, wrong, frozenset()), r"find\(gm\)"),
        (lambda gm, wrong: ringfence.cut(gm, wrong), r"judge\(gm, ...\)"),
        (lambda gm, wrong: ringfence.split(gm, wrong), r"cut\(gm, verdicts\)"),
        (lambda gm, wrong: ringfence.judge(gm, wrong, capture=True), r"Assignment\(groups="),
        (lambda gm, wrong: ringfence.lower(wrong, gm, ringfence.eager_piece, [], frozenset()), r"split\(gm, parts\)"),
        (lambda gm, wrong: ringfence.PiecewiseRunner(wrong, wrong), r"lower\(...\)"),
        (lambda gm, wrong: ringfence.assert_fused(wrong), "CompileReport"),
    ],
)
def test_what_another_pass_did_not_return_is_refused(call: Callable[[Any, Any], object], source: str) -> None:
    for wrong in (None, [3], "text", 4):
        with pytest.raises(ringfence.ArgumentError, match=source):
            call(graph(), wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"all_reduce_ops": ["eng::ar"]}, "no such op is registered"),
        ({"all_reduce_ops": {"eng::arr": None}}, "'eng::arr', and no such op"),
        ({"all_reduce_ops": "eng::ar"}, "not a list"),
        ({"norm_ops": ["eng::norm"]}, "'eng::norm', and no such op"),
        ({"norm_ops": {"eng::norm": "no norm"}}, "'eng::norm', and no such op"),
        ({"groups": "tp"}, "not a list"),
        ({"groups": [3]}, "no process group"),
        ({"groups": set()}, "groups is empty"),
    ],
)
def test_find_refuses_as_the_options_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ringfence.OptionsError, match=message):
        ringfence.find(graph(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_ops": "aten::mul"}, "not a list of strings"),
        ({"on_hazard": "shout"}, "on_hazard='shout' is not one of"),
        ({"profile": "careful"}, "profile='careful' is not one of"),
    ],
)
def test_judge_refuses_as_the_options_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ringfence.OptionsError, match=message):
        ringfence.judge(graph(), ringfence.Assignment(), capture=True, **options)
    with pytest.raises(ringfence.ArgumentError, match=r"describe_groups\(gm, device\)"):
        ringfence.judge(graph(), ringfence.Assignment(groups=["0"]), capture=True)  # type: ignore[arg-type]


def test_find_takes_ops_as_the_options_do() -> None:
    for ops in (["aten::neg"], {"aten::neg": "world"}, ("aten::neg",)):
        (candidate,) = ringfence.find(traced(torch.neg), all_reduce_ops=ops)
        assert candidate.site.node == "neg"
    assert ringfence.find(traced(torch.neg), groups={"tp"}) == []


def test_a_graph_that_is_not_functional_is_said_to_be_none() -> None:
    """make_fx alone leaves the statistic's ``add_`` of F.rms_norm in place."""

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(torch.ops._c10d_functional.all_reduce(x, "sum", "0"), (8,), weight, 1e-6)

    with torch.no_grad():
        gm = make_fx(normed, tracing_mode="fake")(torch.randn(2, 8), torch.ones(8))
    (candidate,) = ringfence.find(gm)
    assert candidate.site.decline is not None
    assert (
        "writes in place, so the graph is not functional: trace it with aot_autograd" in candidate.site.decline.message
    )


def test_lower_counts_inputs() -> None:
    plan = ringfence.SplitPlan(())
    for names in (["x", "y"], [], "x"):
        with pytest.raises(ringfence.ArgumentError, match="for the 1 inputs"):
            ringfence.lower(plan, graph(), ringfence.eager_piece, names, frozenset())
    for positions in (frozenset({9}), frozenset({-1})):
        with pytest.raises(ringfence.ArgumentError, match="has inputs 0 to 0"):
            ringfence.lower(plan, graph(), ringfence.eager_piece, ["x"], positions)
        with pytest.raises(ringfence.ArgumentError, match="has inputs 0 to 0"):
            ringfence.lower(plan, graph(), ringfence.eager_piece, ["x"], frozenset(), positions)


def test_a_runner_counts_its_arguments() -> None:
    runner = ringfence.PiecewiseRunner(Program((), ("x", "cache"), (0,), 2, (), frozenset()), SizeRule((), None))
    with pytest.raises(ringfence.ArgumentError, match=r"takes 2 inputs \(x, cache\), and was given 1"):
        runner(torch.ones(1))


def traced(function: Callable[[torch.Tensor], torch.Tensor]) -> GraphModule:
    gm = make_fx(function, tracing_mode="fake")(torch.randn(2, 8))
    assert isinstance(gm, GraphModule)
    return gm
