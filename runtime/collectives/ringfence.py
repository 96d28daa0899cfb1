"""ringfence: an all-reduce of our own, with what follows it, over peer memory; compiled here, with bounded waits.

The protocol is in ``cuda/protocol.cuh``, and memory that ranks share in ``peer_memory.py``. What is here: what the
kernels of a rank work on, their launches, and where they fit. It needs neither FlashInfer nor a toolkit.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..channel import Channel
from ..errors import WorkspaceError
from ..hazards.situation import Collective, Fact, Strategy
from . import nvrtc
from .cuda_driver import Driver, current_stream
from .epilogue import DTYPES, Epilogue
from .forms import ENTRY, GRANULE, GRANULE_DATA, MOST_WARPS, CallArguments, Form, granules_of, granules_of_token
from .kernels import CLOSED, WAIT_SECONDS, Implementation, KernelCall, KernelMemory, Kernels, Requirement
from .links import FULL
from .lost import Lost
from .peer_memory import Release, share
from .rank_facts import RankFacts, cannot_compile, differ, linked, peers_out_of_reach, topology_of

#: Devices that the kernels were written for.
CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
#: From here on blocks form clusters, and a kernel may begin before the one before it ends (PDL).
_CLUSTERS_FROM = (9, 0)
#: The most ranks, the bytes of the largest row, and the most blocks of a grid: each has a share of a call.
MOST_RANKS, MOST_ROW_BYTES, MOST_BLOCKS = 8, 64 * 1024, 1024
#: The most blocks that can share a norm: those of a cluster.
MOST_CLUSTER = 8
#: Up to how many tokens each is shared by how many blocks; from how many on a block has few warps, and many rounds.
_SHARED, _NARROW_FROM, _NARROW = ((16, 4), (64, 2)), 129, 13
#: How much of an inbox one-shot may ask for: beyond it, a large call is two-shot's.
_MOST_ONE_SHOT_BYTES = 128 << 20
#: How many kernels are compiled at a time.
_COMPILERS = 8
#: Words of 8 bytes of pinned memory, where the report begins, and how many words of 4 bytes it has.
_HOST_WORDS, _REPORT, _REPORT_WORDS = 16, 8, 8


@dataclass(frozen=True)
class RankMemory:
    """What the kernels of one rank work on. Addresses on its device; sizes in bytes.

    inbox: two buffers of ``buffer_bytes``, where the others write. peers: their inboxes, by rank, without its own.
    begun, received: int64, how many shares of calls have begun, and of how many everything was received. A call has
    MOST_BLOCKS shares. broken: int32, whether a wait ended without success.
    host: int64 in pinned memory: how long a wait may last, in nanoseconds, and what a kernel reports.
    names: what people call each rank of the group.
    """

    device: int
    rank: int
    inbox: int
    peers: tuple[int, ...]
    buffer_bytes: int
    begun: Tensor
    received: Tensor
    broken: Tensor
    host: Tensor
    names: tuple[int, ...] = tuple(range(MOST_RANKS))

    @staticmethod
    def make(device: int, rank: int, inbox: int, peers: Sequence[int], buffer_bytes: int) -> RankMemory:
        with torch.inference_mode(False):
            begun, received = (torch.zeros(1, dtype=torch.int64, device=f"cuda:{device}") for _ in range(2))
            broken = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
            host = torch.zeros(_HOST_WORDS, dtype=torch.int64, pin_memory=True)
        memory = RankMemory(device, rank, inbox, tuple(peers), buffer_bytes, begun, received, broken, host)
        memory.wait_for(WAIT_SECONDS)
        return memory

    @property
    def world_size(self) -> int:
        return len(self.peers) + 1

    def wait_for(self, seconds: float) -> None:
        """How long a kernel waits from now on, also one that was captured and one that waits already."""
        c_ulonglong.from_address(self.host.data_ptr()).value = int(seconds * 1e9)  # whatever mode torch is in

    @cached_property
    def _report(self) -> Any:
        return (c_uint * _REPORT_WORDS).from_address(self.host.data_ptr() + 8 * _REPORT)

    def lost(self) -> Lost | None:
        """What a kernel has reported. Waits for nothing."""
        if not self._report[0]:
            return None
        found, names = Lost.read(self._report), self.names
        missing = tuple(names[rank] for rank in found.missing)
        return replace(found, source=names[found.source], rank=names[found.rank], missing=missing)


def arguments(memory: RankMemory, x: Tensor, row_bytes: int) -> CallArguments:
    """Those of a call, without what its epilogue adds."""
    host = memory.host.data_ptr()
    peers = (c_ulonglong * 7)(*memory.peers)
    call = CallArguments(input=x.data_ptr(), inbox=memory.inbox, peers=peers)
    call.begun, call.received = memory.begun.data_ptr(), memory.received.data_ptr()
    call.broken = memory.broken.data_ptr()
    call.bound, call.report = host, host + 8 * _REPORT
    call.buffer_bytes = memory.buffer_bytes
    call.tokens, call.rank = x.numel() * x.element_size() // row_bytes, memory.rank
    return call


@dataclass
class Functions:
    """The kernels of one device, compiled and loaded when they are first asked for."""

    driver: Driver
    capability: tuple[int, int]
    cache: Path | None = None
    _loaded: dict[Form, tuple[c_void_p, c_void_p]] = field(default_factory=dict)

    def of(self, form: Form) -> c_void_p:
        """Raises :class:`WorkspaceError` where it cannot be compiled or loaded."""
        if form not in self._loaded:
            self.load([form])
        return self._loaded[form][1]

    def load(self, forms: Sequence[Form]) -> None:
        """The same of several, which are compiled at the same time."""
        new = [form for form in dict.fromkeys(forms) if form not in self._loaded]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            for form, cubin in zip(new, pool.map(self._compiled, new), strict=True):
                module = self.driver.load(cubin)
                self._loaded[form] = module, self.driver.function(module, ENTRY)

    def _compiled(self, form: Form) -> bytes:
        return nvrtc.cubin(form.source, self.capability, self.cache)

    def close(self) -> None:
        while self._loaded:
            _, (module, _) = self._loaded.popitem()
            self.driver.unload(module)


def check_blocks(blocks: int, norm: bool, capability: tuple[int, int]) -> None:
    """Raises :class:`WorkspaceError` where no kernel lets so many blocks share a token."""
    most = MOST_CLUSTER if norm else MOST_BLOCKS
    if not 1 <= blocks <= most:
        shared = "of a norm" if norm else "without a norm"
        raise WorkspaceError(f"blocks={blocks}: 1 to {most} blocks can share a token {shared}")
    if norm and blocks > 1 and capability < _CLUSTERS_FROM:
        raise WorkspaceError(
            f"blocks={blocks}: blocks share a norm from SM{_CLUSTERS_FROM[0]}{_CLUSTERS_FROM[1]} on, and this device "
            f"is SM{capability[0]}{capability[1]}; leave blocks out"
        )


def blocks_of_token(tokens: int, row_bytes: int, capability: tuple[int, int]) -> int:
    """How many blocks share a token: where tokens are few, more of the device takes part."""
    if capability < _CLUSTERS_FROM:
        return 1
    blocks = next((blocks for most, blocks in _SHARED if tokens <= most), 1)
    return min(blocks, granules_of(row_bytes))


class RingfenceKernels:
    """The kernels of one rank over its memory. release: gives the memory back."""

    strategies: tuple[Strategy, ...] = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)

    def __init__(self, functions: Functions, memory: RankMemory, release: Release | None = None) -> None:
        self._functions, self.rank_memory, self._release = functions, memory, release
        self._capability = functions.capability
        self._closed = False

    @property
    def memory(self) -> KernelMemory | None:
        """Nothing to look at from outside: the kernels report for themselves."""
        return None

    def form(self, x: Tensor, epilogue: Epilogue, strategy: Strategy, blocks: int | None = None) -> Form:
        """The kernel of a call. Raises :class:`WorkspaceError` for blocks that cannot share a token."""
        row_bytes = x.shape[-1] * x.element_size()
        norm = epilogue.norm
        if blocks is None:
            blocks = blocks_of_token(x.shape[0], row_bytes, self._capability)
        else:
            check_blocks(blocks, norm is not None, self._capability)
        return Form(
            strategy,
            x.dtype,
            self.rank_memory.world_size,
            row_bytes,
            residual=epilogue.residual,
            norm=norm is not None,
            weight=norm is not None and norm.has_weight,
            blocks=blocks,
            most_warps=_NARROW if x.shape[0] >= _NARROW_FROM else MOST_WARPS,
        )

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
        *,
        blocks: int | None = None,
        most_blocks: int = MOST_BLOCKS,
    ) -> None:
        """As of :class:`Kernels`, of any epilogue; what it lacks of operands is None.

        blocks: that share a token, most_blocks: of the grid, for tests and tuning; any choice returns the same bits.
        Raises :class:`HangError` where a wait of an earlier call has ended without success, and
        :class:`WorkspaceError` for a call that does not fit, or blocks that cannot share a token.
        """
        if self._closed:
            raise WorkspaceError(CLOSED)
        self.check()
        memory = self.rank_memory
        if not self.holds(KernelCall(x.shape[0], x.shape[1], x.dtype, memory.world_size, strategy)):
            raise WorkspaceError(
                f"{list(x.shape)} of {x.dtype} by {strategy} does not fit into {memory.buffer_bytes} bytes; "
                "make the workspace for more tokens (max_tokens)"
            )
        form = self.form(x, epilogue, strategy, blocks)
        call = arguments(memory, x, form.row_bytes)
        residual, weight = operands or (None, None)
        call.residual = residual.data_ptr() if residual is not None else 0
        call.weight = weight.data_ptr() if weight is not None else 0
        call.norm, call.out = norm.data_ptr() if norm is not None else 0, out.data_ptr()
        if epilogue.norm is not None:
            call.eps, call.weight_bias = epilogue.norm.eps, epilogue.norm.weight_bias
        grid = min(x.shape[0], max(min(most_blocks, MOST_BLOCKS) // form.blocks, 1)) * form.blocks
        with torch.cuda.device(memory.device):
            self._functions.driver.launch(
                self._functions.of(form),
                grid,
                form.threads,
                call,
                current_stream(memory.device),
                dependent=self._capability >= _CLUSTERS_FROM,
            )

    def load(self, calls: Sequence[tuple[KernelCall, Epilogue]]) -> None:
        """What these calls launch, ahead of them: a peer would wait for a rank that compiles in their midst."""
        forms = []
        for call, epilogue in calls:
            x = torch.empty(call.tokens, call.hidden, dtype=call.dtype, device="meta")
            forms.append(self.form(x, epilogue, call.strategy))
        with torch.cuda.device(self.rank_memory.device):
            self._functions.load(forms)

    def wait_for(self, seconds: float) -> None:
        """Also of calls that were captured, and of one that waits already."""
        self.rank_memory.wait_for(seconds)

    def check(self) -> None:
        """Raises :class:`HangError` where a kernel's wait has ended without success. Waits for nothing."""
        lost = self.rank_memory.lost()
        if lost is not None:
            raise lost.error()

    def holds(self, call: KernelCall) -> bool:
        """Whether an inbox is large enough for a call."""
        granules = granules_of_token(call.strategy, call.hidden * call.dtype.itemsize, call.world_size)
        return call.tokens * granules * GRANULE <= self.rank_memory.buffer_bytes

    def control_words(self) -> tuple[int, ...]:
        """How far the calls are: the shares that have begun and received all, and whether a wait was in vain."""
        memory = self.rank_memory
        return tuple(int(words.item()) for words in (memory.begun, memory.received, memory.broken))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._functions.close()
        if self._release is not None:
            self._release()


# -- a rank's kernels -----------------------------------------------------------------


def buffer_bytes(world_size: int, max_tokens: int, row_bytes: int) -> int:
    """Of one of the two buffers of an inbox: for so many tokens, or about as many bytes in other rows."""
    one_shot, two_shot = (
        max_tokens * granules_of_token(strategy, row_bytes, world_size) * GRANULE
        for strategy in (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
    )
    return max(two_shot, min(one_shot, _MOST_ONE_SHOT_BYTES))


def create(
    channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype
) -> RingfenceKernels:
    """The kernels of this rank, on the current device. Every rank must call. Raises :class:`WorkspaceError`."""
    device = torch.cuda.current_device()
    torch.cuda.synchronize(device)  # the driver works in the context that torch made
    driver = Driver()
    functions = Functions(driver, torch.cuda.get_device_capability(device))
    size = buffer_bytes(channel.size, max_tokens, hidden * dtype.itemsize)
    memory = RankMemory.make(device, channel.rank, 0, (), size)  # what may fail comes before what is shared
    torch.cuda.synchronize(device)
    inbox, peers, release = share(driver, channel, 2 * size)
    return RingfenceKernels(functions, replace(memory, inbox=inbox, peers=peers, names=channel.ranks), release)


def _make(channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype) -> Kernels:
    return create(channel, group, max_tokens, hidden, dtype)


def _load(kernels: Kernels, calls: Sequence[tuple[KernelCall, Epilogue]]) -> None:
    if isinstance(kernels, RingfenceKernels):
        kernels.load(calls)


# -- where it fits ---------------------------------------------------------------------


def _fits(ranks: Sequence[RankFacts]) -> str | None:
    if len(ranks) > MOST_RANKS:
        return f"its kernels are for 2 to {MOST_RANKS} ranks, not {len(ranks)}"
    capability = ranks[0].capability
    if unfit := differ(ranks, "capability") or peers_out_of_reach(ranks) or cannot_compile(ranks):
        return unfit
    if capability not in CAPABILITIES:
        known = ", ".join(f"SM{major}{minor}" for major, minor in CAPABILITIES)
        return f"its kernels are written for {known}, and these are SM{capability[0]}{capability[1]}"
    if topology_of(ranks) not in FULL:
        return f"a line of 128 bytes arrives whole over NVLink alone, and the ranks are linked by {linked(ranks)}"
    return None


REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement(
        "row_bytes",
        lambda c: c.hidden * c.dtype.itemsize % 16 == 0 and c.hidden * c.dtype.itemsize <= MOST_ROW_BYTES,
        f"a row is a multiple of 16 bytes, and at most {MOST_ROW_BYTES >> 10} KiB",
        "runtime/collectives/cuda/common.cuh",
    ),
    Requirement(
        "dtype",
        lambda c: c.dtype in DTYPES,
        "the kernels are for bfloat16, float16 and float32",
        "runtime/collectives/cuda/common.cuh",
    ),
    Requirement(
        "two_shot_row",
        lambda c: c.strategy is Strategy.ONE_SHOT or granules_of(c.hidden * c.dtype.itemsize) >= c.world_size,
        f"two-shot needs rows of which every rank has a share of {GRANULE_DATA} bytes, the last one of any part of it",
        "runtime/collectives/cuda/two_shot.cu",
    ),
)

#: A kernel may begin before the one before it ends, and waits for that before it reads anything; so does each of a
#: chain, and behind a kernel that waits for nothing the protocol still holds (runtime/protocol/ringfence.py).
IMPLEMENTATION = Implementation(
    Collective.RINGFENCE,
    "peer",
    _fits,
    _make,
    REQUIREMENTS,
    dtypes=lambda dtype: DTYPES,
    epoch_on_device=True,
    facts=frozenset({Fact.PDL}),
    model="ringfence",
    changes_at=(*(most + 1 for most, _ in _SHARED), _NARROW_FROM),
    load=_load,
)
