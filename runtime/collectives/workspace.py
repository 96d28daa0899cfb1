"""Workspaces: the memory that a fused collective communicates through, and who owns it.

A graph names its collective and its process group; it cannot hold a workspace. So workspaces
belong to the process group object and are found through it, as torch finds a group by the name
in a graph, and die with it. This table, a weak one, is the only state of this package that
outlives a call.

A workspace is created by all ranks or by none, while a graph is compiled and never while one is
captured, and stays where it is. One that is too small for another model is joined by a larger
one. A captured graph that finds its workspace ``closed`` holds addresses of memory that is gone.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..channel import Channel
from ..errors import GroupError, WorkspaceError
from ..groups import name_of_group, resolve_group
from ..hazards.situation import Collective, Situation, Strategy
from ..spelling import failures_text
from .kernels import WAIT_SECONDS, Implementation, KernelCall, Kernels
from .moe_one_sided import MoeSizes, OneSided
from .peer_copy import Copies
from .prepared import Prepared
from .size_table import SizeRow
from .tested import SelfTest, Tested

#: What is tried, for dispatch and combine: who, and over which memory.
MOE_WAY = (str(Collective.MOE_ALL_TO_ALL), "peer")
#: How long work that was submitted before a failure may take to end.
_SECONDS_TO_COME_BACK = 5.0


@dataclass(eq=False)  # or leaving a list compares tensors
class Workspace:
    """Memory and kernels of one collective for calls of up to ``capacity`` bytes on each rank.

    dtypes: what the memory is made for. passed: of these, what the self-test found right; nothing else is served.
    wait_seconds: how long its kernels wait for a peer, where their waits have an end.
    """

    implementation: Implementation
    row: SizeRow
    kernels: Kernels
    device: torch.device
    world_size: int
    capacity: int
    dtypes: tuple[torch.dtype, ...]
    passed: set[torch.dtype] = field(default_factory=set)
    tested: dict[Tested, SelfTest] = field(default_factory=dict)
    closed: bool = False
    wait_seconds: float = WAIT_SECONDS
    _most_seconds: float = math.inf
    _waits: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _constants: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.collective = self.implementation.name  # read in every call
        self.transport = self.implementation.transport

    def wait_for(self, seconds: float) -> None:
        """How long its kernels wait for a peer from now on. May be called from any thread."""
        with self._waits:
            self.wait_seconds = seconds
            self.kernels.wait_for(min(seconds, self._most_seconds))

    @contextlib.contextmanager
    def waits_at_most(self, seconds: float) -> Iterator[None]:
        """No longer than this inside, and as long as was said last from then on."""
        self._bound(seconds)
        try:
            yield
        finally:
            self._bound(math.inf)

    def _bound(self, seconds: float) -> None:
        with self._waits:
            self._most_seconds = seconds
            self.kernels.wait_for(min(self.wait_seconds, seconds))

    @property
    def largest(self) -> int:
        """Bytes of the largest fused call that it serves: what the size table says is worth it, if that fits."""
        two_shot = Strategy.TWO_SHOT in self.kernels.strategies
        return min(self.capacity, self.row.fused if two_shot else self.row.one_shot)

    def strategy(self, tokens: int, hidden: int, dtype: torch.dtype) -> Strategy | None:
        """How a fused call of this shape is carried out; None: by the reference collective."""
        return self.planned(tokens, hidden, dtype) if dtype in self.passed else None

    def planned(self, tokens: int, hidden: int, dtype: torch.dtype) -> Strategy | None:
        """How it is carried out once the self-test of this dtype has passed."""
        strategy = self.row.strategy(tokens * hidden * dtype.itemsize)
        return strategy if strategy is not None and self._serves(tokens, hidden, dtype, strategy) else None

    def all_reduce_strategy(self, tokens: int, hidden: int, dtype: torch.dtype) -> Strategy | None:
        """The same for an all-reduce alone."""
        worth = tokens * hidden * dtype.itemsize <= self.row.all_reduce
        return self.strategy(tokens, hidden, dtype) if worth else None

    def served(self, hidden: int, dtype: torch.dtype, *, alone: bool = False) -> tuple[range, ...]:
        """The token counts that it serves, in order; alone: of an all-reduce without a norm.

        Within a strategy, what is required of a call holds from some token count on, and its memory up to another.
        """
        found: list[range] = []
        first = 1
        for strategy, size in ((Strategy.ONE_SHOT, self.row.one_shot), (Strategy.TWO_SHOT, self.row.fused)):
            worth = min(size, self.row.all_reduce) if alone else size
            counts = range(first, min(worth, self.capacity) // (hidden * dtype.itemsize) + 1)
            first = max(first, size // (hidden * dtype.itemsize) + 1)
            calls = functools.partial(
                KernelCall, hidden=hidden, dtype=dtype, world_size=self.world_size, strategy=strategy
            )
            if dtype not in self.passed or strategy not in self.kernels.strategies:
                continue
            counts = counts[_first(counts, lambda n, of=calls: self.implementation.unmet(of(n)) is None) :]
            counts = counts[: _first(counts, lambda n, of=calls: not self.kernels.holds(of(n)))]
            if found and counts and found[-1].stop == counts.start:
                found[-1] = range(found[-1].start, counts.stop)
            elif counts:
                found.append(counts)
        return tuple(found)

    def _serves(self, tokens: int, hidden: int, dtype: torch.dtype, strategy: Strategy) -> bool:
        call = KernelCall(tokens, hidden, dtype, self.world_size, strategy)
        return (
            dtype in self.dtypes
            and call.size <= self.capacity
            and strategy in self.kernels.strategies
            and self.implementation.unmet(call) is None
            and self.kernels.holds(call)
        )

    def constant(self, name: str, like: Tensor, numel: int) -> Tensor:
        """A residual of zeros or a weight of ones, for sites that have none: the first elements of one buffer."""
        key = (name, like.dtype)
        if key not in self._constants:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise WorkspaceError(f"{name} for sites that have none would be allocated inside a capture")
            elements = self.capacity // like.dtype.itemsize  # no call is larger, and no weight
            with torch.inference_mode(False):
                self._constants[key] = getattr(torch, name)(elements, dtype=like.dtype, device=like.device)
        return self._constants[key][:numel]


@dataclass(eq=False)
class MoeWorkspace:
    """Memory and kernels of dispatch and combine. situation: what the hazard table is asked about its calls.

    tested, captures_tested: whether the self-test tried calls, and captured ones; capture_failure: what failed then.
    """

    kernels: OneSided
    device: torch.device
    situation: Situation
    tested: bool = False
    captures_tested: bool = False
    capture_failure: str | None = None
    closed: bool = False
    _last: torch.cuda.Stream | None = None

    @property
    def sizes(self) -> MoeSizes:
        """What it serves at most; a call of a larger capacity is the reference's."""
        return self.kernels.sizes

    def in_order(self) -> OneSided:
        """The kernels, for a call that begins after the one before it, also where that was on another stream.

        Two calls at once would be two rounds of one flag (hazard M37). Not inside a capture, which may wait for nothing
        outside of itself: whoever captures keeps its calls on one stream, and replays them in order.
        """
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
        return self.kernels


Made = TypeVar("Made", Workspace, MoeWorkspace)


def _first(counts: range, holds: Callable[..., bool]) -> int:
    """How many of them come before what ``holds`` of all others."""
    return bisect.bisect_left(counts, True, key=holds)


class Creation(NamedTuple, Generic[Made]):
    """What came of the vote on a workspace: it, or why not; the same on every rank."""

    workspace: Made | None
    failure: str | None


class User(Protocol):
    """Of workspaces."""

    def poison(self, why: str, /) -> None:
        """Their state is not known any more."""


class Workspaces:
    """The workspaces of one process group."""

    def __init__(self) -> None:
        #: What failed, so that it is not tried again: every try may leave the group waiting.
        self.failed: dict[tuple[str, str | None], str] = {}
        #: Why the protocols' state is not known any more; None where it is. A call broke off on some rank.
        self.invalid: str | None = None
        #: What copies between the ranks' memories brought; None before they were tried, which is done once.
        self.copies: Copies | None = None
        #: By dtype: what was prepared for calls that name no collective.
        self.prepared: dict[torch.dtype, Prepared] = {}
        #: Whose graphs run over them.
        self.users: weakref.WeakSet[User] = weakref.WeakSet()
        self._open: list[Workspace] = []
        #: Those of dispatch and combine; a call takes the last.
        self.moe: list[MoeWorkspace] = []
        #: The one that was prepared for dispatches and combines that name no collective.
        self.moe_prepared: MoeWorkspace | None = None
        #: Compares the numbers of a dispatch, with their names, among the ranks, where that was asked for.
        self.moe_compared: Callable[[tuple[tuple[str, str], ...]], None] | None = None

    def find(self, collective: str | None, device: torch.device, dtype: torch.dtype, size: int) -> Workspace | None:
        """The first one for calls of ``size`` bytes, of whatever collective where none is named."""
        for workspace in self._open:
            mine = collective in (None, workspace.collective) and workspace.device == device
            if mine and dtype in workspace.dtypes and size <= workspace.capacity:
                return workspace
        return None

    def create(
        self, channel: Channel, make: Callable[[], Made], collective: str, transport: str | None
    ) -> Creation[Made]:
        """Make one on every rank, or on none. Every rank must call.

        Raises :class:`WorkspaceError` inside a capture: its addresses would be baked into a graph
        that the other ranks do not have.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise WorkspaceError("a workspace would be created inside a capture; compile and call the model before")
        made: list[Made] = []

        def making() -> Made:
            made.append(make())
            return made[0]

        try:
            workspace, failures = channel.attempt("create a workspace", making)
        except BaseException:
            for unused in made:
                unused.kernels.close()
            raise
        if failures:
            if workspace is not None:
                workspace.kernels.close()
            self.failed[collective, transport] = f"its workspace could not be created ({failures_text(failures)})"
            return Creation(None, self.failed[collective, transport])
        assert workspace is not None
        if isinstance(workspace, MoeWorkspace):
            self.moe.append(workspace)
        else:
            self._open.append(workspace)
        return Creation(workspace, None)

    def check_kernels(self) -> None:
        """Raises :class:`HangError` where a kernel has given up waiting for a peer. Waits for nothing.

        Not of one that serves nothing yet: its self-test will say so.
        """
        for workspace in self.open:
            if workspace.passed:
                workspace.kernels.check()

    def wait_for(self, seconds: float) -> None:
        """How long kernels wait for a peer from now on, where their waits have an end."""
        for workspace in self.open:
            workspace.wait_for(seconds)

    def invalidate(self, why: str) -> None:
        """No graph may use these workspaces any more; who uses them is told. May be called from any thread."""
        if self.invalid is None:
            self.invalid = why
            for user in list(self.users):
                user.poison(why)

    def discard(self, channel: Channel, why: str) -> None:
        """Give back what a failure left behind, so that new ones are made. Every rank must call.

        Raises :class:`WorkspaceError` on all ranks where a device does not come back: a kernel still polls there.
        """
        _, failures = channel.attempt("give invalid workspaces back", self._wait_for_device)
        if failures:
            raise WorkspaceError(
                f"the workspaces of this group cannot be made anew after a failure ({why}): {failures_text(failures)}"
            )
        self.close()
        channel.barrier("invalid workspaces given back")
        self.invalid = None

    def _wait_for_device(self) -> None:
        for device in {workspace.device for workspace in self._all if workspace.device.type == "cuda"}:
            waits = threading.Thread(target=torch.cuda.synchronize, args=(device,), daemon=True)
            waits.start()
            waits.join(_SECONDS_TO_COME_BACK)  # for all streams: a kernel may poll on any of them
            if waits.is_alive():
                raise WorkspaceError(f"{device} does not come back; end the process")

    def retire(self, workspace: Workspace | MoeWorkspace, channel: Channel, reason: str) -> None:
        """Close one that failed its test, and do not make another. Every rank must call."""
        if isinstance(workspace, MoeWorkspace):
            self.failed[MOE_WAY] = reason
            self.moe.remove(workspace)
        else:
            self.failed[workspace.collective, workspace.transport] = reason
            self._open.remove(workspace)
        workspace.closed = True
        channel.barrier("workspace retired")
        workspace.kernels.close()

    def close(self) -> None:
        """Close all. Captured graphs over them can no longer be replayed. Every rank must close, outside of calls."""
        self.prepared.clear()
        self.moe_prepared, self.moe_compared = None, None
        self.failed.clear()  # also where nothing came of any: whoever closes wants another try
        if not self._all:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for workspace in self._all:
            workspace.closed = True
            workspace.kernels.close()
        self._open.clear()
        self.moe.clear()

    @property
    def _all(self) -> tuple[Workspace | MoeWorkspace, ...]:
        return (*self._open, *self.moe)

    @property
    def open(self) -> tuple[Workspace, ...]:
        return tuple(self._open)

    def control_words(self) -> tuple[tuple[int, ...], ...]:
        """Those of every open workspace. Waits for the device."""
        return tuple(workspace.kernels.control_words() for workspace in self._open)


_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, Workspaces] = weakref.WeakKeyDictionary()


def workspaces_of(group_name: str) -> Workspaces:
    """The workspaces of a process group. Raises :class:`GroupError` where there is none of that name."""
    group = resolve_group(group_name)
    found = _of_group.get(group)
    if found is None:
        found = _of_group[group] = Workspaces()
    return found


def close_workspaces(group: dist.ProcessGroup | str | None = None) -> None:
    """Close the workspaces of a group, before it is destroyed: a process group, or its name; None is the default one.

    Every rank must call, outside of calls of the model. Graphs captured over them are refused from
    then on. Raises :class:`GroupError`.
    """
    try:
        found = workspaces_of(name_of_group(group))
    except GroupError as error:
        raise GroupError(
            f"{group!r} is no process group of this process, nor the name of one; pass the group that the model "
            "reduces over (dist.group.WORLD, say), before dist.destroy_process_group"
        ) from error
    found.close()
