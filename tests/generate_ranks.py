"""Tiny Hugging Face models that generate on two ranks, compiled in place and eager."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import torch

from support import save_tiny_model

LAYERS = 2
PROMPT, NEW = 8, 12
#: The window is shorter than what is generated, so that it fills and slides.
_WINDOW = {"sliding_window": 12}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 16, **_WINDOW},
    "gpt_oss": {"num_local_experts": 4, **_EXPERTS, **_WINDOW},
    "qwen3_moe": {"num_experts": 4, **_EXPERTS},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        **_EXPERTS,
    },
}
#: Their plan shards experts and nothing else.
EXPERT_PARALLEL = ("gpt_oss",)


def save(folder: Path, kind: str, layers: int = LAYERS) -> None:
    tokens = {"max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": None, "pad_token_id": 0}
    save_tiny_model(folder / kind, kind, num_hidden_layers=layers, **tokens, **ARCHITECTURES[kind])


def load(folder: Path, kind: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    plan = DistributedConfig(tp_plan="auto", tp_size=2, enable_expert_parallel=kind in EXPERT_PARALLEL)
    return AutoModelForCausalLM.from_pretrained(folder / kind, distributed_config=plan, dtype=torch.float32)


def steps(model: Any, since: int = 0) -> list[str]:
    """How each step of the compiled model was served, from one of them on."""
    return [step["how"] for step in model.ringfence.supervisor.journal.to_dict("")["steps"]][since:]


def generate(
    rank: int, folder: Path, kinds: list[str], extra: str | None = None, assisted: bool = False
) -> dict[str, dict[str, Any]]:
    """By architecture: whether the tokens are those of eager code in two calls, how decoding steps were served in each,
    and the fused and all sites of the graph. extra: one of them, also in a batch and by ``CompileConfig``;
    with ``assisted`` also by an assistant, whose caches grow, so that Dynamo compiles many times.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    import ringfence

    results: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        model = load(folder, kind)
        prompt = torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(3))
        pair = torch.cat([prompt, prompt.flip(-1)])
        mask = torch.ones_like(pair)
        pair[1, :3], mask[1, :3] = 0, 0
        static = {"do_sample": False, "max_new_tokens": NEW, "cache_implementation": "static"}
        plain = {"do_sample": False, "max_new_tokens": NEW}
        expected = model.generate(prompt, **static)
        if kind == extra:
            in_batch = model.generate(pair, attention_mask=mask, **static)
            helped = model.generate(prompt, **plain)
        ringfence.compile(model, capture_sizes=[1, 2], graphs="simulated", piece_compiler="eager", fullgraph=True)
        same, how = [], []
        for _ in range(2):
            since = len(steps(model))
            same.append(torch.equal(model.generate(prompt, **static), expected))
            how.append(dict(collections.Counter(steps(model, since))))
        sites = [site for report in model.ringfence.reports for site in report.sites]
        results[kind] = {
            "same": same,
            "how": how,
            "fused": sum(site.fused for site in sites if "layers" in (site.module or "")),
            "sites": sum("layers" in (site.module or "") for site in sites),
            "graphs": len(model.ringfence.reports),
        }
        if kind == extra:
            since = len(steps(model))
            batch = torch.equal(model.generate(pair, attention_mask=mask, **static), in_batch)
            results[kind]["batch"] = batch, dict(collections.Counter(steps(model, since)))
            if assisted:
                assistant = ringfence.compile(load(folder, kind), piece_compiler="eager")
                helped_now = model.generate(prompt, assistant_model=assistant, **plain)
                results[kind]["assisted"] = torch.equal(helped_now, helped)
            results[kind]["config"] = by_compile_config(folder, kind, prompt, static, expected)
        torch._dynamo.reset()
    return results


def by_compile_config(folder: Path, kind: str, prompt: Any, static: dict[str, Any], expected: Any) -> dict[str, Any]:
    """The same by transformers' own way to compile, which copies the backend with its configuration."""
    from transformers import CompileConfig

    import ringfence
    from ringfence.hugging_face import remove_backward_hooks

    torch._dynamo.reset()
    model = load(folder, kind)
    remove_backward_hooks(model)
    backend = ringfence.Backend(capture_sizes=[1], graphs="simulated", piece_compiler="eager")
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True  # on the CPU, for tests
    same = [torch.equal(model.generate(prompt, compile_config=config, **static), expected) for _ in range(2)]
    return {"same": same, "graphs": len(backend.reports)}


def main() -> None:
    """All of them, a line for each: ``make support``."""
    import tempfile

    from support import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        for kind in ARCHITECTURES:
            save(Path(folder), kind)
            results = run_ranks(2, generate, Path(folder), [kind], "llama", kind == "llama", timeout=1800)
            print(kind, *results[0].values(), "as on the other rank" if results[0] == results[1] else results[1])


if __name__ == "__main__":
    main()
