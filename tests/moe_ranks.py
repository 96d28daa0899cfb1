"""Routings, experts and an oracle for the MoE all-to-all, and what its ranks do in the tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ringfence
from ringfence.runtime.collectives.moe_reference import first_expert

H = 16

#: Which experts each token asks for: ``(tokens, top_k, experts, ranks, this rank, generator) -> [tokens, top_k]``.
Routing = Callable[[int, int, int, int, int, torch.Generator], Tensor]


def _drawn(tokens: int, k: int, experts: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tokens, experts, generator=generator).topk(k, dim=-1).indices


def _uniform(tokens: int, k: int, experts: int, ranks: int, rank: int, g: torch.Generator) -> Tensor:
    return _drawn(tokens, k, experts, g)


def _hot(tokens: int, k: int, experts: int, ranks: int, rank: int, g: torch.Generator) -> Tensor:
    """All tokens of all ranks ask for the last expert first."""
    ids = _drawn(tokens, k, experts - 1, g) if experts > k else _drawn(tokens, k, experts, g)
    return torch.cat((torch.full((tokens, 1), experts - 1), ids), dim=1)[:, :k]


def _to_one_rank(tokens: int, k: int, experts: int, ranks: int, rank: int, g: torch.Generator) -> Tensor:
    """Everything goes to the first rank: the others receive nothing."""
    first = first_expert(1, experts, ranks)
    return torch.randint(0, first, (tokens, k), generator=g)  # an expert may be asked for twice


def _one_sided(tokens: int, k: int, experts: int, ranks: int, rank: int, g: torch.Generator) -> Tensor:
    """Each rank sends all to the next one."""
    to = (rank + 1) % ranks
    low, high = first_expert(to, experts, ranks), first_expert(to + 1, experts, ranks)
    return torch.randint(low, high, (tokens, k), generator=g)


def _at_home(tokens: int, k: int, experts: int, ranks: int, rank: int, g: torch.Generator) -> Tensor:
    low, high = first_expert(rank, experts, ranks), first_expert(rank + 1, experts, ranks)
    return torch.randint(low, high, (tokens, k), generator=g)


ROUTINGS: dict[str, Routing] = {
    "uniform": _uniform,
    "hot": _hot,
    "to_one_rank": _to_one_rank,
    "one_sided": _one_sided,
    "at_home": _at_home,
}

#: By rank, modulo their number: ranks without tokens, all without, one with all.
TOKENS = {"even": (5, 5, 5, 5), "uneven": (7, 1, 4, 2), "idle": (6, 0, 3, 0), "one": (0, 0, 8, 1), "none": (0, 0, 0, 0)}


def batch(
    rank: int, ranks: int, tokens: int, k: int, experts: int, routing: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, ids, weights)`` of one rank; any rank can draw another's."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(tokens, H, generator=g).to(dtype)
    weights = torch.rand(tokens, k, generator=g) + 0.1
    return x, ROUTINGS[routing](tokens, k, experts, ranks, rank, g), weights


def expert_rows(rank: int, ranks: int, experts: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What one rank's experts make of rows, each by itself: scaled and shifted by a number of the expert's own."""
    low, high = first_expert(rank, experts, ranks), first_expert(rank + 1, experts, ranks)
    mine = (ids >= low) & (ids < high)
    scale, shift = torch.cos(ids.double()), torch.sin(3.0 * ids.double())
    each = x.double()[:, None] * scale[..., None] + shift[..., None]  # [rows, k, H]
    return torch.where(mine[..., None], each * weights.double()[..., None], 0.0).sum(1).to(x.dtype)


def expected(rank: int, ranks: int, experts: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same sum in the same roundings, without a message: float32 over the ranks in order, rounded once."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for other in range(ranks):
        low, high = first_expert(other, experts, ranks), first_expert(other + 1, experts, ranks)
        asked = ((ids >= low) & (ids < high)).any(1, keepdim=True)
        total += torch.where(asked, expert_rows(other, ranks, experts, x, ids, weights).float(), 0.0)
    return total.to(x.dtype)


def check_one(
    rank: int, ranks: int, group: Any, sizes: tuple[int, ...], k: int, experts: int, routing: str, dtype: torch.dtype,
    seed: int, *, slack: int = 1, empty_id: int = -1, in_order: bool = True,
) -> None:  # fmt: skip
    """One dispatch and combine against the oracle: rows, empty slots, the result and its one rounding.

    in_order: the sum is taken in the order of the ranks, so its bits are known.
    """
    capacity = max(max(sizes), 1) + slack
    batches = [batch(r, ranks, sizes[r], k, experts, routing, dtype, seed) for r in range(ranks)]
    x, ids, weights = batches[rank]
    sent = ringfence.moe.dispatch(
        [x, weights], ids, capacity=capacity, num_experts=experts, empty_id=empty_id, group=group
    )
    received, got_weights = sent.payloads
    low, high = first_expert(rank, experts, ranks), first_expert(rank + 1, experts, ranks)
    for source, (xs, idss, ws) in enumerate(batches):
        block = slice(source * capacity, (source + 1) * capacity)
        asked = ((idss >= low) & (idss < high)).any(1)
        filled = (sent.ids[block] != empty_id).any(1)
        assert int(filled.sum()) == int(asked.sum()), "each token goes once to each rank that it asks for"
        rows = [received[block][filled], sent.ids[block][filled].to(dtype), got_weights[block][filled].to(dtype)]
        wanted = [xs[asked], idss[asked].to(dtype), ws[asked].to(dtype)]
        assert _in_any_order(torch.cat(rows, 1)) == _in_any_order(torch.cat(wanted, 1)), (source, rank)
        assert (sent.ids[block][~filled] == empty_id).all()
    empty = (sent.ids == empty_id).all(1)
    poisoned = received.masked_fill(empty[:, None], float("nan"))  # whatever lies in an empty slot reaches nobody
    partial = expert_rows(rank, ranks, experts, poisoned, sent.ids, got_weights)
    partial = partial.masked_fill(empty[:, None], float("nan"))
    want = expected(rank, ranks, experts, x, ids, weights)
    out = torch.full_like(x, float("nan"))
    result = ringfence.moe.combine(partial, sent.route, group=group)
    assert result.dtype == dtype and result.shape == x.shape and _same(result, want, in_order)
    again = ringfence.moe.dispatch(
        [x, weights], ids, capacity=capacity, num_experts=experts, empty_id=None, known_ids=True, group=group
    )
    asked = [((i >= low) & (i < high)).any(1).sum() for _, i, _ in batches]
    assert again.counts.dtype == torch.int32 and again.counts.tolist() == [int(n) for n in asked]
    first = (torch.arange(capacity) < again.counts[:, None]).view(-1)  # of each block; what lies behind is anything
    buffer = ringfence.moe.combine_buffer(again, H, dtype, group=group).fill_(float("nan"))
    rows = [t[first] for t in (again.payloads[0], again.ids, again.payloads[1])]
    buffer[first] = expert_rows(rank, ranks, experts, *rows)
    assert ringfence.moe.combine(buffer, again.route, out=out, group=group) is out and _same(out, want, in_order)


def _same(result: Tensor, want: Tensor, in_order: bool) -> bool:
    bound = 2 * torch.finfo(want.dtype).eps
    return torch.equal(result, want) if in_order else torch.allclose(result, want, rtol=bound, atol=1e-6)


def _in_any_order(rows: Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in rows.double().tolist())


def all_routings(rank: int, ranks: int, group: Any, **how: Any) -> int:
    """Every routing with every kind of token counts; how many were checked."""
    cases = list(itertools.product(ROUTINGS, TOKENS.items()))
    for seed, (routing, (_, tokens)) in enumerate(cases):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        k, experts = 2 + seed % 2, 7 + seed % 2
        check_one(rank, ranks, group, tokens[:ranks], k, experts, routing, dtype, seed, slack=seed % 3, **how)
    return len(cases)


def bytes_arrive(rank: int, ranks: int, group: Any) -> list[str]:
    """Payloads of any dtype, their bits as they were, NaN and -0.0 among them."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8, torch.float8_e4m3fn]
    dtypes += [torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int64]
    done = []
    for dtype in dtypes:
        widths = (8, 3) if dtype.itemsize == 1 else (2, 5)
        g = torch.Generator().manual_seed(rank)
        raw = [torch.randint(0, 256, (3, w * dtype.itemsize), generator=g, dtype=torch.uint8) for w in widths]
        to = torch.full((3, 1), (rank + 1) % ranks)
        sent = ringfence.moe.dispatch(
            [one.view(dtype) for one in raw], to, capacity=4, num_experts=ranks, group=group
        )  # fmt: skip
        source = (rank - 1) % ranks
        g = torch.Generator().manual_seed(source)
        wanted = [torch.randint(0, 256, (3, w * dtype.itemsize), generator=g, dtype=torch.uint8) for w in widths]
        filled = (sent.ids != -1).any(1)
        assert filled.nonzero().flatten().tolist() == [4 * source + i for i in range(3)]
        for got, want in zip(sent.payloads, wanted, strict=True):
            assert got.dtype == dtype
            rows = got.view(torch.uint8)[filled]
            assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, want.tolist())), dtype
        ringfence.moe.combine(torch.zeros(4 * ranks, 1), sent.route, group=group)  # from here on rows are overwritten
        done.append(str(dtype))
    return done


def over_gloo(rank: int) -> dict[str, Any]:
    """On groups of two and of four ranks, over sockets."""
    torch.set_grad_enabled(False)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ringfence.register_group("ep:0", pairs[rank // 2])
    found: dict[str, Any] = {"two": all_routings(rank % 2, 2, "ep:0"), "four": all_routings(rank, 4, None)}
    found["dtypes"] = bytes_arrive(rank % 2, 2, pairs[rank // 2])
    found["local"] = [list(ringfence.moe.local_experts(7, "ep:0")), list(ringfence.moe.local_experts(10))]
    return found


# -- graphs that ringfence rewrites --------------------------------------------------------


def rewritten(rank: int) -> dict[str, Any]:
    """Through the backend: on four ranks, captured; and in pairs of which one rank's experts add for every token."""
    import moe_graphs

    class Unmasked(moe_graphs.Experts):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return super().forward(x, ids, weights) + x

    torch.set_grad_enabled(False)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    kind = Unmasked if rank % 2 else moe_graphs.Experts
    layers = {
        "four": moe_graphs.Layer("grouped", rank, 4, k=3),
        "pair": moe_graphs.Layer(group=pairs[rank // 2], experts=kind("batched", rank % 2, 2, torch.bfloat16)),
    }
    found: dict[str, Any] = {}
    for name, layer in layers.items():
        torch._dynamo.reset()
        sizes = [6] if name == "four" else []
        backend = ringfence.Backend(
            moe_dispatch=True, piece_compiler="eager", capture_sizes=sizes, graphs="simulated", agree_seconds=180
        )
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        excess = [layer.excess(compiled(*args), *args) for args in steps(rank, moe_graphs.given)]
        found[name] = excess, backend.reports[0].to_dict()
    return found


def steps(rank: int, given: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs of six steps of changing routing; in the last, rank 1 has nothing but padding."""
    made = []
    for step in range(6):
        x, lean, live = given(6, 10 * step + rank)
        if step == 2:  # everything to the last expert and its neighbour: the other ranks receive little or nothing
            lean[-2:] = 100.0
        if step == 3:  # hot: one expert of each token is the first
            lean[0] = 100.0
        if step in (4, 5) and rank == 1:
            x, live = torch.zeros_like(x), torch.zeros_like(live)
        made.append((x, lean, live))
    return made
