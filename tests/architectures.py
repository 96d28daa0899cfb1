"""The architectures of transformers that have a tensor-parallel plan, tiny, as one of two ranks: what is fused of each.

    python tests/architectures.py --write        # all of them, into docs/support.md; --check compares without writing
    python tests/architectures.py llama gemma2   # some, printed

An architecture counts where ``AutoModelForCausalLM`` makes one from its configuration with the sizes below. The ranks
are fake, as in ``ringfence explain``, so that no other process is needed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->\n"
SECONDS = 240

#: What a configuration is made small by, where it has the field.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@dataclass(frozen=True)
class Row:
    """fused of sites all-reduces in layers, and why the others were not, or why there is no number."""

    kind: str
    sites: int
    fused: int
    why: str

    def __str__(self) -> str:
        return (
            f"| {self.kind} | {self.fused} of {self.sites} | {self.why} |"
            if self.sites
            else (f"| {self.kind} | | {self.why} |")
        )


def architectures() -> list[str]:
    """Types of causal language models whose configuration has a plan."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [
        k for k in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if getattr(CONFIG_MAPPING[k], "base_model_tp_plan", None)
    ]


def small(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    fields = {*inspect.signature(CONFIG_MAPPING[kind].__init__).parameters, *vars(CONFIG_MAPPING[kind]())}
    values = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # each head has a key of its own there, whose width is that of two parts
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    return CONFIG_MAPPING[kind](**values)


def row(kind: str) -> Row:
    """Raises nothing: what goes wrong before ringfence is asked is the reason."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import ringfence

    torch._dynamo.reset()
    stage = "cannot be made this small"
    try:
        with tempfile.TemporaryDirectory() as folder, _at_most(SECONDS):
            AutoModelForCausalLM.from_config(small(kind)).save_pretrained(folder)
            stage = "transformers cannot shard it"
            plan = DistributedConfig(tp_plan="auto", tp_size=2)
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32)
            tokens = torch.arange(3, 11)[None]
            stage = "the sharded model does not run eagerly"
            with torch.no_grad():
                model(tokens, use_cache=False)
            stage = "does not compile"
            ringfence.compile(model, piece_compiler="eager")
            model(tokens, use_cache=False)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        text = " ".join(str(error).split())[:100].replace("|", "/")
        return Row(kind, 0, 0, f"{stage}: {type(error).__name__}: {text}")
    sites = [s for report in model.ringfence.reports for s in report.sites if "layers" in (s.module or "")]
    reasons = collections.Counter(
        f"`{s.decline.reason}` at {s.module.rpartition('layers.')[2].partition('.')[2]}" for s in sites if s.decline
    )
    why = "; ".join(reasons)
    graphs = len(model.ringfence.reports)
    if not sites:
        absent = {note for report in model.ringfence.reports for note in report.notes}
        why = "; ".join(sorted(absent)) or "no all-reduce in its layers"
    if graphs > 1:
        why = "; ".join(filter(None, [why, f"{graphs} graphs"]))
    return Row(kind, len(sites), sum(s.fused for s in sites), why)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rows(kinds: list[str]) -> Iterator[Row]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for kind in kinds:
            one = row(kind)
            print(one, file=sys.stderr, flush=True)
            yield one
    finally:
        dist.destroy_process_group()


def table_of(page: str) -> dict[str, str]:
    """The page's rows, by architecture."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        os.environ.setdefault(name, value)  # transformers reads them
    torch.set_num_threads(1)
    found = list(rows(arguments.kinds or architectures()))
    text = "| architecture | fused in layers | why not all |\n|---|---|---|\n" + "".join(f"{one}\n" for one in found)
    page = PAGE.read_text()
    if arguments.write:
        head, _, rest = page.partition(BEGIN)
        PAGE.write_text(head + BEGIN + text + END + rest.partition(END)[2])
    elif arguments.check:
        there = table_of(page)
        stale = [one.kind for one in found if there.get(one.kind) != str(one)]
        print(f"differs from docs/support.md: {', '.join(stale)}" if stale else "docs/support.md is what runs")
        return 1 if stale else 0
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
