"""What ranks do in the tests of who carries out dispatches and combines: kernels that are the reference, and count."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import moe_graphs
import moe_ranks
import torch
import torch.distributed as dist
from fake_flashinfer import FACTS
from torch import Tensor

import ringfence
from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import group_facts, moe_reference
from ringfence.runtime.collectives.measure_moe import measure_moe
from ringfence.runtime.collectives.moe_one_sided import MoeMemory, MoeSizes, compiled_top_k
from ringfence.runtime.collectives.size_table import MoeRow, write_table
from ringfence.runtime.collectives.workspace import workspaces_of
from ringfence.runtime.errors import WorkspaceError
from ringfence.runtime.groups import describe_group

CAPACITY = 12


class Pair:
    """Kernels of one rank. wrong: what they do to a result."""

    def __init__(self, channel: Channel, sizes: MoeSizes, wrong: bool) -> None:
        self.rank, self.ranks, self.nbytes, self.combine_at = channel.rank, channel.size, 1 << 20, 128
        self.sizes = replace(sizes, top_k=compiled_top_k(sizes.top_k) or 0)
        self.memory = MoeMemory(self.rank, self.ranks, 0, 0, 0, 0)
        self.calls: list[tuple[str, int]] = []
        self.kinds: list[tuple[str, bool, int | None]] = []
        self.copied: list[bool] = []
        self._region = torch.empty(1 << 16)
        self._wrong = wrong

    def dispatch(
        self,
        payloads: list[Tensor],
        ids: Tensor,
        capacity: int,
        num_experts: int,
        empty_id: int | None,
        *,
        known: bool = False,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        self.calls.append(("dispatch", capacity))
        self.kinds.append((str(ids.dtype).removeprefix("torch."), known, empty_id))
        rows, got, self._route, counts = moe_reference.dispatch(
            payloads, ids, capacity, num_experts, empty_id, "world", self.ranks
        )
        if empty_id is None:  # as in a workspace: the id of an expert that is here, say
            empty = torch.arange(capacity) >= counts[:, None]
            got[empty.view(-1)] = self.rank * (num_experts // self.ranks)
        return rows, got, counts

    def combine_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        return self._region.view(dtype)[: rows * hidden].view(rows, hidden)

    def combine(self, partial: Tensor, out: Tensor) -> None:
        self.copied.append(partial.data_ptr() != self._region.data_ptr())
        self.calls.append(("combine", partial.shape[0] // self.ranks))
        out.copy_(moe_reference.combine(partial, self._route, "world"))
        if self._wrong and out.numel():
            out[0, 0] += 1

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def on_gpus(wrong: bool = False, broken: bool = False, facts: Any = FACTS) -> Iterator[list[Pair]]:
    """This process has a GPU and FlashInfer, as far as can be told; the kernels that were made."""
    made: list[Pair] = []

    def create(package: Any, channel: Channel, sizes: MoeSizes) -> Pair:
        if broken:
            raise WorkspaceError("no memory left")
        made.append(Pair(channel, sizes, wrong))
        return made[-1]

    with (
        mock.patch.object(group_facts, "probe", lambda device: facts),
        mock.patch("ringfence.moe_assign.why_reference_only", lambda group, device: None),
        mock.patch("ringfence.runtime.collectives.moe_one_sided.create", create),
        mock.patch("ringfence.runtime.collectives.flashinfer.installed", lambda: None),
    ):
        yield made
    ringfence.close_workspaces("world")
    torch._dynamo.reset()


def prepare(**other: Any) -> ringfence.moe.MoePrepared:
    given: dict[str, Any] = {"capacity": CAPACITY, "top_k": 3, "hidden": moe_ranks.H, "dtype": torch.float32}
    return ringfence.moe.prepare(**given | other)


def raised(call: Callable[[], object]) -> str:
    try:
        return f"nothing; {call()}"
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        return f"{type(inner).__name__}: {inner}"


def all_of_it(rank: int) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {}
    for part in (prepared, refused_on_all, compiled, ranged, disagreeing, compared, measured, in_two_graphs):
        found |= part(rank)
    return found


def prepared(rank: int) -> dict[str, Any]:
    """Eager calls, by kernels up to the capacity that was prepared."""
    with on_gpus() as made:
        said = prepare()
        before = len(made[0].calls)
        for slack in (1, 20):  # 1: within the capacity; 20: beyond it
            moe_ranks.check_one(rank, 2, None, (5, 7), 3, 7, "uniform", torch.float32, 3, slack=slack)
        calls = made[0].calls[before:]
        again = prepare(capacity=4)
        larger = prepare(top_k=5)
        counts = [len(made), len(workspaces_of("world").moe)]
    closed = workspaces_of("world").moe, workspaces_of("world").moe_prepared, [pair.closed for pair in made]
    return {"prepared": said, "calls": calls, "again": again, "larger": larger, "made": counts, "closed": closed}


def refused_on_all(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    faults: dict[str, dict[str, Any]] = {
        "wrong": {"wrong": rank == 1},
        "broken": {"broken": rank == 1},
        "unlike": {"facts": replace(FACTS, capability=(9 + rank, 0))},
        "not measured": {"facts": replace(FACTS, capability=(8, 9))},
        "unlinked": {"facts": replace(FACTS, links=None, links_unknown="nobody says")},
        "nodes": {"facts": replace(FACTS, host=f"node{rank}")},
    }
    for name, fault in faults.items():
        with on_gpus(**fault) as made:
            said = prepare()
            found[name] = (said.collective, said.capacity, "; ".join(said.why), len(made))
            moe_ranks.check_one(rank, 2, None, (5, 7), 3, 7, "uniform", torch.float32, 3)
            found[f"{name}, forced"] = raised(lambda: prepare(collective="moe_all_to_all").collective)
    with on_gpus() as made:
        found["other capacity"] = raised(lambda: prepare(capacity=CAPACITY + rank))
        found["small budget"] = prepare(workspace_bytes=12_000).capacity, raised(lambda: prepare(workspace_bytes=9_000))
        found["large top_k"] = raised(lambda: prepare(top_k=23))
    return found


def compiled(rank: int) -> dict[str, Any]:
    """A graph that is rewritten, and what the kernels were called with; options that keep it from them."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "auto": ({}, {}),
        "reference": ({"moe_collective": "reference"}, {}),
        "site, not measured": ({}, {"facts": replace(FACTS, capability=(8, 9))}),
        "site, small": ({"moe_workspace_bytes": 10_400}, {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/table.json"
        write_table(table, (), (MoeRow((8, 9), 2, 6, "a test"),))
        cases["site, measured"] = ({"size_table": table}, {"facts": replace(FACTS, capability=(8, 9))})
        for name, (options, machine) in cases.items():
            found |= compiled_case(rank, name, options, machine)
    return found


def compiled_case(rank: int, name: str, options: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with on_gpus(**machine) as made:
        layer = moe_graphs.Layer("batched", rank, 2)
        backend = ringfence.Backend(moe_dispatch=True, piece_compiler="eager", agree_seconds=180, **options)
        call = torch.compile(layer, backend=backend, fullgraph=True)
        excess = [layer.excess(call(*args), *args) for args in moe_ranks.steps(rank, moe_graphs.given)[:2]]
        calls = [(pair.calls[-4:], pair.kinds[-1:]) for pair in made]
        (site,) = backend.reports[0].moe_sites
        found[name] = excess, calls, [str(pair.sizes) for pair in made], str(site.decline and site.decline.reason)
        found[f"{name}, why"] = site.message
    return found


def ranged(rank: int) -> dict[str, Any]:
    """A dynamic graph whose kernels were measured up to 8 tokens: what each call ran, and what its graph says."""
    ran, dynamic = [], {"facts": replace(FACTS, capability=(8, 9))}
    with tempfile.TemporaryDirectory() as folder, on_gpus(**dynamic) as made:
        write_table(table := f"{folder}/table.json", (), (MoeRow((8, 9), 2, 8, "a test"),))
        layer = moe_graphs.Layer("batched", rank, 2)
        given: dict[str, Any] = {"piece_compiler": "eager", "agree_seconds": 180, "size_table": table}
        backend = ringfence.Backend(moe_dispatch=True, **given)
        call = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
        for tokens in (5, 7, 8, 9, 20, 3):
            args, before = moe_graphs.given(tokens, rank), sum(len(pair.calls) for pair in made)
            assert layer.excess(call(*args), *args) <= 2.0
            calls = [one for pair in made for one in pair.calls][before:]
            ran.append((tokens, len(backend.reports), calls[-2:]))
        sites = [report.moe_sites[0] for report in backend.reports]
    declined = [(str(site.decline.reason), site.message) if site.decline else None for site in sites]
    return {"ranged": (ran, declined)}


def disagreeing(rank: int) -> dict[str, Any]:
    """Ranks whose graphs have another capacity: nobody sends anything."""

    def own(x: Tensor, ids: Tensor) -> Tensor:
        sent = ringfence.moe.dispatch([x], ids, capacity=8 + rank, num_experts=4)
        return ringfence.moe.combine(sent.payloads[0], sent.route)

    with on_gpus() as made:
        backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180)
        call = torch.compile(own, backend=backend, fullgraph=True)
        said = raised(lambda: call(torch.randn(3, 16), torch.zeros(3, 2, dtype=torch.int64)))
    return {"disagreeing": (said, len(made))}


def compared(rank: int) -> dict[str, Any]:
    """Eager dispatches that are compared first: by kernels, and by the reference."""
    found: dict[str, Any] = {}
    for name in ("moe_all_to_all", "reference"):
        with on_gpus() as made:
            prepare(collective=name, check_every_call=True)
            moe_ranks.check_one(rank, 2, None, (5, 7), 3, 7, "uniform", torch.float32, 3)
            before = sum(len(pair.calls) for pair in made)

            def call(capacity: int, k: int, experts: int) -> Any:
                ids = torch.zeros(3, k, dtype=torch.int64)
                return ringfence.moe.dispatch([torch.randn(3, 16)], ids, capacity=capacity, num_experts=experts)

            wrong = ((4 + rank, 2, 4), (4, 1 + 5 * rank, 6), (4, 2, 4 + rank))
            said = [raised(partial(call, *numbers)) for numbers in wrong]
            unlike = [torch.randn(3, w) for w in ((8, 4), (4, 8))[rank]]
            typed = [torch.randn(3, 16).to((torch.bfloat16, torch.float16)[rank])]
            given: dict[str, Any] = {"capacity": 4, "num_experts": 4}
            ids = torch.zeros(3, 2, dtype=torch.int64)
            begun = time.monotonic()
            for payloads, other in (
                (unlike, ids),
                (typed, ids),
                ([torch.randn(3 + 2 * rank, 16)], ids[:1].expand(3 + 2 * rank, 2)),  # 5 of 4 on one rank
                ([None] if rank else [torch.randn(3, 16)], ids),
                ([], ids),
            ):
                said.append(raised(partial(ringfence.moe.dispatch, payloads, other, **given)))
            found["compared within"] = time.monotonic() - begun
            found[f"compared, {name}"] = said, sum(len(pair.calls) for pair in made) - before
            said = [raised(lambda: prepare(check_every_call=bool(rank)))]
            found["compared by one"] = said[0]
    return found


def measured(rank: int) -> dict[str, Any]:
    group = describe_group("world", torch.device("cpu"))
    given = (group, torch.device("cpu"), (64, 128), torch.float32, "a test")
    with on_gpus() as made:
        rows, text = measure_moe(*given, tokens=(1, 3), seconds=600)
        calls = {capacity for pair in made for _, capacity in pair.calls}
    with on_gpus(broken=rank == 1):
        none = measure_moe(*given, tokens=(1,), seconds=600)
    return {"measured": (rows, text, calls, len(made)), "not measured here": none}


def in_two_graphs(rank: int) -> dict[str, Any]:
    """A dispatch in a graph, its combine outside: both by what was prepared. Two in a row are refused."""
    x, ids = torch.randn(3, 16), torch.tensor([[0, 3], [1, 0], [2, 3]])

    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        sent = ringfence.moe.dispatch([x], ids, capacity=CAPACITY, num_experts=4)
        return sent.payloads[0].clone(), sent.route

    def twice(x: Tensor) -> Tensor:
        return first(first(x)[0][:3])[0]

    found: dict[str, Any] = {}
    for name in ("kernels", "reference"):
        with on_gpus() as made:
            if name == "kernels":
                prepare()
            before = len(made[0].calls) if made else 0
            backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180)
            rows, route = torch.compile(first, backend=backend, fullgraph=True)(x)
            result = ringfence.moe.combine(rows, route)
            want = x * torch.tensor([[2.0], [1.0], [1.0]])
            found[f"two graphs, {name}"] = torch.equal(result, want), [p.calls[before:] for p in made]
            if name == "kernels":
                torch._dynamo.reset()
                backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180)
                found["unanswered"] = raised(lambda b=backend: torch.compile(twice, backend=b, fullgraph=True)(x))
    dist.barrier()
    return found
