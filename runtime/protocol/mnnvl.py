"""MNNVL: FlashInfer's multi-node NVLink all-reduce, one-shot and two-shot.

One-shot: every rank stores its rows into every rank's buffer and polls its own. Two-shot:
token t belongs to rank t % R; the owner gathers, reduces, and stores the sum into every
rank's buffer, where ``rmsNormLamport``, the second launch of the same call, polls it.

Both rotate the same buffers by the same nine control words, which live on the device:
nothing depends on the host, so in principle a capture replays as well as an eager call runs.
A call clears the *dirty* buffer, that of the call before, by the sizes and in the stages that
the call before recorded.

Why three buffers: who writes call n+2, and so the buffer of call n-1, has finished call n+1,
so it has had this rank's part of n+1, so this rank had finished n, and with it its clear of
the buffer of n-1.

Source: trtllm_mnnvl_allreduce.cuh of FlashInfer 0.6.0 to 0.7.2; :mod:`.rules` has what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..hazards.situation import Strategy
from .calls import Call, Calls
from .compiler import Compiler
from .lamport import Mailbox, part, total
from .machine import Machine, Op, OpKind, tag
from .rules import Clear, Epoch, LamportRules, Words

#: Up to this many ranks a rank keeps its own part in registers, from FlashInfer 0.6.13 on.
_OWN_IN_REGISTERS = 8


@dataclass(frozen=True)
class MnnvlControlWords:
    """The ``buffer_flags`` of one rank: nine uint32, in this order.

    cur: the buffer of the next call. dirty: that of the call before, which the next call clears.
    bytes: size of a buffer. dirty_stages: in how many stages the dirty buffer was used; 0 at first.
    clear: bytes to clear in each stage. access: how many blocks of the running call have arrived.
    """

    cur: int
    dirty: int
    bytes: int
    dirty_stages: int = 0
    clear: tuple[int, int, int, int] = (0, 0, 0, 0)
    access: int = 0

    @property
    def words(self) -> tuple[int, ...]:
        return (self.cur, self.dirty, self.bytes, self.dirty_stages, *self.clear, self.access)

    @staticmethod
    def initial(buffer_bytes: int, buffers: int = 3) -> MnnvlControlWords:
        return MnnvlControlWords(0, buffers - 1, buffer_bytes)

    def after(self, call: Call, world_size: int, row_bytes: int, buffers: int = 3) -> MnnvlControlWords:
        """The words once ``call`` is complete. A fused two-shot is complete after its second launch."""
        if call.strategy is Strategy.TWO_SHOT:
            scattered = _scattered_rows(call.tokens, world_size)
            stages, clear = 2, (scattered * row_bytes, call.tokens * row_bytes, 0, 0)
        else:
            stages, clear = 1, (call.tokens * world_size * row_bytes, 0, 0, 0)
        return MnnvlControlWords((self.cur + 1) % buffers, self.cur, self.bytes, stages, clear)


def control_words(
    calls: Sequence[Call], world_size: int, hidden: int, element_size: int, buffer_bytes: int
) -> list[MnnvlControlWords]:
    """The nine words of a rank before the first call and after each, as the real kernel leaves them."""
    words = [MnnvlControlWords.initial(buffer_bytes)]
    for call in calls:
        words.append(words[-1].after(call, world_size, hidden * element_size))
    return words


def mnnvl(programs: Sequence[Calls], rules: LamportRules, *, torn: bool = False) -> Machine:
    """The machine that these programs, one per rank, make of an MNNVL workspace.

    torn: 16-byte stores may arrive word by word. PTX does not promise otherwise, and no
    released kernel was seen to suffer from it.
    """
    return mnnvl_compiler(programs, rules, torn=torn).machine(programs)


def mnnvl_compiler(programs: Sequence[Calls], rules: LamportRules, *, torn: bool = False) -> MnnvlCompiler:
    """Of a workspace that is large enough for these programs."""
    world_size = len(programs)
    capacity = max((_rows(call, world_size) for calls in programs for call in calls), default=0)
    return MnnvlCompiler(world_size, rules=rules, capacity=capacity, torn=torn)


def polls_own(rules: LamportRules, world_size: int) -> bool:
    """Whether a rank polls its own part too."""
    return rules.polls_own or world_size > _OWN_IN_REGISTERS


def _scattered_rows(tokens: int, world_size: int) -> int:
    return -(-tokens // world_size) * world_size


def _rows(call: Call, world_size: int) -> int:
    """How large a buffer this call needs. Two stages are halves."""
    if call.strategy is Strategy.TWO_SHOT:
        return 2 * max(_scattered_rows(call.tokens, world_size), call.tokens)
    return call.tokens * world_size


@dataclass(frozen=True)
class MnnvlCompiler(Compiler[MnnvlControlWords]):
    """MNNVL with its control words in rows instead of bytes. ``capacity``: the rows of a buffer."""

    rules: LamportRules = field(kw_only=True)
    capacity: int = 0
    torn: bool = False

    def initial(self) -> MnnvlControlWords:
        return MnnvlControlWords.initial(self.capacity, self.rules.buffers)

    def kind(self, call: Call) -> Call:
        epoch = call.epoch % self.rules.buffers if self._by_host and call.epoch is not None else None
        return Call(0, call.strategy, call.tokens, call.payload, epoch=epoch, workspace=call.workspace)

    def after(self, words: MnnvlControlWords, call: Call) -> MnnvlControlWords:
        return self._started(words, call).after(call, self.world_size, 1, self.rules.buffers)

    def ops(self, rank: int, words: MnnvlControlWords, call: Call) -> tuple[Op, ...]:
        return _MnnvlRank(self, rank).ops(self._started(words, call), call)

    def _started(self, words: MnnvlControlWords, call: Call) -> MnnvlControlWords:
        """The words that the kernel goes by: the host's number of the call comes before them."""
        if not self._by_host or call.epoch is None:
            return words
        buffers = self.rules.buffers
        return replace(words, cur=call.epoch % buffers, dirty=(call.epoch - 1) % buffers)

    @property
    def _by_host(self) -> bool:
        return self.rules.epoch is Epoch.HOST


class _MnnvlRank:
    """Writes the ops of one rank's call."""

    def __init__(self, compiler: MnnvlCompiler, rank: int) -> None:
        self._rank, self._world, self._capacity = rank, range(compiler.world_size), compiler.capacity
        self._rules, self._torn, self._memory = compiler.rules, compiler.torn, compiler.memory
        own = polls_own(self._rules, compiler.world_size)
        self._polled = [r for r in self._world if r != rank or own]

    def ops(self, words: MnnvlControlWords, call: Call) -> tuple[Op, ...]:
        mailbox = Mailbox(self._memory, f"workspace {call.workspace}" if call.workspace else "")
        body = self._two_shot if call.strategy is Strategy.TWO_SHOT else self._one_shot
        return (*body(call, words.cur, mailbox), *self._clear(call, words, mailbox))

    def _one_shot(self, call: Call, cur: int, mailbox: Mailbox) -> list[Op]:
        """A store to a slot that nobody polls is left out: what its own owner wrote there it alone clears."""
        rank, world, tokens = self._rank, self._world, range(call.tokens)
        sent = tuple(part(call, token, rank, self._rules) for token in tokens)
        ops = []
        for peer in world:
            if peer != rank or rank in self._polled:
                slots = tuple(mailbox.row(peer, cur, token * len(world) + rank) for token in tokens)
                ops.append(Op(OpKind.PUSH, slots, sent, detail=f"to rank {peer}, buffer {cur}"))
        for token in tokens:
            slots = tuple(mailbox.row(rank, cur, token * len(world) + source) for source in self._polled)
            due = tuple(tag(call.id, token, source) for source in self._polled)
            ops.append(Op(OpKind.POLL, slots, due, detail=f"token {token}, buffer {cur}"))
        return ops

    def _two_shot(self, call: Call, cur: int, mailbox: Mailbox) -> list[Op]:
        rank, world, tokens = self._rank, self._world, range(call.tokens)
        ops = []
        for owner in world[: call.tokens]:
            owned = tokens[owner :: len(world)]
            slots = tuple(mailbox.row(owner, cur, token // len(world) * len(world) + rank) for token in owned)
            sent = tuple(part(call, token, rank, self._rules) for token in owned)
            ops.append(Op(OpKind.PUSH, slots, sent, detail=f"to owner {owner}, buffer {cur}"))
        for token in tokens[rank :: len(world)]:
            gathered = 1 << len(ops)
            slots = tuple(mailbox.row(rank, cur, token // len(world) * len(world) + source) for source in world)
            due = tuple(tag(call.id, token, source) for source in world)
            ops.append(Op(OpKind.POLL, slots, due, detail=f"parts of token {token}, buffer {cur}"))
            for peer in world:
                for cell in self._sum_words(mailbox, peer, cur, token):
                    detail = f"sum of token {token} to rank {peer}, buffer {cur}"
                    ops.append(Op(OpKind.PUSH, (cell,), (total(call, token, self._rules),), gathered, detail=detail))
        for token in tokens:
            cells = self._sum_words(mailbox, rank, cur, token)
            trusted = len(cells) - 1 if self._rules.words is Words.FIRST else 0
            due = (tag(call.id, token),) * len(cells)
            ops.append(Op(OpKind.POLL, cells, due, trusted=trusted, detail=f"sum of token {token}, buffer {cur}"))
        return ops

    def _sum_words(self, mailbox: Mailbox, rank: int, buffer: int, token: int) -> tuple[int, ...]:
        """The words of a sum that arrive one after another."""
        row = self._capacity // 2 + token
        return tuple(mailbox.row(rank, buffer, row, second) for second in ((False, True) if self._torn else (False,)))

    def _clear(self, call: Call, words: MnnvlControlWords, mailbox: Mailbox) -> list[Op]:
        match self._rules.clear:
            case Clear.NONE:
                return []
            case Clear.CURRENT:
                words = replace(words.after(call, len(self._world), 1), dirty=words.dirty)
        ops: list[Op] = []
        for stage in range(words.dirty_stages):
            start = stage * (self._capacity // words.dirty_stages)
            ops += mailbox.clear(self._rank, words.dirty, range(start, start + words.clear[stage]), self._torn)
        return ops
