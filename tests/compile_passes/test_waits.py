"""Collectives that nobody has waited for, at the border of captured pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Graph, GraphModule

import ringfence
from ringfence.compile_passes.groups import find_group
from ringfence.compile_passes.judge import Decision
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.roles import c10d, calls
from ringfence.compile_passes.split import split
from ringfence.compile_passes.waits import keep_waits, settle_waits
from support import aot_graph, judge, run_ranks

H = 64
WAIT = c10d.wait_tensor.default
reduced = lambda x: c10d.all_reduce(x, "sum", "0")  # noqa: E731
wait = c10d.wait_tensor


def busy(x: Tensor) -> Tensor:
    """Something to compute meanwhile."""
    return (x @ x).sin()


def leaves(x: Tensor) -> tuple[Tensor, ...]:
    return reduced(busy(x)), x + 1


def leaves_by_a_view(x: Tensor) -> tuple[Tensor, ...]:
    pending = reduced(busy(x))
    return pending.view(-1)[2:], pending.t(), x + 1


def list_leaves(x: Tensor) -> tuple[Tensor, ...]:
    first, second = c10d.all_reduce_coalesced([busy(x), x * 2], "sum", "0")
    return first, second[1:], x + 1


def list_is_waited_for(x: Tensor) -> tuple[Tensor, ...]:
    first, second = c10d.all_reduce_coalesced([busy(x), x * 2], "sum", "0")
    other = busy(x + 1)
    return wait(first) + other, wait(second) * other


def leaves_and_is_waited_for(x: Tensor) -> tuple[Tensor, ...]:
    pending = reduced(busy(x))
    other = busy(x + 1)
    return pending, wait(pending) + other


def is_waited_for_by_a_view(x: Tensor) -> tuple[Tensor, ...]:
    pending = reduced(busy(x)).view(-1)
    other = busy(x + 1).view(-1)
    return (wait(pending) + other,)


def is_waited_for_twice(x: Tensor) -> tuple[Tensor, ...]:
    pending = reduced(busy(x))
    a = wait(pending) + busy(x + 1)
    return a, wait(pending) * busy(a)


def two_in_flight(x: Tensor) -> tuple[Tensor, ...]:
    a, b = reduced(busy(x)), reduced(x * 3)
    other = busy(x + 1)
    return wait(b) + other, wait(a) * other


def gathered(x: Tensor) -> tuple[Tensor, ...]:
    pending = c10d.all_gather_into_tensor(busy(x), 2, "0")
    return pending.view(2, H, H)[1], busy(x + 1)


def scattered(x: Tensor) -> tuple[Tensor, ...]:
    return c10d.reduce_scatter_tensor(busy(x), "sum", 2, "0"), x + 1


def exchanged(x: Tensor) -> tuple[Tensor, ...]:
    half = H // 2
    return c10d.all_to_all_single(busy(x), [half, half], [half, half], "0").t(), x + 1


def sent_to_all(x: Tensor) -> tuple[Tensor, ...]:
    return c10d.broadcast(busy(x), 0, "0"), x + 1


def feeds_the_next(x: Tensor) -> tuple[Tensor, ...]:
    first = wait(reduced(busy(x)))
    return c10d.all_gather_into_tensor(first[1:], 2, "0"), first.cos()


def input_is_written_later(x: Tensor) -> tuple[Tensor, ...]:
    pending = c10d.all_gather_into_tensor(x, 2, "0")
    x.add_(1)
    other = busy(x)
    return wait(pending) + 1, other


def input_is_read_first(x: Tensor) -> tuple[Tensor, ...]:
    """What :func:`input_is_written_later` means, in an order that eager keeps to as well."""
    whole = wait(c10d.all_gather_into_tensor(x, 2, "0"))
    x.add_(1)
    return whole + 1, busy(x)


MEANS = {input_is_written_later: input_is_read_first}
PROGRAMS: tuple[Callable[[Tensor], tuple[Tensor, ...]], ...] = (
    leaves,
    leaves_by_a_view,
    list_leaves,
    list_is_waited_for,
    leaves_and_is_waited_for,
    is_waited_for_by_a_view,
    is_waited_for_twice,
    two_in_flight,
    gathered,
    scattered,
    exchanged,
    sent_to_all,
    feeds_the_next,
    input_is_written_later,
)


def data(call: int, rank: int) -> Tensor:
    return torch.randn(H, H, generator=torch.Generator().manual_seed(10 * call + rank))


def wrong_calls(rank: int, piece_compiler: str) -> dict[str, list[int]]:
    """By program, the calls in which a rank got something else than the program says, waited for by the caller."""
    wrong: dict[str, list[int]] = {}
    with torch.no_grad():
        for program in PROGRAMS:
            torch._dynamo.reset()
            backend = ringfence.Backend(piece_compiler=piece_compiler, capture_sizes=[H], graphs="simulated")
            compiled = torch.compile(program, backend=backend, fullgraph=True)
            for call in range(6):
                mine, twin = data(call, rank), data(call, rank)
                actual = [wait(y) for y in compiled(mine)]
                expected = [wait(y) for y in MEANS.get(program, program)(twin)]
                close = [torch.allclose(a, e, atol=1e-4) for a, e in zip(actual, expected, strict=True)]
                if not all(close) or not torch.equal(mine, twin):
                    wrong.setdefault(program.__name__, []).append(call)
            dist.barrier()
            assert backend.reports[0].captured == (H,)
            assert any(p.island for p in backend.reports[0].pieces)
    return wrong


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
def test_results_are_whole_when_they_leave(piece_compiler: str) -> None:
    assert run_ranks(2, wrong_calls, piece_compiler) == [{}, {}]


# -- the graph --------------------------------------------------------------------------------


def order(gm: GraphModule) -> list[str]:
    """What is called, in order, without overloads."""
    return [
        str(getattr(n.target, "__name__", n.target)).split(".")[0] for n in gm.graph.nodes if n.op == "call_function"
    ]


def settled(fn: Callable[..., Any], *arguments: Tensor) -> GraphModule:
    gm = aot_graph(fn, *arguments)
    settle_waits(gm)
    settled_once = order(gm)
    settle_waits(gm)
    assert order(gm) == settled_once
    return gm


def unwaited(gm: GraphModule) -> list[str]:
    """Who looks at what a collective returned, except waits."""
    collectives = [n for n in gm.graph.nodes if n.op == "call_function" and "c10d_functional" in str(n.target)]
    results = [
        r for n in collectives if n.target is not WAIT for r in (n, *n.users) if isinstance(r.meta["val"], Tensor)
    ]
    return [u.name for r in results if r.target is not WAIT for u in r.users if u.target is not WAIT]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.usefixtures("fake_group")
def test_every_result_is_seen_through_a_wait(program: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    gm = settled(program, torch.randn(H, H))
    assert unwaited(gm) == []
    waits = gm.graph.find_nodes(op="call_function", target=WAIT)
    assert waits and all(find_group(n) == "0" for n in waits)  # each is judged as its collective is


@pytest.mark.usefixtures("fake_group")
def test_a_graph_that_waits_is_left_as_it_is() -> None:
    def overlaps(x: Tensor) -> Tensor:
        pending = c10d.all_gather_into_tensor(x, 2, "0")
        other = x.exp().sin()
        return wait(pending)[:H] + other

    gm = aot_graph(overlaps, torch.randn(H, H))
    before = order(gm)
    settle_waits(gm)
    assert order(gm) == before
    assert before.index("wait_tensor") - before.index("all_gather_into_tensor") == 3


def graph_of(*calls_: tuple[Any, ...], returns: int = -1) -> GraphModule:
    """A graph by hand: each call is an op and its arguments, of which an int is an earlier value; 0 is the input."""
    graph = Graph()
    values = [graph.placeholder("x")]
    values[0].meta["val"] = torch.ones(H, H)
    for target, *arguments in calls_:
        node = graph.call_function(target, tuple(values[a] if isinstance(a, int) else a for a in arguments))
        node.meta["val"] = torch.ones(H, H)
        values.append(node)
    graph.output((values[returns],))
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("collective", "written", "at_once"),
    [
        (c10d.all_to_all_single.default, True, True),
        (c10d.all_to_all_single.default, False, False),
        (c10d.all_reduce.default, True, False),  # reads a copy that it takes at once
    ],
)
def test_what_is_overwritten_is_waited_for_at_once(collective: Any, written: bool, at_once: bool) -> None:
    aten = torch.ops.aten
    rest = ([H], [H], "0") if collective is c10d.all_to_all_single.default else ("sum", "0")
    calls_ = [(collective, 0, *rest), (aten.exp.default, 0), (aten.add.Tensor, 0, 1.5), (WAIT, 1)]
    if written:
        calls_.append((aten.copy_.default, 0, 3))
    gm = graph_of(*calls_, returns=4)
    settle_waits(gm)
    assert (order(gm)[1] == "wait_tensor") is at_once


def test_a_collective_in_place_is_seen_through_what_it_returns() -> None:
    aten = torch.ops.aten
    gm = graph_of((aten.exp.default, 0), (c10d.all_reduce_.default, 1, "sum", "0"), (aten.view.default, 1, [-1]))
    settle_waits(gm)
    assert order(gm) == ["exp", "all_reduce_", "wait_tensor", "view"]
    view = gm.graph.find_nodes(op="call_function", target=aten.view.default)[0]
    assert calls(view.args[0], WAIT)
    gm = graph_of((c10d.all_reduce_.default, 0, "sum", "0"), (aten.ones.default, [H]))
    settle_waits(gm)  # an input, which leaves the graph too
    assert order(gm) == ["all_reduce_", "ones", "wait_tensor"]


def test_nobody_waits() -> None:
    gm = graph_of((c10d.all_reduce.default, 0, "sum", "0"), (torch.ops.aten.exp.default, 0))
    settle_waits(gm)
    assert order(gm) == ["all_reduce", "exp", "wait_tensor"]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("program", [list_is_waited_for, is_waited_for_twice, is_waited_for_by_a_view, two_in_flight])
@pytest.mark.usefixtures("fake_group")
def test_a_wait_is_in_the_part_of_its_collective(program: Callable[[Tensor], tuple[Tensor, ...]], backend: str) -> None:
    """Also where the op that is cut out stands between them."""
    gm = settled(program, torch.randn(H, H))
    verdicts = judge(gm, backends={"0": backend}, capture=True, split_ops=["aten::sin"])
    assert {v.decision for v in verdicts if v.rule == "nccl"} <= {Decision.IN_GRAPH}
    plan, whole = split(gm, cut(gm, verdicts))
    parts = [whole.get_submodule(p.name) for p in plan.pieces]
    homes = [{str(n.target).split(".")[1] for n in part.graph.nodes if "c10d" in str(n.target)} for part in parts]  # type: ignore[union-attr]
    assert all("wait_tensor" in home for home in homes if home) and all(home != {"wait_tensor"} for home in homes)
    assert sum(map(bool, homes)) >= 1 and len(plan.pieces) > 3


def test_two_collectives_of_one_island_overlap() -> None:
    reduce = (c10d.all_reduce.default, 0, "sum", "0")
    exp = torch.ops.aten.exp.default
    gm = graph_of(reduce, reduce, (WAIT, 1), (WAIT, 2), (exp, 3))
    eager = {n.name for n in gm.graph.nodes if "c10d" in str(n.target)}
    keep_waits(gm, eager)
    assert order(gm) == ["all_reduce", "all_reduce", "wait_tensor", "wait_tensor", "exp"]
    gm = graph_of(reduce, (exp, 0), (WAIT, 1), (WAIT, 1), (exp, 3))
    keep_waits(gm, {n.name for n in gm.graph.nodes if "c10d" in str(n.target)})
    assert order(gm) == ["all_reduce", "wait_tensor", "wait_tensor", "exp", "exp"]
