"""Tokens from a tensor-parallel Hugging Face model: torchrun --nproc-per-node 2 examples/generate.py [MODEL_FOLDER]

Compiles the model in place, generates with a static cache, and prints what was captured and replayed. Without a folder
it is a Llama of two small layers with random weights. On the CPU captures are simulated, which is no faster.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import ringfence

SMALL = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=1000,
    eos_token_id=None,
)


def save_small_model() -> Path:
    """On rank 0, for all."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(SMALL).save_pretrained(folder[0])
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def main() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else save_small_model()
    plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=dtype)

    ringfence.compile(model, capture_sizes=[1], graphs="auto" if cuda else "simulated")
    prompt = torch.arange(3, 11, device=model.device)[None]
    for _ in range(2):
        tokens = model.generate(prompt, max_new_tokens=16, do_sample=False, cache_implementation="static")

    if dist.get_rank() == 0:
        print("tokens:", tokens[0].tolist())
        print(model.ringfence.reports[0].summary)
        print(model.ringfence)
    model.ringfence.close()
    ringfence.close_workspaces(dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("start its ranks: torchrun --nproc-per-node 2 examples/generate.py")
    main()
