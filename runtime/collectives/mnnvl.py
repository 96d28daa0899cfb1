"""mnnvl: FlashInfer's multicast all-reduce (trtllm_mnnvl_allreduce.cuh), over multicast or a peer's own pointer.

Nothing here creates an NVLink multicast object but :func:`create_multicast`, and nothing calls that where
:func:`.rank_facts.multicast_barred` found multicast to be forbidden or absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..channel import Channel
from ..errors import WorkspaceError
from ..hazards.situation import Collective, Fact, Strategy
from ..versions import in_range
from . import flashinfer, flashinfer_rules, kernels, rank_facts
from .buffer_dump import Cells, Part, Reading
from .epilogue import DTYPES, Epilogue
from .flashinfer import ChannelBackend, FlashInfer, unicast_memory
from .kernels import (
    BUFFERS,
    BufferParts,
    EndlessWaits,
    Implementation,
    KernelMemory,
    Kernels,
    Launched,
    Layout,
    Requirement,
)
from .rank_facts import RankFacts

#: The kernel waits for the one before it before it reads anything, and every one of a chain waits; so one-shot is
#: launched with PDL where that is faster: up to this many bytes of input (measured, docs/measurements.md).
_PDL_UP_TO = 1 << 20

#: FI#3385: from this release on a rank keeps its own part in registers and polls the others' only.
_PEER_FROM = "0.6.13"

REQUIREMENTS: tuple[Requirement, ...] = (
    *flashinfer_rules.REQUIREMENTS,
    Requirement(
        "float16_square",
        lambda c: c.dtype != torch.float16 or c.strategy is not Strategy.ONE_SHOT,
        "one-shot squares in float16, where a row with an element of 256 or more has the norm 0 (hazard M49)",
        "trtllm_mnnvl_allreduce.cuh, 0.6.0 to 0.7.2",
    ),
)


def _fits_multicast(ranks: Sequence[RankFacts]) -> str | None:
    return flashinfer_rules.unfit(ranks) or rank_facts.multicast_barred(ranks)


def _fits_peer(ranks: Sequence[RankFacts]) -> str | None:
    if unfit := flashinfer_rules.unfit(ranks) or rank_facts.peers_out_of_reach(ranks):
        return unfit
    if len(ranks) != 2:
        return f"one-shot over the peer's own pointer is for two ranks, not {len(ranks)}"
    version = ranks[0].flashinfer
    if version is None or not in_range(version, _PEER_FROM, None):
        return f"FlashInfer {version} polls a rank's own slot; {_PEER_FROM} is needed"
    return None


# -- the adapter -----------------------------------------------------------------------


def create_peer(
    package: FlashInfer,
    channel: Channel,
    group: dist.ProcessGroup,
    max_tokens: int,
    hidden: int,
    dtype: torch.dtype,
) -> Kernels:
    """The MNNVL one-shot kernel of two ranks, with the peer's own pointer where a multicast pointer would be.

    Up to eight ranks, a rank keeps its own part in registers and polls those of the others
    only (FlashInfer 0.6.13 and later), so with two ranks a store to the peer is all that a
    multicast store is needed for. Every rank must call.
    """
    if channel.size != 2:
        raise WorkspaceError(f"transport='peer' of mnnvl serves two ranks, not {channel.size}")
    size = kernels.aligned(channel.size * max_tokens * hidden * dtype.itemsize)
    kernels.check_buffer(size)
    memory = unicast_memory(package, channel, BUFFERS * size)
    pointers = memory.get_buffer_ptrs_host()
    own, peer = int(pointers[channel.rank]), int(pointers[1 - channel.rank])
    kernels.device_words(own, BUFFERS * size // 4).fill_(kernels.SENTINEL)
    flags = torch.tensor([0, BUFFERS - 1, size, 0, 0, 0, 0, 0, 0], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    channel.barrier("mnnvl workspace")
    launch = _launch_of(package)
    pointers = (peer, int(memory.get_buffer_ptrs_dev()), own, flags)
    return Mnnvl(launch, memory, pointers, channel, size, (Strategy.ONE_SHOT,), keeps_own=False)


def create_multicast(
    package: FlashInfer,
    channel: Channel,
    group: dist.ProcessGroup,
    max_tokens: int,
    hidden: int,
    dtype: torch.dtype,
) -> Kernels:
    """The MNNVL kernels as FlashInfer runs them.

    CREATES A MULTICAST OBJECT: only for a choice that :func:`.rank_facts.multicast_barred` let through.
    """
    kernels.check_buffer(kernels.aligned(channel.size * max_tokens * hidden * dtype.itemsize))
    workspace = package.modules["flashinfer.comm.allreduce"].create_allreduce_fusion_workspace(
        backend="mnnvl",
        world_size=channel.size,
        rank=channel.rank,
        max_token_num=max_tokens,
        hidden_dim=hidden,
        dtype=dtype,
        comm_backend=ChannelBackend(channel),
        force_oneshot_support=True,  # for every size: one-shot needs the larger buffer
    )
    if workspace.buffer_size_bytes % kernels.STAGE_ALIGNMENT:
        raise WorkspaceError(f"FlashInfer made Lamport buffers of {workspace.buffer_size_bytes} bytes (hazard M7)")
    pointers = (workspace.mc_ptr, workspace.uc_ptrs_dev, workspace.uc_ptr_local, workspace.buffer_flags)
    size = int(workspace.buffer_size_bytes)
    strategies = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
    return Mnnvl(_launch_of(package), workspace, pointers, channel, size, strategies, keeps_own=True)


def _launch_of(package: FlashInfer) -> Callable[..., None]:
    module = package.modules["flashinfer.comm.trtllm_mnnvl_ar"].get_trtllm_mnnvl_comm_module()
    launch: Callable[..., None] = module.trtllm_mnnvl_allreduce_fusion
    return launch


class Mnnvl(EndlessWaits):
    def __init__(
        self,
        launch: Callable[..., None],
        memory: Any,
        pointers: tuple[int, int, int, Tensor],
        channel: Channel,
        buffer_bytes: int,
        strategies: tuple[Strategy, ...],
        *,
        keeps_own: bool,
    ) -> None:
        self._launch, self._memory, self._pointers = launch, memory, pointers
        self._ranks = (channel.size, channel.rank)
        self.strategies = strategies
        self.memory = KernelMemory(
            LAYOUT,
            channel.rank,
            channel.size,
            words=pointers[3].data_ptr(),
            lamport=int(pointers[2]),
            buffer_bytes=buffer_bytes,
            element=4,
            keeps_own=keeps_own,
        )

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        self.memory.note(x, strategy)
        one_shot = strategy is Strategy.ONE_SHOT
        after = epilogue.norm
        if after is None or operands is None:
            self._launch(
                x, *self._pointers, *self._ranks, False, _pdl(x, strategy), one_shot, out, None, None, None, None, None
            )
            return
        self._launch(
            x, *self._pointers, *self._ranks, True, _pdl(x, strategy), one_shot,
            norm, out, *operands, after.eps, after.weight_bias,
        )  # fmt: skip

    def control_words(self) -> tuple[int, ...]:
        return tuple(self._pointers[3].tolist())

    def close(self) -> None:
        if hasattr(self._memory, "destroy"):
            self._memory.destroy()
        self._memory = None
        self._launch = kernels.closed


def _pdl(x: Tensor, strategy: Strategy) -> bool:
    return strategy is Strategy.ONE_SHOT and x.numel() * x.element_size() <= _PDL_UP_TO


# -- how it uses memory ------------------------------------------------------------------
#
# One-shot: [token][source], so the place of a row does not depend on the number of tokens. Two-shot:
# [token // ranks][source] in the first half, sums [token] in the second.


def _previous(memory: KernelMemory, words: Mapping[str, int]) -> tuple[int, BufferParts]:
    front, half = words["clear_bytes_0"], memory.buffer_bytes // 2
    back = words["clear_bytes_1"] if words["dirty_stages"] > 1 else 0
    return words["dirty_buffer"], ((0, min(front, memory.buffer_bytes)), (half, min(back, half)))


def _uses(memory: KernelMemory, call: Launched) -> tuple[int, int]:
    ranks, (strategy, tokens, row) = memory.world_size, call
    if strategy is Strategy.ONE_SHOT:
        return tokens * ranks * row, 0
    return -(-tokens // ranks) * ranks * row, tokens * row


def _readings(memory: KernelMemory, front: Cells, back: Cells) -> list[Reading]:
    ranks, found = memory.world_size, []
    for strategy, row in sorted({(c.strategy, c.row_bytes) for c in tuple(memory.calls)}):
        rows, half = front.rows(row), memory.buffer_bytes // 2
        parts = tuple(rows.part(range(r, len(rows.whole), ranks)) for r in range(ranks))
        sums: tuple[Part, ...] = ()
        if strategy is Strategy.TWO_SHOT:
            summed = back.rows(row)
            sums = tuple(summed.part(range(r, len(summed.whole), ranks), half) for r in range(ranks))
        found.append(Reading(strategy, row, None, parts, sums))
    return found


LAYOUT = Layout(
    (
        *("buffer", "dirty_buffer", "buffer_bytes", "dirty_stages"),
        *("clear_bytes_0", "clear_bytes_1", "clear_bytes_2", "clear_bytes_3", "arrived_blocks"),
    ),
    _previous,
    _uses,
    _readings,
    strategy_before=lambda words: Strategy.TWO_SHOT if words["dirty_stages"] > 1 else Strategy.ONE_SHOT,
)


def _make_peer(channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype) -> Kernels:
    return create_peer(flashinfer.installed(), channel, group, max_tokens, hidden, dtype)


def _make_multicast(
    channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype
) -> Kernels:
    return create_multicast(flashinfer.installed(), channel, group, max_tokens, hidden, dtype)


_PDL_FACT = frozenset({Fact.PDL})

MULTICAST = Implementation(
    Collective.MNNVL,
    "multicast",
    _fits_multicast,
    _make_multicast,
    REQUIREMENTS,
    takes=kernels.always_adds_and_weights,
    dtypes=lambda dtype: DTYPES,  # a word of the buffer is what one reads at a time, whatever the dtype
    epoch_on_device=True,
    facts=_PDL_FACT,
    model="mnnvl",
)
PEER = Implementation(
    Collective.MNNVL,
    "peer",
    _fits_peer,
    _make_peer,
    REQUIREMENTS,
    takes=kernels.always_adds_and_weights,
    strategies=(Strategy.ONE_SHOT,),
    dtypes=lambda dtype: DTYPES,  # a word of the buffer is what one reads at a time, whatever the dtype
    epoch_on_device=True,
    facts=_PDL_FACT,
    model="mnnvl",
)
