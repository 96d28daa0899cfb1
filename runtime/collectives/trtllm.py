"""trtllm: FlashInfer's peer-to-peer all-reduce (trtllm_allreduce_fusion.cuh), over unicast memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..channel import Channel
from ..errors import WorkspaceError
from ..hazards.situation import Collective, Strategy
from ..versions import in_range
from . import flashinfer, flashinfer_rules, kernels
from .buffer_dump import Cells, Reading, Rows
from .epilogue import Epilogue
from .flashinfer import ChannelBackend, FlashInfer
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
from .rank_facts import RankFacts, peers_out_of_reach

#: Programmatic dependent launch is never asked for: the kernel reads the residual before it waits for the kernel that
#: may still write it (FI#5081). ``trigger_completion_at_end`` stays True for the same reason.
_PDL = False

#: Two-shot writes 2 x tokens x hidden elements into a buffer of ranks x tokens x hidden x 2 bytes, whatever the
#: dtype: float32 on two ranks overruns it. From this release on the buffer has room for 4-byte elements.
_FP32_TWO_SHOT_FIXED = "0.7.2"

#: Until then a flag of two-shot's barrier may be taken that is two barriers old, once grids differ (hazard M58).
_TWO_SHOT_FIXED = "0.7.2"

REQUIREMENTS: tuple[Requirement, ...] = (
    *flashinfer_rules.REQUIREMENTS,
    Requirement(
        "world_size",
        lambda c: c.world_size in (2, 4, 8, 16),
        "the kernels are built for 2, 4, 8 and 16 ranks",
        "allreduce_fusion_op in trtllm_allreduce_fusion.cuh",
    ),
    Requirement(
        "two_shot_tokens",
        lambda c: c.strategy is Strategy.ONE_SHOT or c.tokens > c.world_size,
        "two-shot needs more tokens than ranks",
        "trtllm_allreduce_fusion in trtllm_ar.py asserts it",
    ),
)


def _fits(ranks: Sequence[RankFacts]) -> str | None:
    return flashinfer_rules.unfit(ranks) or peers_out_of_reach(ranks)


def safe(version: str | None) -> tuple[Strategy, ...]:
    """The strategies that a release carries out right whatever the token counts."""
    two_shot = version is not None and in_range(version, _TWO_SHOT_FIXED, None)
    return (Strategy.ONE_SHOT, Strategy.TWO_SHOT) if two_shot else (Strategy.ONE_SHOT,)


# -- the adapter -----------------------------------------------------------------------


def create(
    package: FlashInfer,
    channel: Channel,
    group: dist.ProcessGroup,
    max_tokens: int,
    hidden: int,
    dtype: torch.dtype,
) -> Kernels:
    """The peer-to-peer kernels. Every rank must call. Raises :class:`WorkspaceError`, or what FlashInfer raises."""
    api = package.modules["flashinfer.comm.allreduce"]
    if api.is_confidential_compute():  # also where FLASHINFER_CONFIDENTIAL_COMPUTE=1 says so
        raise WorkspaceError(
            "under confidential computing FlashInfer allocates through torch symmetric memory, "
            "which makes a multicast object wherever the device has multicast"
        )
    if dtype == torch.float32 and in_range(package.version, None, _FP32_TWO_SHOT_FIXED):
        max_tokens = max(max_tokens, -(-4 * max_tokens // channel.size))
    kernels.check_buffer(channel.size * max_tokens * hidden * (4 if dtype == torch.float32 else 2))
    workspace = api.create_allreduce_fusion_workspace(
        backend="trtllm",
        world_size=channel.size,
        rank=channel.rank,
        max_token_num=max_tokens,
        hidden_dim=hidden,
        dtype=dtype,
        comm_backend=ChannelBackend(channel),
        group=group,
    )
    release = package.modules["flashinfer.comm.trtllm_ar"].trtllm_destroy_ipc_workspace_for_all_reduce_fusion
    handles = workspace.ipc_handles  # by purpose and rank: data of two-shot, its flags, Lamport buffers
    memory = KernelMemory(
        LAYOUT,
        channel.rank,
        channel.size,
        words=int(workspace.metadata["control_flag_ptr"]),
        lamport=int(handles[2][channel.rank]),
        buffer_bytes=int(workspace.metadata["lamport_comm_size"]),
        element=4 if dtype == torch.float32 else 2,
        keeps_own=True,
        flags=int(handles[1][channel.rank]),
    )
    return Trtllm(api, workspace, release, memory, safe(package.version))


class Trtllm(EndlessWaits):
    def __init__(
        self,
        api: ModuleType,
        workspace: Any,
        release: Callable[[Any], None],
        memory: KernelMemory,
        strategies: tuple[Strategy, ...] = (Strategy.ONE_SHOT, Strategy.TWO_SHOT),
    ) -> None:
        self.strategies = strategies
        self._call: Callable[..., Any] = api.allreduce_fusion
        self._workspace, self._release = workspace, release
        self._pattern = api.AllReduceFusionPattern
        self._words = kernels.device_words(memory.words, 5)
        self.memory = memory

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
        if epilogue.norm is None or operands is None:
            self._call(
                x,
                self._workspace,
                self._pattern.kAllReduce,
                launch_with_pdl=_PDL,
                trigger_completion_at_end=True,
                output=out,
                use_oneshot=one_shot,
                fp32_acc=True,
            )
            return
        self._call(
            x,
            self._workspace,
            self._pattern.kARResidualRMSNorm,
            launch_with_pdl=_PDL,
            trigger_completion_at_end=True,
            output=norm,  # not written; left out, FlashInfer allocates one
            residual_out=out,
            norm_out=norm,
            residual_in=operands[0],
            rms_gamma=operands[1],
            rms_eps=epilogue.norm.eps,
            use_oneshot=one_shot,
            fp32_acc=True,
            weight_bias=epilogue.norm.weight_bias,
        )

    def control_words(self) -> tuple[int, ...]:
        return tuple(self._words.tolist())

    def close(self) -> None:
        if self._workspace is None:
            return
        handles = self._workspace.ipc_handles
        self._workspace.destroy()
        self._release(handles)  # FlashInfer keeps the memory in a table of its own, which destroy() leaves alone
        self._workspace, self._call = None, kernels.closed


# -- how it uses memory ------------------------------------------------------------------
#
# One-shot: [source][token], so the place of a row depends on the number of tokens. Two-shot: no buffer, but 256 flags
# per source, which count barriers modulo 3.


def _previous(memory: KernelMemory, words: Mapping[str, int]) -> tuple[int, BufferParts]:
    front, half = words["clear_elements"] * memory.element, memory.buffer_bytes // 2
    return (words["buffer"] + BUFFERS - 1) % BUFFERS, ((0, min(front, memory.buffer_bytes)), (half, 0))


def _uses(memory: KernelMemory, call: Launched) -> tuple[int, int]:
    return (call.tokens * memory.world_size * call.row_bytes if call.strategy is Strategy.ONE_SHOT else 0), 0


def _readings(memory: KernelMemory, front: Cells, back: Cells) -> list[Reading]:
    calls = tuple(memory.calls)
    found: list[Reading] = []
    for row in sorted({c.row_bytes for c in calls if c.strategy is Strategy.ONE_SHOT}):
        counts = sorted(c.tokens for c in calls if (c.strategy, c.row_bytes) == (Strategy.ONE_SHOT, row))
        found += _by_token_count(memory, front.rows(row), counts)
    return found


def _by_token_count(memory: KernelMemory, rows: Rows, counts: Sequence[int]) -> list[Reading]:
    """Own part whole, nothing behind the last part; and something missing, or the call would have gone on."""
    behind = max((i for i, some in enumerate(rows.some) if some), default=-1) + 1
    waiting: list[Reading] = []
    complete: list[Reading] = []
    for count in counts:
        own = rows.whole[memory.rank * count : (memory.rank + 1) * count]
        if len(own) < count or not all(own) or behind > memory.world_size * count:
            continue
        parts = tuple(rows.part(range(r * count, (r + 1) * count)) for r in range(memory.world_size))
        missing = any(p.rows < count for p in parts)
        (waiting if missing else complete).append(Reading(Strategy.ONE_SHOT, rows.row_bytes, count, parts))
    return waiting or complete


LAYOUT = Layout(
    ("arrived_blocks", "two_shot_flag", "buffer", "buffer_bytes", "clear_elements"),
    _previous,
    _uses,
    _readings,
    strategy_before=lambda words: None,
)


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Its sentinel is one element wide."""
    return (torch.float32,) if dtype == torch.float32 else (torch.float16, torch.bfloat16)


def _make(channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype) -> Kernels:
    return create(flashinfer.installed(), channel, group, max_tokens, hidden, dtype)


IMPLEMENTATION = Implementation(
    Collective.TRTLLM,
    "peer",
    _fits,
    _make,
    REQUIREMENTS,
    takes=kernels.always_adds_and_weights,
    safe=safe,
    dtypes=_dtypes,
    epoch_on_device=True,
    model="trtllm",
)
