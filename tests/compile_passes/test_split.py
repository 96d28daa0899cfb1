"""Judge and split: who is cut out, in which order, and what stays together."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ringfence.compile_passes.groups import groups_of
from ringfence.compile_passes.judge import RULES, Decision, Verdict
from ringfence.compile_passes.lower import eager_piece, lower
from ringfence.compile_passes.parts import cut as cut_at
from ringfence.compile_passes.roles import c10d
from ringfence.compile_passes.split import SplitPlan, split
from ringfence.runtime.errors import RefusedError
from support import aot_graph, fuse_graph, judge

H = 16


@torch.library.custom_op("ringfence_test::two_outputs", mutates_args=())
def two_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x - 1


@two_outputs.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("ringfence_test::unsafe", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def unsafe(x: Tensor) -> Tensor:
    return x + 1


unsafe.register_fake(torch.empty_like)


@torch.library.custom_op("ringfence_test::mutates", mutates_args=("x",))
def mutates(x: Tensor) -> None:
    x.add_(1)


@torch.library.custom_op("ringfence_test::grouped", mutates_args=())
def grouped(x: Tensor, group: str) -> Tensor:
    return x.clone()


@grouped.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def reduced(x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    return y


def cut(gm: GraphModule, **options: object) -> tuple[SplitPlan, GraphModule]:
    return split(gm, cut_at(gm, judge(gm, backends={"0": "gloo"}, capture=True, **options)))


def islands(plan: SplitPlan) -> list[tuple[str, ...]]:
    return [p.ops for p in plan.pieces if p.island]


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def runs_right(fn: object, gm: GraphModule, plan: SplitPlan, whole: GraphModule, *args: Tensor) -> None:
    """The split graph, and the program made of it, compute what the whole one did."""
    expected = fn(*args)  # type: ignore[operator]
    program = lower(plan, whole, eager_piece, [f"x{i}" for i in args], frozenset())
    slots = [*args, *[None] * (program.slots - len(args))]
    for slot, value in program.constants:
        slots[slot] = value
    for step in program.steps:
        for slot, value in zip(step.outputs, step.call(*[slots[i] for i in step.inputs]), strict=True):
            slots[slot] = value
    for slot, value in zip(program.outputs, expected, strict=True):
        assert torch.equal(slots[slot], value)


@pytest.mark.parametrize(
    ("backend", "capture", "decision", "rule"),
    [
        ("gloo", True, Decision.SPLIT, "host_collective"),
        ("fake", True, Decision.SPLIT, "host_collective"),
        ("nccl", True, Decision.IN_GRAPH, "nccl"),
        ("xccl", True, Decision.SPLIT, "unknown_collective"),
        ("gloo", False, Decision.IN_GRAPH, "no_capture"),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_collective_is_judged_by_its_backend(backend: str, capture: bool, decision: Decision, rule: str) -> None:
    def run(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rms_norm(reduced(x) + r, (H,)), reduced(r).relu()

    gm = aot_graph(run, torch.randn(3, H), torch.randn(3, H))
    assert fuse_graph(gm)[0].fused
    verdicts = judge(gm, backends={"0": backend}, capture=capture)
    assert {v.op for v in verdicts} == {
        "ringfence::all_reduce_add_rms_norm",
        "_c10d_functional::all_reduce",
        "_c10d_functional::wait_tensor",
    }
    assert {(v.decision, v.rule) for v in verdicts} == {(decision, rule)}
    assert [v.site for v in verdicts if v.op.startswith("ringfence")] == [0]
    assert all(v.message and v.source for v in verdicts)


def test_every_rule_names_its_source() -> None:
    assert len({r.id for r in RULES}) == len(RULES)
    assert all(r.source and r.message for r in RULES)


@pytest.mark.usefixtures("fake_group")
def test_pieces_keep_the_original_order() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        a = reduced(x)
        b = torch.sigmoid(a)
        c = reduced(b)
        return torch.tanh(c) + b, a

    gm = aot_graph(run, torch.randn(3, H))
    plan, whole = cut(gm)
    assert [p.island for p in plan.pieces] == [False, True, False, True, False]
    assert islands(plan) == [("_c10d_functional::all_reduce", "_c10d_functional::wait_tensor")] * 2
    runs_right(run, gm, plan, whole, torch.randn(3, H))


@pytest.mark.usefixtures("fake_group")
def test_getitem_stays_with_its_producer_and_neighbours_share_an_island() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.ops.ringfence_test.two_outputs(x * 2)
        c, d = torch.ops.ringfence_test.two_outputs(a)
        return c * b, d + 1

    gm = aot_graph(run, torch.randn(3, H))
    plan, whole = cut(gm, split_ops=["ringfence_test::two_outputs"])
    assert [p.island for p in plan.pieces] == [False, True, False]
    for name in ("submod_0", "submod_2"):
        assert operator.getitem not in {n.target for n in whole.get_submodule(name).graph.nodes}
    runs_right(run, gm, plan, whole, torch.randn(3, H))


@pytest.mark.usefixtures("fake_group")
def test_views_between_islands_are_no_piece() -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        a = reduced(x * 2)
        return (reduced(a.view(-1)).view(-1, H) + 1,)

    gm = aot_graph(run, torch.randn(4, H))
    # in-place collectives put a real copy between; the views are what is left without it
    plan, whole = cut(gm, split_ops=["aten::mul", "aten::copy"])
    assert all(p.nodes for p in plan.pieces)
    assert [p.island for p in plan.pieces] == [True, False]
    runs_right(run, gm, plan, whole, torch.randn(4, H))


@pytest.mark.usefixtures("fake_group")
def test_tag_and_functionalised_op_are_split() -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        y = torch.ops.ringfence_test.unsafe(x * 2) * 3
        torch.ops.ringfence_test.mutates(y)
        return (y.exp(),)

    gm = aot_graph(run, torch.randn(3, H))
    plan, whole = cut(gm, split_ops=["ringfence_test::mutates.default"])
    assert islands(plan) == [("ringfence_test::unsafe",), ("ringfence_test::mutates",)]
    runs_right(run, gm, plan, whole, torch.randn(3, H))


@pytest.mark.usefixtures("fake_group")
def test_graph_without_verdicts_is_one_piece() -> None:
    gm = aot_graph(lambda x: (x.exp(), x), torch.randn(3, H))
    plan, _ = cut(gm)
    assert [(p.island, p.nodes) for p in plan.pieces] == [(False, 1)]


def test_host_memory_and_control_flow_are_split() -> None:
    """On fake CUDA tensors: a CPU scalar of the caller's, a copy to the host; a constant may be captured."""
    constant = torch.tensor(3.0)

    def run(x: Tensor, scalar: Tensor) -> tuple[Tensor, ...]:
        y = (x * constant).exp()
        return y.sin() * scalar, y.cpu()

    with FakeTensorMode(allow_non_fake_inputs=True):
        gm = make_fx(run)(torch.empty(4, H, device="cuda"), torch.empty(()))
    verdicts = judge(gm, backends={}, capture=True)
    assert [(v.op, v.rule, v.decision) for v in verdicts] == [
        ("aten::mul", "host_memory", Decision.SPLIT),
        ("aten::_to_copy", "host_memory", Decision.SPLIT),
    ]
    assert verdicts[0].node == "mul_1"


@pytest.mark.usefixtures("fake_group")
def test_wait_in_another_piece_goes_to_its_collective() -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        pending = c10d.all_reduce(x * 2, "sum", "0")
        other = x.exp().sin()
        return (c10d.wait_tensor(pending) + other,)

    gm = aot_graph(run, torch.randn(3, H))
    verdicts = judge(gm, backends={"0": "nccl"}, capture=True, split_ops=["aten::exp"])
    plan, whole = split(gm, cut_at(gm, verdicts))
    first, island, last = (whole.get_submodule(p.name) for p in plan.pieces)
    targets = [[str(n.target) for n in m.graph.nodes if n.op == "call_function"] for m in (first, island, last)]
    assert targets[0][-2:] == ["_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"]
    assert targets[1] == ["aten.exp.default"]


@pytest.mark.usefixtures("fake_group")
def test_op_with_a_group_argument_is_no_collective() -> None:
    gm = aot_graph(lambda x: (torch.ops.ringfence_test.grouped(x, "no_such_group") + 1,), torch.randn(3, H))
    assert groups_of(gm) == []
    assert judge(gm, backends={}, capture=True) == []


@pytest.mark.usefixtures("fake_group")
def test_engine_op_over_nccl_is_not_taken_for_nccl() -> None:
    gm = aot_graph(lambda x: (torch.ops.ringfence_test.grouped(x, "0") + 1,), torch.randn(3, H))
    (verdict,) = judge(gm, backends={"0": "nccl"}, capture=True, all_reduce_ops=["ringfence_test::grouped"])
    assert (verdict.rule, verdict.decision) == ("unknown_collective", Decision.SPLIT)


def with_attributes(outputs: str, *, ops: bool) -> GraphModule:
    """``f(x, n)`` with two attributes, ``c`` and ``deep.c``; it returns ``outputs``."""
    root = torch.nn.Module()
    root.c, root.deep = torch.arange(3.0), torch.nn.Module()
    root.deep.c = torch.arange(4.0)
    graph = Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    y = graph.call_function(torch.ops.aten.add.Tensor, (x, x)) if ops else None
    attributes = {"c": graph.get_attr("c"), "again": graph.get_attr("c"), "deep": graph.get_attr("deep.c")}
    read = graph.get_attr("c")
    z = graph.call_function(torch.ops.aten.mul.Tensor, (read, 2)) if ops else None
    graph.output(eval(outputs, {"x": x, "n": n, "y": y, "z": z, "read": read, **attributes}))
    with FakeTensorMode():
        for node in (x, y, z):
            if node is not None:
                node.meta["val"] = torch.empty(3)
    graph.eliminate_dead_code()
    return GraphModule(root, graph)


@pytest.mark.parametrize("cut_off", [(), ("add",), ("mul",)], ids=str)
@pytest.mark.parametrize(
    "outputs",
    [
        "(y, c)",
        "(c, y, again, c, deep)",
        "(x, None, 7, n, y, z, c, read)",
        "(deep, {'a': (y, [c, None])}, x)",
        "c",
    ],
)
def test_attribute_that_only_the_caller_reads_is_returned(outputs: str, cut_off: tuple[str, ...]) -> None:
    gm = with_attributes(outputs, ops=True)
    before = gm.code
    verdicts = [Verdict(name, name, Decision.SPLIT, "mine", "", "") for name in cut_off if name in gm.code]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan, whole = split(gm, cut_at(gm, verdicts))
    whole.graph.lint()
    args = torch.randn(3), 5
    assert_same(whole(*args), gm(*args))
    gm.recompile()
    assert gm.code == before
    assert sorted(p.name for p in plan.pieces) == sorted(
        str(n.target) for n in whole.graph.nodes if n.op == "call_module"
    )


@pytest.mark.parametrize("outputs", ["(c,)", "(c, x, again, deep)", "(x, n, None, 3)", "(None,)"])
def test_graph_without_an_op_is_no_piece(outputs: str) -> None:
    gm = with_attributes(outputs, ops=False)
    plan, whole = split(gm, cut_at(gm, []))
    assert plan.pieces == ()
    args = torch.randn(3), 5
    assert_same(whole(*args), gm(*args))
    program = lower(plan, whole, eager_piece, ["x", "n"], frozenset())
    slots = program.slots_of(args)
    assert_same([slots[i] for i in program.outputs], list(gm(*args)))


@pytest.mark.usefixtures("fake_group")
def test_refused_op_is_no_piece() -> None:
    gm = aot_graph(lambda x: (x.exp(),), torch.randn(3, H))
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    verdict = Verdict(node.name, "aten::exp", Decision.REFUSE, "rule", "it would hang", "nowhere")
    with pytest.raises(RefusedError, match=r"'exp' \(aten::exp\) is refused: it would hang"):
        split(gm, cut_at(gm, [verdict]))
