"""A tiny random Llama and a tiny random Qwen3: `python models.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

LAYERS = 3
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(folder: Path) -> None:
    torch.manual_seed(0)
    for name, config, model in (("llama", LlamaConfig, LlamaForCausalLM), ("qwen3", Qwen3Config, Qwen3ForCausalLM)):
        built = model(config(**_SHAPE, initializer_range=0.2)).to(torch.float32)
        with torch.no_grad():
            for key, value in built.named_parameters():
                if "norm" in key:
                    value.uniform_(0.5, 1.5)
        built.save_pretrained(folder / name)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
