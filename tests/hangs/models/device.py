"""Device: what runs when, on GPUs with streams, graph replays, PDL and hosts.

The words of a Lamport protocol are not here. A collective is a kernel that pushes into
boxes of its peers and polls its own; a box holds the payloads of two calls, as three
Lamport buffers do of which one is being cleared. What is here is everything around it:

- a host runs its program in order; launches do not wait, synchronising does;
- a stream starts a kernel when all before it is done. A programmatic dependent (PDL)
  starts when every block of its primary has triggered or ended; its grid-dependency
  wait is for the end of that primary alone, and of no kernel before it (CUDA C++
  Programming Guide, Programmatic Dependent Launch; PTX, griddepcontrol). Between a
  graph and what is before and behind it the dependency is a full one;
- blocks of a kernel are dispatched in order, each into a slot that it keeps until it
  ends, waiting or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ringfence.runtime.protocol.explore import Event, ModelFailure

from .instructions import (
    Add,
    Await,
    BlockOp,
    Free,
    Grid,
    HostOp,
    Kernel,
    Launch,
    Meet,
    MemoryOp,
    ModelError,
    Poll,
    Push,
    Read,
    Record,
    Synchronize,
    WaitEvent,
    Write,
    check,
)

# -- states --------------------------------------------------------------------------

_FREED = "\0freed"
_NOT_STARTED = -1

#: Of a rank, a cell of that name; or its box of that name for what a source sends.
_Key = tuple[int, str, int | None]
_Value = str | int | tuple[str, ...]
_Memory = frozenset[tuple[_Key, _Value]]


class Item(NamedTuple):
    """An entry of a stream. ``at`` is the next instruction of each block; ``edge``: programmatic, to the one before."""

    work: Kernel | Record | WaitEvent
    edge: bool = False
    eager: bool = False
    at: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.work.name if isinstance(self.work, Kernel) else self.work.event

    @property
    def done(self) -> bool:
        return isinstance(self.work, Kernel) and all(map(_ended, self.work.blocks, self.at))

    def resident(self) -> int:
        """The slots that its blocks hold."""
        blocks = self.work.blocks if isinstance(self.work, Kernel) else ()
        return sum(at != _NOT_STARTED and not _ended(ops, at) for ops, at in zip(blocks, self.at, strict=True))


class Rank(NamedTuple):
    """The next operation of a rank's host, its streams, and the events that were reached."""

    host: int
    streams: tuple[tuple[Item, ...], ...]
    events: frozenset[str]


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    memory: _Memory


class Devices:
    """A model for :func:`explore`: one program per rank, one GPU per rank.

    slots: how many blocks a GPU can hold at a time; None: more than are ever launched.
    early_dependents: let dependents in once any block of their primary has triggered. The
        guide says all; the core dump of SGL#34789 has them waiting in every slot while most
        blocks of their primary are yet to be dispatched.

    Raises :class:`ModelError` for a program that no host could run, or a device that runs none.
    """

    def __init__(
        self, programs: Sequence[Sequence[HostOp]], *, slots: int | None = None, early_dependents: bool = False
    ) -> None:
        check(programs)
        if slots is not None and slots < 1:
            raise ModelError(f"a device with {slots} slots runs nothing; give it at least one")
        self._programs = tuple(map(tuple, programs))
        self._slots = slots
        self._enough = any if early_dependents else all
        self._streams = [_streams(program) for program in self._programs]

    def initial(self) -> State:
        return State(tuple(Rank(0, ((),) * len(s), frozenset()) for s in self._streams), frozenset())

    def finished(self, state: State) -> bool:
        return all(self._finished(state, rank) for rank in range(len(self._programs)))

    def steps(self, state: State) -> Iterator[tuple[Event, State]]:
        for rank in range(len(self._programs)):
            yield from self._host_steps(state, rank)
            yield from self._device_steps(state, rank)

    # -- hosts -----------------------------------------------------------------------

    def _host_op(self, state: State, rank: int) -> HostOp | None:
        program, at = self._programs[rank], state.ranks[rank].host
        return program[at] if at < len(program) else None

    def _finished(self, state: State, rank: int) -> bool:
        return self._host_op(state, rank) is None and not any(state.ranks[rank].streams)

    def _host_steps(self, state: State, rank: int) -> Iterator[tuple[Event, State]]:
        op = self._host_op(state, rank)
        here, memory = state.ranks[rank], state.memory
        failure = None
        moves = {rank: here._replace(host=here.host + 1)}
        match op:
            case None:
                return
            case Launch() | Record() | WaitEvent():
                s = self._streams[rank].index(op.stream)
                moves[rank] = _settled(moves[rank], s, (*here.streams[s], *self._items(op, here.streams[s])))
            case Synchronize():
                if any(q for s, q in zip(self._streams[rank], here.streams, strict=True) if op.stream in (None, s)):
                    return
            case Meet():
                if any(self._host_op(state, r) != op for r in op.ranks):
                    return
                moves = {r: state.ranks[r]._replace(host=state.ranks[r].host + 1) for r in op.ranks}
            case Free():
                held = {(key, value) for key, value in memory if key[:2] == (rank, op.cell)}
                memory = memory - held | {((rank, op.cell, None), _FREED)}
            case _:
                outcome = _perform(op, rank, memory)
                if outcome is None:
                    return
                memory, failure = outcome
        ranks = tuple(moves.get(r, was) for r, was in enumerate(state.ranks))
        yield Event(rank, None, "host", str(op), failure), State(ranks, memory)

    def _items(self, op: Launch | Record | WaitEvent, queue: tuple[Item, ...]) -> Iterator[Item]:
        if not isinstance(op, Launch):
            yield Item(op)
            return
        start = 0 if self._slots is None else _NOT_STARTED  # a slot that is always free needs no step to take it
        behind_kernel = bool(queue) and queue[-1].eager and not op.graph
        for k in op.kernels:
            yield Item(k, k.pdl and behind_kernel, not op.graph, (start,) * len(k.blocks))
            behind_kernel = True

    # -- devices ---------------------------------------------------------------------

    def _device_steps(self, state: State, rank: int) -> Iterator[tuple[Event, State]]:
        here = state.ranks[rank]
        for s, i, b, op in self._blocks(here):
            item = here.streams[s][i]
            memory, failure = state.memory, None
            if isinstance(op, MemoryOp):
                outcome = _perform(op, rank, memory)
                if outcome is None:
                    continue
                memory, failure = outcome
            elif not self._may_pass(here, s, i, op):
                continue
            at = (*item.at[:b], item.at[b] + 1, *item.at[b + 1 :])
            queue = (*here.streams[s][:i], item._replace(at=at), *here.streams[s][i + 1 :])
            ranks = (*state.ranks[:rank], _settled(here, s, queue), *state.ranks[rank + 1 :])
            told = f"{item.name}[{b}] {'takes a slot' if op is None else op}"
            yield Event(rank, None, "device", told, failure), State(ranks, memory)

    def _blocks(self, here: Rank) -> Iterator[tuple[int, int, int, BlockOp | None]]:
        """Of every block that its stream lets run: stream, entry, block, next instruction; None to start."""
        for s, queue in enumerate(here.streams):
            for i, item in enumerate(queue):
                if not isinstance(item.work, Kernel) or (i > 0 and not (item.edge and self._triggered(queue[i - 1]))):
                    break
                for b, (ops, at) in enumerate(zip(item.work.blocks, item.at, strict=True)):
                    if at == _NOT_STARTED:
                        yield s, i, b, None
                        break
                    if not _ended(ops, at):
                        yield s, i, b, ops[at]

    def _may_pass(self, here: Rank, s: int, i: int, op: Grid | None) -> bool:
        if op is None:
            assert self._slots is not None
            return sum(item.resident() for queue in here.streams for item in queue) < self._slots
        return op is Grid.TRIGGER or i == 0 or here.streams[s][i - 1].done

    def _triggered(self, item: Item) -> bool:
        assert isinstance(item.work, Kernel)
        return self._enough(
            _ended(ops, at) or Grid.TRIGGER in ops[: max(at, 0)]
            for ops, at in zip(item.work.blocks, item.at, strict=True)
        )

    # -- sentences -------------------------------------------------------------------

    def waiting(self, state: State) -> tuple[str, ...]:
        return tuple(
            f"rank {rank}: " + "; ".join(dict.fromkeys(self._reasons(state, rank)))
            for rank in range(len(self._programs))
            if not self._finished(state, rank)
        )

    def _reasons(self, state: State, rank: int) -> Iterator[str]:
        here = state.ranks[rank]
        match self._host_op(state, rank):
            case None:
                pass
            case Meet() as op:
                absent = [str(r) for r in op.ranks if self._host_op(state, r) != op]
                yield f"its host waits to {op}, without rank {', '.join(absent)}"
            case other:
                yield f"its host waits to {other}"
        for queue in here.streams:
            if queue and isinstance(queue[0].work, WaitEvent):
                yield f"stream '{queue[0].work.stream}' waits for event '{queue[0].name}'"
        for s, i, _, doing in self._blocks(here):
            name = here.streams[s][i].name
            if doing is None:
                holders = dict.fromkeys(k.name for q in here.streams for k in q if k.resident())
                yield f"'{name}' waits for a slot; they are held by {', '.join(map(repr, holders))}"
            elif doing is Grid.WAIT:
                yield f"'{name}' waits for '{here.streams[s][i - 1].name}' to end"
            else:
                ended = isinstance(doing, Poll) and self._finished(state, doing.source)
                yield f"'{name}' waits to {doing}{', which has ended' if ended else ''}"


def _ended(ops: tuple[BlockOp, ...], at: int) -> bool:
    return at == len(ops)


def _settled(here: Rank, stream: int, queue: tuple[Item, ...]) -> Rank:
    """The rank with that queue, after everything that ends by itself: kernels done, events reached.

    None of it is a step, and no order is lost by that: an event only ever lets others go on,
    and what it lets go on may take any time to do so. A kernel that is done behind one that
    is not stays, for it is the one that its dependent waits for.
    """
    streams = [queue if s == stream else q for s, q in enumerate(here.streams)]
    events = set(here.events)
    while True:
        ready = [
            s
            for s, q in enumerate(streams)
            if q and (q[0].done or isinstance(q[0].work, Record) or _reached(q[0].work, events))
        ]
        if not ready:
            return Rank(here.host, tuple(streams), frozenset(events))
        for s in ready:
            work = streams[s][0].work
            if isinstance(work, Record):
                events.add(work.event)
            streams[s] = streams[s][1:]


def _reached(work: Kernel | Record | WaitEvent, events: set[str]) -> bool:
    return isinstance(work, WaitEvent) and work.event in events


# -- memory --------------------------------------------------------------------------


def _perform(op: MemoryOp, rank: int, memory: _Memory) -> tuple[_Memory, ModelFailure | None] | None:
    """The memory after an instruction, and how that failed; None while the instruction has to wait."""
    key, writes = _key(op, rank)
    held = dict(memory)
    if held.get((key[0], key[1], None)) == _FREED:
        return memory, ModelFailure.LOST_WRITE if writes else ModelFailure.STALE_READ
    value = held.get(key)
    failure = None
    match op:
        case Read():
            return memory, None if value == op.value else ModelFailure.STALE_READ
        case Write():
            held[key] = op.value
        case Add():
            held[key] = _count(value) + 1
        case Await():
            reached = _count(value) == op.count if op.exact else _count(value) >= op.count
            return (memory, None) if reached else None
        case Push():
            box = value if isinstance(value, tuple) else ()
            failure = ModelFailure.LOST_WRITE if len(box) == op.depth else None
            held[key] = (*box, op.value)
        case Poll():
            if not isinstance(value, tuple) or not value:
                return None
            failure = ModelFailure.STALE_READ if value[0] != op.value else None
            held[key] = value[1:]
    return frozenset(held.items()), failure


def _key(op: MemoryOp, rank: int) -> tuple[_Key, bool]:
    """What an instruction touches, and whether it writes there."""
    match op:
        case Push():
            return (op.to, op.box, rank), True
        case Poll():
            return (rank, op.box, op.source), False
        case Read() | Write():
            return (rank if op.of is None else op.of, op.cell, None), isinstance(op, Write)
        case _:
            return (rank, op.cell, None), isinstance(op, Add)


def _count(value: _Value | None) -> int:
    return value if isinstance(value, int) else 0


def _streams(program: Sequence[HostOp]) -> tuple[str, ...]:
    used = [op.stream for op in program if isinstance(op, Launch | Record | WaitEvent | Synchronize)]
    return tuple(dict.fromkeys(s for s in used if s is not None))
