"""Two to eight ranks of ringfence's own kernels on ONE GPU: a rank is a stream, memory of its own and its kernels.

The kernels cannot tell: they are given addresses. What cannot be shown so is what a link does: :func:`over_a_link` is
for that, on two GPUs. The blocks of all ranks must fit onto the one GPU at once, so grids are kept small. :func:`run`
is called in a child (:mod:`.children`).
"""

from __future__ import annotations

import itertools
import os
import random
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu.own_calls import EPILOGUES, ONE, PAYLOADS, POISON, TWO, Call, Case, OneRank, Ranks, same
from ringfence.runtime.collectives.ringfence import MOST_BLOCKS as SHARES
from ringfence.runtime.errors import HangError
from ringfence.runtime.hazards.situation import Strategy


def run(item: dict[str, Any]) -> dict[str, Any]:
    """One of the functions below, by name."""
    began = time.monotonic()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # fewer queues than ranks, and one waits behind another's wait
    ask = {"numerics": numerics, "soak": soak, "alone": alone, "told": told, "timing": timing}[item.pop("what")]
    torch.cuda.init()
    try:
        found = ask(**item)
    except Exception:  # the other items are asked all the same
        return {"kind": "crashed", "note": traceback.format_exc()[-2000:]}
    return {"kind": "returned", "seconds": round(time.monotonic() - began, 2)} | found


def cases_of(world_size: int) -> list[Case]:
    """Every form for two ranks; for more, every strategy and dtype, and blocks that share a token."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    found = []
    for dtype, epilogue, strategy in itertools.product(dtypes, EPILOGUES, (ONE, TWO)):
        if world_size == 2 or epilogue in ("sum", "fused"):
            found.append(Case(5, 2048, dtype, epilogue, strategy, 1))
    for strategy, (tokens, blocks) in itertools.product((ONE, TWO), ((1, 4), (40, 4), (40, 2), (70, 1))):
        found.append(Case(tokens, 2048, torch.bfloat16, "fused", strategy, blocks))
    for hidden in (8, 2880, 32768):  # a row of one vector, one that ends inside a line, the largest
        found.append(Case(3, hidden, torch.bfloat16, "gemma" if hidden == 2880 else "fused", ONE, 1))
    return found


def numerics(world_size: int) -> dict[str, Any]:
    """Each case with each payload, twice, on ranks that share one history."""
    ranks = Ranks(world_size, 70, 2 * 32768)
    calls = [Call(case, world_size, 31 * i) for i, case in enumerate(cases_of(world_size))]
    seconds = ranks.load([(call.inputs[0], call.case) for call in calls])
    wrong: list[str] = []
    sums: dict[tuple[Any, ...], list[Tensor]] = {}
    for payload in PAYLOADS:
        for i, case in enumerate(cases_of(world_size)):
            case = Case(**{**case.__dict__, "payload": payload})
            call = Call(case, world_size, 31 * i + 7)
            outputs = [call.outputs() for _ in range(world_size)]
            torch.cuda.synchronize()
            for rank, (norm, out) in enumerate(outputs):
                with torch.cuda.stream(ranks.streams[rank]):
                    call.launch(ranks.kernels[rank], rank, norm, out)
            torch.cuda.synchronize()
            for rank, (norm, out) in enumerate(outputs):
                if trouble := call.wrong(norm, out):
                    wrong.append(f"rank {rank}: {trouble}")
                if rank and norm is not None and outputs[0][0] is not None and not same(norm, outputs[0][0]):
                    wrong.append(f"rank {rank}: other bits than rank 0 in {case}")
    # The same rows alone, among others, by each strategy, and by several blocks.
    rows = Call(Case(40, 2048, torch.bfloat16, "fused", ONE), world_size, 5)
    for tokens, strategy, blocks in itertools.product((1, 16, 17, 40), (ONE, TWO), (1, 4)):
        part = Call(Case(tokens, 2048, torch.bfloat16, "fused", strategy, blocks), world_size, 5)
        for mine, whole in zip(part.inputs, rows.inputs, strict=True):
            mine.copy_(whole[:tokens])
        part.residual.copy_(rows.residual[:tokens])
        part.weight.copy_(rows.weight)
        outputs = [part.outputs() for _ in range(world_size)]
        torch.cuda.synchronize()
        for rank, (norm, out) in enumerate(outputs):
            with torch.cuda.stream(ranks.streams[rank]):
                part.launch(ranks.kernels[rank], rank, norm, out)
        torch.cuda.synchronize()
        assert outputs[0][0] is not None
        sums.setdefault(("first row",), []).append(outputs[0][0][0].clone())
    if any(not same(row, found[0]) for found in sums.values() for row in found):
        wrong.append("the bits of a row depend on the number of tokens, the strategy or the blocks")
    lost = [str(kernels.rank_memory.lost()) for kernels in ranks.kernels.values() if kernels.rank_memory.lost()]
    return {"wrong": wrong[:5], "count": len(wrong), "lost": lost, "load_seconds": round(seconds, 2)}


class Round:
    """Calls in a row, whose outputs lie in one piece of memory for each rank."""

    def __init__(self, calls: Sequence[Call], world_size: int) -> None:
        self.calls = calls
        sizes = [call.out.numel() * call.out.element_size() for call in calls for _ in range(2)]
        self.flat = [torch.zeros(sum(sizes) // 4, dtype=torch.int32, device="cuda") for _ in range(world_size)]
        self.right: Tensor | None = None
        self.views = [list(self._views(flat)) for flat in self.flat]
        self.bad = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(world_size)]

    def _views(self, flat: Tensor) -> Any:
        at, memory = 0, flat.view(torch.uint8)
        for call in self.calls:
            size = call.out.numel() * call.out.element_size()
            norm, out = (
                memory[at + i * size : at + (i + 1) * size].view(call.case.dtype).view_as(call.out) for i in range(2)
            )
            at += 2 * size
            yield (None if call.norm is None else norm), out

    def launch(self, ranks: Ranks, rank: int) -> None:
        for call, (norm, out) in zip(self.calls, self.views[rank], strict=True):
            call.launch(ranks.kernels[rank], rank, norm, out)

    def check(self, rank: int) -> None:
        """On the device: no rank waits for the host."""
        assert self.right is not None
        self.bad[rank] += (self.flat[rank] != self.right).sum()


def soak(world_size: int, calls: int, captured: bool) -> dict[str, Any]:
    """Calls of emulated ranks, all eager or all captured."""
    return mixed(Ranks(world_size, 64, 4096), calls, 0.0 if captured else 1.0)


def over_a_link(rank: int, calls: int, eager: float) -> dict[str, Any]:
    """The same of ranks that have a GPU each; the body of a rank of a process group."""
    ranks = OneRank(rank, dist.get_world_size(), 64, 2048)
    found = mixed(ranks, calls, eager)
    dist.barrier()
    ranks.kernels[rank].close()
    return found


def mixed(ranks: Ranks, calls: int, eager: float, seed: int = 3) -> dict[str, Any]:
    """Calls of mixed sizes, strategies, shares and payloads, back to back; each result bit by bit as at first.

    eager: the share that is launched, and not replayed.
    """
    picks, world_size, here = random.Random(seed), ranks.world_size, list(ranks.kernels)
    shapes = [(1, 2048), (2, 2048), (3, 2048), (16, 2048), (33, 2048), (64, 2048), (5, 1800), (9, 512)]
    forms = [("fused", ONE), ("fused", TWO), ("sum", ONE), ("sum", TWO), ("norm", ONE)]
    rounds = []
    for turn in range(6):
        made = []
        for i in range(25):
            tokens, hidden = picks.choice(shapes)
            epilogue, strategy = picks.choice(forms)
            if hidden == 512:
                strategy = ONE
            case = Case(
                tokens, hidden, torch.bfloat16, epilogue, strategy, picks.choice((1, 4)), picks.choice(PAYLOADS)
            )
            made.append(Call(case, world_size, 1000 * turn + i))
        rounds.append(Round(made, world_size))
    ranks.load([(call.inputs[0], call.case) for one in rounds for call in one.calls])
    wrong: list[str] = []
    for one in rounds:
        for rank in here:
            one.flat[rank].fill_(POISON)
        torch.cuda.synchronize()
        for rank in here:
            with torch.cuda.stream(ranks.streams[rank]):
                one.launch(ranks, rank)
        torch.cuda.synchronize()
        for rank in here:
            for call, (norm, out) in zip(one.calls, one.views[rank], strict=True):
                if trouble := call.wrong(norm, out):
                    wrong.append(f"rank {rank}: {trouble}")
        one.right = one.flat[here[0]].clone()
    graphs: list[dict[int, torch.cuda.CUDAGraph]] = []
    torch.cuda.synchronize()
    for one in rounds if eager < 1 else ():
        graphs.append({rank: torch.cuda.CUDAGraph() for rank in here})
        for rank, graph in graphs[-1].items():
            with torch.cuda.graph(graph, stream=ranks.streams[rank], capture_error_mode="thread_local"):
                one.launch(ranks, rank)
    torch.cuda.synchronize()
    for one in rounds:  # nothing may be loaded or allocated beside kernels that wait
        for rank in here:
            with torch.cuda.stream(ranks.streams[rank]):
                one.flat[rank].fill_(0)
                one.check(rank)
                one.bad[rank].zero_()
    torch.cuda.synchronize()
    done = launched = 0
    while done < calls:
        place = picks.randrange(len(rounds))
        one, launches = rounds[place], picks.random() < eager
        for rank in here:
            with torch.cuda.stream(ranks.streams[rank]):
                one.flat[rank].fill_(POISON)
                if launches:
                    one.launch(ranks, rank)
                else:
                    graphs[place][rank].replay()
                one.check(rank)
        done += len(one.calls)
        launched += len(one.calls) * launches
        if done % 1000 < len(one.calls):
            torch.cuda.synchronize()  # no queue fills up
    torch.cuda.synchronize()
    bad = sum(int(count) for one in rounds for count in one.bad)
    memories = [kernels.rank_memory for kernels in ranks.kernels.values()]
    lost = [str(memory.lost()) for memory in memories if memory.lost()]
    counts = {int(count.item()) for memory in memories for count in (memory.begun, memory.received)}
    # A check that cannot fail would not notice this either.
    one, rank = rounds[0], here[0]
    one.flat[rank].copy_(one.right if one.right is not None else 0)
    one.flat[rank][::2] += 1
    one.check(rank)
    return {
        "wrong": wrong[:5],
        "bad": bad,
        "lost": lost,
        "calls": done,
        "eager": launched,
        "counts_alike": len(counts) == 1 and counts.pop() % SHARES == 0,
        "noticed": sum(int(count) for count in one.bad) > 0,
    }


def alone(world_size: int, strategy: str, seconds: float = 0.5) -> dict[str, Any]:
    """The last rank never comes to the second call."""
    ranks = Ranks(world_size, 16, 4096)
    call = Call(Case(6, 2048, torch.bfloat16, "fused", Strategy(strategy)), world_size, 1)
    ranks.load([(call.inputs[0], call.case)])
    for present in (world_size, world_size - 1):
        outputs = [call.outputs() for _ in range(world_size)]
        torch.cuda.synchronize()
        for kernels in ranks.kernels.values():
            kernels.rank_memory.wait_for(seconds)
        began = time.monotonic()
        for rank, (norm, out) in enumerate(outputs[:present]):
            with torch.cuda.stream(ranks.streams[rank]):
                call.launch(ranks.kernels[rank], rank, norm, out)
        torch.cuda.synchronize()
    took = time.monotonic() - began
    seen: dict[str, Any] = {"took": round(took, 2), "reports": [], "nan": [], "raised": []}
    for rank in range(world_size - 1):
        kernels = ranks.kernels[rank]
        lost = kernels.rank_memory.lost()
        seen["reports"].append([lost.call, lost.token, list(lost.missing), lost.rank, lost.relayed] if lost else None)
        norm, out = outputs[rank]
        seen["nan"].append(bool(out.isnan().all()) and norm is not None and bool(norm.isnan().all()))
        try:
            call.launch(kernels, rank, norm, out)
        except HangError as error:
            seen["raised"].append([str(error), list(error.ranks)])
    return seen


def told(seconds: float = 0.3) -> dict[str, Any]:
    """Rank 1 comes to two captured calls after rank 0 gave up: the second tells it, and it waits for nothing."""
    ranks = Ranks(2, 16, 4096)
    call = Call(Case(3, 2048, torch.bfloat16, "fused", ONE, 1), 2, 1)
    ranks.load([(call.inputs[0], call.case)])
    outputs = [[call.outputs() for _ in range(2)] for _ in range(2)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    torch.cuda.synchronize()
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=ranks.streams[rank]):
            for norm, out in outputs[rank]:
                call.launch(ranks.kernels[rank], rank, norm, out)
    torch.cuda.synchronize()
    for kernels in ranks.kernels.values():
        kernels.rank_memory.wait_for(seconds)
    took = []
    for rank, graph in enumerate(graphs):
        began = time.monotonic()
        with torch.cuda.stream(ranks.streams[rank]):
            graph.replay()
        torch.cuda.synchronize()
        took.append(round(time.monotonic() - began, 2))
    reports = [kernels.rank_memory.lost() for kernels in ranks.kernels.values()]
    first, second = outputs[1]
    return {
        "took": took,
        "reports": [[r.call, r.source, list(r.missing), r.rank, r.relayed] if r else None for r in reports],
        "nan": [bool(out.isnan().any()) for _, out in (*outputs[0], first, second)],
        "right": call.wrong(*first) is None,
    }


def timing(tokens: Sequence[int], sites: int = 50, hidden: int = 8192) -> dict[str, Any]:
    """Microseconds of a site of two emulated ranks, captured; no link in it, so it says what the kernels cost."""
    ranks = Ranks(2, max(tokens), 2 * hidden)
    rows = []
    for count, strategy, blocks in itertools.product(tokens, (ONE, TWO), (1, 4)):
        call = Call(Case(count, hidden, torch.bfloat16, "fused", strategy, blocks), 2, count)
        if count * blocks > 128:
            continue
        ranks.load([(call.inputs[0], call.case)])
        outputs = [call.outputs() for _ in range(2)]
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        torch.cuda.synchronize()
        for rank, graph in enumerate(graphs):
            with torch.cuda.graph(graph, stream=ranks.streams[rank]):
                for _ in range(sites):
                    call.launch(ranks.kernels[rank], rank, *outputs[rank], most_blocks=64)
        best = float("inf")
        for _ in range(6):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
            for repeat in range(5):
                for rank, graph in enumerate(graphs):
                    with torch.cuda.stream(ranks.streams[rank]):
                        if repeat == 1 and rank == 0:
                            events[0].record()
                        graph.replay()
            events[1].record(ranks.streams[0])
            torch.cuda.synchronize()
            best = min(best, events[0].elapsed_time(events[1]) * 1000 / 4 / sites)
        wrong = call.wrong(*outputs[0])
        rows.append([count, str(strategy), blocks, round(best, 2), wrong])
    return {"rows": rows}
