"""What must not be captured, kind by kind: each with an op that is cut out, and a twin that is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from unsafe_graphs import H, X, decided, on_the_gpu

import ringfence
from ringfence.compile_passes.groups import collectives_of, groups_of
from ringfence.compile_passes.host import Unsafe
from ringfence.compile_passes.lower import eager_piece, lower
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.rules import RULES
from ringfence.compile_passes.split import split
from ringfence.runtime.errors import CaptureFailedWarning
from support import aot_graph, judge

aten = torch.ops.aten
UNSAFE = (torch.Tag.cudagraph_unsafe,)
#: Calls of ``write``, which a replay would not repeat.
CALLS: list[int] = []


@torch.library.custom_op("ringfence_unsafe::read", mutates_args=(), tags=UNSAFE)
def read(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("ringfence_unsafe::write", mutates_args=("out",), tags=UNSAFE)
def write(x: Tensor, out: Tensor) -> None:
    CALLS.append(1)
    out.copy_(x * 2)


@torch.library.custom_op("ringfence_unsafe::plain_write", mutates_args=("out",))
def plain_write(x: Tensor, out: Tensor) -> None:
    out.copy_(x * 2)


@torch.library.custom_op("ringfence_unsafe::size_in_data", mutates_args=(), tags=(torch.Tag.dynamic_output_shape,))
def size_in_data(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("ringfence_unsafe::answer", mutates_args=("out",), tags=(torch.Tag.data_dependent_output,))
def answer(x: Tensor, out: Tensor) -> None:
    out.copy_(x * x.sum().item())


for op in (read, size_in_data):
    op.register_fake(torch.empty_like)

library = torch.library.Library("ringfence_unsafe", "FRAGMENT")
library.define("scale(Tensor x) -> Tensor", tags=UNSAFE)
library.define("scale.by(Tensor x, float by) -> Tensor")
library.define("plain(Tensor x) -> Tensor")
library.define("plain.by(Tensor x, float by) -> Tensor", tags=UNSAFE)
for name in ("scale", "plain"):
    library.impl(name, lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl(f"{name}.by", lambda x, by: x * by, "CompositeExplicitAutograd")


def test_every_kind_has_its_row() -> None:
    rows = {rule.id: rule for rule in RULES}
    assert set(map(str, Unsafe)) <= set(rows)


# -- what the op is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "rule"),
    [
        (lambda x, out: write(x + 1, out), "cudagraph_unsafe"),
        (lambda x, out: answer(x + 1, out), "data_dependent"),
        (lambda x, out: plain_write(x + 1, out), None),
    ],
)
def test_tags_of_an_op_that_writes_into_an_argument(fn: Callable[..., None], rule: str | None) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        fn(x, out)
        return out + 1

    gm = aot_graph(run, torch.randn(H, H))
    assert any(n.target is torch.ops.higher_order.auto_functionalized_v2 for n in gm.graph.nodes)
    assert [r for _, r in decided(gm)] == ([rule] if rule else [])


def test_tag_of_the_default_overload_is_the_ops() -> None:
    ops = torch.ops.ringfence_unsafe
    x = torch.randn(H)
    assert (
        decided(aot_graph(lambda x: (ops.scale(x) + 1, ops.scale.by(x, 2.0)), x))
        == [("ringfence_unsafe::scale", "cudagraph_unsafe")] * 2
    )
    assert decided(aot_graph(lambda x: (ops.plain(x) + 1, ops.plain.by(x, 2.0)), x)) == [
        ("ringfence_unsafe::plain", "cudagraph_unsafe")
    ]


@pytest.mark.parametrize("name", ["ringfence_unsafe::plain_write", "ringfence_unsafe::plain_write.default"])
def test_ops_that_inductor_was_told_to_partition_at(name: str) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        plain_write(x, out)
        return out + 1

    gm = aot_graph(run, torch.randn(H, H))
    with torch._inductor.config.patch(custom_should_partition_ops=[name]):
        assert decided(gm) == [("ringfence_unsafe::plain_write", "named_to_inductor")]
    assert not decided(gm)


def test_size_that_depends_on_data_is_seen_by_the_tag() -> None:
    assert decided(aot_graph(lambda x: size_in_data(x) + 1, torch.randn(H))) == [
        ("ringfence_unsafe::size_in_data", "data_dependent")
    ]
    index, repeats = torch.arange(H), torch.ones(H, dtype=torch.int64)
    assert decided(aot_graph(lambda x, i: x[i] + 1, torch.randn(H, H), index)) == []
    known = lambda x, r: torch.repeat_interleave(r, output_size=H) + x  # noqa: E731
    assert decided(aot_graph(known, torch.randn(H), repeats)) == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("op", [aten.index_put.default, aten._unsafe_index_put.default])
def test_write_by_a_mask(op: Any, dtype: torch.dtype) -> None:
    rows = (H, {"dtype": dtype})
    gm = on_the_gpu(lambda x, i, v: op(x, [i], v), X, rows, (H, {}))
    masked = dtype is not torch.int64
    assert decided(gm) == ([(str(op.name()), "boolean_index")] if masked else [])


def test_sparse_tensors_are_islands() -> None:
    sparse = torch.eye(H).to_sparse()
    assert decided(by_hand(aten.to_sparse.default, value=sparse)) == [("aten::to_sparse", "sparse")]
    assert decided(by_hand(aten._to_sparse_csr.default, value=sparse.to_sparse_csr()))[0][1] == "sparse"
    assert decided(by_hand(aten.exp.default)) == []
    reads = by_hand(aten.mm.default, value=torch.eye(H))
    assert decided(reads) == []
    reads.graph.find_nodes(op="placeholder")[0].meta["val"] = sparse
    assert decided(reads) == [("aten::mm", "sparse")]


def test_ops_that_ask_the_host_though_no_tag_says_so() -> None:
    with torch.no_grad():
        checked = aot_graph(lambda x: torch.linalg.solve(x, x), torch.eye(H))
    assert decided(checked) == [("aten::_linalg_check_errors", "host_op")]
    assert decided(aot_graph(lambda x: torch.linalg.solve_ex(x, x)[0], torch.eye(H))) == []


def by_hand(target: Any, *arguments: Any, value: Any = None, **options: Any) -> GraphModule:
    """A graph of one call, which takes the graph's input after ``arguments``."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(H)
    node = graph.call_function(target, (*arguments, x), options)
    node.meta["val"] = x.meta["val"] if value is None else value
    graph.output((node,))
    return GraphModule(torch.nn.Module(), graph)


class Stranger(torch._ops.HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("ringfence_stranger")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_higher_order_ops_by_what_is_known_of_them() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
    from torch._prims.rng_prims import graphsafe_run_with_rng_state, run_and_save_rng_state, run_with_rng_state

    exp = aten.exp.default
    for op in (run_and_save_rng_state, run_with_rng_state, graphsafe_run_with_rng_state):
        assert decided(by_hand(op, exp)) == [(str(op), "rng_state")]
        assert (op, aten.exp.default) not in decided(by_hand(op, exp))
    assert decided(by_hand(Stranger())) == [("ringfence_stranger", "higher_order")]
    assert decided(by_hand(torch.ops.higher_order.out_dtype, aten.mul.Tensor, torch.float32)) == []
    assert decided(by_hand(triton_kernel_wrapper_functional)) == []
    assert decided(by_hand(torch.ops.higher_order.with_effects, None, exp))[-1][1] == "effect"


@pytest.mark.parametrize(
    ("fn", "op", "rule"),
    [
        (lambda x: torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,)), "cond", "control_flow"),
        (
            lambda x: torch.while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 2), (torch.tensor(0), x))[1],
            "while_loop",
            "control_flow",
        ),
        (lambda x: torch._higher_order_ops.map(lambda t: t.sin(), x), "map_impl", "control_flow"),
        (
            lambda x: torch._higher_order_ops.scan(lambda c, t: (c + t, c * t), torch.zeros(H), x)[1],
            "scan",
            "control_flow",
        ),
    ],
)
def test_control_flow_is_the_hosts(fn: Callable[[Tensor], Tensor], op: str, rule: str) -> None:
    assert decided(aot_graph(lambda x: fn(x.exp()) + 1, torch.randn(H, H))) == [(op, rule)]


# -- regions --------------------------------------------------------------------------------


def region(body: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Two calls of one region, which AOT leaves as ``invoke_subgraph``."""
    nested = torch.compiler.nested_compile_region(lambda x: body(x * 2) + 1)
    return lambda x: nested(nested(x.exp()).sin()).cos()


def written(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    write(x, out)
    return out


def all_reduce(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", "0"))


@pytest.mark.parametrize(
    ("body", "options", "expected"),
    [
        (read, {}, ("ringfence_unsafe::read", "cudagraph_unsafe")),
        (written, {}, ("ringfence_unsafe::write", "cudagraph_unsafe")),
        (torch.sigmoid, {"split_ops": ["aten::sigmoid"]}, ("aten::sigmoid", "split_op")),
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), {}, ("cond", "control_flow")),
        (torch.sigmoid, {"split_ops": ["aten::tanh"]}, None),
    ],
    ids=["tagged", "writes", "named", "control flow", "nothing"],
)
def test_an_op_in_a_region_decides_for_the_region(
    body: Callable[[Tensor], Tensor], options: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    fn, x = region(body), torch.randn(H, H)
    gm = aot_graph(fn, x)
    assert sum(n.target is torch.ops.higher_order.invoke_subgraph for n in gm.graph.nodes) == 2
    assert decided(gm, **options) == ([expected] * 2 if expected else [])
    plan, whole = split(gm, cut(gm, judge(gm, backends={}, capture=True, **options)))
    assert [p.island for p in plan.pieces] == ([False, True, False, True, False] if expected else [False])
    program = lower(plan, whole, eager_piece, ["x"], frozenset())
    slots = [x, *[None] * (program.slots - 1)]
    for step in program.steps:
        for slot, value in zip(step.outputs, step.call(*[slots[i] for i in step.inputs]), strict=True):
            slots[slot] = value
    assert torch.equal(slots[program.outputs[0]], fn(x))


@pytest.mark.parametrize(("backend", "rule"), [("gloo", "host_collective"), ("nccl", "nccl")])
@pytest.mark.usefixtures("fake_group")
def test_a_collective_in_a_region_is_judged(backend: str, rule: str) -> None:
    gm = aot_graph(region(all_reduce), torch.randn(H, H))
    assert groups_of(gm) == ["0"]
    assert len(collectives_of(gm)) == 2
    verdicts = judge(gm, backends={"0": backend}, capture=True)
    assert [(v.op, v.rule) for v in verdicts] == [("_c10d_functional::all_reduce", rule)] * 2
    assert all(v.message.endswith(f"(it is in a region that '{v.node}' calls)") for v in verdicts)
    plan, whole = split(gm, cut(gm, verdicts))
    program = lower(plan, whole, eager_piece, ["x"], frozenset())
    assert [step.calls for step in program.steps if step.calls] == ([("0",)] * 2 if backend == "gloo" else [("0", "0")])


# -- through the backend ----------------------------------------------------------------------


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
def test_a_writing_op_that_is_tagged_runs_in_every_replay(piece_compiler: str) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        write(x + 1, out)
        return out + 1

    backend = ringfence.Backend(capture_sizes=[H], graphs="simulated", piece_compiler=piece_compiler)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            CALLS.clear()
            x = torch.randn(H, H)
            torch.testing.assert_close(compiled(x), (x + 1) * 2 + 1)
            assert len(CALLS) == 1
    assert [p.ops for p in backend.reports[0].pieces if p.island] == [("ringfence_unsafe::write",)]


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
@pytest.mark.parametrize("body", [read, torch.sigmoid], ids=["island", "captured"])
def test_regions_are_served(body: Callable[[Tensor], Tensor], piece_compiler: str) -> None:
    fn = region(body)
    backend = ringfence.Backend(capture_sizes=[H], graphs="simulated", piece_compiler=piece_compiler)
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", CaptureFailedWarning)
        for _ in range(4):
            x = torch.randn(H, H)
            torch.testing.assert_close(compiled(x), fn(x))
    assert sum(p.island for p in backend.reports[0].pieces) == (2 if body is read else 0)
