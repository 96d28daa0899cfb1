"""What a MoE dispatch and its combine cost: ringfence, the bare kernels, and NCCL's ways.

    torchrun --nproc-per-node 2 benchmarks/moe.py --out results

A chain of pairs that feed each other, with nothing between a dispatch and its combine: what the experts would read is
combined as it is. Each way is in one CUDA graph; times are per pair, of the slowest rank, interleaved.

    NCCL gather + scatter    all_gather of rows, ids and weights, and a reduce_scatter: what engines fall back to
    NCCL all_to_all          rows and weights in equal parts, and back: less than any such way needs, it sorts nothing
    bare pair                dispatch, empty ids, combine from the workspace: as if experts had written there
    bare pair, staged        the same, and the combine copies its rows into the workspace first
    ringfence                the pair called as functions, compiled by ringfence, over the kernels; by the ids' dtype
    ringfence reference      the same over NCCL

``--soak N``: N replays of graphs of several sizes in turn, with new rows and routing in each, ranks without tokens and
hosts that come late; every result is compared on the device, bit by bit.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ranks as r
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn

import ringfence
from ringfence.runtime.collectives.workspace import workspaces_of

KERNELS = "moe_all_to_all"
GATHER, SWAP = "NCCL gather + scatter", "NCCL all_to_all"


@dataclass(frozen=True)
class Inputs:
    """Of one rank: rows, which experts each asks for, and how much of each. wanted: what a chain makes of the rows."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    wanted: Tensor


def inputs(ranks: r.Ranks, options: argparse.Namespace, hidden: int, tokens: int) -> Inputs:
    g = torch.Generator(ranks.device).manual_seed(1000 + ranks.rank)
    x = torch.randn(tokens, hidden, generator=g, device=ranks.device).to(options.dtype)
    weights, ids = torch.rand(tokens, options.experts, generator=g, device=ranks.device).topk(options.top_k, dim=-1)
    each = options.experts // ranks.size
    owners = torch.zeros(tokens, ranks.size, device=ranks.device).scatter_(1, ids // each, 1.0)
    wanted = x.float() * owners.sum(1, keepdim=True) ** options.pairs  # a row comes back from each rank that it went to
    return Inputs(x, ids.to(torch.int32), weights, wanted)


class Chain(nn.Module):
    """Pairs that feed each other. Routing is a parameter, which a captured call does not copy."""

    def __init__(self, options: argparse.Namespace, ids: Tensor, weights: Tensor, capacity: int) -> None:
        super().__init__()
        self.options, self.capacity = options, capacity
        self.ids, self.weights = (nn.Parameter(t, requires_grad=False) for t in (ids, weights))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.options.pairs):
            sent = ringfence.moe.dispatch(
                [x, self.weights], self.ids, capacity=self.capacity, num_experts=self.options.experts
            )
            x = ringfence.moe.combine(sent.payloads[0], sent.route)
        return x


# -- the contenders ----------------------------------------------------------------------


@dataclass
class Contender:
    """``call`` runs the whole chain once and returns its rows. ``keep`` holds what a graph only knows by address."""

    name: str
    call: Callable[[], Tensor]
    keep: Any = None


def by_hand(ranks: r.Ranks, name: str, chain: Callable[[], Tensor], keep: Any = None) -> Contender:
    if not ranks.cuda:
        return Contender(name, chain, keep)
    graph, out = r.captured(chain)

    def call() -> Tensor:
        graph.replay()
        return out

    return Contender(name, call, (graph, keep))


def gather_and_scatter(ranks: r.Ranks, options: argparse.Namespace, given: Inputs) -> Contender:
    sent = (given.x, given.ids, given.weights)
    gathered = [t.new_empty(ranks.size * t.shape[0], t.shape[1]) for t in sent]
    out = torch.empty_like(given.x)

    def chain() -> Tensor:
        x = given.x
        for _ in range(options.pairs):
            for whole, part in zip(gathered, (x, *sent[1:]), strict=True):
                dist.all_gather_into_tensor(whole, part)
            dist.reduce_scatter_tensor(out, gathered[0])
            x = out
        return out

    return by_hand(ranks, GATHER, chain, (gathered, out))


def swaps(ranks: r.Ranks, options: argparse.Namespace, given: Inputs) -> Contender:
    rows, weights = given.x.repeat(ranks.size, 1), given.weights.repeat(ranks.size, 1)
    others = [torch.empty_like(t) for t in (rows, weights, rows)]

    def chain() -> Tensor:
        for _ in range(options.pairs):
            dist.all_to_all_single(others[0], rows)
            dist.all_to_all_single(others[1], weights)
            dist.all_to_all_single(others[2], others[0])
        return others[2]

    return by_hand(ranks, SWAP, chain, (rows, weights, others))


def bare(ranks: r.Ranks, options: argparse.Namespace, given: Inputs, *, staged: bool) -> Contender:
    """The library's own calls on the workspace that ringfence made."""
    kernels = workspaces_of(ranks.group_name).moe[-1].kernels
    api, workspace, meta, (tokens, hidden) = kernels._api, kernels._workspace, kernels._meta, given.x.shape
    about, out = (ranks.rank, ranks.size), torch.empty_like(given.x)
    at, size = kernels.combine_at, ranks.size * tokens * hidden * given.x.element_size()
    region = workspace[ranks.rank, at : at + size].view(given.x.dtype).view(ranks.size, tokens, hidden)

    def chain() -> Tensor:
        x = given.x
        for _ in range(options.pairs):
            planes, *_ = api.moe_a2a_dispatch(
                given.ids, [x, given.weights, given.ids], workspace, meta, tokens, *about, options.top_k,
                options.experts, enable_pdl=False,
            )  # fmt: skip
            api.moe_a2a_sanitize_expert_ids(planes[2], workspace, meta, ranks.rank, -1, enable_pdl=False)
            api.moe_a2a_combine(
                planes[0] if staged else region, tokens, workspace, meta, tokens, *about, options.top_k, at,
                payload_in_workspace=not staged, output=out, enable_pdl=False,
            )  # fmt: skip
            x = out
        return out

    return by_hand(ranks, f"bare pair{', staged' if staged else ''}", chain, (kernels, given, out))


def compiled(options: argparse.Namespace, collective: str, ids: Tensor, given: Inputs, tokens: int) -> Contender:
    backend = ringfence.Backend(capture_sizes=(tokens,), moe_collective=collective, static_outputs=True)
    chain = Chain(options, ids, given.weights, tokens)
    call = torch.compile(chain, backend=backend, fullgraph=True, dynamic=False)
    with r.failed_capture_is_an_error():
        call(given.x)  # compiles, runs and captures
    (report,) = backend.reports
    if collective == KERNELS and not any(KERNELS in note for note in report.notes) and given.x.is_cuda:
        raise RuntimeError(f"the kernels were not taken: {report.notes}")
    name = f"ringfence, {str(ids.dtype).removeprefix('torch.')} ids" if collective == KERNELS else "ringfence reference"
    return Contender(name, lambda: call(given.x), (report, chain))


# -- the race ----------------------------------------------------------------------------------


def pairs(ranks: r.Ranks, options: argparse.Namespace, hidden: int, tokens: int) -> None:
    ranks.forget()
    given = inputs(ranks, options, hidden, tokens)
    makers: dict[str, Callable[[], Contender]] = {GATHER: partial(gather_and_scatter, ranks, options, given)}
    if ranks.cuda:
        for dtype in (torch.int32, torch.int64):
            ids = given.ids.to(dtype)
            makers[f"ringfence {dtype}"] = partial(compiled, options, KERNELS, ids, given, tokens)
        makers["bare"] = partial(bare, ranks, options, given, staged=False)
        makers["bare, staged"] = partial(bare, ranks, options, given, staged=True)
    makers["reference"] = partial(compiled, options, "reference", given.ids, given, tokens)
    makers[SWAP] = partial(swaps, ranks, options, given)
    contenders = ranks.made(makers, part="pairs", hidden=hidden, tokens=tokens)
    samples, _ = ranks.together(lambda: race(ranks, options, contenders, given))
    for contender, (us, difference) in zip(contenders, samples or (), strict=False):
        checked = {"difference": max(ranks.gather(difference))} if difference is not None else {}
        ranks.record(
            part="pairs", hidden=hidden, tokens=tokens, contender=contender.name, us=ranks.median_of_max(us), **checked
        )
    if samples is not None:
        ranks.say("\n" + tabled(ranks.results))


def race(
    ranks: r.Ranks, options: argparse.Namespace, contenders: list[Contender], given: Inputs
) -> list[tuple[list[float], float | None]]:
    """For each contender: times per pair, and how far its rows are from the right ones, where they can be right."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(options.repeats):
        for i, contender in enumerate(contenders):
            times[i].append(ranks.stream_us(contender.call, options.calls)[0] / options.pairs)
    sums = [c.name.startswith("ringfence") or c.name.endswith("staged") for c in contenders]
    found = [r.distance(c.call(), given.wanted) if right else None for c, right in zip(contenders, sums, strict=True)]
    return list(zip(times, found, strict=True))


# -- the soak ----------------------------------------------------------------------------------


def soak(ranks: r.Ranks, options: argparse.Namespace) -> None:
    hidden, sizes = options.hidden[0], ((1, 1), (16, 16), (128, 40), (64, 0), (0, 7))
    ringfence.moe.prepare(
        capacity=128,
        top_k=options.top_k,
        hidden=hidden,
        dtype=options.dtype,
        collective=KERNELS if ranks.cuda else "auto",
    )
    wrong = torch.zeros(len(sizes), dtype=torch.int64, device=ranks.device)
    replays = [one_pair(ranks, options, hidden, counts, wrong[i]) for i, counts in enumerate(sizes)]
    order, late = random.Random(7), random.Random(ranks.rank)  # one order on all ranks
    start, done = time.perf_counter(), 0
    while done < options.soak and ranks.time_left():
        for _ in range(min(5000, options.soak - done)):
            order.choice(replays)()
            if late.random() < 0.002:
                time.sleep(late.random() / 500)
            done += 1
        ranks.synchronize()
    seconds = time.perf_counter() - start
    found = [sum(each) for each in zip(*ranks.gather(wrong.tolist()), strict=True)]
    ranks.record(
        part="soak", replays=done, mismatches=sum(found), by_size=str(dict(zip(sizes, found, strict=True))), s=seconds
    )


def one_pair(
    ranks: r.Ranks, options: argparse.Namespace, hidden: int, counts: tuple[int, int], wrong: Tensor
) -> Callable[[], object]:
    """A graph that draws rows and routing, sends them, and counts into ``wrong`` where they did not come back whole."""
    tokens, each = counts[ranks.rank % 2], options.experts // ranks.size

    def call() -> Tensor:
        x = torch.randn(tokens, hidden, device=ranks.device).to(options.dtype)
        ids = torch.rand(tokens, options.experts, device=ranks.device).topk(options.top_k, dim=-1).indices
        owners = torch.zeros(tokens, ranks.size, device=ranks.device).scatter_(1, ids // each, 1.0)
        sent = ringfence.moe.dispatch([x], ids, capacity=max(counts), num_experts=options.experts)
        result = ringfence.moe.combine(sent.payloads[0], sent.route)
        wrong.add_((result.float() != (x.float() * owners.sum(1, keepdim=True))).any())
        return result

    if not ranks.cuda:
        return call
    graph, out = r.captured(call)
    kept = (graph, out)
    return lambda: kept[0].replay()


def tabled(results: list[dict[str, Any]]) -> str:
    rows = [e for e in results if e["part"] == "pairs"]
    us = {(e["contender"], e["hidden"], e["tokens"]): e["us"] for e in rows if "failed" not in e}
    sizes = list(dict.fromkeys((e["hidden"], e["tokens"]) for e in rows))
    names = list(dict.fromkeys(e["contender"] for e in rows))

    def line(name: str, value: Callable[[tuple[int, int]], float | None]) -> list[str]:
        return [name, *(f"{found:.2f}" if (found := value(size)) is not None else "-" for size in sizes)]

    def ratio(size: tuple[int, int], over: str, under: str) -> float | None:
        one, other = us.get((over, *size)), us.get((under, *size))
        return one / other if one and other else None

    ours = next((n for n in names if n.endswith("int32 ids")), "ringfence reference")
    table = [line(name, lambda size, n=name: us.get((n, *size))) for name in names]  # type: ignore[misc]
    table.append(line("ringfence / bare pair", lambda size: ratio(size, ours, "bare pair")))
    table.append(line(f"{GATHER} / ringfence", lambda size: ratio(size, GATHER, ours)))
    headers = ("us per pair", *(f"{hidden} x {tokens}" for hidden, tokens in sizes))
    return tabulate(table, headers, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=r.numbers, default=(1, 16, 128, 1024))
    parser.add_argument("--hidden", type=r.numbers, default=(4096, 7168))
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="back-to-back calls of a repeat")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="replays, instead of times")
    options = r.arguments(parser)
    options.dtype = torch.bfloat16
    ranks = r.Ranks(options)
    with torch.no_grad():
        if options.soak:
            soak(ranks, options)
        for hidden in options.hidden if not options.soak else ():
            for tokens in options.tokens:
                if ranks.time_left():
                    pairs(ranks, options, hidden, tokens)
    if not options.soak:
        ranks.say("\n" + tabled(ranks.results))
    ranks.end()


if __name__ == "__main__":
    main()
