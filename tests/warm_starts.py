"""Starts of tiny models of transformers that find what an earlier process left in Inductor's cache.

PYTHONPATH=tests python tests/warm_starts.py      a line for each architecture of the suite: ``make support``
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from test_hugging_face import ARCHITECTURES

import ringfence
from support import run_ranks, save_tiny_model, start_fake_group


@dataclass(frozen=True)
class Started:
    """hits, misses: of Inductor's cache. logits: of each call, as bytes."""

    hits: int
    misses: int
    logits: list[bytes]


def save_models(folder: Path, kinds: Sequence[str]) -> None:
    for kind in kinds:
        save_tiny_model(folder / kind, kind, num_hidden_layers=1, **ARCHITECTURES[kind])


def start(kinds: Sequence[str], folder: Path) -> dict[str, Started]:
    """All of them in one new process, as the first of two ranks, whose collectives do nothing."""
    (found,) = run_ranks(1, _start, kinds, folder)
    return found  # type: ignore[no-any-return]


def _start(rank: int, kinds: Sequence[str], folder: Path) -> dict[str, Started]:
    dist.destroy_process_group()
    start_fake_group(2)
    return {kind: _serve(folder / kind) for kind in kinds}


def _serve(path: Path) -> Started:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    from ringfence.hugging_face import remove_backward_hooks

    torch._dynamo.reset()
    before = Counter(torch._dynamo.utils.counters["inductor"])
    plan = DistributedConfig(tp_plan="auto", tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=plan, dtype=torch.float32).eval()
    remove_backward_hooks(model)
    backend = ringfence.Backend(capture_sizes=[3], graphs="simulated", on_capture_failure="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    logits = []
    with torch.no_grad():
        for tokens in (torch.arange(3)[None], torch.arange(3, 6)[None]):
            ours, right = (m(tokens, use_cache=False).logits for m in (compiled, model))
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
            logits.append(ours.numpy().tobytes())
    assert backend.reports[-1].fused
    seen = torch._dynamo.utils.counters["inductor"] - before
    return Started(seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"], logits)


def main() -> int:
    """Two starts of each; 1 where the second compiles something, or has other numbers."""
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / "cache")
        save_models(Path(scratch), list(ARCHITECTURES))
        first, second = (start(list(ARCHITECTURES), Path(scratch)) for _ in range(2))
        for kind, now in second.items():
            good = now.hits > 0 and now.misses == 0 and now.logits == first[kind].logits
            failed += [] if good else [kind]
            print(f"{kind}: {first[kind].misses} compiled, then {now.hits} found and {now.misses} compiled", end="")
            print("" if now.logits == first[kind].logits else "; other numbers")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
