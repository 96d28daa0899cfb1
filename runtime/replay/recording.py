"""The call that records: each step runs once, and what it returned is put where replays will put it.

Memory goes as in an ordinary run: what no later step reads is given to whatever is recorded next. An entry then
holds a tensor that reads the memory without keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import DataDependentValueError
from ..watch.journal import Marks, sizes_text
from .buffers import copy_into, same_memory, static_like
from .capture import CapturedPiece, GraphBackend
from .entry import Entry
from .pending import Pending
from .pool import Pool
from .program import Program, Step, last_reads, taker


@dataclass(frozen=True)
class Reads:
    """Who reads a slot last.

    by_pieces: the slots that a captured piece reads, so that their address counts. last: step -> the slots
    that nothing reads after it. loose: what islands return to the caller alone, which is new in every call.
    """

    by_pieces: frozenset[int]
    last: tuple[tuple[int, ...], ...]
    loose: tuple[int, ...]


def reads_of(program: Program, kept: Sequence[int], *, apart: bool = False) -> Reads:
    """``kept`` are the arguments that stay with the caller.

    apart: the buffers of inputs share memory with nothing. A caller who is given the captured buffers may pass one of
    them to the next call, and loading that call's inputs one by one would write into it before it is read.
    """
    by_pieces = frozenset(i for step in program.steps if not step.island for i in step.inputs)
    stay = {*kept, *(slot for slot, _ in program.constants)}
    stay |= {slot for slot in program.outputs if slot >= len(program.inputs)}
    stay |= {*range(len(program.inputs))} if apart else set()
    last = last_reads(program.steps, stay)
    returned = {slot for step in program.steps if step.island for slot in step.outputs if slot in program.outputs}
    return Reads(by_pieces, last, tuple(sorted(returned - by_pieces)))


@dataclass
class Recording:
    """Fills an entry, step by step.

    kept: the arguments that captures hold by address. pool: where buffers lie; None gives each one memory of its own.
    """

    program: Program
    reads: Reads
    graphs: GraphBackend
    pending: Pending
    entry: Entry
    kept: Sequence[Tensor]
    pool: Pool | None
    #: Slot -> the piece that returned it, and in which place.
    _returned: dict[int, tuple[CapturedPiece, int]] = field(default_factory=dict)
    #: Slot -> its buffer, for inputs and islands' outputs.
    _buffers: set[int] = field(default_factory=set)

    def buffer(self, slot: int, like: Tensor) -> Tensor:
        """A buffer for an input or an island's output; it is put into the slot."""
        self._buffers.add(slot)
        pooled = self.pool is not None and like.device == self.pool.device
        made = self.pool.like(like) if pooled and self.pool is not None else static_like(like)
        self.entry.slots[slot] = made
        return made

    def steps(self, marks: Marks) -> None:
        """Run and record all steps. Releases what it has where the model raises."""
        entry = self.entry
        try:
            self.graphs.make_room()
            for i, step in enumerate(self.program.steps):
                marks.enter()
                if step.island:
                    entry.actions.append(self._island(step, self.reads.last[i]))
                elif entry.failed is None:
                    entry.failed = self._piece(step)
                else:
                    self._run(step)
                for slot in self.reads.last[i]:
                    self._give_back(slot)
                marks.leave()
        except BaseException:  # the model's own
            entry.release()
            raise
        entry.nbytes = self._nbytes()

    def give_outputs_back(self) -> None:
        """The caller has its copies: the next capture may use the memory."""
        for slot in set(self.program.outputs) & {*self._returned, *self._buffers}:
            self._give_back(slot)

    def _nbytes(self) -> int:
        """Bytes of the entry's own memory, shared or not; what only kernels of a piece use is not in it."""
        held: dict[int, int] = {}
        for slot in {*self._returned, *self._buffers}:
            value = self.entry.slots[slot]
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                held[storage.data_ptr()] = max(held.get(storage.data_ptr(), 0), storage.nbytes())
        for kept in self.kept:  # views of the caller's memory
            held.pop(kept.untyped_storage().data_ptr(), None)
        return sum(held.values())

    # -- steps -------------------------------------------------------------------------

    def _run(self, step: Step) -> Sequence[Any]:
        slots = self.entry.slots
        values = self.graphs.warm_up(step.call, [slots[i] for i in step.inputs])
        for slot, value in zip(step.outputs, values, strict=True):
            slots[slot] = value
        return values

    def _piece(self, step: Step) -> str | None:
        """Run a piece, capture it, and put what it returned where its replays will put it; why that failed."""
        entry = self.entry
        args = [entry.slots[i] for i in step.inputs]
        values = self._run(step)
        try:
            piece = self.graphs.capture(step.call, args)
        except Exception as error:
            return (
                f"capture of '{step.name}' at {sizes_text(entry.sizes)} failed ({type(error).__name__}: {error}); "
                "calls of these sizes run uncaptured"
            )
        entry.pieces.append(piece)
        for i, (slot, landing, value) in enumerate(zip(step.outputs, piece.outputs, values, strict=True)):
            if isinstance(landing, Tensor) and not same_memory(landing, value):  # else a view of an input
                copy_into(landing, value)
            entry.slots[slot] = landing
            self._returned[slot] = piece, i
        entry.actions.append(piece.replay)
        return None

    def _island(self, step: Step, last: Sequence[int]) -> Callable[[], None]:
        """Run an island now and again; what pieces read of it lands where they look for it.

        What only islands read, or the caller, stays as it comes: it may have another
        size each time.
        """
        call, take, slots, pending = step.call, taker(step.inputs), self.entry.slots, self.pending
        count, stays = len(step.outputs), [(i, s) for i, s in enumerate(step.outputs) if s not in self.reads.by_pieces]
        # Where the others land, and what the host would else ask the landing buffer in every replay.
        landings: list[tuple[int, Any, Any, Any]] = []
        for i, (slot, value) in enumerate(zip(step.outputs, call(*take(slots)), strict=True)):
            slots[slot] = value
            if slot not in self.reads.by_pieces:
                continue
            shape, dtype = (value.shape, value.dtype) if isinstance(value, Tensor) else (None, None)
            if isinstance(value, Tensor):
                pending.wait((value,))
                copy_into(self.buffer(slot, value), value)
            landings.append((i, _weak(self.pool, slots[slot]), shape, dtype))
        dropped = [s for s in last if s >= len(self.program.inputs) and s not in self.reads.by_pieces]
        dropped = [s for s in dropped if s not in self._returned]
        waits = any(s.calls for s in self.program.steps if s.island)

        def run() -> None:
            values = call(*take(slots))
            if len(values) != count:
                raise step.returned(len(values))
            if waits and pending.any():
                pending.wait(values[i] for i, *_ in landings)
            for i, slot in stays:
                slots[slot] = values[i]
            for i, landing, shape, dtype in landings:
                value = values[i]
                if shape is not None and isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype:
                    copy_into(landing, value)
                elif isinstance(value, Tensor) or isinstance(landing, Tensor) or landing != value:
                    seen, now = (_describe(v) for v in (landing, value))
                    raise DataDependentValueError(
                        f"island '{step.name}' returned {now}, and a captured piece was given {seen}; "
                        "add the ops that read it to split_ops"
                    )
            for slot in dropped:
                slots[slot] = None

        return run

    def _give_back(self, slot: int) -> None:
        """Let a slot be read on, and its memory be used by what is recorded next."""
        slots = self.entry.slots
        if slot in self._returned:
            piece, position = self._returned[slot]
            slots[slot] = piece.free(position)
        elif slot in self._buffers:
            slots[slot] = _weak(self.pool, slots[slot])
        elif slot >= len(self.program.inputs) and isinstance(slots[slot], Tensor):
            slots[slot] = None


def _weak(pool: Pool | None, value: Any) -> Any:
    """A tensor on the memory of ``value`` that does not keep it, where the pool keeps it mapped."""
    block = pool.block_of(value) if pool is not None and isinstance(value, Tensor) else None
    return block.like(value) if block is not None else value


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
