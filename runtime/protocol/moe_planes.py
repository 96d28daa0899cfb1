"""MoE planes: where the rows of a one-sided all-to-all lie, and who may still be reading them.

:mod:`.moe_a2a` has the flags alone. Here rows are words of a rank's memory:

    planes           R blocks of ``capacity`` rows, one for each source, written by the sources in a dispatch
    combine region   as many rows, written by their owner, read by the sources in the combine

The owner's rows are copied there in the combine's own launch, or experts write them there (:class:`Writes`).

The combine region begins behind the planes of its own call, unless it is at one offset for all calls. A dispatch or a
combine raises its flag at every peer, waits for theirs, and then reads; nothing says that a rank has finished reading.
So the rows of a next dispatch may come while a peer still combines, which is harmless only where they lie elsewhere.
And where ranks go by different capacities, each reads where nobody wrote.

Small programs are explored in every order (:func:`.explore.explore`); the flags' model answers for long ones.

Source: moeAlltoAllKernels.cu and trtllm_moe_alltoall.py of FlashInfer 0.6.18.post1 and 0.7.2.post1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from ..hazards.situation import Strategy
from .calls import Call, Calls
from .machine import EMPTY, CellTable, Launch, Machine, Op, OpKind, flag, tag
from .rules import MoeRules


class Writes(Enum):
    """When the combine region is written."""

    IN_COMBINE = "a copy in the combine's launch"
    BETWEEN = "experts, after the dispatch"
    EARLY = "experts, before the dispatch"
    LATE = "experts, after the combine"


def moe_planes(
    programs: Sequence[Calls], rules: MoeRules, *, initialises: bool = False, writes: Writes = Writes.IN_COMBINE
) -> Machine:
    """The machine that these programs of dispatches and combines, one per rank, make of a workspace.

    A call sends ``tokens`` rows of ``width`` words to every rank. initialises: each rank first clears its own memory.
    """
    memory = CellTable()
    largest = max((call.capacity * call.width for calls in programs for call in calls), default=0)
    ranks = [_Rank(memory, rules, rank, len(programs), largest) for rank in range(len(programs))]
    launches = tuple(tuple(rank.launches(c, initialises, writes)) for rank, c in zip(ranks, programs, strict=True))
    return Machine(launches, memory.names)


class _Rank:
    """Writes the launches of one rank."""

    def __init__(self, memory: CellTable, rules: MoeRules, rank: int, world_size: int, largest: int) -> None:
        self._memory, self._rules, self._rank, self._world = memory, rules, rank, range(world_size)
        self._largest = largest

    def launches(self, calls: Calls, initialises: bool, writes: Writes) -> Iterator[Launch]:
        if initialises:
            yield Launch(-1, "initialise", self._initialise())
        for number, (call, after) in enumerate(zip(calls, (*calls[1:], None), strict=True), 1):
            if writes is Writes.EARLY and after is not None and after.strategy is Strategy.COMBINE:
                yield self._experts(after)
            if writes is Writes.BETWEEN and call.strategy is Strategy.COMBINE:
                yield self._experts(call)
            yield Launch(call.id, call.title, self._ops(call, number, writes))
            if writes is Writes.LATE and call.strategy is Strategy.COMBINE:
                yield self._experts(call)

    def _experts(self, combine: Call) -> Launch:
        """What experts write where peers will combine it from."""
        return Launch(combine.id, "experts", self._made(combine))

    def _made(self, combine: Call) -> tuple[Op, ...]:
        made = (self._combined(combine, self._rank, source) for source in self._world)
        return tuple(self._push(self._rank, cells, combine, self._rank, of=of) for of, cells in enumerate(made))

    def _ops(self, call: Call, number: int, writes: Writes) -> tuple[Op, ...]:
        sent: Sequence[Op]
        if call.strategy is Strategy.DISPATCH:
            sent = [self._push(peer, self._plane(call, peer, self._rank), call, self._rank) for peer in self._world]
            due = [self._plane(call, self._rank, source) for source in self._world]
            read = [self._read(cells, call, source, f"rows of rank {source}") for source, cells in enumerate(due)]
        else:
            sent = self._made(call) if writes is Writes.IN_COMBINE else ()
            back = [self._combined(call, peer, self._rank) for peer in self._world]
            what = [f"what rank {peer} made of its own" for peer in self._world]
            read = [self._read(back[p], call, p, what[p], of=self._rank) for p in self._world]
        return self._met(sent, read, f"{call.strategy} flag", flag(number, call.id))

    def _met(self, before: Sequence[Op], after: Sequence[Op], name: str, due: int) -> tuple[Op, ...]:
        """Ops, then a flag to every peer and theirs here, then ops."""
        peers = [peer for peer in self._world if peer != self._rank]
        published = (1 << len(before)) - 1
        raises = [
            Op(OpKind.RAISE, (self._flag(peer, self._rank, name),), (due,), published, detail=f"{name} of rank {peer}")
            for peer in peers
        ]
        here = tuple(self._flag(self._rank, peer, name) for peer in peers)
        awaits = Op(OpKind.AWAIT_EQUAL, here, (due,) * len(here), published, detail=f"{name}s")
        arrived = published | 1 << len(before) + len(raises)
        late = [Op(op.kind, op.cells, op.values, arrived, detail=op.detail) for op in after]
        return (*before, *raises, awaits, *late)

    def _initialise(self) -> tuple[Op, ...]:
        words = 2 * len(self._world) * self._largest
        cells = [self._memory.cell(self._rank, f"word {i}") for i in range(words)]
        for name in (Strategy.DISPATCH, Strategy.COMBINE):
            cells += [self._flag(self._rank, peer, f"{name} flag") for peer in self._world if peer != self._rank]
        clear = Op(OpKind.CLEAR, tuple(cells), (EMPTY,) * len(cells), detail="its own workspace")
        return self._met([clear], [], "barrier", flag(1)) if self._rules.barrier_after_init else (clear,)

    def _plane(self, call: Call, owner: int, source: int) -> tuple[int, ...]:
        """The words of the rows that ``source`` has there, as this rank places them."""
        return self._words(owner, source * call.capacity * call.width, call)

    def _combined(self, call: Call, owner: int, source: int) -> tuple[int, ...]:
        own = self._largest if self._rules.combine_offset_fixed else call.capacity * call.width
        return self._words(owner, len(self._world) * own + source * call.capacity * call.width, call)

    def _words(self, owner: int, start: int, call: Call) -> tuple[int, ...]:
        return tuple(self._memory.cell(owner, f"word {start + i}") for i in range(call.tokens * call.width))

    def _flag(self, owner: int, source: int, name: str) -> int:
        return self._memory.cell(owner, f"{name} of rank {source}")

    def _push(self, peer: int, cells: tuple[int, ...], call: Call, rank: int, of: int = 0) -> Op:
        return Op(OpKind.PUSH, cells, self._values(cells, call, rank, of), detail=f"{call.strategy} to rank {peer}")

    def _read(self, cells: tuple[int, ...], call: Call, rank: int, what: str, of: int = 0) -> Op:
        return Op(OpKind.READ, cells, self._values(cells, call, rank, of), detail=what)

    @staticmethod
    def _values(cells: tuple[int, ...], call: Call, rank: int, of: int) -> tuple[int, ...]:
        """A word for each place: of a rank's rows, or of what it made of the rows ``of`` another."""
        return tuple(tag(call.id, of * len(cells) + i, rank) for i in range(len(cells)))
