"""Who is named in the graph for an all-reduce, after the sites are fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ringfence.compile_passes.collectives import refuse_sites, replace_plain_all_reduces
from ringfence.compile_passes.find import find
from ringfence.compile_passes.fuse import SITE, fuse
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.roles import c10d
from ringfence.runtime.collectives import ops
from support import aot_graph

H = 16
pytestmark = pytest.mark.usefixtures("two_groups")


@pytest.fixture
def two_groups(fake_group: None) -> None:
    """Groups "0" and "1"."""
    assert dist.new_group([0, 1]).group_name == "1"


def total(x: Tensor, op: str = "sum", group: str = "0") -> Tensor:
    result: Tensor = c10d.wait_tensor(c10d.all_reduce(x, op, group))
    return result


def graph(fn: Callable[..., Any], *args: Tensor, **options: Any) -> GraphModule:
    return aot_graph(fn, *(args or (torch.randn(4, H),)), **options)


def count(gm: GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def test_a_sum_over_the_group_is_given_to_the_collective() -> None:
    gm = graph(lambda x: total(x.sin()) * 2)
    (wait,) = gm.graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)
    before = dict(wait.meta)
    (name,) = replace_plain_all_reduces(gm, "0", "trtllm")
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.all_reduce)
    assert node.name == name and node.args[1:] == ("0", "trtllm")
    assert node.args[0].target == torch.ops.aten.sin.default
    assert count(gm, c10d.all_reduce.default, c10d.wait_tensor.default) == 0
    assert node.meta["val"] is before["val"] and node.meta["val"].shape == (4, H)
    # What is said of the arguments of the old op, or of its place, is not true of the new one.
    assert {*node.meta} <= {"val", "stack_trace", "nn_module_stack", "custom"}
    assert {*node.meta} == {"val", "stack_trace", "nn_module_stack", "custom"} & {*before}
    gm.graph.lint()
    assert "ringfence.all_reduce" in gm.code and "wait_tensor" not in gm.code, "recompiled"


def test_the_graph_still_computes_the_sum() -> None:
    x = torch.randn(4, H)
    gm = graph(lambda x: total(x.sin()) * 2, x)
    (before,) = gm(x)
    assert replace_plain_all_reduces(gm, "0", "reference")
    (after,) = gm(x)
    assert torch.equal(before, after)  # the fake group adds nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_that_the_kernels_know(dtype: torch.dtype) -> None:
    assert len(replace_plain_all_reduces(graph(total, torch.ones(4, H, dtype=dtype)), "0", "mnnvl")) == 1


def test_sizes_that_are_not_known_yet() -> None:
    gm = graph(lambda x: total(x) + 1, torch.randn(4, H), dynamic=[(0, 0)])
    assert len(replace_plain_all_reduces(gm, "0", "mnnvl")) == 1
    gm.graph.lint()


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "another group": lambda x: total(x, group="1"),
    "largest": lambda x: total(x, "max"),
    "mean": lambda x: total(x, "avg"),
    "integers": lambda x: total(x.int()),
    "float64": lambda x: total(x.double()),
    "no dimension": lambda x: total(x.sum()),
    "gathered": lambda x: c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "0")),
    "scattered": lambda x: c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, "0")),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_sum_over_the_group_is_left_alone(case: str) -> None:
    gm = graph(OTHERS[case])
    before = gm.code
    assert replace_plain_all_reduces(gm, "0", "trtllm") == []
    assert gm.code == before and count(gm, c10d.wait_tensor.default) == 1


def test_an_unfinished_sum_that_somebody_else_looks_at() -> None:
    gm = graph(lambda x: total(x.sin()))
    (start,) = gm.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
    output = gm.graph.output_node()
    output.args = ((*output.args[0], start),)  # type: ignore[misc]
    before = str(gm.graph)
    assert replace_plain_all_reduces(gm, "0", "trtllm") == []
    assert str(gm.graph) == before


@torch.library.custom_op("collectives_test::all_reduce", mutates_args=())
def custom_all_reduce(x: Tensor, group_name: str) -> Tensor:
    return x.clone()


@custom_all_reduce.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x)


def test_an_engines_own_op_is_left_alone() -> None:
    gm = graph(lambda x: torch.ops.collectives_test.all_reduce(x, "0") + 1)
    assert replace_plain_all_reduces(gm, "0", "trtllm") == []
    assert count(gm, torch.ops.collectives_test.all_reduce.default) == 1


def test_among_others_only_the_sums_change_and_their_order_stays() -> None:
    def model(x: Tensor) -> Tensor:
        x = total(x.sin()).cos()
        x = total(x, "max")
        return total(total(x.sigmoid()), group="0") + total(x, group="1")

    gm = graph(model)
    order = ["sin", "all_reduce", "cos", "max", "sigmoid", "all_reduce", "all_reduce", "other"]
    names = replace_plain_all_reduces(gm, "0", "trtllm")
    assert len(names) == 3 and names == [n.name for n in gm.graph.nodes if n.target is ops.all_reduce]
    seen = []
    for node in gm.graph.nodes:
        if node.target is c10d.all_reduce.default:
            seen.append("max" if node.args[1] == "max" else "other")
        elif node.target is ops.all_reduce:
            seen.append("all_reduce")
        elif node.op == "call_function" and "aten" in str(node.target) and "add" not in str(node.target):
            seen.append(str(node.target).split(".")[1])
    assert seen == order


def test_nodes_to_keep_are_kept() -> None:
    gm = graph(lambda x: total(x.sin()) + total(x.cos()))
    first, _ = gm.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
    assert len(replace_plain_all_reduces(gm, "0", "trtllm", keep={first.name})) == 1
    (left,) = gm.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
    assert left is first


def test_a_graph_without_any() -> None:
    gm = graph(lambda x: x.sin())
    assert replace_plain_all_reduces(gm, "0", "trtllm") == []


# -- sites that are refused


def layers(x: Tensor, residual: Tensor) -> Tensor:
    for _ in range(3):
        residual = total(x.sin()) + residual
        x = F.rms_norm(residual, (H,), None, 1e-6)
    return F.rms_norm(total(x.cos()), (H,), None, 1e-6)  # a norm without a residual


@pytest.fixture
def fused(two_groups: None) -> GraphModule:
    gm = graph(layers, torch.randn(4, H), torch.randn(4, H))
    assert all(site.fused for site in fuse(gm, find(gm), collectives={"0": "trtllm"}))
    return gm


def sites(gm: GraphModule) -> list[Any]:
    return [node for node in gm.graph.nodes if SITE in node.meta]


def named(gm: GraphModule) -> list[Any]:
    return [node.args[-1] for node in sites(gm)]


def verdict(node: Any, decision: Decision, site: int | None) -> Verdict:
    return Verdict(node.name, str(node.target), decision, "mine", "", "", site)


def test_refused_sites_go_to_the_reference_and_keep_their_other_arguments(fused: GraphModule) -> None:
    nodes = sites(fused)
    assert named(fused) == ["trtllm"] * 4
    before = [node.args[:-1] for node in nodes]
    decisions = [Decision.IN_GRAPH, Decision.REFUSE, Decision.SPLIT, Decision.REFUSE]
    verdicts = [verdict(n, d, i) for i, (n, d) in enumerate(zip(nodes, decisions, strict=True))]
    assert refuse_sites(fused, verdicts) == 2
    assert named(fused) == ["trtllm", "reference", "trtllm", "reference"]
    assert [node.args[:-1] for node in nodes] == before
    fused.graph.lint()
    assert refuse_sites(fused, []) == 0


def test_ops_that_are_not_ours_are_not_touched(fused: GraphModule) -> None:
    other = next(n for n in fused.graph.nodes if n.op == "call_function" and SITE not in n.meta)
    before = other.args
    assert refuse_sites(fused, [verdict(other, Decision.REFUSE, None)]) == 0
    assert other.args == before and named(fused) == ["trtllm"] * 4


def test_an_op_of_ours_is_refused_whether_or_not_it_is_a_site(fused: GraphModule) -> None:
    (last,) = [n for n in sites(fused) if n.target is ops.all_reduce_rms_norm]
    assert refuse_sites(fused, [verdict(last, Decision.REFUSE, None)]) == 1
    assert sorted(named(fused)) == ["reference", *["trtllm"] * 3]
