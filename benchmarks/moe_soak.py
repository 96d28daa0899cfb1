"""The soak of benchmarks/moe.py: replays of pairs of several sizes in turn, each result compared on the device."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import ranks as r
import torch
from moe_ways import prepare
from torch import Tensor

import ringfence

#: Tokens of even ranks and of odd ones; graphs with ``lean`` go by counts and write where peers combine.
SIZES = ((1, 1), (16, 16), (128, 40), (64, 0), (0, 7))
CHUNK = 5000


def soak(ranks: r.Ranks, options: argparse.Namespace) -> None:
    kinds = [(counts, lean) for counts in SIZES for lean in (False, True)]
    wrong = torch.zeros(len(kinds), dtype=torch.int64, device=ranks.device)

    def made() -> list[Callable[[], object]]:
        ranks.say(prepare(ranks, options, options.hidden[0], 128))
        return [pair_of(ranks, options, counts, lean, wrong[i]) for i, (counts, lean) in enumerate(kinds)]

    replays, why = ranks.together(made)
    if why is not None:
        ranks.record(part="soak", failed=why)
        return
    order, late = random.Random(7), random.Random(ranks.rank)  # one order on all ranks
    start, done = time.perf_counter(), 0
    while done < options.soak and ranks.time_left():
        count = min(CHUNK, options.soak - done)
        _, why = ranks.together(lambda n=count: replayed(replays, order, late, n))  # type: ignore[misc]
        if why is not None:
            ranks.record(part="soak", replays=done, failed=why)
            return
        done += count
    seconds = time.perf_counter() - start
    found = [sum(each) for each in zip(*ranks.gather(wrong.tolist()), strict=True)]
    by_size = {f"{counts}{', lean' if lean else ''}": n for (counts, lean), n in zip(kinds, found, strict=True)}
    ranks.record(part="soak", replays=done, mismatches=sum(found), by_size=str(by_size), s=seconds)


def replayed(replays: list[Callable[[], object]], order: random.Random, late: random.Random, count: int) -> None:
    for _ in range(count):
        order.choice(replays)()
        if late.random() < 0.002:
            time.sleep(late.random() / 500)


def pair_of(
    ranks: r.Ranks, options: argparse.Namespace, counts: tuple[int, int], lean: bool, wrong: Tensor
) -> Callable[[], object]:
    """A graph that draws rows and routing, sends them, and counts into ``wrong`` where they did not come back whole."""
    tokens, each, hidden = counts[ranks.rank % 2], options.experts // ranks.size, options.hidden[0]
    capacity = max(counts)
    slots, nobody = (
        torch.arange(capacity, device=ranks.device),
        torch.tensor(float("nan"), dtype=options.dtype, device=ranks.device),
    )

    def call() -> Tensor:
        x = torch.randn(tokens, hidden, device=ranks.device).to(options.dtype)
        ids = torch.rand(tokens, options.experts, device=ranks.device).topk(options.top_k, dim=-1).indices
        owners = torch.zeros(tokens, ranks.size, device=ranks.device).scatter_(1, ids // each, 1.0)
        if lean:
            sent = ringfence.moe.dispatch(
                [x], ids.int(), capacity=capacity, num_experts=options.experts, empty_id=None, known_ids=True
            )
            filled = (slots < sent.counts[:, None]).view(-1, 1)
            partial = ringfence.moe.combine_buffer(sent, hidden, options.dtype)
            torch.where(filled, sent.payloads[0], nobody, out=partial)  # an empty row must reach nobody
        else:
            sent = ringfence.moe.dispatch([x], ids, capacity=capacity, num_experts=options.experts)
            partial = torch.where(sent.ids[:, :1] >= 0, sent.payloads[0], nobody)
        result = ringfence.moe.combine(partial, sent.route)
        wrong.add_((result.float() != (x.float() * owners.sum(1, keepdim=True))).any())
        return result

    if not ranks.cuda:
        return call
    graph, out = r.captured(call)
    kept = (graph, out, slots, nobody)
    return lambda: kept[0].replay()
