"""The ways that benchmarks/moe.py races: each runs a chain of dispatches and combines that feed each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ranks as r
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ringfence
from ringfence.runtime.collectives.workspace import workspaces_of

KERNELS = "moe_all_to_all"
GATHER, SWAP, BARE = "NCCL gather + scatter", "NCCL all_to_all", "bare pair"
LEAN, COMPILED = "ringfence, lean", "ringfence compiled, lean"
_BLOCK = 128  # values of a scale


@dataclass(frozen=True)
class Inputs:
    """Of one rank: what is sent beside the ids, rows first, and what experts would make of all that arrives.

    wanted: what a chain makes of the rows, where it does something with them.
    """

    payloads: tuple[Tensor, ...]
    ids: Tensor
    partial: Tensor
    wanted: Tensor | None

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def hidden(self) -> int:
        return self.partial.shape[1]

    @property
    def quantised(self) -> bool:
        return self.payloads[0].dtype != self.partial.dtype

    def next_rows(self, y: Tensor) -> Tensor:
        """What a pair returned, as rows for the next one: of fp8, some of its bytes."""
        return y if not self.quantised else y.view(self.payloads[0].dtype).view(-1, self.hidden)[: self.tokens]


def inputs(ranks: r.Ranks, options: argparse.Namespace, hidden: int, tokens: int) -> Inputs:
    g = torch.Generator(ranks.device).manual_seed(1000 + ranks.rank)
    x = torch.randn(tokens, hidden, generator=g, device=ranks.device).to(options.dtype)
    weights, ids = torch.rand(tokens, options.experts, generator=g, device=ranks.device).topk(options.top_k, dim=-1)
    partial = torch.randn(ranks.size * tokens, hidden, generator=g, device=ranks.device).to(options.dtype)
    narrow = ids.to(torch.int32)
    if options.payload == "fp8":
        scales = torch.rand(tokens, max(hidden // _BLOCK, 1), generator=g, device=ranks.device)
        return Inputs((x.to(torch.float8_e4m3fn), scales, weights), narrow, partial, None)
    each = options.experts // ranks.size
    owners = torch.zeros(tokens, ranks.size, device=ranks.device).scatter_(1, ids // each, 1.0)
    wanted = x.float() * owners.sum(1, keepdim=True) ** options.pairs  # a row comes back from each rank that it went to
    return Inputs((x, weights), narrow, partial, wanted)


def prepare(ranks: r.Ranks, options: argparse.Namespace, hidden: int, capacity: int) -> Any:
    """One workspace for all sizes and payloads."""
    return ringfence.moe.prepare(
        capacity=capacity,
        top_k=options.top_k,
        hidden=hidden,
        dtype=options.dtype,
        payload_bytes=hidden * options.dtype.itemsize + 4 * options.top_k + hidden // 32,
        collective=KERNELS if ranks.cuda else "auto",
        device=ranks.device,
    )


@dataclass
class Contender:
    """``call`` runs the whole chain once and returns its rows. ``keep`` holds what a graph only knows by address."""

    name: str
    call: Callable[[], Tensor]
    keep: Any = None
    right: bool = False


def by_hand(ranks: r.Ranks, name: str, chain: Callable[[], Tensor], keep: Any = None, right: bool = False) -> Contender:
    if not ranks.cuda:
        return Contender(name, chain, keep, right)
    graph, out = r.captured(chain)

    def call() -> Tensor:
        graph.replay()
        return out

    return Contender(name, call, (graph, keep), right)


# -- without ringfence -----------------------------------------------------------------------


def gather_and_scatter(ranks: r.Ranks, options: argparse.Namespace, given: Inputs) -> Contender:
    """Each rank has all tokens, ids and weights; what the experts made is summed."""
    sent = [*given.payloads[1:], given.ids]
    rows = given.payloads[0]
    gathered = [t.new_empty(ranks.size * t.shape[0], t.shape[1]) for t in (rows, *sent)]
    out = torch.empty(given.tokens, given.hidden, dtype=given.partial.dtype, device=ranks.device)

    def chain() -> Tensor:
        x = rows
        for _ in range(options.pairs):
            for whole, part in zip(gathered, (x, *sent), strict=True):
                dist.all_gather_into_tensor(whole.view(torch.uint8), part.view(torch.uint8))
            dist.reduce_scatter_tensor(out, given.partial if given.quantised else gathered[0])
            x = given.next_rows(out)
        return out

    return by_hand(ranks, GATHER, chain, (gathered, out, given))


def swaps(ranks: r.Ranks, options: argparse.Namespace, given: Inputs) -> Contender:
    """Equal parts there and back; nobody sorts, counts or sums."""
    sent = [t.repeat(ranks.size, 1) for t in given.payloads]
    got, back = [torch.empty_like(t) for t in sent], torch.empty_like(given.partial)

    def chain() -> Tensor:
        for _ in range(options.pairs):
            for to, part in zip(got, sent, strict=True):
                dist.all_to_all_single(to.view(torch.uint8), part.view(torch.uint8))
            dist.all_to_all_single(back, given.partial if given.quantised else got[0])
        return back

    return by_hand(ranks, SWAP, chain, (sent, got, back, given))


def bare(
    ranks: r.Ranks, options: argparse.Namespace, given: Inputs, *, staged: bool = False, sanitised: bool = True
) -> Contender:
    """The library's own calls on the workspace that ringfence made. staged: a combine copies what it is given."""
    kernels = workspaces_of(ranks.group_name).moe[-1].kernels
    api, workspace, meta, tokens = kernels._api, kernels._workspace, kernels._meta, given.tokens
    about = (ranks.rank, ranks.size)
    out = torch.empty(tokens, given.hidden, dtype=given.partial.dtype, device=ranks.device)
    at, shape = kernels.combine_at, (ranks.size, tokens, given.hidden)
    region = kernels.combine_rows(ranks.size * tokens, given.hidden, given.partial.dtype).view(shape)

    def chain() -> Tensor:
        x = given.payloads[0]
        for _ in range(options.pairs):
            planes, *_ = api.moe_a2a_dispatch(
                given.ids, [x, *given.payloads[1:], given.ids], workspace, meta, tokens, *about, options.top_k,
                options.experts, enable_pdl=False,
            )  # fmt: skip
            if sanitised:
                api.moe_a2a_sanitize_expert_ids(planes[-1], workspace, meta, ranks.rank, -1, enable_pdl=False)
            made = region if not staged else given.partial.view(shape) if given.quantised else planes[0]
            api.moe_a2a_combine(
                made, tokens, workspace, meta, tokens, *about, options.top_k, at, payload_in_workspace=not staged,
                output=out, enable_pdl=False,
            )  # fmt: skip
            x = given.next_rows(out)
        return out

    name = f"{BARE}{', staged' if staged else ''}{'' if sanitised else ', ids as they lie'}"
    return by_hand(ranks, name, chain, (kernels, given, out), right=staged and given.wanted is not None)


# -- ringfence ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Pairs that feed each other. What does not change is a parameter, which a captured call does not copy.

    lean: as experts would have it that go by counts and write where peers combine: nothing is written there here.
    """

    def __init__(self, options: argparse.Namespace, given: Inputs, *, lean: bool) -> None:
        super().__init__()
        self.pairs, self.experts, self.lean = options.pairs, options.experts, lean
        self.given = given
        self.ids = nn.Parameter(given.ids, requires_grad=False)
        self.partial = nn.Parameter(given.partial, requires_grad=False)
        self.others = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in given.payloads[1:]])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        how: dict[str, Any] = {"empty_id": None, "known_ids": True} if self.lean else {}
        for _ in range(self.pairs):
            payloads = [x] + [other for other in self.others]  # Dynamo of torch 2.11 does not unpack an empty list
            sent = ringfence.moe.dispatch(
                payloads, self.ids, capacity=self.given.tokens, num_experts=self.experts, **how
            )
            if self.lean:
                partial = ringfence.moe.combine_buffer(sent, self.given.hidden, self.partial.dtype)
            else:
                partial = self.partial if self.given.quantised else sent.payloads[0]
            y = ringfence.moe.combine(partial, sent.route)
            x = self.given.next_rows(y)
        return y


def functions(ranks: r.Ranks, options: argparse.Namespace, given: Inputs, *, lean: bool) -> Contender:
    """Called in a graph of one's own."""
    chain = Chain(options, given, lean=lean)
    right = not lean and given.wanted is not None
    name = LEAN if lean else "ringfence, as it comes"
    return by_hand(ranks, name, lambda: chain(given.payloads[0]), (chain, given), right)


def compiled(
    ranks: r.Ranks, options: argparse.Namespace, given: Inputs, *, lean: bool, collective: str = KERNELS
) -> Contender:
    """Compiled and captured by ringfence."""
    backend = ringfence.Backend(
        capture_sizes=(given.tokens,),
        moe_collective=collective if ranks.cuda else "reference",
        static_outputs=True,
        piece_compiler=options.piece_compiler,
    )
    chain = Chain(options, given, lean=lean)
    call = torch.compile(chain, backend=backend, fullgraph=True, dynamic=False)
    with r.failed_capture_is_an_error():
        call(given.payloads[0])  # compiles, runs and captures
    (report,) = backend.reports
    if collective == KERNELS and ranks.cuda and not any(KERNELS in note for note in report.notes):
        raise RuntimeError(f"the kernels were not taken: {report.notes}")
    name = COMPILED if lean else "ringfence compiled, as it comes"
    if collective != KERNELS:
        name = "ringfence over NCCL"
    return Contender(
        name, lambda: call(given.payloads[0]), (report, chain), right=not lean and given.wanted is not None
    )
