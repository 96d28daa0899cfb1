"""Repeated values are merged where nobody can tell, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from ringfence.compile_passes import Reason, find, fuse
from ringfence.compile_passes.absent import why_no_all_reduce
from ringfence.compile_passes.provenance import label, name_inputs, source_of
from ringfence.compile_passes.repeats import merge_repeats
from support import aot_graph

H = 16
aten = torch.ops.aten


def ar(x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    return y


def run(gm: GraphModule, *args: Tensor) -> list[Tensor]:
    named = {f"arg{i}_1": a for i, a in enumerate(args)}
    return list(gm(*(named[n.name] for n in gm.graph.find_nodes(op="placeholder"))))


@pytest.mark.usefixtures("fake_group")
def test_repeated_residual_add_does_not_keep_a_site_from_fusing() -> None:
    """EAGLE-3: hidden states of some layers are returned beside the model's own."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> object:
        aux = []
        for _ in range(3):
            h = ar(x)
            aux.append(h + r)
            r = h + r
            x = F.rms_norm(r, (H,), w, 1e-6)
        return x, r, torch.cat(aux, -1)

    args = torch.randn(4, H), torch.randn(4, H), torch.rand(H) + 0.5
    gm = aot_graph(model, *args)
    expected = run(gm, *args)
    assert [c.site.fused for c in find(gm)] == [False] * 3
    assert merge_repeats(gm) == 3
    assert all(s.fused for s in fuse(gm, find(gm)))
    for ours, theirs in zip(run(gm, *args), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("fake_group")
def test_a_sum_in_the_other_order_is_the_same_sum() -> None:
    """Only where both operands are tensors and nothing scales the second."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> object:
        h = ar(x)
        aux = r + h
        r = h + r
        return (
            F.rms_norm(r, (H,), w, 1e-6),
            r,
            aux * 2,
            w * r + r * w,
            torch.add(r, x, alpha=2) + torch.add(x, r, alpha=2),
        )

    args = torch.randn(4, H), torch.randn(4, H), torch.rand(H) + 0.5
    gm = aot_graph(model, *args)
    expected = run(gm, *args)
    assert merge_repeats(gm) == 2
    assert all(s.fused for s in fuse(gm, find(gm)))
    for ours, theirs in zip(run(gm, *args), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def two(second: Callable[[Graph, torch.fx.Node, torch.fx.Node], torch.fx.Node]) -> GraphModule:
    """A graph that returns ``a + b`` and what ``second`` makes."""
    graph, value = Graph(), torch.randn(2, 3)
    a, b = graph.placeholder("a"), graph.placeholder("b")
    first = graph.call_function(aten.add.Tensor, (a, b))
    for node in (a, b, first):
        node.meta["val"] = value.clone()
    other = second(graph, a, b)
    other.meta.setdefault("val", value.clone())
    graph.output((first, other))
    return GraphModule({}, graph)


def again(graph: Graph, a: torch.fx.Node, b: torch.fx.Node, **meta: object) -> torch.fx.Node:
    node = graph.call_function(aten.add.Tensor, (a, b))
    node.meta |= {"val": torch.randn(2, 3)} | meta
    return node


def test_two_outputs_stay_two_tensors() -> None:
    gm = two(again)
    assert merge_repeats(gm) == 1
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    first, second = gm(a, b)
    assert torch.equal(first, a + b) and torch.equal(second, a + b)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_what_may_differ_is_not_merged() -> None:
    def behind_a_mutation(graph: Graph, a: torch.fx.Node, b: torch.fx.Node) -> torch.fx.Node:
        graph.call_function(aten.mul_.Tensor, (a, 2))
        return again(graph, a, b)

    def on_another_stream(graph: Graph, a: torch.fx.Node, b: torch.fx.Node) -> torch.fx.Node:
        return again(graph, a, b, custom={"stream": 1})

    def scaled(graph: Graph, a: torch.fx.Node, b: torch.fx.Node) -> torch.fx.Node:
        return graph.call_function(aten.add.Tensor, (a, b), {"alpha": 2})

    def written(graph: Graph, a: torch.fx.Node, b: torch.fx.Node) -> torch.fx.Node:
        node = again(graph, a, b)
        graph.call_function(aten.mul_.Tensor, (node, 2))
        return node

    for second in (behind_a_mutation, on_another_stream, scaled, written):
        assert merge_repeats(two(second)) == 0, second.__name__

    graph = Graph()
    a = graph.placeholder("a")
    nodes = [graph.call_function(aten.rand_like.default, (a,)) for _ in range(2)]
    for node in (a, *nodes):
        node.meta["val"] = torch.randn(2)
    graph.output(tuple(nodes))
    assert merge_repeats(GraphModule({}, graph)) == 0


# -- what the report calls things, and says where there is nothing ---------------------


@pytest.mark.usefixtures("fake_group")
def test_messages_name_lines_and_parameters() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Parameter(torch.randn(H))
            self.gain = torch.nn.Parameter(torch.randn(H, dtype=torch.float64))

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            y = x * 2
            dist.all_reduce(y)
            h = r + torch.relu(y)
            return F.rms_norm(h, (H,), self.gate, 1e-6)

    gm = aot_graph(Layer(), torch.randn(4, H), torch.randn(4, H))
    (candidate,) = find(gm)
    assert "aten::relu" in candidate.site.message and "test_repeats.py:" in candidate.site.message
    placeholders = gm.graph.find_nodes(op="placeholder")
    name_inputs(gm, ["l_self_modules_a_parameters_gate_"] * len(placeholders))
    assert any("gate" in label(n) for n in placeholders)


def test_a_folder_called_torch_is_no_library() -> None:
    node = Graph().placeholder("x")
    node.meta["stack_trace"] = (
        '  File "/home/u/run.py", line 3, in <module>\n    m(x)\n'
        '  File "/home/u/torch/llama.py", line 120, in forward\n    y\n'
        f'  File "{torch.__file__}", line 9, in all_reduce\n    z\n'
    )
    assert source_of(node) == "/home/u/torch/llama.py:120"


@torch.library.custom_op("repeats_test::tp_all_reduce", mutates_args=())
def tp_all_reduce(x: Tensor) -> Tensor:
    return x.clone()


@tp_all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("repeats_test::all_reduce_list", mutates_args=())
def all_reduce_list(x: list[Tensor], group_name: str) -> list[Tensor]:
    return [t.clone() for t in x]


@all_reduce_list.register_fake
def _(x: list[Tensor], group_name: str) -> list[Tensor]:
    return [torch.empty_like(t) for t in x]


@torch.library.custom_op("repeats_test::all_reduce_scaled_", mutates_args=("x",))
def all_reduce_scaled_(x: Tensor, scale: Tensor, group_name: str) -> None:
    x.mul_(scale)


@pytest.mark.usefixtures("fake_group")
def test_graph_without_an_all_reduce_says_what_it_has() -> None:
    import torch.distributed._functional_collectives as funcol

    x = torch.randn(4, H)
    scattered = aot_graph(lambda x: funcol.reduce_scatter_tensor(x * 2, "sum", 0, dist.group.WORLD) + 1, x)
    assert (
        "reduce_scatter_tensor" in why_no_all_reduce(scattered) and "sequence" in why_no_all_reduce(scattered).lower()
    )
    engine = aot_graph(lambda x: torch.ops.repeats_test.tp_all_reduce(x) + 1, x)
    assert "all_reduce_ops=['repeats_test::tp_all_reduce']" in why_no_all_reduce(engine)
    gathered = aot_graph(lambda x: funcol.all_gather_tensor(x * 2, 0, dist.group.WORLD) + 1, x)
    assert "all_gather_into_tensor" in why_no_all_reduce(gathered)
    assert "graph break" in why_no_all_reduce(aot_graph(lambda x: x + 1, x))


@pytest.mark.usefixtures("fake_group")
def test_all_reduce_op_of_several_tensors_says_so() -> None:
    def listed(x: Tensor, r: Tensor) -> object:
        y, z = torch.ops.repeats_test.all_reduce_list([x, r], "0")
        return F.rms_norm(y + z, (H,))

    def one(x: Tensor, r: Tensor) -> object:
        (y,) = torch.ops.repeats_test.all_reduce_list([x], "0")
        return F.rms_norm(y + r, (H,))

    def scaled(x: Tensor, r: Tensor) -> object:
        y = x.clone()
        torch.ops.repeats_test.all_reduce_scaled_(y, r[0, 0], "0")
        return F.rms_norm(y + r, (H,))

    names = {"repeats_test::all_reduce_list": None, "repeats_test::all_reduce_scaled_": None}
    gm = aot_graph(one, torch.randn(4, H), torch.randn(4, H))
    assert [c.fuses for c in find(gm, all_reduce_ops=names)] == [True], "a list of one is what is in it"
    for program, says in ((listed, "takes 2 tensors"), (scaled, "takes 2 tensors")):
        gm = aot_graph(program, torch.randn(4, H), torch.randn(4, H))
        (candidate,) = find(gm, all_reduce_ops=names)
        decline = candidate.site.decline
        assert decline is not None and decline.reason is Reason.ALL_REDUCE_FORM and says in decline.message


@pytest.mark.usefixtures("fake_group")
def test_all_reduce_in_a_nested_region_is_seen() -> None:
    @torch.compiler.nested_compile_region
    def layer(x: Tensor, r: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return F.rms_norm(y + r, (H,))

    gm = aot_graph(lambda x, r: layer(layer(x, r), r), torch.randn(4, H), torch.randn(4, H))
    sites = fuse(gm, find(gm))
    assert sites and all(s.decline and s.decline.reason is Reason.NESTED_REGION for s in sites)
    assert "nested_compile_region" in sites[0].message and sites[0].group == "0"
    assert {s.node for s in sites} <= {n.name for n in gm.graph.nodes}
