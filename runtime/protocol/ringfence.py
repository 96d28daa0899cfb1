"""ringfence: the all-reduce of our own, one-shot and two-shot, whose flags travel with the data.

A line says by the number of its call that it is there, and is taken for nothing else: so there is no sentinel, no
payload that matters, and nothing to clear. A call has as many shares as a grid may have blocks, and a block counts its
own of them on the device when it begins. What it finds says how many calls began before, whatever their grids.

Why two buffers: who writes call n + 2, and so the buffer of call n, has received from every peer in call n + 1, so each
peer had begun that call, and had received all of call n.

A call lets its dependents begin once all of its blocks have counted and the kernel before it has ended. They wait for
its end, and so does a chain of them. A kernel in between that waits for nothing takes that away: then a call finds that
all before it have counted, and waits by itself until the blocks of all calls before it have received everything.

Source: runtime/collectives/cuda.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ..hazards.situation import Strategy
from .calls import Call, Calls
from .compiler import Compiler
from .machine import Launch, Machine, Op, OpKind, flag
from .rules import Epoch

#: Numbers are told from here on where a run is looked at from its middle: older ones are all different from them.
_FIRST_NUMBER = 12
#: Flags are compared by number and, in :mod:`.walk`, moved by multiples of 3; buffers take turns by its remainder.
_PERIOD = 6


class Begin(StrEnum):
    """When a call of a rank may begin to send.

    ENDED: the one before has ended. RECEIVED: the one before has counted, and this one waits until it has received
    everything, as behind a kernel that waits for nothing. These two are the kernels'. What they are not: COUNTED, the
    same without that wait; and AT_ONCE, even before the one before has counted.
    """

    ENDED = "ended"
    RECEIVED = "received"
    COUNTED = "counted"
    AT_ONCE = "at_once"


@dataclass(frozen=True)
class LineRules:
    """The protocol, and what could be otherwise.

    every_share_counts: a call counts all of its shares, and not one for each block of its grid.
    flag_with_data: a line and its number arrive together; else the number may come first.
    """

    buffers: int = 2
    epoch: Epoch = Epoch.DEVICE
    every_share_counts: bool = True
    flag_with_data: bool = True
    begin: Begin = Begin.ENDED


#: As the kernels are.
RULES = LineRules()

Shares = tuple[int, ...]


def ringfence(programs: Sequence[Calls], rules: LineRules = RULES) -> Machine:
    """The machine that these programs, one per rank, make of a workspace."""
    compiler = ringfence_compiler(programs, rules)
    if rules.begin is Begin.ENDED:
        return compiler.machine(programs)
    launches = [(_overlapped(compiler, rank, calls),) for rank, calls in enumerate(programs)]
    return Machine(launches, compiler.memory.names)


def ringfence_compiler(programs: Sequence[Calls], rules: LineRules = RULES) -> RingfenceCompiler:
    """A call has as many shares as the largest grid of these programs has blocks."""
    blocks = max((call.ctas for calls in programs for call in calls), default=1)
    return RingfenceCompiler(len(programs), rules=rules, blocks=blocks)


@dataclass(frozen=True)
class RingfenceCompiler(Compiler[Shares]):
    """Its control words: how often each share was counted. A row is as many granules as there are ranks.

    stride: from one token to the next in an inbox, in lines; None is what a token needs, by one-shot and by two-shot.
    """

    rules: LineRules = field(kw_only=True)
    blocks: int = 1
    stride: int | None = None

    def lines(self, strategy: Strategy) -> int:
        """How many of an inbox a token needs."""
        peers = self.world_size - 1
        return peers + self.world_size if strategy is Strategy.TWO_SHOT else peers * self.world_size

    def initial(self) -> Shares:
        return (0,) * self.blocks

    def kind(self, call: Call) -> Call:
        epoch = call.epoch if self.rules.epoch is Epoch.HOST else None
        ctas = 1 if self.rules.every_share_counts else call.ctas
        return Call(0, call.strategy, call.tokens, ctas=ctas, epoch=epoch, workspace=call.workspace)

    def after(self, words: Shares, call: Call) -> Shares:
        if self.rules.epoch is Epoch.HOST and call.epoch is not None:
            return words
        return tuple(
            number + 1 if self.rules.every_share_counts or block < call.ctas else number
            for block, number in enumerate(words)
        )

    def rebased(self, words: Shares) -> tuple[Shares, int]:
        if self.rules.epoch is Epoch.HOST:  # its numbers do not count from anywhere else
            return words, 0
        least = min(words)
        moved = least - _FIRST_NUMBER - least % _PERIOD
        return tuple(number - moved for number in words), moved

    def ops(self, rank: int, words: Shares, call: Call) -> tuple[Op, ...]:
        return tuple(_RingfenceRank(self, rank, words, call).ops(range(call.tokens)))


class _RingfenceRank:
    """Writes the ops of one rank's call."""

    def __init__(self, compiler: RingfenceCompiler, rank: int, words: Shares, call: Call) -> None:
        self._rank, self._world, self._call, self._words = rank, range(compiler.world_size), call, words
        self._rules, self._memory = compiler.rules, compiler.memory
        self._stride = compiler.stride or compiler.lines(call.strategy)
        self._peers = [peer for peer in self._world if peer != rank]

    def ops(self, tokens: range) -> list[Op]:
        return self._two_shot(tokens) if self._call.strategy is Strategy.TWO_SHOT else self._one_shot(tokens)

    def _one_shot(self, tokens: range) -> list[Op]:
        """In an inbox: [token][source][granule]."""
        granules, ops = len(self._world), list[Op]()

        def slots(token: int, at: int, source: int) -> list[int]:
            return [token * self._stride + _place(source, at) * granules + g for g in range(granules)]

        for peer in self._peers:
            for token in tokens:
                ops += self._send(token, peer, slots(token, peer, self._rank), 0, len(ops))
        for token in tokens:
            cells = [slot for source in self._peers for slot in slots(token, self._rank, source)]
            ops.append(self._receive(token, cells, 0, f"token {token}"))
        return ops

    def _two_shot(self, tokens: range) -> list[Op]:
        """For each token: the parts of the rank's own granule, [source], and then the sums, [granule]."""
        peers, of_token, ops = len(self._peers), self._stride, list[Op]()
        for peer in self._peers:
            for token in tokens:
                ops += self._send(token, peer, [token * of_token + _place(self._rank, peer)], 0, len(ops))
        for token in tokens:
            parts = [token * of_token + place for place in range(peers)]
            ops.append(self._receive(token, parts, 0, f"parts of token {token}"))
            summed = 1 << len(ops) - 1
            for peer in self._world:
                ops += self._send(token, peer, [token * of_token + peers + self._rank], summed, len(ops))
        for token in tokens:
            sums = [token * of_token + peers + granule for granule in self._world]
            ops.append(self._receive(token, sums, 0, f"sums of token {token}"))
        return ops

    def _number(self, token: int) -> int:
        """Of this call, as a block knows it from what it found counted."""
        if self._rules.epoch is Epoch.HOST and self._call.epoch is not None:
            return self._call.epoch + 1
        return sum(self._words) // len(self._words) + 1

    def _cells(self, rank: int, number: int, slots: Sequence[int]) -> tuple[int, ...]:
        name = f"workspace {self._call.workspace} " if self._call.workspace else ""
        buffer = number % self._rules.buffers
        return tuple(self._memory.cell(rank, f"{name}buffer {buffer} granule {slot}") for slot in slots)

    def _send(self, token: int, peer: int, slots: Sequence[int], after: int, place: int) -> list[Op]:
        number = self._number(token)
        cells, values = self._cells(peer, number, slots), (flag(number, self._call.id),) * len(slots)
        detail = f"token {token} to rank {peer}, number {number}"
        sent = Op(OpKind.RAISE, cells, values, after, detail=detail)
        if self._rules.flag_with_data:
            return [sent]
        early = Op(OpKind.RAISE, cells, (flag(number),) * len(slots), after, detail=f"the number of {detail}")
        return [early, replace(sent, after=after | 1 << place)]

    def _receive(self, token: int, slots: Sequence[int], after: int, what: str) -> Op:
        number = self._number(token)
        due = (flag(number, self._call.id),) * len(slots)
        cells = self._cells(self._rank, number, slots)
        return Op(OpKind.AWAIT_EQUAL, cells, due, after, detail=f"{what}, number {number}")


def _place(source: int, at: int) -> int:
    """Of a source among the others of rank ``at``."""
    return source if source < at else source - 1


def _overlapped(compiler: RingfenceCompiler, rank: int, calls: Calls) -> Launch:
    """All calls of a rank in one launch, each behind a kernel that waits for nothing.

    A block looks at what is counted, counts its own shares, and waits for what all calls but the last have to receive.
    Then dependents may begin. It waits for the last too, carries its tokens, and counts that it has received them. Here
    shares are flags of their own, not one sum: a call counts no share before all calls before it have counted theirs.
    """
    begin, memory = compiler.rules.begin, compiler.memory
    begun = tuple(memory.cell(rank, f"share {share}, begun") for share in range(compiler.blocks))
    received = tuple(memory.cell(rank, f"share {share}, received") for share in range(compiler.blocks))
    words, ops, before = compiler.initial(), list[Op](), 0
    for number, call in enumerate(calls):
        dependents, grid = 0, call.ctas
        for block in range(grid):
            told, own = f"call {call.id}, block {block}", slice(block, None, grid)
            counts = own if compiler.rules.every_share_counts else slice(block, block + 1)

            def add(op: Op) -> int:
                ops.append(op)
                return 1 << len(ops) - 1

            found = add(_count(begun, number, before, f"{told}: its number", looks=False))
            ready = dependents_of = add(_raise(begun[counts], number + 1, found, f"{told}: counted"))
            if begin is Begin.RECEIVED:
                dependents_of = add(_count(received, number - 1, ready, f"{told}: the calls before the last"))
                ready = add(_count(received, number, dependents_of, f"{told}: the calls before"))
            dependents |= dependents_of
            start, waits = len(ops), 0
            for op in _RingfenceRank(compiler, rank, words, call).ops(range(block, call.tokens, grid)):
                waits |= (1 << len(ops)) if op.kind.waits else 0
                ops.append(replace(op, after=op.after << start | ready))
            add(_raise(received[own], number + 1, waits, f"{told}: received"))
        words = compiler.after(words, call)
        before = 0 if begin is Begin.AT_ONCE else dependents
    return Launch(0, f"{len(calls)} calls", tuple(ops))


def _count(cells: tuple[int, ...], number: int, after: int, detail: str, *, looks: bool = True) -> Op:
    """Wait until each has been counted so often; or only rely on it."""
    due = (flag(max(number, 0)),) * len(cells)
    return Op(OpKind.AWAIT_COUNT, cells, due, after, 0 if looks else len(cells), detail)


def _raise(cells: tuple[int, ...], number: int, after: int, detail: str) -> Op:
    return Op(OpKind.RAISE, cells, (flag(number),) * len(cells), after, detail=detail)


__all__ = ["RULES", "Begin", "LineRules", "RingfenceCompiler", "ringfence", "ringfence_compiler"]
