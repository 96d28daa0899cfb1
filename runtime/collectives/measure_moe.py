"""Measure dispatch and combine: up to how many tokens of a rank the kernels are worth using on this machine.

Beside them is what is done without: gathers of rows, ids and weights, and a reduce-scatter, over NCCL. Both are timed
as all-reduces are (:mod:`.measure`), in one graph of many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..channel import DEFAULT_SECONDS, Channel, open_channel
from ..errors import CollectiveUnavailableError
from ..groups import Group, resolve_group
from .group_facts import facts_of_all
from .measure import slowest_us, worth_up_to
from .moe_one_sided import OneSided
from .moe_ready import MOE, MoeWanted, needed, prepare_moe
from .rank_facts import topology_of
from .size_table import MoeRow
from .workspace import close_workspaces

TOKENS = (1, 16, 128, 1024)
_EXPERTS, _TOP_K = 64, 8


@dataclass(frozen=True)
class MoeTiming:
    """Microseconds of a pair."""

    hidden: int
    tokens: int
    kernels: float
    nccl: float


def measure_moe(
    group: Group,
    device: torch.device,
    hiddens: Sequence[int],
    dtype: torch.dtype,
    source: str,
    *,
    tokens: Sequence[int] = TOKENS,
    seconds: float = DEFAULT_SECONDS,
) -> tuple[tuple[MoeRow, ...], str]:
    """A row, and what to print; no row where the kernels cannot be had. Every rank must call."""
    channel = open_channel(group.name, seconds=seconds)
    ranks = facts_of_all(channel, device)
    timings: list[MoeTiming] = []
    for hidden in hiddens:
        row_bytes = hidden * dtype.itemsize
        sizes = needed(row_bytes + 4 * _TOP_K, _TOP_K, row_bytes, max(tokens))
        try:
            ready = prepare_moe(channel, group, device, MoeWanted(MOE, sizes, limit=8 << 30))
        except CollectiveUnavailableError as error:
            return (), f"\n{MOE} was not measured: {error}"
        if ready.workspace is None or ready.capture_failure:
            return (), f"\n{MOE} was not measured: {ready.capture_failure}"
        kernels = ready.workspace.kernels
        timings += [_timing(kernels, group, channel, n, hidden, dtype, device) for n in tokens]
        channel.barrier("bench: every rank is done with the workspace")
        close_workspaces(group.name)
    most = worth_up_to((t.tokens, t.kernels, t.nccl) for t in timings)
    row = MoeRow(ranks[0].capability, group.size, most, source, topology_of(ranks))
    return (row,), as_text(timings, row)


def _timing(
    kernels: OneSided,
    group: Group,
    channel: Channel,
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MoeTiming:
    process_group = resolve_group(group.name, device)
    g = torch.Generator(device).manual_seed(1000 + channel.rank)
    x = torch.randn(tokens, hidden, generator=g, device=device).to(dtype)
    weights, chosen = torch.rand(tokens, _EXPERTS, generator=g, device=device).topk(_TOP_K, dim=-1)
    sent = (x, chosen.to(torch.int32), weights)
    gathered = [t.new_zeros(group.size * tokens, t.shape[1]) for t in sent]
    out = torch.empty_like(x)

    def pair() -> None:
        (rows, _), *_ = kernels.dispatch([x, weights], sent[1], tokens, _EXPERTS, None, known=True)
        kernels.combine(rows, out)  # as a graph calls them that was rewritten

    def nccl() -> None:
        for whole, part in zip(gathered, sent, strict=True):
            dist.all_gather_into_tensor(whole, part, group=process_group)
        dist.reduce_scatter_tensor(out, gathered[0], group=process_group)

    ways: tuple[Callable[[], None], ...] = (pair, nccl)
    return MoeTiming(hidden, tokens, *(slowest_us(way, channel, device) for way in ways))


def as_text(timings: Sequence[MoeTiming], row: MoeRow) -> str:
    """Microseconds for each size, and what follows."""
    from tabulate import tabulate

    lines = [[str(t.hidden), str(t.tokens), f"{t.nccl:.1f}", f"{t.kernels:.1f}"] for t in timings]
    headers = ["hidden", "tokens of a rank", "NCCL, gathers and reduce-scatter", f"{MOE}, dispatch and combine"]
    table = tabulate(lines, headers, disable_numparse=True, stralign="right")
    worth = f"up to {row.most} tokens of a rank" if row.most else "at no size"
    return f"\n\nus per pair\n{table}\n\n{MOE}: {worth}"
