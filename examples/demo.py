"""The whole path on a machine without a GPU: python examples/demo.py

Two gloo ranks load one tiny, randomly initialised Llama with ``tp_plan="auto"``,
compile it with ringfence, capture it with simulated graphs and replay ten steps. Exits with 1
if an all-reduce was not fused or a number is further from eager than rounding explains.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LAYERS = 2
STEPS = 10
SIZES = (2, 4, 8)
#: The model computes in float32, so that the bound is tight: another order of summation, nothing more.
BOUND = 1e-4
TIMEOUT_SECONDS = 500


def say(text: str, rank: int = 0) -> None:
    """What is done now, on rank 0."""
    if rank == 0:
        print(f"demo: {text}", flush=True)


#: Of what other libraries tell of their own affairs, nothing is part of the answer. Inductor's workers would cost more
#: to start than two layers cost to compile.
ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def save_model(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def rank_main(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.utils import logging

    import ringfence

    logging.disable_progress_bar()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    say("each rank loads its half of the model (tp_plan='auto')", rank)
    plan = DistributedConfig(tp_plan="auto", tp_size=world_size)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32).eval()
    backend = ringfence.Backend(capture_sizes=SIZES, graphs="simulated", verify=True, piece_compiler="eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)

    say(f"{STEPS} steps of {SIZES} tokens, beside eager; the first compiles, the first of each size captures", rank)
    worst = 0.0
    generator = torch.Generator().manual_seed(1)  # the same tokens on every rank
    with torch.no_grad():
        for step in range(STEPS):
            tokens = torch.randint(0, 128, (1, SIZES[step % len(SIZES)]), generator=generator)
            expected = model(tokens, use_cache=False).logits
            actual = compiled(tokens, use_cache=False).logits
            worst = max(worst, (actual - expected).abs().max().item())
            say(f"step {step + 1}: {tokens.shape[1]} tokens", rank)
    if rank == 0:
        say("the report of the graph, which serves any number of tokens from 2 on:")
        for report in backend.reports:
            print(report, end="\n\n")
        say(f"largest difference from eager over {STEPS} steps: {worst:.2e} (bound {BOUND:.0e})")
    for report in backend.reports:
        # Two of each layer; newer releases of transformers split the embedding too, which is one more.
        ringfence.assert_fused(report, count=max(2 * LAYERS, len(report.sites)))
    if not worst <= BOUND:
        raise SystemExit(f"rank {rank}: differs from eager by {worst:.2e}")
    dist.destroy_process_group()


def main() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it outlives every rank
    os.environ |= ENVIRONMENT  # the ranks inherit it
    say(f"a Llama of {LAYERS} small layers on two ranks, captures simulated; about a minute of CPU time")
    with tempfile.TemporaryDirectory() as folder:
        say("making the model, with random weights")
        save_model(folder)
        ranks = mp.start_processes(rank_main, args=(2, store.port, folder), nprocs=2, join=False, start_method="spawn")
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not ranks.join(timeout=1, grace_period=5):
                if time.monotonic() > deadline:
                    print(f"demo: no end after {TIMEOUT_SECONDS} s", file=sys.stderr)
                    return 1
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            for process in ranks.processes:
                process.kill()
    print("demo: every all-reduce fused, every step right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
