"""The spec of a part: a graph that was cut and rewritten wrongly is not used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ringfence.compile_passes.in_place import write_in_place
from ringfence.compile_passes.parts import GraphPart, cut
from ringfence.compile_passes.spec import check_parts
from ringfence.compile_passes.symbols import give_sizes
from ringfence.compile_passes.value_numbers import FunctionalNumbers
from ringfence.runtime.errors import PartSpecError
from support import aot_graph, judge

aten = torch.ops.aten
CPU = torch.device("cpu")


@torch.library.custom_op("ringfence_test::scale_rows", mutates_args=("rows",))
def scale_rows(x: Tensor, rows: Tensor) -> Tensor:
    rows.mul_(2)
    return x + rows.sum()


scale_rows.register_fake(lambda x, rows: torch.empty_like(x))


def program(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    old = cache[1:].sum()
    y = torch.ops.ringfence_test.scale_rows(x, cache[:2])
    cache.add_(1)
    return y + cache.sum() + old, x[:2] * 2


def parts_of(gm: GraphModule) -> tuple[GraphPart, ...]:
    return cut(gm, judge(gm, backends={}, capture=True, split_ops=["ringfence_test::scale_rows"]))


def rewritten(eager: bool) -> tuple[GraphModule, tuple[GraphPart, ...], FunctionalNumbers]:
    gm = aot_graph(program, torch.randn(4, 8), torch.randn(4, 8))
    before = FunctionalNumbers(gm)
    return gm, write_in_place(gm, parts_of(gm), eager_pieces=eager), before


def only(gm: GraphModule, target: object) -> Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=target)
    return node


@pytest.mark.parametrize("eager", [False, True])
def test_a_right_rewrite_passes(eager: bool) -> None:
    gm, parts, before = rewritten(eager)
    check_parts(gm, parts, before, CPU, sizes=not eager)
    assert any(n.target is torch.ops.ringfence_test.scale_rows.default for p in parts if p.island for n in p.nodes)


def lose_the_write(gm: GraphModule) -> None:
    gm.graph.erase_node(only(gm, aten.add_.Tensor))


def write_another_value(gm: GraphModule) -> None:
    node = only(gm, aten.add_.Tensor)
    node.args = (node.args[0], 2)


def give_the_op_other_rows(gm: GraphModule) -> None:
    node = only(gm, torch.ops.ringfence_test.scale_rows.default)
    node.kwargs = {**node.kwargs, "x": gm.graph.find_nodes(op="placeholder")[0]}


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lose_the_write, "output 0"),
        (write_another_value, "output 0"),
        (give_the_op_other_rows, "output 0"),
    ],
)
def test_a_wrong_rewrite_is_found(tamper: Callable[[GraphModule], None], message: str) -> None:
    gm, parts, before = rewritten(eager=True)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.ringfence_test.scale_rows.default)
    tamper(gm)
    parts = tuple(GraphPart(p.island, tuple(n for n in p.nodes if not n._erased), p.ops) for p in parts)
    with pytest.raises(PartSpecError, match=message):
        check_parts(gm, parts, before, CPU, sizes=False)


def test_a_read_that_comes_after_the_write_is_found() -> None:
    gm, parts, before = rewritten(eager=True)
    first, *rest = parts
    late = [n for n in first.nodes if n.op == "call_function"]
    assert late, "the old rows are summed before the op runs"
    moved = (rest[0], GraphPart(first.island, first.nodes, first.ops), *rest[1:])
    with pytest.raises(PartSpecError, match="output 0"):
        check_parts(gm, moved, before, CPU, sizes=False)


def test_a_view_that_crosses_a_cut_is_found() -> None:
    def views(x: Tensor) -> Tensor:
        rows = (x * 2)[1:]
        return torch.ops.aten.sin(rows)

    gm = aot_graph(views, torch.randn(4, 8))
    parts = cut(gm, judge(gm, backends={}, capture=True, split_ops=["aten::sin"]))
    before = FunctionalNumbers(gm)
    here = {p.island: p for p in parts}
    (view,) = [n for p in parts for n in p.nodes if n.target is aten.slice.Tensor]
    wrong = (
        GraphPart(False, (*[n for n in here[False].nodes if n is not view], view)),
        GraphPart(True, tuple(n for n in here[True].nodes if n is not view)),
    )
    with pytest.raises(PartSpecError, match="shares the memory"):
        check_parts(gm, wrong, before, CPU, sizes=False)
    check_parts(gm, write_in_place(gm, wrong, eager_pieces=True), before, CPU, sizes=False)


def test_a_size_that_a_piece_is_not_given_is_found() -> None:
    def sizes(x: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.sin(torch.cat([x, y])) * 2

    gm = aot_graph(sizes, torch.randn(5, 8), torch.randn(3, 8), dynamic=[(0, 0), (1, 0)])
    parts = cut(gm, judge(gm, backends={}, capture=True, split_ops=["aten::sin"]))
    before = FunctionalNumbers(gm)
    done = write_in_place(gm, parts, eager_pieces=False)
    with pytest.raises(PartSpecError, match="is not given the sizes"):
        check_parts(gm, done, before, CPU, sizes=True)
    check_parts(gm, give_sizes(gm, done), before, CPU, sizes=True)


def test_an_input_that_does_not_hold_what_was_written_is_found() -> None:
    def write(x: Tensor, cache: Tensor) -> Tensor:
        cache.add_(x)
        return x * 2

    gm = aot_graph(write, torch.randn(4, 8), torch.randn(4, 8))
    before = FunctionalNumbers(gm)
    parts = write_in_place(gm, cut(gm, []), eager_pieces=True)
    check_parts(gm, parts, before, CPU, sizes=False)
    lose_the_write(gm)
    left = tuple(GraphPart(p.island, tuple(n for n in p.nodes if not n._erased)) for p in parts)
    with pytest.raises(PartSpecError, match="does not hold"):
        check_parts(gm, left, before, CPU, sizes=False)
