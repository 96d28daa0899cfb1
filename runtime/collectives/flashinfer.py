"""The adapter: everything that ringfence knows of FlashInfer's Python side.

FlashInfer is imported here, when it is asked for, and nowhere else. What can be wrong with it
(absent, broken, another API) is a reason and not an exception: whoever asks falls back, and
the report says why.

Nothing here creates an NVLink multicast object but :meth:`FlashInfer.mnnvl_multicast`, and
nothing calls that where :mod:`.choice` found multicast to be forbidden or absent. The peer
transport and trtllm allocate unicast memory (``SymmDeviceMemory(enable_multicast=False)``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..channel import Channel
from ..errors import VersionError, WorkspaceError
from ..hazards.situation import Collective, Strategy
from ..versions import in_range
from .buffer_dump import BUFFERS, Memory

#: Releases whose Python side was read: what :data:`CONTRACT` lists is in all of them.
SUPPORTED = ("0.6.18", "0.8")

#: The functions that are called, and the parameters that they are called with.
CONTRACT: dict[str, tuple[str, ...]] = {
    "flashinfer.comm.allreduce:create_allreduce_fusion_workspace": (
        *("backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype"),
        *("comm_backend", "force_oneshot_support", "group"),
    ),
    "flashinfer.comm.allreduce:allreduce_fusion": (
        *("input", "workspace", "pattern", "launch_with_pdl", "trigger_completion_at_end", "output", "residual_out"),
        *("norm_out", "residual_in", "rms_gamma", "rms_eps", "use_oneshot", "fp32_acc", "weight_bias"),
    ),
    "flashinfer.comm.mnnvl:SymmDeviceMemory": (
        *("buf_size", "group_size", "group_rank", "device_idx", "comm_backend_for_handle_transfer"),
        *("enable_multicast", "allocate_signal_pads"),
    ),
    "flashinfer.comm.trtllm_mnnvl_ar:get_trtllm_mnnvl_comm_module": (),
    "flashinfer.comm.allreduce:is_confidential_compute": (),
    "flashinfer.comm.trtllm_ar:trtllm_destroy_ipc_workspace_for_all_reduce_fusion": ("workspace",),
}
_PATTERNS = {"kAllReduce": 0, "kARResidualRMSNorm": 1}

#: The word that means "not arrived".
_SENTINEL = -(2**31)  # 0x80000000

#: FI#4473: the two stages of a Lamport buffer must both start at a multiple of 16 bytes.
STAGE_ALIGNMENT = 32
#: A clear offset of two buffers is a signed 32-bit product (trtllm_allreduce_fusion.cuh), which wraps from here on.
WRAPPING_BUFFER = 2**30

#: Two-shot writes 2 x tokens x hidden elements into a buffer of ranks x tokens x hidden x 2 bytes, whatever the
#: dtype: float32 on two ranks overruns it. From this release on the buffer has room for 4-byte elements.
_FP32_TWO_SHOT_FIXED = "0.7.2"

#: Programmatic dependent launch is never asked for of trtllm: it reads the residual before it waits for
#: the kernel that may still write it (FI#5081). ``trigger_completion_at_end`` stays True for the same reason.
_PDL = False
#: MNNVL waits for the kernel before it before it reads anything, and every one of a chain waits; so its
#: one-shot is launched so where that is faster: up to this many bytes of input (measured, docs/measurements.md).
_MNNVL_PDL_UP_TO = 1 << 20


# -- what a call must look like ------------------------------------------------------


@dataclass(frozen=True)
class KernelCall:
    """One call: ``[tokens, hidden]`` of a dtype on each of ``world_size`` ranks."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    world_size: int
    strategy: Strategy

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return self.tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Requirement:
    """Something that a kernel takes for granted. What is not checked by FlashInfer itself ends in garbage."""

    id: str
    collectives: tuple[Collective, ...]
    met: Callable[[KernelCall], bool]
    message: str
    source: str


_BOTH = (Collective.TRTLLM, Collective.MNNVL)

REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement(
        "dtype",
        _BOTH,
        lambda c: c.dtype in (torch.float16, torch.bfloat16, torch.float32),
        "the kernels are built for float16, bfloat16 and float32",
        "DISPATCH_FLOATING_TYPES in csrc",
    ),
    Requirement(
        "world_size",
        (Collective.TRTLLM,),
        lambda c: c.world_size in (2, 4, 8, 16),
        "the kernels are built for 2, 4, 8 and 16 ranks",
        "allreduce_fusion_op in trtllm_allreduce_fusion.cuh",
    ),
    Requirement(
        "hidden",
        _BOTH,
        lambda c: c.hidden * c.dtype.itemsize % 16 == 0,
        "a row must be a multiple of 16 bytes",
        "both kernels read 16 bytes at a time",
    ),
    Requirement(
        "cluster",
        _BOTH,
        lambda c: c.hidden * c.dtype.itemsize <= 16 * 1024 * 8,
        "a row must fit into 8 blocks of 1,024 threads",
        "the largest portable cluster; a row is normalised by one cluster",
    ),
    Requirement(
        "warp",
        _BOTH,
        lambda c: c.hidden * c.dtype.itemsize % (16 * 32) == 0,
        "a row must be a multiple of 512 bytes, so that warps are whole",
        "FI#3880 (hazard M13)",
    ),
    Requirement(
        "float16_square",
        (Collective.MNNVL,),
        lambda c: c.dtype != torch.float16 or c.strategy is not Strategy.ONE_SHOT,
        "one-shot squares in float16, where a row with an element of 256 or more has the norm 0 (hazard M49)",
        "trtllm_mnnvl_allreduce.cuh, 0.6.0 to 0.7.2",
    ),
    Requirement(
        "two_shot_tokens",
        (Collective.TRTLLM,),
        lambda c: c.strategy is Strategy.ONE_SHOT or c.tokens > c.world_size,
        "two-shot needs more tokens than ranks",
        "trtllm_allreduce_fusion in trtllm_ar.py asserts it",
    ),
)


def unmet(collective: Collective, call: KernelCall) -> Requirement | None:
    """The first requirement that a call does not meet."""
    return next((r for r in REQUIREMENTS if collective in r.collectives and not r.met(call)), None)


# -- the package ------------------------------------------------------------------------


@dataclass(frozen=True)
class Unavailable:
    """FlashInfer cannot be used, and why."""

    reason: str


class Kernels(Protocol):
    """The kernels of one collective over memory of their own. One workspace owns them."""

    strategies: tuple[Strategy, ...]
    memory: Memory

    def fused(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        strategy: Strategy,
        norm_out: Tensor,
        residual_out: Tensor,
    ) -> None:
        """All-reduce, add and norm of ``[tokens, hidden]``; contiguous, of one dtype, ``weight`` ``[hidden]``."""

    def all_reduce(self, x: Tensor, out: Tensor, strategy: Strategy) -> None:
        """The sum over the ranks, of ``[tokens, hidden]``."""

    def control_words(self) -> tuple[int, ...]:
        """The words that the protocol keeps on this rank's device. Waits for the device."""

    def close(self) -> None:
        """Give the memory back. Every rank must close, and none may be inside a call."""


def load() -> FlashInfer | Unavailable:
    """FlashInfer, if it is there and has the API that is called. Never raises."""
    try:
        import flashinfer
        import flashinfer.comm.allreduce
        import flashinfer.comm.mnnvl
        import flashinfer.comm.trtllm_ar
        import flashinfer.comm.trtllm_mnnvl_ar

        comm = flashinfer.comm
        modules: dict[str, ModuleType] = {
            m.__name__: m for m in (comm.allreduce, comm.mnnvl, comm.trtllm_ar, comm.trtllm_mnnvl_ar)
        }
        version = str(flashinfer.__version__)
    except ModuleNotFoundError as error:
        if error.name == "flashinfer":
            return Unavailable("FlashInfer is not installed: pip install 'ringfence[flashinfer]'")
        return Unavailable(f"FlashInfer cannot be imported: {error}")
    except Exception as error:  # 0.6.13 raises AssertionError without a CUDA runtime
        return Unavailable(f"FlashInfer cannot be imported: {type(error).__name__}: {error}")
    low, high = SUPPORTED
    try:
        supported = in_range(version, low, high)
        broken = contract_breaks(modules) if supported else []
    except (VersionError, TypeError, ValueError) as error:  # a build without a version, a function without a signature
        return Unavailable(f"FlashInfer {version} cannot be read: {error}")
    if not supported:
        return Unavailable(f"FlashInfer {version} is not supported; install {low} or later, before {high}")
    if broken:
        return Unavailable(f"FlashInfer {version} has another API: {'; '.join(broken)}")
    return FlashInfer(version, modules)


def contract_breaks(modules: dict[str, ModuleType]) -> list[str]:
    """What :data:`CONTRACT` asks for and these modules do not have."""
    broken = []
    for name, wanted in CONTRACT.items():
        module, _, function = name.partition(":")
        found = getattr(modules[module], function, None)
        if found is None:
            broken.append(f"{name} is gone")
            continue
        have = inspect.signature(found).parameters
        if missing := [p for p in wanted if p not in have]:
            broken.append(f"{name} has no parameter {', '.join(missing)}")
    patterns = getattr(modules["flashinfer.comm.allreduce"], "AllReduceFusionPattern", None)
    for name, code in _PATTERNS.items():
        if getattr(patterns, name, None) != code:
            broken.append(f"AllReduceFusionPattern.{name} is not {code}")
    return broken


@dataclass(frozen=True)
class FlashInfer:
    """The package, as far as it is used."""

    version: str
    modules: dict[str, ModuleType]

    def trtllm(
        self, channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype
    ) -> Kernels:
        """The peer-to-peer kernels. Every rank must call. Raises :class:`WorkspaceError`, or what FlashInfer raises."""
        api = self.modules["flashinfer.comm.allreduce"]
        if api.is_confidential_compute():  # also where FLASHINFER_CONFIDENTIAL_COMPUTE=1 says so
            raise WorkspaceError(
                "under confidential computing FlashInfer allocates through torch symmetric memory, "
                "which makes a multicast object wherever the device has multicast"
            )
        if dtype == torch.float32 and in_range(self.version, None, _FP32_TWO_SHOT_FIXED):
            max_tokens = max(max_tokens, -(-4 * max_tokens // channel.size))
        _check_buffer(channel.size * max_tokens * hidden * (4 if dtype == torch.float32 else 2))
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
        release = self.modules["flashinfer.comm.trtllm_ar"].trtllm_destroy_ipc_workspace_for_all_reduce_fusion
        handles = workspace.ipc_handles  # by purpose and rank: data of two-shot, its flags, Lamport buffers
        memory = Memory(
            Collective.TRTLLM,
            channel.rank,
            channel.size,
            words=int(workspace.metadata["control_flag_ptr"]),
            lamport=int(handles[2][channel.rank]),
            buffer_bytes=int(workspace.metadata["lamport_comm_size"]),
            element=4 if dtype == torch.float32 else 2,
            keeps_own=True,
            flags=int(handles[1][channel.rank]),
        )
        return _Trtllm(api, workspace, release, memory)

    def mnnvl_peer(self, channel: Channel, max_tokens: int, hidden: int, dtype: torch.dtype) -> Kernels:
        """The MNNVL one-shot kernel of two ranks, with the peer's own pointer where a multicast pointer would be.

        Up to eight ranks, a rank keeps its own part in registers and polls those of the others
        only (FlashInfer 0.6.13 and later), so with two ranks a store to the peer is all that a
        multicast store is needed for. Every rank must call.
        """
        if channel.size != 2:
            raise WorkspaceError(f"transport='peer' of mnnvl serves two ranks, not {channel.size}")
        size = _aligned(channel.size * max_tokens * hidden * dtype.itemsize)
        _check_buffer(size)
        memory = self.modules["flashinfer.comm.mnnvl"].SymmDeviceMemory(
            buf_size=BUFFERS * size,
            group_size=channel.size,
            group_rank=channel.rank,
            device_idx=torch.cuda.current_device(),
            comm_backend_for_handle_transfer=ChannelBackend(channel),
            enable_multicast=False,
            allocate_signal_pads=False,
        )
        pointers = memory.get_buffer_ptrs_host()
        own, peer = int(pointers[channel.rank]), int(pointers[1 - channel.rank])
        _device_words(own, BUFFERS * size // 4).fill_(_SENTINEL)
        flags = torch.tensor([0, BUFFERS - 1, size, 0, 0, 0, 0, 0, 0], dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        channel.barrier("mnnvl workspace")
        launch = self._mnnvl_launch()
        pointers = (peer, int(memory.get_buffer_ptrs_dev()), own, flags)
        return _Mnnvl(launch, memory, pointers, channel, size, (Strategy.ONE_SHOT,), keeps_own=False)

    def mnnvl_multicast(self, channel: Channel, max_tokens: int, hidden: int, dtype: torch.dtype) -> Kernels:
        """The MNNVL kernels as FlashInfer runs them.

        CREATES A MULTICAST OBJECT: only for a choice that :func:`.choice.multicast_barred` let through.
        """
        _check_buffer(_aligned(channel.size * max_tokens * hidden * dtype.itemsize))
        workspace = self.modules["flashinfer.comm.allreduce"].create_allreduce_fusion_workspace(
            backend="mnnvl",
            world_size=channel.size,
            rank=channel.rank,
            max_token_num=max_tokens,
            hidden_dim=hidden,
            dtype=dtype,
            comm_backend=ChannelBackend(channel),
            force_oneshot_support=True,  # for every size: one-shot needs the larger buffer
        )
        if workspace.buffer_size_bytes % STAGE_ALIGNMENT:
            raise WorkspaceError(f"FlashInfer made Lamport buffers of {workspace.buffer_size_bytes} bytes (hazard M7)")
        pointers = (workspace.mc_ptr, workspace.uc_ptrs_dev, workspace.uc_ptr_local, workspace.buffer_flags)
        size = int(workspace.buffer_size_bytes)
        strategies = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
        return _Mnnvl(self._mnnvl_launch(), workspace, pointers, channel, size, strategies, keeps_own=True)

    def _mnnvl_launch(self) -> Callable[..., None]:
        module = self.modules["flashinfer.comm.trtllm_mnnvl_ar"].get_trtllm_mnnvl_comm_module()
        launch: Callable[..., None] = module.trtllm_mnnvl_allreduce_fusion
        return launch


class ChannelBackend:
    """A channel as FlashInfer's ``CommBackend``: its handles travel beside NCCL, and with a deadline."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def Get_rank(self) -> int:
        return self._channel.rank

    def Get_size(self) -> int:
        return self._channel.size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        return tuple(self._channel.exchange("FlashInfer workspace: all-gather", data))

    def bcast(self, data: Any, root: int) -> Any:
        mine = data if self.Get_rank() == root else None
        return self._channel.exchange("FlashInfer workspace: broadcast", mine)[root]

    def barrier(self) -> None:
        self._channel.barrier("FlashInfer workspace: barrier")

    def Split(self, color: int, key: int) -> ChannelBackend:
        raise WorkspaceError("FlashInfer asked to split the group of a workspace; ringfence makes one per group")


# -- kernels ---------------------------------------------------------------------------


class _Trtllm:
    strategies: tuple[Strategy, ...] = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)

    def __init__(self, api: ModuleType, workspace: Any, release: Callable[[Any], None], memory: Memory) -> None:
        self._call: Callable[..., Any] = api.allreduce_fusion
        self._workspace, self._release = workspace, release
        self._pattern = api.AllReduceFusionPattern
        self._words = _device_words(memory.words, 5)
        self.memory = memory

    def fused(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        strategy: Strategy,
        norm_out: Tensor,
        residual_out: Tensor,
    ) -> None:
        self.memory.note(x, strategy)
        self._call(
            x,
            self._workspace,
            self._pattern.kARResidualRMSNorm,
            launch_with_pdl=_PDL,
            trigger_completion_at_end=True,
            output=norm_out,  # not written; left out, FlashInfer allocates one
            residual_out=residual_out,
            norm_out=norm_out,
            residual_in=residual,
            rms_gamma=weight,
            rms_eps=eps,
            use_oneshot=strategy is Strategy.ONE_SHOT,
            fp32_acc=True,
            weight_bias=weight_bias,
        )

    def all_reduce(self, x: Tensor, out: Tensor, strategy: Strategy) -> None:
        self.memory.note(x, strategy)
        self._call(
            x,
            self._workspace,
            self._pattern.kAllReduce,
            launch_with_pdl=_PDL,
            trigger_completion_at_end=True,
            output=out,
            use_oneshot=strategy is Strategy.ONE_SHOT,
            fp32_acc=True,
        )

    def control_words(self) -> tuple[int, ...]:
        return tuple(self._words.tolist())

    def close(self) -> None:
        if self._workspace is None:
            return
        handles = self._workspace.ipc_handles
        self._workspace.destroy()
        self._release(handles)  # FlashInfer keeps the memory in a table of its own, which destroy() leaves alone
        self._workspace, self._call = None, _closed


class _Mnnvl:
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
        self.memory = Memory(
            Collective.MNNVL,
            channel.rank,
            channel.size,
            words=pointers[3].data_ptr(),
            lamport=int(pointers[2]),
            buffer_bytes=buffer_bytes,
            element=4,
            keeps_own=keeps_own,
        )

    def fused(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        strategy: Strategy,
        norm_out: Tensor,
        residual_out: Tensor,
    ) -> None:
        self.memory.note(x, strategy)
        one_shot = strategy is Strategy.ONE_SHOT
        self._launch(
            x, *self._pointers, *self._ranks, True, _pdl(x, strategy), one_shot,
            norm_out, residual_out, residual, weight, eps, weight_bias,
        )  # fmt: skip

    def all_reduce(self, x: Tensor, out: Tensor, strategy: Strategy) -> None:
        self.memory.note(x, strategy)
        one_shot = strategy is Strategy.ONE_SHOT
        self._launch(
            x, *self._pointers, *self._ranks, False, _pdl(x, strategy), one_shot, out, None, None, None, None, None
        )

    def control_words(self) -> tuple[int, ...]:
        return tuple(self._pointers[3].tolist())

    def close(self) -> None:
        if hasattr(self._memory, "destroy"):
            self._memory.destroy()
        self._memory = None
        self._launch = _closed


def _pdl(x: Tensor, strategy: Strategy) -> bool:
    return strategy is Strategy.ONE_SHOT and x.numel() * x.element_size() <= _MNNVL_PDL_UP_TO


def _closed(*_: object, **__: object) -> None:
    raise WorkspaceError("this workspace was closed")


def _aligned(size: int) -> int:
    return -(-size // STAGE_ALIGNMENT) * STAGE_ALIGNMENT


def _check_buffer(size: int) -> None:
    if size >= WRAPPING_BUFFER:
        raise WorkspaceError(
            f"a Lamport buffer of {size} bytes (ranks x max_tokens x hidden size x element size) is 1 GiB or more, "
            "where the kernel's clear offset wraps (hazard M6); lower max_tokens"
        )


class _DeviceArray:
    def __init__(self, pointer: int, words: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (words,),
            "typestr": "<i4",
            "data": (pointer, False),
            "version": 3,
        }


def _device_words(pointer: int, words: int) -> Tensor:
    """Device memory that torch did not allocate, as int32."""
    return torch.as_tensor(_DeviceArray(pointer, words), device="cuda")
