"""A decode step of Llama-shaped layers with random weights, tensor-parallel over the ranks.

    torchrun --nproc-per-node 4 benchmarks/decode.py --deadline 120 --out results

Every contender runs the same modules, weights and caches, on inputs that change with each step. The important ones
run first, so that a deadline costs the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ranks as r
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import ringfence

EPS = 1e-5
HEAD = 128
CACHE_TOKENS = 1024
POSITION = 1000  # the slot that the step writes; attention reads the whole cache


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int


SHAPES = {
    "70B": Shape(8192, 64, 8, 28672, 8),
    "8B": Shape(4096, 32, 8, 14336, 16),
    "tiny": Shape(1024, 8, 4, 512, 2),  # for machines without a GPU
}


# -- the model ---------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """One new token per sequence: write its key and value, attend over the whole cache.

    q, k and v are [batch, heads, 1, HEAD], the caches [batch, heads, CACHE_TOKENS, HEAD].
    """
    k_cache.index_copy_(2, position, k)
    v_cache.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)


#: The caches of the model that runs now, by layer. As in serving engines, the op below finds its cache by a number:
#: a graph then neither takes the caches nor sees them change. A plain library op has less overhead than ``custom_op``.
_caches: list[tuple[Tensor, Tensor]] = []
_library = torch.library.Library("bench", "FRAGMENT")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor position, int layer) -> Tensor")
_library.impl(
    "attention",
    lambda q, k, v, position, layer: attention(q, k, v, position, *_caches[layer]).contiguous(),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("bench::attention", lambda q, k, v, position, layer: q.new_empty(q.shape), lib=_library)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Layer(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, model: Decoder, index: int, new_weight: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        shape, ranks = model.shape, model.ranks
        self.index, self.heads, self.kv_heads = index, shape.heads // ranks.size, shape.kv_heads // ranks.size
        ffn = shape.ffn // ranks.size
        self.qkv = new_weight((self.heads + 2 * self.kv_heads) * HEAD, shape.hidden)
        self.out = new_weight(shape.hidden, self.heads * HEAD)
        self.gate_up = new_weight(2 * ffn, shape.hidden)
        self.down = new_weight(shape.hidden, ffn)
        self.norm_attention = new_weight(shape.hidden)
        self.norm_ffn = new_weight(shape.hidden)

    def attend(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, inline: bool) -> Tensor:
        heads = F.linear(x, self.qkv).view(x.shape[0], -1, 1, HEAD)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if inline:
            y = attention(q, k, v, position, self.k_cache, self.v_cache)
        else:
            y = torch.ops.bench.attention(q, k, v, position, self.index)
        return F.linear(y.reshape(x.shape[0], -1), self.out)

    def feed_forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class Decoder(nn.Module):
    """The weights are made once; a contender sets ``inline`` and ``reduces``, and the batch by :meth:`use_cache`."""

    def __init__(self, shape: Shape, ranks: r.Ranks, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.ranks, self.dtype = shape, ranks, dtype
        self.inline, self.reduces, self.group = False, True, ranks.group_name
        sharded = torch.Generator(ranks.device).manual_seed(ranks.rank)
        common = torch.Generator(ranks.device).manual_seed(100)

        def new_weight(*size: int) -> nn.Parameter:
            generator = sharded if len(size) > 1 else common
            weight = torch.empty(size, device=ranks.device, dtype=dtype)
            if len(size) > 1:
                weight.normal_(0, size[-1] ** -0.5, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
            return nn.Parameter(weight, requires_grad=False)

        self.layers = nn.ModuleList(Layer(self, i, new_weight) for i in range(shape.layers))
        self.norm = new_weight(shape.hidden)
        angles = torch.outer(torch.arange(CACHE_TOKENS), 5e5 ** (-torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(ranks.device, dtype))
        self.register_buffer("sin", angles.sin().to(ranks.device, dtype))
        self.caches: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def use_cache(self, batch: int) -> None:
        if batch not in self.caches:
            generator = torch.Generator(self.ranks.device).manual_seed(200 + self.ranks.rank)
            size = (batch, self.shape.kv_heads // self.ranks.size, CACHE_TOKENS, HEAD)

            def random() -> Tensor:
                return torch.empty(size, device=self.ranks.device, dtype=self.dtype).normal_(generator=generator)

            self.caches[batch] = [(random(), random()) for _ in self.layers]
        _caches[:] = self.caches[batch]
        for layer, (k_cache, v_cache) in zip(self.layers, _caches, strict=True):
            layer.register_buffer("k_cache", k_cache, persistent=False)
            layer.register_buffer("v_cache", v_cache, persistent=False)

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self.reduces:
            return x
        c10d = torch.ops._c10d_functional
        return c10d.wait_tensor(c10d.all_reduce(x, "sum", self.group))

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        residual = x
        x = self.rms_norm(x, self.layers[0].norm_attention)
        for i, layer in enumerate(self.layers):
            residual = residual + self.all_reduce(layer.attend(x, position, cos, sin, self.inline))
            x = self.rms_norm(residual, layer.norm_ffn)
            residual = residual + self.all_reduce(layer.feed_forward(x))
            following = self.layers[i + 1].norm_attention if i + 1 < len(self.layers) else self.norm
            x = self.rms_norm(residual, following)
        return x


# -- the contenders ----------------------------------------------------------------

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """One compilation. ``make`` returns the steps that it serves, by their names in the table."""

    name: str
    make: Callable[[str, Decoder, Tensor, Tensor], dict[str, Step]]
    inline: bool = False
    reduces: bool = True


def by_hand(name: str, model: Decoder, x: Tensor, position: Tensor) -> dict[str, Step]:
    """Inductor in one CUDA graph over static inputs; the copy of the hidden states is part of the step."""
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    if not model.ranks.cuda:
        return {name: lambda x: compiled(x, position)}
    static = x.clone()
    graph, output = r.captured(lambda: compiled(static, position))

    def step(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return output

    # The row of plain Inductor comes from the same compilation.
    return {name: step, "Inductor": lambda x: compiled(x, position)} if name == PEER else {name: step}


def reduce_overhead(name: str, model: Decoder, x: Tensor, position: Tensor) -> dict[str, Step]:
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def step(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, position)

    return {name: step}


def eager(name: str, model: Decoder, x: Tensor, position: Tensor) -> dict[str, Step]:
    return {name: lambda x: model(x, position)}


def by_ringfence(collective: str, split_ops: tuple[str, ...] = ()) -> Callable[..., dict[str, Step]]:
    def make(name: str, model: Decoder, x: Tensor, position: Tensor) -> dict[str, Step]:
        backend = ringfence.Backend(
            capture_sizes=(len(x),),
            collective=collective,
            split_ops=split_ops,
            static_outputs=True,
            max_tokens=max(model.caches),
        )
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        with r.failed_capture_is_an_error():
            compiled(x, position)  # compiles, runs and captures
        (report,) = backend.reports
        ringfence.assert_fused(report, count=2 * len(model.layers))
        model.ranks.say(report.summary)
        return {name: lambda x: compiled(x, position)}

    return make


PEER = "Inductor, one graph by hand"
NO_COLLECTIVE = "no collective"


def jobs(options: argparse.Namespace) -> list[Job]:
    """In the order of importance."""
    inline = options.attention == "inline"
    found = [Job(PEER, by_hand, inline)]
    found += [Job(f"ringfence {c}, one piece", by_ringfence(c), inline) for c in options.collectives]
    found.append(Job(f"{NO_COLLECTIVE}, one graph by hand", by_hand, inline, reduces=False))
    if not inline:  # Inductor may do better where it sees into the attention
        found.append(Job(f"{PEER}, attention inlined", by_hand, inline=True))
        found += [Job(f"ringfence {c}, attention inlined", by_ringfence(c), inline=True) for c in options.collectives]
    between = ("bench::attention",)
    found += [Job(f"ringfence {c}, attention between pieces", by_ringfence(c, between)) for c in options.collectives]
    found.append(Job("Inductor reduce-overhead", reduce_overhead, inline))
    found.append(Job("eager", eager, inline))
    return [job for job in found if options.only is None or any(part in job.name for part in options.only)]


# -- measuring ---------------------------------------------------------------------


def measure(ranks: r.Ranks, options: argparse.Namespace, model: Decoder, shape: str, batch: int, job: Job) -> None:
    """Run one job on one batch, and record each of its rows."""
    ranks.forget()
    model.use_cache(batch)
    model.inline, model.reduces = job.inline, job.reduces
    generator = torch.Generator(ranks.device).manual_seed(3)  # the same hidden states on every rank
    size = (4, batch, model.shape.hidden)
    xs = torch.randn(size, generator=generator, device=ranks.device).to(model.dtype).unbind()
    position = torch.full((1,), POSITION, device=ranks.device)

    def prepare() -> tuple[dict[str, tuple[Step, float]], float, float]:
        """The steps with their difference from eager, the seconds that it took, and the memory."""
        expected = model(xs[1], position).clone()
        before = memory_mb(ranks)
        start = time.perf_counter()
        steps = {}
        for name, step in job.make(job.name, model, xs[0], position).items():
            for x in (xs[2], xs[3], xs[1]):  # reduce-overhead warms up, records, and then replays
                output = step(x)
            steps[name] = (step, r.distance(output, expected))
        ranks.synchronize()
        return steps, time.perf_counter() - start, memory_mb(ranks) - before

    prepared, why = ranks.together(prepare)
    if why is not None:
        ranks.record(shape=shape, batch=batch, contender=job.name, failed=why)
        return
    steps, preparation, memory = prepared
    for name, (step, difference) in steps.items():
        times, why = ranks.together(lambda step=step: timed(ranks, options, step, xs))
        if why is not None:
            ranks.record(shape=shape, batch=batch, contender=name, failed=why)
            return
        ranks.record(
            shape=shape,
            batch=batch,
            contender=name,
            wall_us=ranks.median_of_max(times[0]),
            stream_us=ranks.median_of_max(times[1]),
            difference=max(ranks.gather(difference)),
            preparation_s=max(ranks.gather(preparation)),
            memory_mb=max(ranks.gather(memory)),
        )


def timed(
    ranks: r.Ranks, options: argparse.Namespace, step: Step, xs: tuple[Tensor, ...]
) -> tuple[list[float], list[float]]:
    """Microseconds per step: the wall clock of whole loops, and the stream time of each step of the last loop."""
    wall, events = [], []
    for loop in range(4):
        ranks.barrier()
        start = time.perf_counter()
        for i in range(options.steps):
            step(xs[i % len(xs)])
        ranks.synchronize()
        if loop:  # the first is for warming up
            wall.append((time.perf_counter() - start) / options.steps * 1e6)
    if not ranks.cuda:
        return wall, wall
    for i in range(options.steps):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        step(xs[i % len(xs)])
        pair[1].record()
        events.append(pair)
    ranks.synchronize()
    return wall, [begin.elapsed_time(end) * 1e3 for begin, end in events]


def memory_mb(ranks: r.Ranks) -> float:
    if not ranks.cuda:
        return 0.0
    ranks.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def table(results: list[dict[str, Any]], shape: str, ranks: r.Ranks) -> str:
    rows = [e for e in results if e["shape"] == shape]
    batches = list(dict.fromkeys(e["batch"] for e in rows))
    names = list(dict.fromkeys(e["contender"] for e in rows))
    ours = [n for n in names if n.startswith("ringfence")]
    peers = [n for n in names if n not in ours and not n.startswith(NO_COLLECTIVE)]
    wall = {(e["contender"], e["batch"]): e["wall_us"] for e in rows if "failed" not in e}
    stream = {(e["contender"], e["batch"]): e["stream_us"] for e in rows if "failed" not in e}
    failed = {(e["contender"], e["batch"]) for e in rows if "failed" in e}
    lines: list[list[Any]] = []
    for name in names:
        nothing = ["failed" if (name, b) in failed else "-" for b in batches]
        timed = [f"{wall[name, b]:.0f} ({stream[name, b]:.0f})" if (name, b) in wall else None for b in batches]
        lines.append([name, *(t or n for t, n in zip(timed, nothing, strict=True))])
    for name in ours:
        line = [f"best peer / {name}"]
        for b in batches:
            best = min((wall[p, b] for p in peers if (p, b) in wall), default=None)
            line.append(f"{best / wall[name, b]:.2f}" if best and (name, b) in wall else "-")
        lines.append(line)
    title = f"{shape}, TP{ranks.size}: us per step, wall clock (stream), by batch"
    return f"{title}\n" + tabulate(lines, ("", *batches), disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=r.words, default=("70B", "8B"))
    parser.add_argument("--tokens", "--batches", dest="batches", type=r.numbers, default=(1, 16, 64))
    parser.add_argument("--hidden", type=int, help="instead of the shape's")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--collectives", type=r.words, default=("auto",))
    parser.add_argument(
        "--attention",
        choices=("op", "inline"),
        default="op",
        help="in one piece, the attention is an op that finds its cache by itself (op) or traced (inline)",
    )
    parser.add_argument("--only", type=r.words, help="only names with one of these in them: 'by hand,piece'")
    options = r.arguments(parser)
    ranks = r.Ranks(options)
    with torch.no_grad():
        models = {}
        for name in options.shapes:
            changes = {k: getattr(options, k) for k in ("hidden", "layers") if getattr(options, k)}
            shape = Shape(**(vars(SHAPES[name]) | changes))
            models[name] = Decoder(shape, ranks, torch.bfloat16)
            for batch in options.batches:
                models[name].use_cache(batch)
        ranks.say("the models are there")
        for job in jobs(options):
            for name, model in models.items():
                for batch in options.batches:
                    if ranks.time_left():
                        measure(ranks, options, model, name, batch, job)
    if ranks.rank == 0:
        for name in models:
            print(f"\n{table(ranks.results, name, ranks)}")
    ranks.end()


if __name__ == "__main__":
    main()
