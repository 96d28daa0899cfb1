"""What one fused all-reduce costs, how exact it is, and what a piece costs the host.

    torchrun --nproc-per-node 2 benchmarks/gpu.py --out results

sites      a chain of all-reduce + add + RMSNorm: NCCL and Inductor captured by hand, the bare kernels captured by
           hand, and ringfence called as a user calls it. Interleaved; times per site, of the slowest rank.
numerics   the largest error of each site against float32, with the outputs poisoned before each call.
host       a model of many tiny pieces: the host's time per piece, and the memory that its captures take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pieces
import ranks as r
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import ringfence
from ringfence.runtime.channel import open_channel
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.collectives.ready import Wanted, prepare
from ringfence.runtime.groups import describe_group

EPS = 1e-6
PEER = "NCCL + Inductor"


@dataclass
class Contender:
    """``call`` runs the whole chain once. ``keep`` holds what a captured graph only knows by address."""

    name: str
    call: Callable[[], Any]
    outputs: tuple[Tensor, Tensor]
    keep: Any = None


class Chain(nn.Module):
    """Sites that feed each other and nothing else. Each rank has weights of its own, so that sums are of
    different values at every site; the norms keep them in range."""

    def __init__(self, ranks: r.Ranks, options: argparse.Namespace, sites: int) -> None:
        super().__init__()
        self.group = ranks.group_name
        generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
        weights = [torch.rand(options.hidden, generator=generator, device=ranks.device) + 0.5 for _ in range(sites)]
        self.weights = nn.ParameterList(nn.Parameter(w.to(options.dtype), requires_grad=False) for w in weights)

    def site(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        c10d = torch.ops._c10d_functional
        residual = residual + c10d.wait_tensor(c10d.all_reduce(x, "sum", self.group))
        return F.rms_norm(residual, weight.shape, weight, EPS), residual

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for weight in self.weights:
            x, residual = self.site(x, residual, weight)
        return x, residual


class OpenChain(Chain):
    """A chain that returns what every site returned."""

    def forward(self, x: Tensor, residual: Tensor) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        outputs = []
        for weight in self.weights:
            x, residual = self.site(x, residual, weight)
            outputs.append((x, residual))
        return outputs


def inputs(ranks: r.Ranks, options: argparse.Namespace, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An activation that differs between the ranks, and a residual that does not."""

    def random(seed: int) -> Tensor:
        generator = torch.Generator(ranks.device).manual_seed(seed)
        return torch.randn(tokens, options.hidden, generator=generator, device=ranks.device).to(options.dtype)

    return random(1000 * (seed + 1) + ranks.rank), random(seed)


# -- the contenders ----------------------------------------------------------------


def nccl_and_inductor(ranks: r.Ranks, chain: Chain, x: Tensor, residual: Tensor) -> Contender:
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    if not ranks.cuda:
        return Contender(PEER, lambda: compiled(x, residual), compiled(x, residual))
    graph, outputs = r.captured(lambda: compiled(x, residual))
    return Contender(PEER, graph.replay, outputs, (x, residual, chain))


def bare(
    ranks: r.Ranks, options: argparse.Namespace, collective: str, pdl: bool, chain: Chain, x: Tensor, residual: Tensor
) -> Contender:
    """The kernel's own calls in one graph: what is left of a site when nothing surrounds it."""
    group = describe_group(ranks.group_name, ranks.device)
    wanted = Wanted(collective, "auto", options.hidden, options.dtype, max_tokens=max(options.tokens))
    workspace = prepare(open_channel(group.name, seconds=60), group, ranks.device, wanted).workspace
    strategy = workspace.strategy(*x.shape, x.dtype) if workspace is not None else None
    if workspace is None or strategy is None:
        raise RuntimeError(f"{collective} does not serve {list(x.shape)}")
    kernels, epilogue = workspace.kernels, Epilogue(residual=True, norm=RmsNorm(EPS))
    buffers = [(torch.empty_like(x), torch.empty_like(x)) for _ in range(2)]

    def run() -> tuple[Tensor, Tensor]:
        norm, total = x, residual
        for i, weight in enumerate(chain.weights):
            norm_out, total_out = buffers[i % 2]
            kernels.run(norm, epilogue, strategy, (total, weight), norm_out, total_out)
            norm, total = norm_out, total_out
        return norm, total

    with (  # the product asks for it of mnnvl only, up to a size: see there
        mock.patch.object(trtllm, "_PDL", pdl),
        mock.patch.object(mnnvl, "_PDL_UP_TO", 1 << 30 if pdl else 0),
    ):
        graph, outputs = r.captured(run)
    return Contender(bare_name(collective, pdl), graph.replay, outputs, (workspace, run, chain))


def bare_name(collective: str, pdl: bool) -> str:
    return f"bare {collective}{' pdl' if pdl else ''}"


def compiled_by_ringfence(
    options: argparse.Namespace, collective: str, chain: Chain, x: Tensor, residual: Tensor
) -> Contender:
    backend = ringfence.Backend(
        capture_sizes=(x.shape[0],), collective=collective, static_outputs=True, max_tokens=max(options.tokens)
    )
    compiled = torch.compile(chain, backend=backend, fullgraph=True, dynamic=False)
    with r.failed_capture_is_an_error():
        compiled(x, residual)  # compiles, runs and captures
    (report,) = backend.reports
    ringfence.assert_fused(report, count=len(chain.weights))
    outputs = compiled(x, residual)
    return Contender(f"ringfence {collective}", lambda: compiled(x, residual), outputs, report)


# -- sites -------------------------------------------------------------------------


def sites(ranks: r.Ranks, options: argparse.Namespace) -> None:
    chain = Chain(ranks, options, options.sites)
    for tokens in options.tokens:
        if not ranks.time_left():
            break
        ranks.forget()
        sites_of(ranks, options, chain, tokens)


def sites_of(ranks: r.Ranks, options: argparse.Namespace, chain: Chain, tokens: int) -> None:
    """At one token count; what the contenders hold is given back afterwards."""
    x, residual = inputs(ranks, options, tokens)
    makers: dict[str, Callable[[], Contender]] = {PEER: partial(nccl_and_inductor, ranks, chain, x, residual)}
    for name in options.collectives:
        makers[f"ringfence {name}"] = partial(compiled_by_ringfence, options, name, chain, x, residual)
        if ranks.cuda and name != "auto":
            for pdl in (False, True) if name in ("trtllm", "mnnvl") else (False,):
                makers[bare_name(name, pdl)] = partial(bare, ranks, options, name, pdl, chain, x, residual)
    contenders = ranks.made(makers, part="sites", tokens=tokens)
    samples, _ = ranks.together(lambda: race(ranks, options, contenders))
    for contender, (stream, host, difference) in zip(contenders, samples or (), strict=False):
        report = contender.keep if isinstance(contender.keep, ringfence.CompileReport) else None
        ranks.record(
            part="sites",
            tokens=tokens,
            contender=contender.name,
            us=ranks.median_of_max(stream),
            host_us=ranks.median_of_max(host),
            difference=max(ranks.gather(difference)),
            **({"runs_as": report.summary} if report else {}),
        )


def race(
    ranks: r.Ranks, options: argparse.Namespace, contenders: list[Contender]
) -> list[tuple[list[float], list[float], float]]:
    """For each contender: stream and host times per site, and how far its result is from the first one's."""
    stream: list[list[float]] = [[] for _ in contenders]
    host: list[list[float]] = [[] for _ in contenders]
    for _ in range(options.repeats):
        for i, contender in enumerate(contenders):
            times = ranks.stream_us(contender.call, options.calls)
            stream[i].append(times[0] / options.sites)
            host[i].append(times[1] / options.sites)
    differences = []
    for contender in contenders:
        contender.call()
        differences.append(r.distance(contender.outputs[0], contenders[0].outputs[0]))
    return list(zip(stream, host, differences, strict=True))


def sites_table(results: list[dict[str, Any]]) -> str:
    rows = [e for e in results if e["part"] == "sites"]
    found = dict.fromkeys(e["contender"] for e in rows)  # those that failed come first
    names = sorted(found, key=lambda n: (n != PEER, n.startswith("ringfence"), n))
    sizes = list(dict.fromkeys(e["tokens"] for e in rows))
    us = {(e["contender"], e["tokens"]): e["us"] for e in rows if "failed" not in e}
    table = [[name, *(f"{us[name, t]:.2f}" if (name, t) in us else "failed" for t in sizes)] for name in names]
    for name in (n for n in names if n.startswith("ringfence")):
        collective = name.removeprefix("ringfence ")
        bare = [n for n in names if n.startswith("bare") and collective in (*n.split(), "auto")]
        for what, peers in (("best bare", bare), ("NCCL", [PEER])):
            best = [min((us[p, t] for p in peers if (p, t) in us), default=None) for t in sizes]
            ratios = [
                f"{us[name, t] / b:.2f}" if b and (name, t) in us else "-" for b, t in zip(best, sizes, strict=True)
            ]
            table.append([f"{name} / {what}", *ratios])
    return "us per site\n" + tabulate(table, ("tokens", *sizes), disable_numparse=True)


# -- numerics ----------------------------------------------------------------------


def numerics(ranks: r.Ranks, options: argparse.Namespace) -> None:
    chain = OpenChain(ranks, options, sites=4)
    for tokens in options.tokens:
        for collective in options.collectives:
            if not ranks.time_left():
                return
            ranks.forget()
            errors, why = ranks.together(lambda t=tokens, c=collective: errors_of(ranks, options, c, t, chain))
            worst = [max(each) for each in zip(*ranks.gather(errors), strict=True)] if why is None else []
            found = {"failed": why} if why else {"error": worst[0], "eager_error": worst[1]}
            ranks.record(part="numerics", tokens=tokens, contender=f"ringfence {collective}", **found)


def errors_of(
    ranks: r.Ranks, options: argparse.Namespace, collective: str, tokens: int, chain: OpenChain
) -> tuple[float, float]:
    """The largest error of ringfence over some calls, and that of eager PyTorch on the same inputs."""
    backend = ringfence.Backend(
        capture_sizes=(tokens,), collective=collective, static_outputs=True, max_tokens=max(options.tokens)
    )
    compiled = torch.compile(chain, backend=backend, fullgraph=True, dynamic=False)
    ours, eager = 0.0, 0.0
    for seed in range(5):
        x, residual = inputs(ranks, options, tokens, seed)
        with r.failed_capture_is_an_error():
            outputs = compiled(x, residual)
        ours = max(ours, largest_error(ranks, chain, x, residual, outputs))
        for norm, total in outputs:  # the buffers that the next call is to fill
            norm.fill_(float("nan"))
            total.fill_(float("nan"))
        eager = max(eager, largest_error(ranks, chain, x, residual, chain(x, residual)))
    ringfence.assert_fused(backend.reports[0], count=len(chain.weights))
    return ours, eager


def largest_error(
    ranks: r.Ranks, chain: Chain, x: Tensor, residual: Tensor, outputs: list[tuple[Tensor, Tensor]]
) -> float:
    """Largest |actual - float32| / (|float32| + rms of the row), each site judged by what it was given."""
    worst = 0.0
    for weight, (norm, total) in zip(chain.weights, outputs, strict=True):
        everyones = [torch.empty_like(x) for _ in range(ranks.size)]
        dist.all_gather(everyones, x.contiguous())
        exact = sum((each.float() for each in everyones), residual.float())
        exact_norm = F.rms_norm(exact, weight.shape, weight.float(), EPS)
        for actual, reference in ((norm, exact_norm), (total, exact)):
            rms = reference.square().mean(-1, keepdim=True).sqrt()
            error = ((actual.float() - reference).abs() / (reference.abs() + rms)).nan_to_num(nan=float("inf"))
            worst = max(worst, float(error.max()))
        x, residual = norm, total
    return worst


def numerics_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for e in (e for e in results if e["part"] == "numerics"):
        errors = (f"{e['error']:.2e}", f"{e['eager_error']:.2e}") if "error" in e else ("failed", "-")
        rows.append((e["tokens"], e["contender"], *errors))
    headers = ("tokens", "", "ringfence", "eager")
    return "largest |error| / (|float32| + rms)\n" + tabulate(rows, headers, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=r.words, default=("sites", "numerics", "host"))
    parser.add_argument("--tokens", type=r.numbers, default=(1, 16, 64, 128, 512))
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--pieces", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--calls", type=int, default=20, help="back-to-back calls of a repeat")
    parser.add_argument("--collectives", type=r.words, help="default: mnnvl (two ranks), trtllm, auto")
    options = r.arguments(parser)
    options.dtype = torch.bfloat16
    ranks = r.Ranks(options)
    if options.collectives is None:
        options.collectives = ("mnnvl", "trtllm", "auto") if ranks.size == 2 else ("trtllm", "auto")
        if not ranks.cuda:
            options.collectives = ("auto",)
    with torch.no_grad():
        for part in (sites, numerics, pieces.host):
            if part.__name__ in options.parts and ranks.time_left():
                part(ranks, options)
    if ranks.rank == 0:
        for name, text in (
            ("sites", sites_table(ranks.results)),
            ("numerics", numerics_table(ranks.results)),
            ("host", pieces.host_table(ranks.results, options.pieces)),
        ):
            if name in options.parts:
                print(f"\n{text}")
    ranks.end()


if __name__ == "__main__":
    main()
