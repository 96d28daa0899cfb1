"""Instructions: what the hosts and the kernels of a :class:`~.device.Devices` can be told to do.

Programs are straight lines: what a rank does after a raise, a vote or a choice is what
its program says. Kernels and hosts share the instructions on memory; each is atomic and
takes effect for all at once. A read says which value it is meant to get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class ModelError(ValueError):
    """A model holds a program that no host could run."""


class _Told:
    """An instruction that can be told to a person: "rank 0 waits to ..."."""

    told: ClassVar[str]

    def __str__(self) -> str:
        of = getattr(self, "of", None)
        return self.told.format(**vars(self)) + ("" if of is None else f" of rank {of}")


# -- memory --------------------------------------------------------------------------


@dataclass(frozen=True)
class Read(_Told):
    """Read a cell that should hold ``value``, in one's own memory or in that of rank ``of``."""

    told = "read '{value}' in '{cell}'"
    cell: str
    value: str | int
    of: int | None = None


@dataclass(frozen=True)
class Write(_Told):
    told = "write '{value}' to '{cell}'"
    cell: str
    value: str | int
    of: int | None = None


@dataclass(frozen=True)
class Add(_Told):
    """Add one to a counter. A cell never written counts as 0."""

    told = "count up '{cell}'"
    cell: str


@dataclass(frozen=True)
class Await:
    """Spin until a counter is at least ``count``, or, if ``exact``, equal to it."""

    cell: str
    count: int
    exact: bool = False

    def __str__(self) -> str:
        return f"see '{self.cell}' at {'exactly' if self.exact else 'least'} {self.count}"


@dataclass(frozen=True)
class Push(_Told):
    """Put ``value`` into the box of rank ``to``. Beyond ``depth`` unread ones it overwrites one."""

    told = "push '{value}' into '{box}' of rank {to}"
    box: str
    to: int
    value: str
    depth: int = 2


@dataclass(frozen=True)
class Poll(_Told):
    """Spin until one's own box holds something of rank ``source``; take it. It should be ``value``."""

    told = "take '{value}' of rank {source} from '{box}'"
    box: str
    source: int
    value: str


MemoryOp = Read | Write | Add | Await | Push | Poll


# -- kernels -------------------------------------------------------------------------


class Grid(Enum):
    """What a kernel says to the kernels beside it in its stream."""

    TRIGGER = "trigger its dependents"  # cudaTriggerProgrammaticLaunchCompletion
    WAIT = "pass its grid-dependency wait"  # cudaGridDependencySynchronize

    def __str__(self) -> str:
        return self.value


BlockOp = MemoryOp | Grid


@dataclass(frozen=True, eq=False)  # by identity, for hashing is most of the work of a search
class Kernel:
    """``blocks`` holds the instructions of each block. ``pdl``: launched as a programmatic dependent."""

    name: str
    blocks: tuple[tuple[BlockOp, ...], ...]
    pdl: bool = False


def kernel(name: str, *ops: BlockOp, blocks: int = 1, pdl: bool = False) -> Kernel:
    """A kernel whose blocks all do the same."""
    return Kernel(name, (ops,) * blocks, pdl)


def all_reduce(rank: int, ranks: Sequence[int], value: str, box: str = "workspace") -> tuple[MemoryOp, ...]:
    """One block's part of one call on the workspace ``box``, in a protocol that is right by itself."""
    peers = [r for r in ranks if r != rank]
    return (*[Push(box, to, value) for to in peers], *[Poll(box, source, value) for source in peers])


# -- hosts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Append kernels to a stream: one after the other, or as one replay of a graph."""

    kernels: tuple[Kernel, ...]
    stream: str = "main"
    graph: bool = False

    def __str__(self) -> str:
        return f"{'replay' if self.graph else 'launch'} {', '.join(k.name for k in self.kernels)} on '{self.stream}'"


def launch(*kernels: Kernel, stream: str = "main") -> Launch:
    return Launch(kernels, stream)


def replay(*kernels: Kernel, stream: str = "main") -> Launch:
    return Launch(kernels, stream, graph=True)


@dataclass(frozen=True)
class Record(_Told):
    """Record an event. Each has a name of its own."""

    told = "record '{event}' on '{stream}'"
    event: str
    stream: str


@dataclass(frozen=True)
class WaitEvent(_Told):
    """Make a stream wait for an event; the host does not wait."""

    told = "let '{stream}' wait for '{event}'"
    event: str
    stream: str


@dataclass(frozen=True)
class Synchronize(_Told):
    """Wait until a stream has run dry, or every stream of the rank's device. ``why`` is for people."""

    told = "{why}, which needs its streams idle"
    stream: str | None = None
    why: str = "synchronise"


@dataclass(frozen=True)
class Meet(_Told):
    """The hosts of ``ranks`` wait for one another: a rendezvous, a vote, a CPU barrier.

    They meet if they agree on ``what`` and ``ranks``, and not otherwise.
    """

    told = "meet ranks {ranks} at '{what}'"
    what: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Free(_Told):
    """Give back one's own cell or box of that name, now and for good.

    It waits for no kernel: an allocator's books follow the order of the host.
    """

    told = "free '{cell}'"
    cell: str


HostOp = MemoryOp | Launch | Record | WaitEvent | Synchronize | Meet | Free


def check(programs: Sequence[Sequence[HostOp]]) -> None:
    """Raise :class:`ModelError` for a program that no host could run."""
    everyone = set(range(len(programs)))
    for rank, program in enumerate(programs):
        recorded: set[str] = set()
        for op in program:
            if isinstance(op, WaitEvent) and op.event not in recorded:
                raise ModelError(f"rank {rank} waits for event '{op.event}' before it records it; record it first")
            if isinstance(op, Record):
                if op.event in recorded:
                    raise ModelError(f"rank {rank} records event '{op.event}' twice; name each record differently")
                recorded.add(op.event)
            if isinstance(op, Meet) and rank not in op.ranks:
                raise ModelError(f"rank {rank} meets others at '{op.what}'; name itself among the ranks {op.ranks}")
            for k in op.kernels if isinstance(op, Launch) else ():
                if not (k.blocks and all(k.blocks)):
                    raise ModelError(f"a block of kernel '{k.name}' does nothing; give it an instruction")
            named = set(op.ranks) if isinstance(op, Meet) else set(map(_peer, _inner(op)))
            if unknown := {r for r in named if r is not None} - everyone:
                raise ModelError(f"rank {rank} speaks to ranks {sorted(unknown)}; there are {len(programs)}, from 0")


def _inner(op: HostOp) -> list[HostOp | Grid]:
    return [o for k in op.kernels for ops in k.blocks for o in ops] if isinstance(op, Launch) else [op]


def _peer(op: HostOp | Grid) -> int | None:
    return op.to if isinstance(op, Push) else op.source if isinstance(op, Poll) else getattr(op, "of", None)
