"""Random programs on real ranks: the same program and setting on each, other weights and activations."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from .check import check_all, draw


def fuzz_ranks(rank: int, seeds: Sequence[int]) -> tuple[Counter[str], list[str]]:
    """Counts by kind and the failures, as text."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=180), dist.group.WORLD)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for at in seeds:
        program, settings = draw(at, inductor=0.0, ranks=True)
        for setting, outcome in zip(settings[:2], check_all(program, settings[:2]), strict=True):
            counts[outcome.kind] += 1
            if outcome.kind == "wrong":
                failures.append(f"seed {at}: {outcome.message}\n  {setting}\n{program.source()}")
        counts["programs"] += 1
    return counts, failures
