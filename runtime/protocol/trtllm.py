"""trtllm: FlashInfer's unicast all-reduce, one-shot by Lamport and two-shot by barriers.

One-shot stores into every peer's buffer and polls its own, as :mod:`.mnnvl` does, element by
element and bitwise. Two-shot copies its input where peers can read it, and meets them in two
barriers. A barrier's flags take three values. Block b of a grid writes the next value to flags
b, b + grid, b + 2 grid, ... of every peer, and waits while its own flag b, as each peer wrote
it, still has the previous value.

Each strategy has its own buffers and its own flag among the five control words; the arrival
``counter`` is shared, and must equal the grid exactly; it is not modelled here.

Until 0.7.1 a block writes its own flag before those of blocks that its grid does not have, and a peer that waits for
the former alone may be in its next launch before the latter are performed (hazard M58). From 0.7.2 on its own comes
last, so whoever has seen it has all of them; they are one step here.

Source: trtllm_allreduce_fusion.cuh of FlashInfer 0.6.0 to 0.7.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..hazards.situation import Strategy
from .calls import Call, Calls
from .compiler import Compiler
from .lamport import Mailbox, part
from .machine import Machine, Op, OpKind, flag, tag
from .rules import Clear, Epoch, LamportRules

#: Where barriers are counted from when the counts of a long run are brought back; a multiple of 3.
_BARRIERS_AT_FIRST = 3 * 64


@dataclass(frozen=True)
class TrtllmControlWords:
    """The five int32 of one rank, in this order.

    counter: how many blocks of the running call have arrived. sync: value of the barrier flags.
    lamport: number of the data buffer. comm_size: bytes of a Lamport buffer. clear: elements of
    the buffer before that the next one-shot call clears.
    """

    counter: int
    sync: int
    lamport: int
    comm_size: int
    clear: int

    @property
    def words(self) -> tuple[int, ...]:
        return (self.counter, self.sync, self.lamport, self.comm_size, self.clear)

    @staticmethod
    def initial(comm_size: int) -> TrtllmControlWords:
        return TrtllmControlWords(0, 0, 0, comm_size, 0)

    def after(self, call: Call, world_size: int, row: int, buffers: int = 3) -> TrtllmControlWords:
        """The words once ``call`` is complete; ``row`` is what one token counts in ``clear``."""
        if call.strategy is Strategy.TWO_SHOT:
            return replace(self, sync=(self.sync + 2) % 3)  # two barriers
        return replace(self, lamport=(self.lamport + 1) % buffers, clear=call.tokens * world_size * row)


def control_words(calls: Sequence[Call], world_size: int, hidden: int, comm_size: int) -> list[TrtllmControlWords]:
    """The five words of a rank before the first call and after each, as the real kernel leaves them."""
    words = [TrtllmControlWords.initial(comm_size)]
    for call in calls:
        words.append(words[-1].after(call, world_size, hidden))
    return words


def trtllm(programs: Sequence[Calls], rules: LamportRules) -> Machine:
    """The machine that these programs, one per rank, make of a trtllm workspace."""
    return trtllm_compiler(programs, rules).machine(programs)


def trtllm_compiler(programs: Sequence[Calls], rules: LamportRules) -> TrtllmCompiler:
    """With as many flags as the largest grid of these programs has blocks."""
    flags = max((call.ctas for calls in programs for call in calls), default=1)
    return TrtllmCompiler(len(programs), rules=rules, flags=flags)


@dataclass(frozen=True)
class _Words:
    """A rank's control words, and how many barriers it has passed, of which the real word has the remainder by 3."""

    control: TrtllmControlWords
    barriers: int = 0


@dataclass(frozen=True)
class TrtllmCompiler(Compiler[_Words]):
    """trtllm's all-reduce. ``flags`` stands for the 256 of the real workspace."""

    rules: LamportRules = field(kw_only=True)
    flags: int = 1

    def initial(self) -> _Words:
        return _Words(TrtllmControlWords.initial(0))

    def kind(self, call: Call) -> Call:
        if call.strategy is Strategy.TWO_SHOT:  # a barrier: it reads no word of the data
            return Call(0, call.strategy, ctas=call.ctas, workspace=call.workspace)
        epoch = call.epoch % self.rules.buffers if self._by_host and call.epoch is not None else None
        return Call(0, call.strategy, call.tokens, call.payload, epoch=epoch, workspace=call.workspace)

    def after(self, words: _Words, call: Call) -> _Words:
        if call.strategy is Strategy.TWO_SHOT:
            return _Words(words.control.after(call, self.world_size, 1, self.rules.buffers), words.barriers + 2)
        control = self._started(words.control, call)
        return _Words(control.after(call, self.world_size, 1, self.rules.buffers), words.barriers)

    def rebased(self, words: _Words) -> tuple[_Words, int]:
        passed = _BARRIERS_AT_FIRST + words.barriers % 3
        return replace(words, barriers=passed), words.barriers - passed

    def ops(self, rank: int, words: _Words, call: Call) -> tuple[Op, ...]:
        compiled = _TrtllmRank(self, rank)
        if call.strategy is Strategy.TWO_SHOT:
            return tuple(compiled.two_shot(call, words.barriers))
        return tuple(compiled.one_shot(call, self._started(words.control, call)))

    def _started(self, words: TrtllmControlWords, call: Call) -> TrtllmControlWords:
        """The words that the kernel goes by: the host's number of the call comes before them."""
        if not self._by_host or call.epoch is None:
            return words
        return replace(words, lamport=call.epoch % self.rules.buffers)

    @property
    def _by_host(self) -> bool:
        return self.rules.epoch is Epoch.HOST


class _TrtllmRank:
    """Writes the ops of one rank's call."""

    def __init__(self, compiler: TrtllmCompiler, rank: int) -> None:
        self._rank, self._world, self._flags = rank, range(compiler.world_size), compiler.flags
        self._rules, self._memory = compiler.rules, compiler.memory
        self._first = compiler.rules.own_flag_first

    def one_shot(self, call: Call, words: TrtllmControlWords) -> list[Op]:
        rank, world, rules = self._rank, self._world, self._rules
        mailbox = Mailbox(self._memory, f"workspace {call.workspace}" if call.workspace else "")
        after = words.after(call, len(world), 1, rules.buffers)
        cur, dirty = words.lamport, (words.lamport + rules.buffers - 1) % rules.buffers
        sent = tuple(part(call, token, rank, rules) for token in range(call.tokens))
        ops = []
        for peer in world:
            rows = range(rank * call.tokens, (rank + 1) * call.tokens)
            slots = tuple(mailbox.row(peer, cur, row) for row in rows)
            ops.append(Op(OpKind.PUSH, slots, sent, detail=f"to rank {peer}, buffer {cur}"))
        for token in range(call.tokens):
            slots = tuple(mailbox.row(rank, cur, source * call.tokens + token) for source in world)
            due = tuple(tag(call.id, token, source) for source in world)
            ops.append(Op(OpKind.POLL, slots, due, detail=f"token {token}, buffer {cur}"))
        cleared = {Clear.RECORDED: words.clear, Clear.CURRENT: after.clear, Clear.NONE: 0}[rules.clear]
        return [*ops, *mailbox.clear(rank, dirty, range(cleared))]

    def two_shot(self, call: Call, passed: int) -> list[Op]:
        ops: list[Op] = []
        for block in range(call.ctas):
            before = 0
            late: dict[int, int] = {}
            for barrier in (passed + 1, passed + 2):
                start = len(ops)
                for peer in self._peers():
                    numbers = range(block, self._flags, call.ctas)
                    ops += self._raise(call, peer, numbers[: 1 if self._first else None], barrier, before)
                raised = before | self._mask(ops)
                for i, peer in enumerate(self._peers() if self._first else ()):
                    # Each store to a flag comes after the one before to the same flag, and nobody waits for these.
                    after = before | 1 << start + i | late.get(peer, 0)
                    more = self._raise(call, peer, range(block, self._flags, call.ctas)[1:], barrier, after)
                    late[peer] = late.get(peer, 0) | (1 << len(ops) if more else 0)
                    ops += more
                # The first barrier says that peers have put their input there: that of this call.
                due = flag(barrier, call.id if barrier == passed + 1 else None)
                for peer in self._peers():
                    cells = (self._flag(call, self._rank, block, peer),)
                    detail = f"block {block}: flag {block} from rank {peer} for {barrier % 3}"
                    ops.append(Op(OpKind.AWAIT_CHANGE, cells, (due,), raised, detail=detail))
                before = raised | self._mask(ops)
        return ops

    def _raise(self, call: Call, peer: int, numbers: range, barrier: int, after: int) -> list[Op]:
        """One step for these flags of a peer; none for none."""
        cells = tuple(self._flag(call, peer, number, self._rank) for number in numbers)
        detail = f"block {numbers[0]}: flags of rank {peer} to {barrier % 3}" if numbers else ""
        return [Op(OpKind.RAISE, cells, (flag(barrier, call.id),) * len(cells), after, detail=detail)] if cells else []

    def _peers(self) -> list[int]:
        """A rank's own flags tell it nothing that it does not know."""
        return [peer for peer in self._world if peer != self._rank]

    def _mask(self, ops: list[Op]) -> int:
        """The last step of a block, one op per peer."""
        return ((1 << len(self._peers())) - 1) << len(ops) - len(self._peers())

    def _flag(self, call: Call, rank: int, number: int, source: int) -> int:
        workspace = f"workspace {call.workspace} " if call.workspace else ""
        return self._memory.cell(rank, f"{workspace}flag {number} of rank {source}")
