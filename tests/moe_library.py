"""FlashInfer's one-sided MoE all-to-all on the CPU: its functional API over one memory, a thread for each rank.

It does what ``trtllm_moe_alltoall.cu`` of 0.6.18 does with pointers, and checks what that checks and no more: where
rows go follows from the capacity and the widths of a call, planes lie one behind the other, a combine reads its region
in the ranks that the last dispatch sent to. Ranks wait for each other as the kernels do, by barriers.

:class:`Launches` counts what a device would be given: the library's kernels, and each op of torch's that is no view.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from ringfence.runtime.collectives import moe
from ringfence.runtime.collectives.flashinfer import FlashInfer
from ringfence.runtime.collectives.moe_reference import owner_of

NAMES = ("FLAG_VAL", "LOCAL_TOKEN_COUNTER", "SEND_COUNTERS", "RECV_COUNTERS", "DISPATCH_COMPLETION_FLAGS")
NAMES += ("COMBINE_COMPLETION_FLAGS", "TOPK_TARGET_RANKS", "TOPK_SEND_INDICES", "EPLB_GATHERED_STATS", "PAYLOAD_DATA")
COMPILED = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22)


def up(size: int) -> int:
    return (size + 127) & ~127


def host_bytes(pointer: int, size: int) -> Tensor:
    """Memory that torch did not allocate, as uint8."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8)


def offsets(ranks: int, tokens: int) -> list[int]:
    """``calculateOffsets`` of the library."""
    found = [0, 4, 8, 8 + 4 * ranks, up(8 + 8 * ranks)]
    for size in (4 * ranks, 4 * ranks, 88 * tokens, 88 * tokens, 0):
        found.append(up(found[-1] + size))
    return found


_PAIR: dict[Any, Callable[..., Any]] = {
    moe.moe_dispatch: moe.dispatched,
    moe.moe_combine: moe.combined,
    moe.moe_combine_into: moe.combined_into,
    moe.moe_combine_buffer: moe.combine_buffer,
}


class Launches(TorchDispatchMode):
    """What a thread launches, by name, in order."""

    #: Ops of torch's that launch nothing, besides views.
    QUIET = ("empty", "detach", "alias", "lift", "_reinterpret")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PAIR:  # what is launched inside is meant
            with self:
                return _PAIR[func](*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        looks = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not looks and not any(word in name for word in self.QUIET):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the library that launches these, and nothing of torch's."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            for mode in _get_current_dispatch_mode_stack():
                if isinstance(mode, Launches):
                    mode.names += names
            with _disable_current_modes():
                return function(*args, **named)

        return call

    return wrap


class Library:
    """All ranks' memory, each at ``stride`` behind the one before, and who is where."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.base, self.stride = ranks, 0, 0
        self.meeting = threading.Barrier(ranks, timeout=120)
        self.routes: list[Any] = [None] * ranks
        self.calls: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
        self.allocated: list[dict[str, Any]] = []
        self._lock, self._held = threading.Lock(), None

    def package(self, rank: int, version: str = "0.6.18.post1") -> FlashInfer:
        modules: dict[str, Any] = {
            "flashinfer.comm.mnnvl": SimpleNamespace(SymmDeviceMemory=self._allocate),
            "flashinfer.comm.dlpack_utils": SimpleNamespace(pack_strided_memory=self._pack),
            "flashinfer.comm.trtllm_moe_alltoall": Api(self),
        }
        return FlashInfer(version, modules)

    def _allocate(self, **asked: Any) -> Any:
        """The first rank allocates for all; memory is poisoned."""
        with self._lock:
            self.allocated.append(asked)
            if self._held is None:
                self.stride = -(-asked["buf_size"] // 4096) * 4096
                self._held = ctypes.create_string_buffer(
                    b"\xff" * (self.stride * self.ranks), self.stride * self.ranks + 256
                )
                self.base = up(ctypes.addressof(self._held))
                ctypes.memmove(self.base, b"\xff" * (self.stride * self.ranks), self.stride * self.ranks)
        pointers = [self.base + rank * self.stride for rank in range(self.ranks)]
        return SimpleNamespace(get_buffer_ptrs_host=lambda: pointers, get_allocation_size=lambda: self.stride)

    @staticmethod
    def _pack(
        ptr: int, segment_size: int, segment_stride: int, num_segments: int, dtype: torch.dtype, dev_id: int
    ) -> Tensor:
        assert dtype == torch.uint8
        size = segment_stride * (num_segments - 1) + segment_size
        return host_bytes(ptr, size).as_strided((num_segments, segment_size), (segment_stride, 1))


class Api:
    """``flashinfer.comm.trtllm_moe_alltoall``, for whichever rank calls."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def get_moe_alltoall_module(self) -> Any:
        names = [f"MOE_A2A_{name}_OFFSET_INDEX" for name in NAMES]
        return SimpleNamespace(
            moe_a2a_get_aux_data_size=lambda ranks, tokens, eplb: offsets(ranks, tokens)[-1],
            moe_a2a_get_metainfo_index_pairs=lambda: ([*names, "MOE_A2A_NUM_METAINFO_FIELDS"], [*range(11)]),
        )

    def moe_a2a_initialize(self, workspace: Tensor, ep_rank: int, ep_size: int, max_num_tokens: int) -> Tensor:
        workspace[ep_rank].zero_()
        return torch.tensor(offsets(ep_size, max_num_tokens))

    def _words(self, workspace: Tensor, rank: int, meta: Tensor, name: str, count: int) -> Tensor:
        at = int(meta[NAMES.index(name)])
        return workspace[rank, at : at + 4 * count].view(torch.int32)

    @kernels("prepare_dispatch", "dispatch")
    def moe_a2a_dispatch(
        self, token_selected_experts: Tensor, input_payloads: list[Tensor], workspace: Tensor, metainfo: Tensor,
        runtime_max_tokens_per_rank: int, ep_rank: int, ep_size: int, top_k: int, num_experts: int,
        enable_pdl: bool | None = None,
    ) -> tuple[list[Tensor], int, None]:  # fmt: skip
        ids, library, capacity = token_selected_experts, self._library, runtime_max_tokens_per_rank
        assert ids.dtype == torch.int32 and ids.is_contiguous() and list(ids.shape) == [ids.shape[0], top_k]
        assert capacity > 0 and num_experts >= ep_size and 1 <= len(input_payloads) <= 6
        widths = [p.shape[1] * p.element_size() for p in input_payloads]
        for payload, width in zip(input_payloads, widths, strict=True):
            assert payload.is_contiguous() and payload.shape[0] == ids.shape[0]
            assert payload.data_ptr() % min(width & -width, 16) == 0, "a misaligned source"
        assert int(metainfo[-1]) + ep_size * capacity * sum(widths) <= workspace.shape[1]
        library.calls[ep_rank].append({"k": top_k, "pdl": enable_pdl, "capacity": capacity, "widths": widths})
        flag = self._words(workspace, ep_rank, metainfo, "FLAG_VAL", 1)
        flag += 1
        if top_k not in COMPILED:
            raise RuntimeError("Unsupported top_k")
        owners = owner_of(ids.long(), num_experts, ep_size)
        assert not (owners >= ep_size).any(), "beyond the counters"
        targets, places, counts = torch.full_like(ids, -1), torch.full_like(ids, -1), [0] * ep_size
        order = list(range(ids.shape[0]))[::-1]  # slots are in no order of the tokens'
        for token in order:
            for k in range(top_k):
                to = int(owners[token, k])
                if to in targets[token].tolist():
                    continue
                targets[token, k], places[token, k] = to, counts[to]
                self._store(workspace, metainfo, to, ep_rank, capacity, counts[to], token, input_payloads, widths)
                counts[to] += 1
        library.routes[ep_rank] = targets, places
        for to in range(ep_size):
            self._words(workspace, to, metainfo, "RECV_COUNTERS", ep_size)[ep_rank] = counts[to]
            self._words(workspace, to, metainfo, "DISPATCH_COMPLETION_FLAGS", ep_size)[ep_rank] = int(flag[0])
        library.meeting.wait()
        return list(self._planes(workspace, metainfo, ep_rank, capacity, input_payloads)), -1, None

    @staticmethod
    def _planes(workspace: Tensor, meta: Tensor, rank: int, capacity: int, payloads: list[Tensor]) -> Iterator[Tensor]:
        """What the library returns: ``[ranks, capacity, width]`` of each payload, in the workspace."""
        at, ranks = int(meta[-1]), workspace.shape[0]
        for payload in payloads:
            size = ranks * capacity * payload.shape[1] * payload.element_size()
            yield workspace[rank, at : at + size].view(payload.dtype).view(ranks, capacity, -1)
            at += size

    def _store(
        self, workspace: Tensor, meta: Tensor, to: int, rank: int, capacity: int, slot: int, token: int,
        payloads: list[Tensor], widths: list[int],
    ) -> None:  # fmt: skip
        at = int(meta[-1])
        for payload, width in zip(payloads, widths, strict=True):
            row = at + (rank * capacity + slot) * width
            assert row % min(width & -width, 16) == 0, "a misaligned row"
            workspace[to, row : row + width] = payload[token].view(torch.uint8)
            at += workspace.shape[0] * capacity * width

    @kernels("sanitize")
    def moe_a2a_sanitize_expert_ids(
        self, expert_ids: Tensor, workspace: Tensor, metainfo: Tensor, ep_rank: int, invalid_expert_id: int,
        enable_pdl: bool | None = None,
    ) -> None:  # fmt: skip
        assert expert_ids.dtype == torch.int32 and expert_ids.is_contiguous() and expert_ids.ndim == 3
        counts = self._words(workspace, ep_rank, metainfo, "RECV_COUNTERS", expert_ids.shape[0]).tolist()
        for source, count in enumerate(counts):
            expert_ids[source, count:] = invalid_expert_id

    @kernels("prepare_combine", "combine")
    def moe_a2a_combine(
        self, payload: Tensor, local_num_tokens: int, workspace: Tensor, metainfo: Tensor,
        runtime_max_tokens_per_rank: int, ep_rank: int, ep_size: int, top_k: int, combine_payload_offset: int,
        payload_in_workspace: bool = False, *, output: Tensor, enable_pdl: bool | None = None,
    ) -> Tensor:  # fmt: skip
        assert payload.is_contiguous() and output.is_contiguous()
        assert payload.shape[:2] == (ep_size, runtime_max_tokens_per_rank) and output.dtype == payload.dtype
        assert payload.data_ptr() % 16 == 0 and output.data_ptr() % 16 == 0
        assert list(output.shape) == [local_num_tokens, payload.shape[2]]
        size = payload.numel() * payload.element_size()
        assert combine_payload_offset + size <= workspace.shape[1]
        flag = self._words(workspace, ep_rank, metainfo, "FLAG_VAL", 1)
        flag += 1
        about = {"k": top_k, "pdl": enable_pdl, "at": combine_payload_offset, "copied": not payload_in_workspace}
        self._library.calls[ep_rank].append(about)
        region = workspace[:, combine_payload_offset : combine_payload_offset + size]
        if payload_in_workspace:
            assert payload.data_ptr() == region[ep_rank].data_ptr(), "payload_in_workspace, and it is elsewhere"
        else:
            counts = self._words(workspace, ep_rank, metainfo, "RECV_COUNTERS", ep_size).tolist()
            rows = region[ep_rank].view(payload.dtype).view(payload.shape)
            for source, count in enumerate(counts):  # no row that nobody sent
                rows[source, :count] = payload[source, :count]
        for to in range(ep_size):
            self._words(workspace, to, metainfo, "COMBINE_COMPLETION_FLAGS", ep_size)[ep_rank] = int(flag[0])
        self._library.meeting.wait()
        targets, places = self._library.routes[ep_rank]
        total = torch.zeros(output.shape)
        for token in range(local_num_tokens):
            for k in range(top_k):
                if (place := int(places[token, k])) >= 0:
                    rows = region[int(targets[token, k])].view(payload.dtype).view(payload.shape)
                    total[token] += rows[ep_rank, place].float()
        output.copy_(total)
        self._library.meeting.wait()
        return output
