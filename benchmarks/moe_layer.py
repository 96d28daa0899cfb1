"""A layer with experts: as ringfence rewrites it, and the same by Inductor and NCCL in a CUDA graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import ranks as r
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from moe_ways import KERNELS, Contender, by_hand, prepare
from tabulate import tabulate
from torch import Tensor, nn

import ringfence

INDUCTOR, OURS = "Inductor, NCCL gather + scatter", "ringfence, dispatch + combine"


class Layer(nn.Module):
    """``x`` and the sum of its experts, of which each rank has a part; tokens are gathered, and the sum is scattered.

    Rows are sorted by expert and multiplied in groups, as Hugging Face's ``grouped_mm`` form does it.
    """

    def __init__(self, options: argparse.Namespace, hidden: int, rank: int, ranks: int, device: torch.device) -> None:
        super().__init__()
        self.top_k, self.rank, self.count = options.top_k, rank, options.experts // ranks
        g = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> nn.Parameter:
            values = torch.randn(shape, generator=g, device=device, dtype=options.dtype) / shape[-1] ** 0.5
            return nn.Parameter(values, requires_grad=False)

        self.gate = drawn(options.experts, hidden)  # equal on all ranks: drawn first
        self.up = drawn(self.count, 2 * options.intermediate, hidden)
        self.down = drawn(self.count, hidden, options.intermediate)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        elsewhere = (ids // self.count) != self.rank
        local = torch.fmod(ids.masked_fill(elsewhere, -1), self.count)
        chosen = local.masked_fill(local == -1, self.count).reshape(-1)
        scale = weights.masked_fill(elsewhere, 0.0).reshape(-1)
        by_expert, order = torch.sort(chosen)
        binned = by_expert.float() if x.device.type == "cpu" else by_expert.int()
        counts = torch.histc(binned, bins=self.count, min=0, max=self.count - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        others = (by_expert >= self.count).unsqueeze(-1)
        rows = x[order // self.top_k].masked_fill(others, 0.0)
        up = torch._grouped_mm(rows, self.up.transpose(-2, -1), offs=ends).masked_fill(others, 0.0)
        gate, value = up.chunk(2, dim=-1)
        made = torch._grouped_mm(F.silu(gate) * value, self.down.transpose(-2, -1), offs=ends).masked_fill(others, 0.0)
        made = made * scale[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=x.device)
        return made[back].view(x.shape[0], self.top_k, x.shape[1]).sum(dim=1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax((x @ self.gate.t()).float(), -1)
        weights, ids = scores.topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        rows = (funcol.all_gather_tensor(t, 0, dist.group.WORLD) for t in (x, ids, weights))
        return x + funcol.reduce_scatter_tensor(self.experts(*rows), "sum", 0, dist.group.WORLD)


def layers(ranks: r.Ranks, options: argparse.Namespace) -> None:
    made, why = ranks.together(lambda: prepare(ranks, options, max(options.hidden), max(options.tokens)))
    ranks.say(made if why is None else why)
    for hidden in options.hidden if why is None else ():
        layer = Layer(options, hidden, ranks.rank, ranks.size, ranks.device)
        for tokens in options.tokens:
            if ranks.time_left():
                raced(ranks, options, layer, hidden, tokens)


def by_inductor(ranks: r.Ranks, options: argparse.Namespace, layer: Layer, x: Tensor) -> Contender:
    backend = "inductor" if options.piece_compiler == "inductor" else "aot_eager"
    call = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    return by_hand(ranks, INDUCTOR, lambda: call(x), (call, x))


def by_ringfence(ranks: r.Ranks, options: argparse.Namespace, layer: Layer, x: Tensor) -> Contender:
    backend = ringfence.Backend(
        capture_sizes=(x.shape[0],),
        moe_dispatch=True,
        moe_collective=KERNELS if ranks.cuda else "auto",
        static_outputs=True,
        piece_compiler=options.piece_compiler,
    )
    call = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    with r.failed_capture_is_an_error():
        call(x)
    (report,) = backend.reports
    if not all(site.rewritten for site in report.moe_sites) or len(report.moe_sites) != 1:
        raise RuntimeError(f"the layer was not rewritten: {[site.message for site in report.moe_sites]}")
    return Contender(OURS, lambda: call(x), (report, call))


def raced(ranks: r.Ranks, options: argparse.Namespace, layer: Layer, hidden: int, tokens: int) -> None:
    ranks.forget()
    g = torch.Generator(ranks.device).manual_seed(ranks.rank)
    x = torch.randn(tokens, hidden, generator=g, device=ranks.device).to(options.dtype)
    makers = (by_inductor, by_ringfence)
    about: dict[str, Any] = {"part": "layer", "hidden": hidden, "tokens": tokens}
    contenders: list[Contender] = []
    for maker in makers:
        contender, why = ranks.together(partial(maker, ranks, options, layer, x))
        if why is not None:
            ranks.record(**about, contender=maker.__name__, failed=why)
            return
        contenders.append(contender)

    def race() -> tuple[list[list[tuple[float, float]]], float]:
        times: list[list[tuple[float, float]]] = [[] for _ in contenders]
        for _ in range(options.repeats):
            for i, contender in enumerate(contenders):
                times[i].append(ranks.stream_us(contender.call, options.calls))
        first, second = (contender.call().clone() for contender in contenders)
        return times, r.distance(second, first)

    found, why = ranks.together(race)
    if found is None:
        ranks.record(**about, contender="all", failed=why)
        return
    times, off = found
    difference = max(ranks.gather(off))
    for contender, each in zip(contenders, times, strict=True):
        us, host = (ranks.median_of_max([pair[i] for pair in each]) for i in (0, 1))
        ranks.record(**about, contender=contender.name, us=us, host_us=host, difference=difference)
    ranks.say("\n" + tabled(ranks.results))


def tabled(results: list[dict[str, Any]]) -> str:
    rows = [e for e in results if e["part"] == "layer" and "failed" not in e]
    us = {(e["contender"], e["hidden"], e["tokens"]): e["us"] for e in rows}
    sizes = list(dict.fromkeys((e["hidden"], e["tokens"]) for e in rows))
    of: Callable[[str, tuple[int, int]], float] = lambda name, size: us[(name, *size)]  # noqa: E731
    table = [[name, *(f"{of(name, size):.1f}" for size in sizes)] for name in (INDUCTOR, OURS)]
    table.append(["first / second", *(f"{of(INDUCTOR, size) / of(OURS, size):.2f}" for size in sizes)])
    return tabulate(table, ("us per layer", *(f"{h} x {t}" for h, t in sizes)), disable_numparse=True)
