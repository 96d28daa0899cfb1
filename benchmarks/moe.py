"""What a MoE dispatch and its combine cost: ringfence, the bare kernels, and NCCL's ways.

    torchrun --nproc-per-node 2 benchmarks/moe.py --out results
    torchrun --nproc-per-node 2 benchmarks/moe.py --payload fp8
    torchrun --nproc-per-node 2 benchmarks/moe.py --layer
    torchrun --nproc-per-node 2 benchmarks/moe.py --soak 100000

A chain of pairs that feed each other, with nothing between a dispatch and its combine: what the experts would read is
combined as it is. Each way is in one CUDA graph; times are per pair, of the slowest rank, interleaved.

    NCCL gather + scatter    all_gather of rows, ids and weights, and a reduce_scatter: what engines fall back to
    NCCL all_to_all          rows and weights in equal parts, and back: less than any such way needs, it sorts nothing
    bare pair                dispatch, empty ids, combine from the workspace: as if experts had written there
    bare pair, staged        the same, and the combine copies its rows into the workspace first
    ringfence, lean          the functions in a graph by hand, for experts that go by counts and write into the buffer
    ringfence, as it comes   the same without such arguments: ids of empty rows are written, ids clamped, rows copied
    ringfence compiled, lean the first of them, compiled and captured by ringfence
    ringfence over NCCL      the reference (``--all``)

``--payload fp8`` sends rows of float8 with scales, and combines bfloat16. ``--layer``: a layer with experts, from
gathers to dispatch and combine by ringfence's rewrite, beside the same by Inductor and NCCL in a CUDA graph.
``--soak N``: N replays of graphs of several sizes in turn, with new rows and routing in each, ranks without tokens and
hosts that come late; every result is compared on the device, bit by bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import moe_layer
import moe_soak
import ranks as r
import torch
from moe_ways import (
    BARE,
    COMPILED,
    GATHER,
    LEAN,
    SWAP,
    Contender,
    Inputs,
    bare,
    compiled,
    functions,
    gather_and_scatter,
    inputs,
    prepare,
    swaps,
)
from tabulate import tabulate


def ways(ranks: r.Ranks, options: argparse.Namespace, given: Inputs) -> dict[str, Callable[[], Contender]]:
    about = (ranks, options, given)
    found: dict[str, Callable[[], Contender]] = {
        GATHER: partial(gather_and_scatter, *about),
        SWAP: partial(swaps, *about),
    }
    if ranks.cuda:
        found |= {BARE: partial(bare, *about), "staged": partial(bare, *about, staged=True)}
    found |= {LEAN: partial(functions, *about, lean=True), "as it comes": partial(functions, *about, lean=False)}
    if not options.no_compile:
        found[COMPILED] = partial(compiled, *about, lean=True)
    if options.all:
        found["compiled, as it comes"] = partial(compiled, *about, lean=False)
        found["over NCCL"] = partial(compiled, *about, lean=False, collective="reference")
    if options.all and ranks.cuda:
        found["as they lie"] = partial(bare, *about, sanitised=False)
    return found


def pairs(ranks: r.Ranks, options: argparse.Namespace, hidden: int, tokens: int) -> None:
    ranks.forget()
    given = inputs(ranks, options, hidden, tokens)
    contenders: list[Contender] = []
    about = {"part": "pairs", "payload": options.payload, "hidden": hidden, "tokens": tokens}
    for name, make in ways(ranks, options, given).items():
        contender, why = ranks.together(make)
        if why is None:
            contenders.append(contender)
        else:
            ranks.record(**about, contender=name, failed=why)
    samples, why = ranks.together(lambda: race(ranks, options, contenders, given))
    if why is not None:
        ranks.record(**about, contender="all", failed=why)
    for contender, (us, host, difference) in zip(contenders, samples or (), strict=False):
        checked = {"difference": max(ranks.gather(difference))} if difference is not None else {}
        times = {"us": ranks.median_of_max(us), "host_us": ranks.median_of_max(host)}
        ranks.record(**about, contender=contender.name, **times, **checked)
    ranks.say("\n" + tabled(ranks.results))


def race(
    ranks: r.Ranks, options: argparse.Namespace, contenders: list[Contender], given: Inputs
) -> list[tuple[list[float], list[float], float | None]]:
    """For each contender: times per pair, those of the host, and how far its rows are from what they can be."""
    times: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for _ in range(options.repeats):
        for i, contender in enumerate(contenders):
            stream, host = ranks.stream_us(contender.call, options.calls)
            times[i].append((stream / options.pairs, host / options.pairs))
    found = [r.distance(c.call(), given.wanted) if c.right and given.wanted is not None else None for c in contenders]
    return [([s for s, _ in each], [h for _, h in each], off) for each, off in zip(times, found, strict=True)]


def tabled(results: list[dict[str, Any]]) -> str:
    """Microseconds of a pair by way and size, and what follows from them."""
    rows = [e for e in results if e["part"] == "pairs" and e["contender"] != "all"]
    us = {(e["contender"], e["hidden"], e["tokens"]): e["us"] for e in rows if "failed" not in e}
    sizes = list(dict.fromkeys((e["hidden"], e["tokens"]) for e in rows))
    names = list(dict.fromkeys(e["contender"] for e in rows))

    def line(name: str, value: Callable[[tuple[int, int]], float | None]) -> list[str]:
        return [name, *(f"{found:.2f}" if (found := value(size)) is not None else "-" for size in sizes)]

    def ratio(size: tuple[int, int], over: str, under: str) -> float | None:
        one, other = us.get((over, *size)), us.get((under, *size))
        return one / other if one and other else None

    table = [line(name, lambda size, n=name: us.get((n, *size))) for name in names]  # type: ignore[misc]
    ours = [name for name in (LEAN, COMPILED) if name in names]
    table += [line(f"{name} / {BARE}", lambda size, n=name: ratio(size, n, BARE)) for name in ours]  # type: ignore[misc]
    table += [line(f"{GATHER} / {name}", lambda size, n=name: ratio(size, GATHER, n)) for name in ours]  # type: ignore[misc]
    headers = ("us per pair", *(f"{hidden} x {tokens}" for hidden, tokens in sizes))
    return tabulate(table, headers, disable_numparse=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=r.numbers, default=(1, 16, 128, 1024))
    parser.add_argument("--hidden", type=r.numbers, default=(7168,))
    parser.add_argument("--payload", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=32, help="of a chain: layers of a model")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="back-to-back calls of a repeat")
    parser.add_argument("--piece-compiler", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--no-compile", action="store_true", help="the functions alone")
    parser.add_argument("--all", action="store_true", help="more ways: the compiled ones as they come, and over NCCL")
    parser.add_argument("--layer", action="store_true", help="a layer with experts, instead of pairs")
    parser.add_argument("--intermediate", type=int, default=1536, help="of a layer's experts")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="replays, instead of times")
    options = r.arguments(parser)
    options.dtype = torch.bfloat16
    return options


def main() -> None:
    options = parsed()
    ranks = r.Ranks(options)
    with torch.no_grad():
        if options.soak:
            moe_soak.soak(ranks, options)
        elif options.layer:
            moe_layer.layers(ranks, options)
        else:
            made, why = ranks.together(lambda: prepare(ranks, options, max(options.hidden), max(options.tokens)))
            ranks.say(made if why is None else why)
            for hidden in options.hidden if why is None else ():
                for tokens in options.tokens:
                    if ranks.time_left():
                        pairs(ranks, options, hidden, tokens)
    ranks.end()


if __name__ == "__main__":
    main()
