"""What a piece costs the host, and the memory that its captures take: the part ``host`` of gpu.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import ranks as r
import torch
from tabulate import tabulate
from torch import Tensor, nn

import ringfence

#: An op that a piece cannot hold, as cheap as an op can be: a plain library op has less overhead than ``custom_op``.
_library = torch.library.Library("bench", "FRAGMENT")
_library.define("pass_on(Tensor x) -> Tensor")
_library.impl("pass_on", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("bench::pass_on", lambda x: torch.empty_like(x), lib=_library)


class Pieces(nn.Module):
    """``count`` pieces of one kernel each, and an op between any two that must run eagerly."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.count - 1):
            x = torch.ops.bench.pass_on(x * 0.5)
        return x * 0.5


def pieces_backend(sizes: tuple[int, ...]) -> ringfence.Backend:
    return ringfence.Backend(
        capture_sizes=sizes, split_ops=("bench::pass_on",), piece_compiler="eager", static_outputs=True
    )


def host(ranks: r.Ranks, options: argparse.Namespace) -> None:
    torch._dynamo.reset()
    x = torch.ones(1, options.hidden, device=ranks.device, dtype=options.dtype)
    contenders, why = ranks.together(lambda: host_contenders(ranks, options, x))
    if why is None:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.repeats * 3):
            for name, call in contenders.items():
                ranks.synchronize()
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e6 / options.pieces)
        for name in contenders:
            ranks.record(part="host", contender=name, us_per_piece=max(ranks.gather(median(times[name]))))
    ranks.together(lambda: capture_memory(ranks, options))


def host_contenders(ranks: r.Ranks, options: argparse.Namespace, x: Tensor) -> dict[str, Callable[[], object]]:
    backend = pieces_backend((1,))
    compiled = torch.compile(Pieces(options.pieces), backend=backend, fullgraph=True, dynamic=False)
    with r.failed_capture_is_an_error():
        compiled(x)
    compiled(x)
    assert sum(not p.island for p in backend.reports[0].pieces) == options.pieces, backend.reports[0].summary
    contenders: dict[str, Callable[[], object]] = {}
    if ranks.cuda:
        buffers = [torch.ones_like(x) for _ in range(options.pieces)]
        graphs, outputs = zip(*(r.captured(lambda b=b: b * 0.5) for b in buffers), strict=True)

        def replays() -> None:
            for graph in graphs:
                graph.replay()

        def replays_and_ops() -> None:
            graphs[0].replay()
            for graph, output, buffer in zip(graphs[1:], outputs, buffers[1:], strict=False):
                buffer.copy_(torch.ops.bench.pass_on(output))
                graph.replay()

        contenders |= {"bare replays": replays, "bare replays, the ops and a copy between": replays_and_ops}
    return contenders | {"ringfence": lambda: compiled(x)}


def capture_memory(ranks: r.Ranks, options: argparse.Namespace) -> None:
    """What each capture size adds, the largest first. Size 1 is left out: torch compiles it by itself."""
    sizes = tuple(sorted((t for t in options.tokens if t > 1), reverse=True))
    if not ranks.cuda or not sizes:
        return
    torch._dynamo.reset()
    compiled = torch.compile(Pieces(options.pieces), backend=pieces_backend(sizes), fullgraph=True, dynamic=True)
    for tokens in sizes:
        x = torch.ones(tokens, options.hidden, device=ranks.device, dtype=options.dtype)
        before = memory_mb()
        with r.failed_capture_is_an_error():
            compiled(x)
        after = memory_mb()
        ranks.record(
            part="memory",
            tokens=tokens,
            reserved_mb=after[0] - before[0],
            device_mb=after[1] - before[1],
            one_activation_mb=x.nbytes / 2**20,
        )


def memory_mb() -> tuple[float, float]:
    """Held by torch's allocator, and taken from the device by anybody."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_reserved() / 2**20, (total - free) / 2**20


def host_table(results: list[dict[str, Any]], pieces: int) -> str:
    times = [(e["contender"], e["us_per_piece"]) for e in results if e["part"] == "host"]
    memory = [
        (e["tokens"], e["reserved_mb"], e["device_mb"], e["one_activation_mb"])
        for e in results
        if e["part"] == "memory"
    ]
    text = f"host, us per piece of {pieces}\n" + tabulate(times, ("", "us"), floatfmt=".2f")
    headers = ("tokens", "reserved MB", "device MB", "one activation MB")
    return text + "\n\ncapture memory\n" + tabulate(memory, headers, floatfmt=".1f")
