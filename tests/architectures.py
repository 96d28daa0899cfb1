"""The architectures of transformers that have a tensor-parallel plan, tiny, as one of two ranks: what is fused of each.

    python tests/architectures.py --write             # all of them, into docs/support.md; --check compares instead
    python tests/architectures.py --write --missing   # those that have no row there, as after a run that was stopped
    python tests/architectures.py llama gemma2        # some, printed

A row is written as soon as it is found. Each is found in a process of its own, so that one that crashes, or that does
not end, is a row as well. An architecture counts where ``AutoModelForCausalLM`` makes one from its configuration with
the sizes below. The ranks are fake, as in ``ringfence explain``, so that no other rank is needed.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->\n"
HEAD = "| architecture | fused in layers | why not all |\n|---|---|---|\n"
SECONDS = 600
MEMORY = 8 << 30

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

#: What some need beside it, or differently.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "longcat_flash": {"head_dim": SMALL["qk_rope_head_dim"]},
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

    of_text = getattr(CONFIG_MAPPING[kind], "sub_configs", {}).get("text_config")
    config = of_text or CONFIG_MAPPING[kind]
    fields = {*inspect.signature(config.__init__).parameters, *vars(config())}
    values = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # each head has a key of its own there, whose width is that of two parts
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= OWN.get(kind, {})
    return CONFIG_MAPPING[kind](text_config=values) if of_text else config(**values)


def row(kind: str) -> Row:
    """Raises nothing: what goes wrong is the reason."""
    ours, its = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_find_row, args=(kind, its), daemon=True)
    process.start()
    its.close()
    stage, until = "does not start", time.monotonic() + SECONDS
    try:
        while ours.poll(max(0.0, until - time.monotonic())):
            said = ours.recv()
            if isinstance(said, Row):
                return said
            stage = said
        return Row(kind, 0, 0, f"{stage}: no end after {SECONDS} s")
    except EOFError:
        process.join()
        return Row(kind, 0, 0, f"{stage}: the process ends with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _find_row(kind: str, pipe: Connection) -> None:
    """In a process of its own: sends each stage, by what its failure is called, and then the row."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import ringfence

    said = ""

    def stage(name: str) -> None:
        nonlocal said
        said = name
        pipe.send(name)

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}  # transformers reads them
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # one that is not small after all takes nobody else down
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    stage("cannot be made this small")
    try:
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(small(kind)).save_pretrained(folder)
            stage("transformers does not shard it")
            plan = DistributedConfig(tp_plan="auto", tp_size=2)
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32)
        tokens = torch.arange(3, 11)[None]
        stage("transformers does not run it sharded, without ringfence")
        with torch.no_grad():
            model(tokens, use_cache=False)
        stage("does not compile")
        ringfence.compile(model, piece_compiler="eager")
        model(tokens, use_cache=False)
        found = _row_of(kind, model.ringfence.reports)
    except Exception as error:
        text = " ".join(str(error).split())[:140].replace("|", "/")
        found = Row(kind, 0, 0, f"{said}: {type(error).__name__}: {text}")
    pipe.send(found)


def _row_of(kind: str, reports: Sequence[Any]) -> Row:
    """Where Dynamo breaks the graph, one graph serves each layer, so its sites count once, by their path in a layer."""
    several = len(reports) > 1
    sites = [s for report in reports for s in report.sites if _in_layers(s.module or "", several)]
    declined = [(s.decline.reason, (s.module or "").rpartition("layers.")[2]) for s in sites if s.decline]
    why = [f"`{reason}` at {re.sub(r'^[0-9]+[.]', '', path) or 'the experts'}" for reason, path in declined]
    if not sites:
        why = sorted({note for report in reports for note in report.notes}) or ["no all-reduce in its layers"]
    if several:
        broken = [n for report in reports for n in report.notes if "Dynamo breaks it" in n]
        why.append(
            f"{len(reports)} graphs, because {broken[0].partition(': ')[2]}" if broken else f"{len(reports)} graphs"
        )
    return Row(kind, len(sites), sum(s.fused for s in sites), "; ".join(dict.fromkeys(why)))


def _in_layers(path: str, several: bool) -> bool:
    return "layers" in path or (several and not path.startswith(("model.", "embed", "lm_head")))


def rows(kinds: list[str]) -> Iterator[Row]:
    import transformers  # noqa: F401  # once, for all processes

    import ringfence.backend  # noqa: F401

    for kind in kinds:
        one = row(kind)
        print(one, file=sys.stderr, flush=True)
        yield one


def table_of(page: str) -> dict[str, str]:
    """The page's rows, by architecture."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def write(found: dict[str, str]) -> None:
    """The page with these rows, and no others."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    text = HEAD + "".join(f"{found[kind]}\n" for kind in sorted(found))
    PAGE.write_text(head + BEGIN + text + END + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    known = architectures()
    there = {kind: line for kind, line in table_of(PAGE.read_text()).items() if kind in known}
    kinds = [kind for kind in arguments.kinds or known if not (arguments.missing and kind in there)]
    stale = []
    for one in rows(kinds):
        stale += [one.kind] if there.get(one.kind) != str(one) else []
        there[one.kind] = str(one)
        if arguments.write:
            write(there)
    if arguments.check:
        print(f"differs from docs/support.md: {', '.join(stale)}" if stale else "docs/support.md is what runs")
        return 1 if stale else 0
    print(HEAD + "".join(f"{there[kind]}\n" for kind in kinds), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
