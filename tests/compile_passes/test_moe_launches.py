"""What a graph launches around the kernels of a dispatch and a combine: nothing that it can do itself, or need not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_library import Launches, Library, host_bytes
from torch import Tensor
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.collectives import refuse_sites
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.lower import inductor_piece
from ringfence.compile_passes.moe_calls import calls_of, carried_out_by, is_dispatch
from ringfence.compile_passes.op_calls import op_arguments
from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import moe_checks, moe_one_sided
from ringfence.runtime.collectives.moe_ready import needed
from ringfence.runtime.collectives.workspace import MoeWorkspace, workspaces_of
from ringfence.runtime.hazards.situation import Collective, Situation
from support import aot_graph

E, H, C = 4, 16, 6
KERNELS = "moe_all_to_all"
LEAN = ["prepare_dispatch", "dispatch", "prepare_combine", "combine"]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """One rank, with kernels over the library in Python."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(moe_one_sided, "device_bytes", host_bytes)
    monkeypatch.setattr(moe_checks, "is_capturing", lambda device: True)  # nobody looks at ids, as on a device
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    library = Library(1)
    kernels = moe_one_sided.create(
        library.package(0), Channel(dist.HashStore(), 0, 1, seconds=5), needed(4 * H, 2, 4 * H, C)
    )
    workspaces_of("world").moe.append(MoeWorkspace(kernels, torch.device("cpu"), Situation(Collective.MOE_ALL_TO_ALL)))
    yield library
    dist.destroy_process_group()


def routed(scores: Tensor) -> Tensor:
    return scores.topk(2, dim=-1).indices


def chain(x: Tensor, scores: Tensor) -> Tensor:
    """Nobody reads the ids."""
    sent = ringfence.moe.dispatch([x], routed(scores), capacity=C, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0], sent.route)


def reader(x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    sent = ringfence.moe.dispatch([x], routed(scores), capacity=C, num_experts=E, empty_id=-7)
    return ringfence.moe.combine(sent.payloads[0] * 2, sent.route), sent.ids + 1


def even(x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of as many rows as there are tokens, and one."""
    sent = ringfence.moe.dispatch([x], routed(scores), capacity=x.shape[0] + 1, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0], sent.route), sent.ids + 1


def told(x: Tensor, ids: Tensor) -> Tensor:
    """Ids that the graph knows nothing of, by the caller's word."""
    sent = ringfence.moe.dispatch([x], ids, capacity=C, num_experts=E, known_ids=True)
    return ringfence.moe.combine(sent.payloads[0], sent.route)


def into_out(x: Tensor, ids: Tensor) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=C, num_experts=E, known_ids=True)
    return ringfence.moe.combine(sent.payloads[0], sent.route, out=torch.empty_like(x))


def given_ids(x: Tensor, ids: Tensor) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=C, num_experts=E)
    return ringfence.moe.combine(sent.payloads[0], sent.route)


def into_buffer(x: Tensor, ids: Tensor) -> Tensor:
    sent = ringfence.moe.dispatch([x], ids, capacity=C, num_experts=E, known_ids=True)
    buffer = ringfence.moe.combine_buffer(sent, H, x.dtype)
    torch.ops.ringfence_tests.experts_into(buffer, sent.payloads[0])
    return ringfence.moe.combine(buffer, sent.route)


@contextlib.contextmanager
def experts_in_torch() -> Iterator[None]:
    """An op of an engine's own that writes where it is told."""

    def experts_into(out: Tensor, rows: Tensor) -> None:
        torch.mul(rows, 3, out=out)

    with torch.library._scoped_library("ringfence_tests", "FRAGMENT"):
        torch.library.custom_op("ringfence_tests::experts_into", experts_into, mutates_args=("out",))
        yield


def by_kernels(
    fn: Callable[..., Any], *args: Tensor, fuses: bool = False, dynamic: Sequence[tuple[int, int]] = ()
) -> GraphModule:
    gm = aot_graph(fn, *args, inductor=True, dynamic=dynamic)
    for calls in calls_of(gm).values():
        carried_out_by(calls, KERNELS, fuses=fuses)
    gm.graph.lint()
    gm.recompile()
    return gm


def inputs(seed: int = 0, tokens: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, H, generator=g), torch.rand(tokens, E, generator=g)


def in_order(gm: GraphModule, *args: Tensor) -> list[Any]:
    """As the graph takes them, which are of unlike widths; a number is that of the tokens."""
    by_width = {arg.shape[1]: arg for arg in args}
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    return [by_width[v.shape[1]] if isinstance(v, Tensor) else args[0].shape[0] for v in values]


def launches(gm: GraphModule, *args: Tensor) -> tuple[list[str], Any]:
    given = in_order(gm, *args)
    with torch.no_grad(), Launches() as seen:
        (result, *others) = gm(*given)
    return seen.names, (result, *others)


def test_ids_that_come_from_topk_and_that_nobody_reads_cost_nothing(library: Library) -> None:
    x, scores = inputs()
    names, (result,) = launches(by_kernels(chain, x, scores), x, scores)
    assert names == ["topk", "convert_element_type", *LEAN] and torch.equal(result, x)


def test_ids_that_are_read_are_written_by_the_kernel_that_reads_them_where_one_is_made(library: Library) -> None:
    x, scores = inputs()
    eager, (twice, ids) = launches(by_kernels(reader, x, scores), x, scores)
    assert eager.count("sanitize") == 1 and torch.equal(twice, 2 * x)
    assert sorted(ids[4:].flatten().tolist()) == [-6] * 4
    fused = by_kernels(reader, x, scores, fuses=True)
    names, (_, again) = launches(fused, x, scores)
    assert "sanitize" not in names and "where" in names and torch.equal(again, ids)
    gm = by_kernels(reader, x, scores, fuses=True)
    piece = inductor_piece(gm)
    for seed in (1, 2):
        x, scores = inputs(seed)
        library.calls[0].clear()
        with torch.no_grad():
            twice, got = piece(*in_order(gm, x, scores))
        assert torch.equal(twice, 2 * x) and (got[4:] == -6).all()
        assert sorted(map(tuple, (got[:4] - 1).tolist())) == sorted(map(tuple, routed(scores).tolist()))


def test_the_tokens_of_a_graph_may_vary(library: Library) -> None:
    gm = by_kernels(even, *inputs(), fuses=True, dynamic=[(0, 0), (1, 0)])
    piece = inductor_piece(gm)
    for tokens in (4, 5, 2):
        x, scores = inputs(tokens, tokens)
        with torch.no_grad():
            y, ids = piece(*in_order(gm, x, scores))
        assert torch.equal(y, x) and ids.shape == (tokens + 1, 2) and ids[tokens:].tolist() == [[0, 0]]
        assert sorted(map(tuple, (ids[:tokens] - 1).tolist())) == sorted(map(tuple, routed(scores).tolist()))


def test_ids_are_clamped_unless_the_graph_or_the_caller_knows_them(library: Library) -> None:
    x, scores = inputs()
    ids = routed(scores).int()
    assert launches(by_kernels(told, x, ids), x, ids)[0] == LEAN
    assert launches(by_kernels(given_ids, x, ids), x, ids)[0] == ["clamp", *LEAN]

    def among_more(x: Tensor, scores: Tensor) -> Tensor:
        return given_ids(x, torch.cat((scores, scores), 1).topk(2, dim=-1).indices)

    assert "clamp" in launches(by_kernels(among_more, x, scores), x, scores)[0], "8 scores of 4 experts"


def test_experts_of_a_graph_write_what_peers_combine(library: Library) -> None:
    x, scores = inputs()
    ids = routed(scores).int()
    with experts_in_torch():
        gm = by_kernels(into_buffer, x, ids, fuses=True)
        piece = inductor_piece(gm)
        with torch.no_grad():
            assert torch.equal(piece(*in_order(gm, x, ids))[0], 3 * x)
    assert [call["copied"] for call in library.calls[0] if "copied" in call] == [False]


def test_a_combine_into_given_memory_is_the_kernels_too(library: Library) -> None:
    x, scores = inputs()
    gm = by_kernels(into_out, x, ids := routed(scores).int())
    with torch.no_grad():
        assert torch.equal(gm(*in_order(gm, x, ids))[0], x)
    assert len(library.calls[0]) == 2


@pytest.mark.parametrize("fn", [into_out, into_buffer])
def test_a_pair_that_is_refused_is_all_the_references(library: Library, fn: Callable[..., Tensor]) -> None:
    """A buffer that is left to the kernels would be written while nobody waits for the peers that read it."""
    x, scores = inputs()
    with experts_in_torch():
        gm = by_kernels(fn, x, routed(scores).int())
    names = {n.name for n in gm.graph.nodes if is_dispatch(n)}
    verdicts = [Verdict(name, "", Decision.REFUSE, "", "", "", group="world") for name in names]
    assert refuse_sites(gm, verdicts) == 2
    named = [value for n in gm.graph.nodes for key, value in op_arguments(n).items() if key == "collective"]
    assert named == ["reference"] * (3 if fn is into_buffer else 2)
