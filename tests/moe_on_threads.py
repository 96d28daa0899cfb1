"""Ranks on threads, with FlashInfer's MoE kernels over one library in Python (:mod:`moe_library`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moe_ranks
import pytest
import torch
import torch.distributed as dist
from moe_library import Library, host_bytes

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import moe_one_sided
from ringfence.runtime.collectives.moe_one_sided import MoeSizes, OneSided
from ringfence.runtime.collectives.moe_ready import needed
from ringfence.runtime.collectives.workspace import MoeWorkspace, workspaces_of
from ringfence.runtime.hazards.situation import Collective, Situation
from support import run_threaded

CPU = torch.device("cpu")
#: What the pairs of these tests need: rows of 16 float32 at most, three experts of a token.
SIZES = needed(4 * moe_ranks.H + 4 * 3, 3, 4 * moe_ranks.H, 10)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each test of a file that imports it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(moe_one_sided, "device_bytes", host_bytes)


def made(library: Library, channel: Channel, sizes: MoeSizes = SIZES) -> OneSided:
    return moe_one_sided.create(library.package(channel.rank), channel, sizes)


def on_ranks(
    ranks: int, body: Callable[[OneSided, Channel], Any], sizes: MoeSizes = SIZES
) -> tuple[Library, list[Any]]:
    """``body`` on each rank, with kernels of its own over one library."""
    library, store = Library(ranks), dist.HashStore()

    def run(rank: int) -> Any:
        channel = Channel(store, rank, ranks, seconds=120)
        return body(made(library, channel, sizes), channel)

    return library, run_threaded(ranks, run)


def served(kernels: OneSided) -> MoeWorkspace:
    """Kernels as those of the default group that were prepared."""
    workspace = MoeWorkspace(kernels, CPU, Situation(Collective.MOE_ALL_TO_ALL))
    workspaces_of(dist.group.WORLD.group_name).moe_prepared = workspace
    return workspace
