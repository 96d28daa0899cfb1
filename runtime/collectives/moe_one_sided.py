"""FlashInfer's one-sided MoE all-to-all (``trtllm_moe_alltoall.py``): dispatch and combine over the peers' own memory.

A rank's memory, at one stride from the next rank's: what the kernels keep (flags, counters, routing), then the
received rows of one call, then at an offset that no call moves (hazard M63) the rows that are combined.

    | kept | planes: R * capacity rows of each payload | ... | combine region: R * capacity rows |

What the library does not check and what would be written over is checked before a flag moves: :func:`unserved` here,
and :func:`.moe_checks.check_dispatch`. Nothing here creates a multicast object: memory comes from
``SymmDeviceMemory(enable_multicast=False)``, and the kernels have no instruction that could use one.

PDL is off: that a replay behind any kernel is safe with it was not shown (hazard M19).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..channel import Channel
from ..errors import WorkspaceError
from . import flashinfer_rules, rank_facts
from .flashinfer import FlashInfer, unicast_memory
from .kernels import CLOSED, device_bytes
from .rank_facts import RankFacts

#: The numbers of experts per token that kernels were compiled for; others throw half-way (hazard M66) and are padded.
COMPILED_TOP_K = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22)
#: kMaxRanks of the kernels.
MOST_RANKS = 64
_ALIGNMENT = 128  # of parts of the workspace
_VECTOR = 16  # bytes that a thread copies at most
_COUNT = 4  # bytes
_PDL = False


# -- what is asked for ------------------------------------------------------------------


@dataclass(frozen=True)
class MoeSizes:
    """What calls need of a workspace at most. Equal on all ranks.

    capacity: tokens of a rank. row_bytes: of all payloads of a token, and its ids. combine_bytes: of a combined row.
    top_k: experts of a token.
    """

    capacity: int
    row_bytes: int
    combine_bytes: int
    top_k: int

    def __or__(self, other: MoeSizes) -> MoeSizes:
        """What serves both."""
        return MoeSizes(
            *(max(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)),
        )

    def covers(self, other: MoeSizes) -> bool:
        return self | other == self

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """What must be equal on all ranks, for people."""
        return tuple((f.name, str(getattr(self, f.name))) for f in dataclasses.fields(self))


def compiled_top_k(top_k: int) -> int | None:
    """The number of experts per token that a call with so many is made with; None where there is none."""
    return next((k for k in COMPILED_TOP_K if k >= top_k), None)


def id_bytes(top_k: int) -> int:
    """Of the ids of a row, which travel as int32."""
    return 4 * top_k


def within(sizes: MoeSizes, ranks: int, limit: int) -> MoeSizes | None:
    """The sizes with the largest capacity whose memory is no more than ``limit`` bytes on each rank; None: not one."""
    fixed = 2 * 4096 + 8 * _ALIGNMENT  # flags and counters of 64 ranks, and what aligning may add
    routing = 2 * 4 * COMPILED_TOP_K[-1]
    fits = (limit - fixed) // (ranks * (sizes.row_bytes + sizes.combine_bytes) + routing)
    return dataclasses.replace(sizes, capacity=min(sizes.capacity, fits)) if fits >= 1 else None


def unfit(ranks: Sequence[RankFacts]) -> str | None:
    """Why the kernels cannot be had on these ranks."""
    if reason := flashinfer_rules.unfit(ranks) or rank_facts.peers_out_of_reach(ranks):
        return reason
    if not 2 <= len(ranks) <= MOST_RANKS:
        return f"the kernels are for 2 to {MOST_RANKS} ranks, not {len(ranks)}"
    return None


def unserved(sizes: MoeSizes, call: MoeSizes) -> str | None:
    """Why memory of these sizes cannot hold a call, but for its capacity, which decides who carries the call out."""
    if call.top_k > sizes.top_k:
        return f"{call.top_k} experts of a token, and the workspace is for {sizes.top_k}"
    if call.row_bytes > sizes.row_bytes:
        return (
            f"{call.row_bytes} bytes of a token in all payloads and its ids, and the workspace is for {sizes.row_bytes}"
        )
    if call.combine_bytes > sizes.combine_bytes:
        return f"combined rows of {call.combine_bytes} bytes, and the workspace is for {sizes.combine_bytes}"
    return None


# -- memory -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeMemory:
    """Where a rank keeps what a hang leaves behind: addresses on its device. Each is one word, or one of each rank."""

    rank: int
    world_size: int
    flag: int
    dispatch_flags: int
    combine_flags: int
    received: int


def create(package: FlashInfer, channel: Channel, sizes: MoeSizes) -> OneSided:
    """Memory of all ranks and the kernels over it. Every rank must call, outside of captures.

    Raises :class:`WorkspaceError`.
    """
    top_k = compiled_top_k(sizes.top_k)
    if top_k is None:
        raise WorkspaceError(
            f"{sizes.top_k} experts of a token; the kernels are compiled for up to {COMPILED_TOP_K[-1]}"
        )
    sizes = dataclasses.replace(sizes, top_k=top_k)
    api = package.moe()
    built = api.get_moe_alltoall_module()
    kept = int(built.moe_a2a_get_aux_data_size(channel.size, sizes.capacity, 0))
    combine_at = _up(kept + channel.size * sizes.capacity * sizes.row_bytes)
    size = _up(combine_at + channel.size * sizes.capacity * sizes.combine_bytes)
    memory = unicast_memory(package, channel, size)
    pointers, stride = [int(p) for p in memory.get_buffer_ptrs_host()], int(memory.get_allocation_size())
    if pointers != [pointers[0] + rank * stride for rank in range(channel.size)]:
        raise WorkspaceError("FlashInfer laid the ranks' memory at unequal distances, and the kernels count on one")
    # It begins on the first rank's device, and is given as this one's. What its capsule looks at has to outlive it.
    pack = package.modules["flashinfer.comm.dlpack_utils"].pack_strided_memory
    workspace = pack(pointers[0], size, stride, channel.size, torch.uint8, torch.cuda.current_device())
    kept_alive = (memory, getattr(workspace, "_capsule_wrapper", None))
    meta = api.moe_a2a_initialize(workspace, channel.rank, channel.size, sizes.capacity)
    channel.barrier("moe workspace")  # a peer's first flag would be wiped (hazard M64)
    offsets = {name: int(meta[i]) for name, i in _indices(built).items()}
    if offsets["PAYLOAD_DATA"] != kept:
        raise WorkspaceError(f"FlashInfer keeps {offsets['PAYLOAD_DATA']} bytes, and had said {kept}")
    if offsets["RECV_COUNTERS"] % _VECTOR != _COUNT * counts_offset(channel.size):
        raise WorkspaceError(f"FlashInfer keeps its counts at {offsets['RECV_COUNTERS']}, where they were not before")
    return OneSided(
        api, workspace, kept_alive, meta, offsets, channel.rank, channel.size, sizes, combine_at, nbytes=size
    )


def counts_offset(ranks: int) -> int:
    """How many words behind a multiple of 16 bytes the library keeps counts: compilers are told, and assume no more."""
    return (2 + ranks) % (_VECTOR // _COUNT)


def _up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _indices(built: Any) -> dict[str, int]:
    """Which number of the metainfo is what, as the library says."""
    names, values = built.moe_a2a_get_metainfo_index_pairs()
    short = (str(name).removeprefix("MOE_A2A_").removesuffix("_OFFSET_INDEX") for name in names)
    found = dict(zip(short, map(int, values), strict=True))
    wanted = ("FLAG_VAL", "DISPATCH_COMPLETION_FLAGS", "COMBINE_COMPLETION_FLAGS", "RECV_COUNTERS", "PAYLOAD_DATA")
    if missing := [name for name in wanted if name not in found]:
        raise WorkspaceError(f"FlashInfer does not say where its {', '.join(missing)} are")
    return {name: found[name] for name in wanted}


class Planes:
    """Tensors over a rank's own memory, each with a storage of its own, so that no two look like aliases."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Tensor] = {}  # a capture finds what the call before it made

    def rows(self, pointer: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """``[rows, width]`` of a dtype, contiguous."""
        size = rows * width * dtype.itemsize
        if (pointer, size) not in self._made:
            with torch.inference_mode(False):
                self._made[pointer, size] = device_bytes(pointer, size)
        return self._made[pointer, size].view(dtype).view(rows, width)


# -- the kernels ----------------------------------------------------------------------------


@dataclass(eq=False)
class OneSided:
    """Dispatch and combine over memory of their own. One workspace owns it.

    offsets: of what the kernels keep, in bytes from the start of a rank's memory. combine_at: of the combine region.
    nbytes: of a rank's memory.
    """

    _api: Any
    _workspace: Tensor
    _kept_alive: tuple[Any, Any] | None
    _meta: Tensor
    _offsets: Mapping[str, int]
    rank: int
    ranks: int
    sizes: MoeSizes
    combine_at: int
    nbytes: int
    _planes: Planes = field(default_factory=Planes)

    @property
    def _own(self) -> int:
        """Address of this rank's memory."""
        return self._workspace.data_ptr() + self.rank * self._workspace.stride(0)

    @property
    def memory(self) -> MoeMemory:
        at = {name: self._own + offset for name, offset in self._offsets.items()}
        flags = at["DISPATCH_COMPLETION_FLAGS"], at["COMBINE_COMPLETION_FLAGS"]
        return MoeMemory(self.rank, self.ranks, at["FLAG_VAL"], *flags, at["RECV_COUNTERS"])

    def dispatch(
        self,
        payloads: Sequence[Tensor],
        ids: Tensor,
        capacity: int,
        num_experts: int,
        empty_id: int | None,
        *,
        known: bool = False,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """``(received, ids, counts)`` as :mod:`.moe` describes them, in the workspace's memory.

        The next dispatch writes there. ids: int32 or int64 ``[T, k]``. An id of no expert goes to the rank of the
        nearest one, which does not know it; known: there is none such. Besides the library's dispatch, a kernel is
        launched for ids that are to be clamped, for each conversion between int64 and int32, and for the ids of empty
        rows unless ``empty_id`` is None; operands that no kernel can read are copied, and small received rows behind
        an odd number of others, which compilers take to lie at a multiple of 16 bytes as all tensors do.
        """
        sent = [*(_readable(p.contiguous()) for p in payloads), _readable(ids.to(torch.int32).contiguous())]
        widths = [t.shape[1] * t.element_size() for t in sent]
        order = sorted(range(len(sent)), key=lambda i: -_alignment(widths[i]))  # or a row is misaligned (hazard M67)
        self._api.moe_a2a_dispatch(
            self._targets(sent[-1], num_experts, known),
            [sent[i].view(torch.uint8) for i in order],
            self._workspace,
            self._meta,
            capacity,
            self.rank,
            self.ranks,
            self.sizes.top_k,
            num_experts,
            enable_pdl=_PDL,
        )
        rows, at = self.ranks * capacity, self._own + self._offsets["PAYLOAD_DATA"]
        received: dict[int, Tensor] = {}
        for i in order:
            received[i] = self._planes.rows(at, rows, sent[i].shape[1], sent[i].dtype)
            at += rows * widths[i]
        got = received.pop(len(sent) - 1)
        if empty_id is not None:
            self._api.moe_a2a_sanitize_expert_ids(
                got.view(self.ranks, capacity, -1), self._workspace, self._meta, self.rank, empty_id, enable_pdl=_PDL
            )
        got = _readable(got) if got.dtype == ids.dtype else got.to(ids.dtype)
        return [_readable(received[i]) for i in range(len(payloads))], got, self._counts()

    def _counts(self) -> Tensor:
        before = counts_offset(self.ranks)
        start = self._own + self._offsets["RECV_COUNTERS"] - _COUNT * before
        return self._planes.rows(start, before + self.ranks, 1, torch.int32).view(-1)[before:]

    def _targets(self, ids: Tensor, num_experts: int, known: bool) -> Tensor:
        """The ids that decide where a token goes: of experts that there are, as many as kernels were compiled for."""
        more = self.sizes.top_k - ids.shape[1]
        inside = ids if known else ids.clamp(0, num_experts - 1)  # or counts are beyond the counters (hazard M65)
        return inside if not more else torch.cat((inside, inside[:, :1].expand(-1, more)), dim=1)  # once to a rank

    def combine_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """``[rows, hidden]`` of the memory that peers combine from; see :func:`.moe.combine_buffer`."""
        return self._planes.rows(self._own + self.combine_at, rows, hidden, dtype)

    def combine(self, partial: Tensor, out: Tensor) -> None:
        """Into ``out`` ``[T, H]``: the sum over the ranks that each token of the last dispatch went to.

        Rows of :meth:`combine_rows` are where peers read; of others, those that were sent are copied there, in a kernel
        that is launched anyway. Nothing else is launched, unless a kernel cannot read ``partial`` or write ``out``.
        """
        tokens, hidden = out.shape
        there = partial.is_contiguous() and partial.data_ptr() == self._own + self.combine_at
        given = (partial if there else _readable(partial.contiguous())).view(self.ranks, -1, hidden)
        into = out if out.is_contiguous() and out.data_ptr() % _VECTOR == 0 else partial.new_empty(tokens, hidden)
        self._api.moe_a2a_combine(
            given,
            tokens,
            self._workspace,
            self._meta,
            given.shape[1],
            self.rank,
            self.ranks,
            self.sizes.top_k,
            self.combine_at,
            payload_in_workspace=there,
            output=into,
            enable_pdl=_PDL,
        )
        if into is not out:
            out.copy_(into)

    def control_words(self) -> tuple[int, ...]:
        """The number of calls that this rank has begun. Waits for the device."""
        at = self._offsets["FLAG_VAL"]
        return tuple(self._workspace[self.rank, at : at + 4].view(torch.int32).tolist())

    def close(self) -> None:
        """Give the memory back. Every rank must close, and none may be inside a call."""
        self._api, self._workspace, self._planes = _Closed(), torch.empty(0, 0, dtype=torch.uint8), Planes()
        self._kept_alive = None


class _Closed:
    """In place of kernels whose workspace is gone."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise WorkspaceError(CLOSED)


def _readable(tensor: Tensor) -> Tensor:
    """At a multiple of 16 bytes, as the kernels take for granted of rows of such a width."""
    return tensor if tensor.data_ptr() % _VECTOR == 0 else tensor.clone()


def _alignment(width: int) -> int:
    """By how many bytes rows of this width are copied."""
    return min(width & -width, _VECTOR)
