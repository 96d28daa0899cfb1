"""FlashInfer's Python side: whether it is there, and has what is called.

FlashInfer is imported here, when it is asked for, and nowhere else. What can be wrong with it
(absent, broken, another API) is a reason and not an exception: whoever asks falls back, and
the report says why.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..channel import Channel
from ..errors import VersionError, WorkspaceError
from ..versions import in_range

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

#: The same of the MoE all-to-all, without which the all-reduces are as good as before.
MOE = "flashinfer.comm.trtllm_moe_alltoall"
MOE_CONTRACT: dict[str, tuple[str, ...]] = {
    f"{MOE}:get_moe_alltoall_module": (),
    f"{MOE}:moe_a2a_initialize": ("workspace", "ep_rank", "ep_size", "max_num_tokens"),
    f"{MOE}:moe_a2a_dispatch": (
        *("token_selected_experts", "input_payloads", "workspace", "metainfo", "runtime_max_tokens_per_rank"),
        *("ep_rank", "ep_size", "top_k", "num_experts", "enable_pdl"),
    ),
    f"{MOE}:moe_a2a_sanitize_expert_ids": (
        *("expert_ids", "workspace", "metainfo", "ep_rank", "invalid_expert_id", "enable_pdl"),
    ),
    f"{MOE}:moe_a2a_combine": (
        *("payload", "local_num_tokens", "workspace", "metainfo", "runtime_max_tokens_per_rank", "ep_rank", "ep_size"),
        *("top_k", "combine_payload_offset", "payload_in_workspace", "output", "enable_pdl"),
    ),
    "flashinfer.comm.dlpack_utils:pack_strided_memory": (
        *("ptr", "segment_size", "segment_stride", "num_segments", "dtype", "dev_id"),
    ),
}


@dataclass(frozen=True)
class Unavailable:
    """FlashInfer cannot be used, and why."""

    reason: str


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
            return Unavailable("FlashInfer is not installed: pip install '.[flashinfer]' in a clone of ringfence")
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
    broken = _breaks(CONTRACT, modules)
    patterns = getattr(modules["flashinfer.comm.allreduce"], "AllReduceFusionPattern", None)
    for name, code in _PATTERNS.items():
        if getattr(patterns, name, None) != code:
            broken.append(f"AllReduceFusionPattern.{name} is not {code}")
    return broken


def _breaks(contract: dict[str, tuple[str, ...]], modules: dict[str, ModuleType]) -> list[str]:
    broken = []
    for name, wanted in contract.items():
        module, _, function = name.partition(":")
        found = getattr(modules[module], function, None)
        if found is None:
            broken.append(f"{name} is gone")
            continue
        have = inspect.signature(found).parameters
        if missing := [p for p in wanted if p not in have]:
            broken.append(f"{name} has no parameter {', '.join(missing)}")
    return broken


@dataclass(frozen=True)
class FlashInfer:
    """The package, as far as it is used."""

    version: str
    modules: dict[str, ModuleType]

    def moe(self) -> ModuleType:
        """The module of the MoE all-to-all. Raises :class:`WorkspaceError` where it is not as it was read."""
        try:
            for name in {name.partition(":")[0] for name in MOE_CONTRACT} - {*self.modules}:
                self.modules[name] = importlib.import_module(name)
            broken = _breaks(MOE_CONTRACT, self.modules)
        except Exception as error:  # what it imports may raise what it likes
            raise WorkspaceError(
                f"FlashInfer's MoE all-to-all cannot be read: {type(error).__name__}: {error}"
            ) from error
        if broken:
            raise WorkspaceError(f"FlashInfer {self.version} has another MoE all-to-all: {'; '.join(broken)}")
        return self.modules[MOE]


def installed() -> FlashInfer:
    """FlashInfer; raises :class:`WorkspaceError` where it cannot be used."""
    package = load()
    if isinstance(package, Unavailable):
        raise WorkspaceError(package.reason)
    return package


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


def unicast_memory(package: FlashInfer, channel: Channel, size: int) -> Any:
    """``size`` bytes on the current device of each rank that all ranks can address. Every rank must call.

    FlashInfer's ``SymmDeviceMemory``, without a multicast object and without memory for signals of its own.
    """
    return package.modules["flashinfer.comm.mnnvl"].SymmDeviceMemory(
        buf_size=size,
        group_size=channel.size,
        group_rank=channel.rank,
        device_idx=torch.cuda.current_device(),
        comm_backend_for_handle_transfer=ChannelBackend(channel),
        enable_multicast=False,
        allocate_signal_pads=False,
    )
