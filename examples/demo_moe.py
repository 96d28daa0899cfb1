"""Experts on two ranks, on a machine without a GPU.

Two gloo ranks hold one tiny, randomly initialised Qwen3-MoE. Each has tokens of its own and half of the experts: what
the router chose is gathered, every rank's experts look at all tokens, and a reduce-scatter brings the sums back.
ringfence rewrites that into a dispatch, which sends a token only to the ranks of its experts, and a combine, captures
what lies between with simulated graphs, and replays ten steps of changing sizes and routing; in some of them rank 1 is
empty. Exits with 1 if a layer was not rewritten or a number differs from eager.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

LAYERS = 2
EXPERTS = 8
STEPS = 10
SIZES = (2, 4, 8)
TIMEOUT_SECONDS = 500


def expert_parallel(experts: Any, rank: int, ranks: int) -> torch.nn.Module:
    """This rank's block of a layer's experts, behind a gather of all ranks' tokens and before a reduce-scatter."""
    from torch.distributed._functional_collectives import all_gather_tensor, reduce_scatter_tensor
    from transformers.integrations.moe import grouped_mm_experts_forward

    class ExpertParallel(torch.nn.Module):
        has_gate, has_bias, is_transposed = True, False, False

        def __init__(self) -> None:
            super().__init__()
            self.num_experts = EXPERTS // ranks
            mine = slice(rank * self.num_experts, (rank + 1) * self.num_experts)
            self.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[mine].clone())
            self.down_proj = torch.nn.Parameter(experts.down_proj[mine].clone())
            #: 0 in a step in which this rank has nothing but padding, whose weights then count for nothing.
            self.register_buffer("live", torch.ones(1, 1, dtype=torch.bfloat16))

        def _apply_gate(self, x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            group = dist.group.WORLD
            x, ids, weights = (all_gather_tensor(t, 0, group) for t in (x, ids, weights * self.live))
            elsewhere = (ids // self.num_experts) != rank
            ids = (ids % self.num_experts).masked_fill(elsewhere, self.num_experts)
            partial = grouped_mm_experts_forward(self, x, ids, weights.masked_fill(elsewhere, 0.0))
            return reduce_scatter_tensor(partial, "sum", 0, group)

    return ExpertParallel()


def build(rank: int, ranks: int) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)  # the same weights on every rank
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight)  # zeros would send every token to the same experts
        layer.mlp.experts = expert_parallel(layer.mlp.experts, rank, ranks)
    return model


def rank_main(rank: int, ranks: int, port: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # newer releases of torch call its collectives otherwise
    import ringfence

    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    model = build(rank, ranks)
    backend = ringfence.Backend(
        moe_dispatch=True, capture_sizes=SIZES, graphs="simulated", piece_compiler="eager", verify=True
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(1 + rank)  # tokens of its own
    wrong = []
    with torch.no_grad():
        for step in range(STEPS):
            size = SIZES[step % len(SIZES)]
            empty = rank == 1 and step in (4, 7)
            tokens = torch.randint(0, 128, (1, size), generator=generator) * (not empty)
            for layer in model.model.layers:
                layer.mlp.experts.live.fill_(not empty)
            expected = model(tokens, use_cache=False).logits
            actual = compiled(tokens, use_cache=False).logits
            if not torch.equal(actual, expected):
                wrong.append(f"step {step}: off by {(actual - expected).abs().max():.2e}")
    (report,) = backend.reports
    if rank == 0:
        print(report)
    sites = [site for site in report.moe_sites if site.rewritten]
    if len(sites) != LAYERS or report.captured != SIZES or wrong:
        raise SystemExit(f"rank {rank}: {len(sites)} of {LAYERS} layers rewritten; {wrong}; captured {report.captured}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it outlives every rank
    ranks = mp.start_processes(rank_main, args=(2, store.port), nprocs=2, join=False, start_method="spawn")
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not ranks.join(timeout=1, grace_period=5):
            if time.monotonic() > deadline:
                print(f"demo-moe: no end after {TIMEOUT_SECONDS} s", file=sys.stderr)
                return 1
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for process in ranks.processes:
            process.kill()
    print(f"demo-moe: every layer rewritten, {STEPS} steps equal to eager, two of them with an empty rank")
    return 0


if __name__ == "__main__":
    sys.exit(main())
