"""PiecewiseRunner: run a split graph, capturing its pieces where a size was asked for.

The first call of a captured size is an ordinary call that also records: each piece runs
once, which warms it up, and is captured, which runs nothing. So every effect happens
once, islands see real data, every rank makes the same collective calls as in any other
step, and the call returns its result. Later calls of that size copy their inputs into
the static buffers, replay the pieces and run the islands. Any other size runs uncaptured.

Parameters, and the inputs that the program writes into, are kept: they stay where the caller has them, and a capture
belongs to their addresses. Modules that share compiled code (the layers of a model compiled one by one) call one runner
with different parameters, and each set has captures of its own; :mod:`.places` says what follows when they move.

What makes a replay right is checked, always:

- what is kept is where it was at capture;
- the outputs of an island land in buffers whose addresses the next piece knows;
- a number that an island returns is the one that was baked in
  (:class:`DataDependentValueError`);
- a collective that nobody has waited for is waited for before a value is copied;
- no call runs inside a capture, or in grad mode with inputs that need grad; another call of this runner, or of one that
  shares its memory, which runs around it or on another thread, makes it run uncaptured.

A capture that throws leaves nothing behind and breaks no step off: a rank that stopped half-way would leave its peers
waiting in the next collective. The rest of the step runs uncaptured, the pieces are released, and calls of that size
stay uncaptured from then on; one :class:`CaptureFailedWarning` says why.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    AddressChangedError,
    ArgumentError,
    CaptureFailedWarning,
    GradModeError,
    NestedCaptureError,
    WorkspaceReplacedError,
)
from ..watch.journal import CAPTURE, REPLAY, UNCAPTURED, Journal, Marks, PieceNote, ProgramNote, sizes_text
from ..watch.supervision import Supervision
from .buffers import Loads, narrow
from .capture import GraphBackend
from .entry import Entry, Key
from .pending import Pending
from .places import How, Places, nothing
from .pool import Pool
from .program import Padding, Program, SizeRule
from .recording import Recording, reads_of
from .remarks import Remarks
from .stats import Counts, Uncaptured


class PiecewiseRunner:
    """Calls a :class:`Program` with the arguments of its graph; returns a list of outputs.

    graphs: what captures; None never captures.
    capture_sizes: token counts to capture.
    padding: serve a size below a captured one by that one; None does not pad.
    closed: whether the workspace of the collectives was closed; its captures are :class:`WorkspaceReplacedError` then.
    max_tokens: the largest token count that is served at all; None serves any.
    static_outputs: return the captured buffers themselves, valid until the next call,
        instead of copies that the caller owns.
    journal: where steps and pieces are written down; one of its own by default.
    supervision: what ranks agree on beside the steps, and what follows when one of them fails.
    collective: what serves its calls, for the journal.
    remarks: who hears what shows in calls only.
    """

    def __init__(
        self,
        program: Program,
        sizes: SizeRule,
        graphs: GraphBackend | None = None,
        capture_sizes: Collection[int] = (),
        *,
        padding: Padding | None = None,
        closed: Callable[[], bool] = lambda: False,
        max_tokens: int | None = None,
        static_outputs: bool = False,
        journal: Journal | None = None,
        supervision: Supervision | None = None,
        collective: str = "",
        remarks: Remarks | None = None,
    ) -> None:
        if not isinstance(program, Program) or not isinstance(sizes, SizeRule):
            raise ArgumentError(
                f"a runner takes a Program and a SizeRule, as lower(...) and size_rule(...) return them, not a "
                f"{type(program).__name__} and a {type(sizes).__name__}"
            )
        self._program = program
        self._journal = journal if journal is not None else Journal(pieces=1024, steps=64)
        self._supervision = supervision if supervision is not None else Supervision()
        notes = tuple(PieceNote(step.name, step.island, step.calls) for step in program.steps)
        lockstep = any(step.calls for step in program.steps if not step.island)
        shared = None if lockstep else sizes.shared  # as they are compared before a capture
        note = ProgramNote(notes, collective, self._supervision.graph, shared, lockstep)
        self._number, self.groups = self._journal.register(note), note.groups
        self._sizes = sizes
        self._graphs = graphs if capture_sizes and sizes.tokens is not None else None
        self._in_use = threading.Lock()
        self._capture_sizes = sorted(capture_sizes)
        self._padding = padding if not program.written - program.static_inputs else None  # rows would land in caches
        self._closed = closed
        self._max_tokens = max_tokens
        self._static_outputs = static_outputs
        self.counts = Counts()
        self._places = Places(program, sizes, self._supervision, remarks, self.counts)
        self._reads = reads_of(program, self._places.kept, apart=static_outputs)
        self._pool: Pool | None = None
        self._pending = Pending()
        self._issues = any(step.calls for step in program.steps if step.island)
        read_by_islands = {i for step in program.steps if step.island for i in step.inputs}
        self._read_kept = any(i in read_by_islands for i in self._places.kept)
        self._loose = () if static_outputs else self._reads.loose
        self._runs = [step.run for step in program.steps]
        self._dynamic = [i for i in range(len(program.inputs)) if i not in self._places.kept]
        self._unseen = program.unseen

    @property
    def bytes_held(self) -> dict[tuple[int, ...], int]:
        """Bytes of the buffers and outputs of each tuple of sizes, shared with others' or not."""
        held: dict[tuple[int, ...], int] = {}
        for entry in self._places.entries.values():
            held[entry.sizes] = held.get(entry.sizes, 0) + entry.nbytes
        return held

    @property
    def captured_sizes(self) -> list[tuple[int, ...]]:
        """The tuples of sizes that have been captured so far."""
        return list(dict.fromkeys(sizes for sizes, _ in self._places.entries))

    def __call__(self, *args: Any) -> list[Any]:
        return self.boxed(list(args))

    def boxed(self, args: list[Any]) -> list[Any]:
        """A call with its arguments in a list, which is emptied: an uncaptured call holds each up to its last use."""
        begun = self._journal.begun, self._journal.missed  # steps, and those beside another's
        self._places.take_back = nothing
        try:
            return self._call(args)
        except Exception as error:
            if (self._journal.begun, self._journal.missed) == begun:
                self._places.take_back()
                self.refuses(error)
            raise

    def refuses(self, error: Exception, groups: Collection[str] = ()) -> None:
        """A call that was to come here, or to a graph of these groups, is an error, and its step does not begin."""
        self._supervision.refuses(error, groups or self.groups)

    def _call(self, args: list[Any]) -> list[Any]:
        self._supervision.check()
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise GradModeError(
                "the runner serves inference and was called in grad mode with inputs that require grad; "
                "call it under torch.no_grad() or torch.inference_mode()"
            )
        if len(args) != len(self._program.inputs):
            wanted = f"{len(self._program.inputs)} inputs ({', '.join(self._program.inputs)})"
            raise ArgumentError(f"the runner takes {wanted}, and was given {len(args)}")
        if self._max_tokens is not None:
            self._sizes.check(args, self._max_tokens)
        if self._graphs is None:
            self.counts.uncaptured[Uncaptured.OFF] += 1
            return self._run(args, self._sizes.sizes(args))
        if self._graphs.is_capturing():
            raise NestedCaptureError(
                "the model captures its own pieces and was called inside another capture; "
                "compile it with capture_sizes=() to capture it from outside"
            )
        sizes = self._sizes.sizes(args)
        target = self._target(sizes, args)
        if target is None:
            self.counts.uncaptured[Uncaptured.SIZE] += 1
            return self._run(args, sizes)
        if not self._in_use.acquire(blocking=False):  # by a call around this one, or on another thread
            return self._run_as(target, sizes, args, Uncaptured.BUSY)
        try:
            return self._serve(target, sizes, args)
        finally:
            self._in_use.release()

    def _serve(self, target: tuple[int, ...], sizes: tuple[int, ...], args: list[Any]) -> list[Any]:
        assert self._graphs is not None
        if self._pool is None:
            self._pool = self._graphs.pool_for(args, own=self._static_outputs)  # nobody writes what the caller holds
        if self._pool is not None and not self._pool.enter():
            return self._run_as(target, sizes, args, Uncaptured.POOL)
        try:
            if self._pending.any():
                self._pending.wait(args)
            places = self._places
            key = places.key(target, args)
            if places.share_memory(key, args, self._dynamic):
                return self._run_as(target, sizes, args, Uncaptured.SHARED)
            entry = None if places.lockstep else places.entries.get(key)
            how = How.REPLAY if entry is not None else self._how(key, args)
            if how is How.REPLAY:
                return self._serve_replay(entry or places.entries[key], sizes, args)
            if how is How.UNCAPTURED:
                return self._run_as(target, sizes, args, places.why)
            return self._serve_capture(key, sizes, args, agreed=how is How.CAPTURE)
        finally:
            if self._pool is not None:
                self._pool.leave()

    def _how(self, key: Key, args: Sequence[Any]) -> How:
        try:
            return self._places.how(key, args)
        except AddressChangedError as error:  # the others replay now, and would wait for this rank

            def break_off(marks: Marks, error: AddressChangedError = error) -> None:
                raise error

            self._step(key[0], REPLAY, break_off)
            raise

    def _serve_replay(self, entry: Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> list[Any]:
        if self._closed():
            raise WorkspaceReplacedError(
                f"the workspace of the collectives was closed since {sizes_text(entry.sizes)} were captured, and the "
                "graph holds its addresses; start over with torch._dynamo.reset()"
            )
        assert self._graphs is not None
        if self._graphs.by_owner and entry.gone:  # other tensors lie at the addresses that count
            entry.parameters = self._places.kept_of(args)
            for piece in entry.pieces:
                piece.adopt([args[i] for i in self._places.kept])
        self._places.replays(entry)
        try:
            self._step(entry.sizes, REPLAY, self._replay, entry, sizes, args)
            return self._outputs(entry, sizes, args)
        finally:
            if self._read_kept:
                entry.forget()
            if self._loose:
                self._drop_loose(entry)

    def _serve_capture(self, key: Key, sizes: tuple[int, ...], args: Sequence[Any], *, agreed: bool) -> list[Any]:
        """Record, and return what was computed meanwhile. ``agreed``: all ranks record in this step."""
        assert self._graphs is not None
        if agreed:
            self._supervision.before_capture(self._places.compared(key[0]))
        entry = Entry(key[0], self._program.slots_of(args), [], [], key[1], self._places.kept_of(args))
        kept = [args[i] for i in self._places.kept]
        recording = Recording(self._program, self._reads, self._graphs, self._pending, entry, kept, self._pool)
        try:
            self._step(key[0], CAPTURE, self._record, recording, sizes, args)
            self._keep_or_drop(entry, args, agreed)
            outputs = self._outputs(entry, sizes, args)
            if entry.failed is None and not self._static_outputs:
                recording.give_outputs_back()
            return outputs
        finally:
            entry.settle(args, self._places.kept)
            self._drop_loose(entry)

    def _step(self, sizes: tuple[int, ...], how: str, body: Callable[..., None], *args: Any) -> None:
        """``body(marks, *args)`` as one step of the journal; the other ranks hear of it when it fails."""
        self._supervision.before_step(self._places.compared(sizes), how, first=not self._journal.has_run(self._number))
        marks = self._journal.begin(self._number, sizes, how)
        try:
            body(marks, *args)
            self._supervision.check_kernels()
        except BaseException as error:
            self._supervision.break_off(error, marks)  # raises in its place where another rank is the cause
            raise
        marks.end()

    def _replay(self, marks: Marks, entry: Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        if self._read_kept:
            entry.lend(args, self._dynamic)
        self._load(entry.loads, entry.sizes, sizes, args)
        for action in marks.each(entry.actions):
            action()

    # -- uncaptured ------------------------------------------------------------------

    def _run(self, args: list[Any], sizes: tuple[int, ...]) -> list[Any]:
        viewed = {i: args[i] for i in self._program.viewed}
        return self._program.with_views(self._values(args, sizes), viewed)

    def _values(self, args: list[Any], sizes: tuple[int, ...]) -> list[Any]:
        """The outputs of an uncaptured call. Empties ``args``: the slots hold what is read later."""
        slots = self._program.slots_of(args)
        args.clear()
        self._step(sizes, UNCAPTURED, self._run_steps, slots)
        return [slots[i] for i in self._program.outputs]

    def _run_as(self, target: tuple[int, ...], sizes: tuple[int, ...], args: list[Any], why: Uncaptured) -> list[Any]:
        """Uncaptured what would be a call of ``target``: other ranks may replay it, so the rows must be as many."""
        self.counts.uncaptured[why] += 1
        if target == sizes or self._padding is None:
            return self._run(args, sizes)
        pads, grown = self._padding, list(args)
        for i, arg in enumerate(args):
            if i in pads.inputs:
                grown[i] = arg.new_zeros([target[0] if d in pads.inputs[i] else n for d, n in enumerate(arg.shape)])
                narrow(grown[i], pads.inputs[i], sizes[0]).copy_(arg)
            elif isinstance(arg, int) and i in self._dynamic:
                grown[i] = target[0]
        outputs = self._values(grown, target)
        for position, slot in enumerate(self._program.outputs):
            if slot < len(args):
                outputs[position] = args[slot]
            elif position in pads.outputs and position not in self._unseen:
                outputs[position] = narrow(outputs[position], pads.outputs[position], sizes[0]).clone()
        return self._program.with_views(outputs, args)

    def _run_steps(self, marks: Marks, slots: list[Any]) -> None:
        for run in marks.each(self._runs):
            run(slots)

    def _target(self, sizes: tuple[int, ...], args: Sequence[Any]) -> tuple[int, ...] | None:
        assert self._sizes.tokens is not None
        tokens = self._sizes.tokens(sizes)
        if tokens in self._capture_sizes:
            return sizes
        if self._padding is None or not all(args[i].is_contiguous() for i in self._padding.inputs):
            return None  # a grown buffer has the strides that were traced only if both are contiguous
        larger = (n for n in self._capture_sizes if n > tokens)
        return next(filter(None, (self._padding.size_for(n, self._sizes, sizes) for n in larger)), None)

    # -- captured ----------------------------------------------------------------------

    def _load(self, loads: Loads, target: tuple[int, ...], sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        """Copy the call's inputs into the static buffers; rows that are padding become zero."""
        if self._padding is not None and sizes != target:
            buffers = dict(loads.buffers)
            for i in self._padding.inputs:
                buffers[i] = narrow(buffers[i].zero_(), self._padding.inputs[i], sizes[0])
            loads = Loads(buffers)
        loads(args)

    def _drop_loose(self, entry: Entry) -> None:
        for i in self._loose:
            entry.slots[i] = None

    def _outputs(self, entry: Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> list[Any]:
        grown = self._padding.outputs if self._padding is not None and sizes != entry.sizes else {}
        outputs = []
        if self._issues and self._pending.any():
            self._pending.wait(entry.slots[slot] for slot in self._program.outputs)
        for position, slot in enumerate(self._program.outputs):
            if slot < len(args) or position in self._unseen:  # an input is the caller's own, not our copy of it
                outputs.append(args[slot] if slot < len(args) else None)
                continue
            value = entry.slots[slot]
            if position in grown:
                value = narrow(value, grown[position], sizes[0])
            if isinstance(value, Tensor) and not self._static_outputs:
                value = value.clone()
            outputs.append(value)
        return self._program.with_views(outputs, args)

    def _record(self, marks: Marks, recording: Recording, sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        entry = recording.entry
        target, slots = entry.sizes, entry.slots
        grown = self._padding.inputs if self._padding is not None and target != sizes else {}
        for i in self._dynamic:
            if i in grown:
                shape = [target[0] if d in grown[i] else n for d, n in enumerate(args[i].shape)]
                recording.buffer(i, args[i].new_empty(shape))
            elif isinstance(args[i], Tensor):
                recording.buffer(i, args[i])
            elif target != sizes and isinstance(args[i], int):
                slots[i] = target[0]  # a graph that can be padded has one size, and this is it
        self._places.note(args, self._dynamic)
        loads = Loads({i: slots[i] for i in self._dynamic if isinstance(slots[i], Tensor)})
        self._load(loads, target, sizes, args)
        del loads  # memory of a buffer that was read is given to later ones
        recording.steps(marks)

    def _keep_or_drop(self, entry: Entry, args: Sequence[Any], agreed: bool) -> None:
        """Use the captures from now on if every rank that captured has its own; if not, no rank does."""
        try:
            vote = self._supervision.after_capture if agreed else self._supervision.after_own_capture
            failures = vote(entry.failed)
        except BaseException:
            self._places.drop(entry)
            raise
        self._places.recorded(entry, args, failed=bool(failures))
        if failures:
            entry.failed = entry.failed or failures[0]
            self._places.drop(entry)
            warnings.warn(f"ringfence: {'; '.join(failures)}", CaptureFailedWarning, stacklevel=2)
