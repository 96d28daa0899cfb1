"""PiecewiseRunner: run a split graph, capturing its pieces where a size was asked for.

The first call of a captured size is an ordinary call that also records: each piece runs
once, which warms it up, and is captured, which runs nothing. So every effect happens
once, islands see real data, every rank makes the same collective calls as in any other
step, and the call returns its result. Later calls of that size copy their inputs into
the static buffers, replay the pieces and run the islands. Any other size runs uncaptured.

Modules that share compiled code (the layers of a model compiled one by one) call one
runner with different parameters; each set of parameters has captures of its own.

What makes a replay right is checked, always:

- parameters are where they were at capture (:class:`AddressChangedError`);
- the outputs of an island land in buffers whose addresses the next piece knows;
- a number that an island returns is the one that was baked in
  (:class:`DataDependentValueError`);
- no call runs inside a capture, beside another call of this runner, or in grad mode with
  inputs that need grad.

A capture that throws leaves nothing behind and breaks no step off: a rank that stopped
half-way would leave its peers waiting in the next collective. The rest of the step runs
uncaptured, the pieces are released, and calls of that size stay uncaptured from then on;
one :class:`CaptureFailedWarning` says why.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    AddressChangedError,
    CaptureFailedWarning,
    ConcurrentCallError,
    DataDependentValueError,
    GradModeError,
    InputError,
    NestedCaptureError,
    WorkspaceReplacedError,
)
from ..watch.journal import CAPTURE, REPLAY, UNCAPTURED, Journal, Marks, PieceNote, ProgramNote, sizes_text
from ..watch.supervision import Supervision
from .buffers import copy_into, narrow, static_like, weak_memory
from .capture import CapturedPiece, GraphBackend
from .program import Padding, Program, SizeRule, Step

#: Captures of one token count that differ in another size (a batch of sequences, the length of a cache).
#: A size that grows in every step would otherwise fill the memory with graphs that are used once.
_CAPTURES_PER_TOKEN_COUNT = 8


class _Parameter:
    """A parameter as a capture saw it. Keeps neither the object nor its memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._memory = weak_memory(tensor)
        self._address = tensor.data_ptr()

    @property
    def gone(self) -> bool:
        return self._memory() is None

    @property
    def moved(self) -> bool:
        tensor = self._tensor()
        return tensor is not None and tensor.data_ptr() != self._address


@dataclass
class _Entry:
    """Everything recorded for one tuple of sizes and one set of parameters."""

    sizes: tuple[int, ...]
    slots: list[Any]
    actions: list[Callable[[], None]]
    pieces: list[CapturedPiece]
    addresses: tuple[int, ...]
    parameters: list[_Parameter]
    failed: str | None = None

    def release(self) -> None:
        for piece in self.pieces:
            piece.release()


class PiecewiseRunner:
    """Calls a :class:`Program` with the arguments of its graph; returns a list of outputs.

    graphs: what captures; None never captures.
    capture_sizes: token counts to capture.
    padding: serve a size below a captured one by that one; None does not pad.
    closed: whether the workspace of the collectives was closed; graphs captured over it are refused
        from then on (:class:`WorkspaceReplacedError`).
    max_tokens: the largest token count that is served at all; None serves any.
    static_outputs: return the captured buffers themselves, valid until the next call,
        instead of copies that the caller owns.
    journal: where steps and pieces are written down; one of its own by default.
    supervision: what ranks agree on beside the steps, and what follows when one of them fails.
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
    ) -> None:
        self._program = program
        self._journal = journal if journal is not None else Journal(pieces=1024, steps=64)
        self._supervision = supervision if supervision is not None else Supervision()
        notes = tuple(PieceNote(step.name, step.island, step.calls) for step in program.steps)
        self._number = self._journal.register(ProgramNote(notes, collective, self._supervision.graph))
        self._sizes = sizes
        self._graphs = graphs if capture_sizes and sizes.tokens is not None else None
        self._in_use = threading.Lock()
        self._capture_sizes = sorted(capture_sizes)
        self._padding = padding
        self._closed = closed
        self._max_tokens = max_tokens
        self._static_outputs = static_outputs
        #: Whether captured pieces hold collectives, which every rank must capture then.
        self._lockstep = self._graphs is not None and any(s.calls for s in program.steps if not s.island)
        #: Sizes of all ranks that were captured, or tried -> their token count.
        self._met: dict[tuple[int, ...], int] = {}
        self._failed: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self._entries: dict[tuple[tuple[int, ...], tuple[int, ...]], _Entry] = {}
        self._read_by_pieces = {i for step in program.steps if not step.island for i in step.inputs}
        self._static = sorted(program.static_inputs)
        read_by_islands = {i for step in program.steps if step.island for i in step.inputs}
        self._read_statics = [i for i in self._static if i in read_by_islands or i in program.outputs]
        self._dynamic = [i for i in range(len(program.inputs)) if i not in program.static_inputs]

    @property
    def captured_sizes(self) -> list[tuple[int, ...]]:
        """The tuples of sizes that have been captured so far."""
        return list(dict.fromkeys(sizes for sizes, _ in self._entries))

    def __call__(self, *args: Any) -> list[Any]:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise GradModeError(
                "the runner serves inference and was called in grad mode with inputs that require grad; "
                "call it under torch.no_grad() or torch.inference_mode()"
            )
        self._supervision.check()
        if self._max_tokens is not None:
            self._check_tokens(args)
        if self._graphs is None:
            return self._run(args, self._sizes.sizes(args))
        if self._graphs.is_capturing():
            raise NestedCaptureError(
                "the model captures its own pieces and was called inside another capture; "
                "compile it with capture_sizes=() to capture it from outside"
            )
        sizes = self._sizes.sizes(args)
        target = self._target(sizes, args)
        if target is None:
            return self._run(args, sizes)
        if not self._in_use.acquire(blocking=False):
            raise ConcurrentCallError(
                "the model's captured buffers serve one call at a time, and a second one came from another thread or "
                "from inside the model; serve from one thread, or compile a copy for each"
            )
        try:
            return self._serve(target, sizes, args)
        finally:
            self._in_use.release()

    def _together(self, target: tuple[int, ...]) -> bool:
        """Whether every rank captures in this step, so that they can agree on it.

        Where captured pieces hold collectives, all must. Where not, they do when they first meet sizes that all of them
        have; what else a capture is for, such as a rank's own sizes and addresses, is its own business.
        """
        if self._lockstep:
            return True
        shared = self._compared(target)
        first = shared not in self._met
        self._met.setdefault(shared, self._tokens(target))
        return first

    def _compared(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """What of a step's sizes must be the same on all ranks."""
        return sizes if self._lockstep else self._sizes.of_all_ranks(sizes)

    def _serve(self, target: tuple[int, ...], sizes: tuple[int, ...], args: Sequence[Any]) -> list[Any]:
        addresses = tuple([args[i].data_ptr() for i in self._static])
        entry = self._entries.get((target, addresses))
        together = False
        if entry is None:
            self._check_parameters(target)
            together = self._together(target)
            if (target, addresses) in self._failed or self._has_enough(target, addresses, together):
                return self._run(args, sizes)
            if together:
                self._supervision.before_capture(self._compared(target))
            parameters = [_Parameter(args[i]) for i in self._static]
            entry = _Entry(target, [], [], [], addresses, parameters)
            run, how = self._capture, CAPTURE
        elif self._closed():
            raise WorkspaceReplacedError(
                f"the workspace of the collectives was closed since {sizes_text(target)} were captured, and the graph "
                "holds its addresses; start over with torch._dynamo.reset()"
            )
        else:
            run, how = self._replay, REPLAY
        try:
            self._step(target, how, run, entry, sizes, args)
            if how is CAPTURE:
                self._keep_or_drop(entry, together)
            self._write_back(entry, sizes, args)
            return self._outputs(entry, sizes, args)
        finally:
            self._forget_parameters(entry)

    def _step(self, sizes: tuple[int, ...], how: str, body: Callable[..., None], *args: Any) -> None:
        """``body(marks, *args)`` as one step of the journal; the other ranks hear of it when it fails."""
        self._supervision.before_step(self._compared(sizes), how)
        marks = self._journal.begin(self._number, sizes, how)
        try:
            body(marks, *args)
        except BaseException as error:
            try:
                self._supervision.failed(error)  # raises in its place where another rank is the cause
            finally:
                marks.fail()
            raise
        marks.end()

    def _check_tokens(self, args: Sequence[Any]) -> None:
        assert self._sizes.tokens is not None and self._max_tokens is not None
        tokens = self._sizes.tokens(self._sizes.sizes(args))
        if tokens > self._max_tokens:
            raise InputError(
                f"a call of {tokens} tokens, and deterministic=True serves at most max_tokens={self._max_tokens}: "
                "another kernel would not return the same bits"
            )

    def _has_enough(self, target: tuple[int, ...], addresses: tuple[int, ...], together: bool) -> bool:
        tokens = self._tokens(target)
        if together and not self._lockstep:  # what all ranks count alike; this one is among them already
            return sum(1 for n in self._met.values() if n == tokens) > _CAPTURES_PER_TOKEN_COUNT
        alike = (s for s, a in self._entries if a == addresses and self._tokens(s) == tokens)
        return sum(1 for _ in alike) >= _CAPTURES_PER_TOKEN_COUNT

    def _tokens(self, sizes: tuple[int, ...]) -> int:
        assert self._sizes.tokens is not None
        return self._sizes.tokens(sizes)

    def _replay(self, marks: Marks, entry: _Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        self._load(entry, sizes, args)
        enter, leave = marks.enter, marks.leave
        for action in entry.actions:
            enter()
            action()
            leave()

    # -- uncaptured ------------------------------------------------------------------

    def _run(self, args: Sequence[Any], sizes: tuple[int, ...]) -> list[Any]:
        slots = self._slots(args)
        self._step(sizes, UNCAPTURED, self._run_steps, slots)
        return [slots[i] for i in self._program.outputs]

    def _slots(self, args: Sequence[Any]) -> list[Any]:
        slots = [*args, *[None] * (self._program.slots - len(args))]
        for slot, value in self._program.constants:
            slots[slot] = value
        return slots

    def _run_steps(self, marks: Marks, slots: list[Any]) -> None:
        enter, leave = marks.enter, marks.leave
        for step in self._program.steps:
            enter()
            values: Any = step.call(*[slots[i] for i in step.inputs])
            leave()
            for slot, value in zip(step.outputs, values, strict=True):
                slots[slot] = value
            values = value = None  # an output that nobody reads dies here, not after the next step
            for slot in step.frees:
                slots[slot] = None

    # -- which captured size serves this call ----------------------------------------

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

    def _load(self, entry: _Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        """Copy the call's inputs into the static buffers; rows that are padding become zero."""
        grown = self._padding.inputs if self._padding is not None and sizes != entry.sizes else {}
        for i in self._read_statics:
            entry.slots[i] = args[i]
        for i in self._dynamic:
            buffer = entry.slots[i]
            if not isinstance(buffer, Tensor):
                continue
            if i in grown:
                buffer.zero_()
                buffer = narrow(buffer, grown[i], sizes[0])
            copy_into(buffer, args[i])

    def _forget_parameters(self, entry: _Entry) -> None:
        """Keep no parameter alive: a module that is dropped takes its memory with it."""
        for i in self._static:
            entry.slots[i] = None

    def _write_back(self, entry: _Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        """Give the caller's inputs what was written into our copies of them."""
        grown = self._padding.inputs if self._padding is not None and sizes != entry.sizes else {}
        for i in self._program.written:
            copy_into(args[i], narrow(entry.slots[i], grown[i], sizes[0]) if i in grown else entry.slots[i])

    def _outputs(self, entry: _Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> list[Any]:
        grown = self._padding.outputs if self._padding is not None and sizes != entry.sizes else {}
        outputs = []
        for position, slot in enumerate(self._program.outputs):
            if slot < len(args):  # the graph returns an input: the caller's own, not our copy of it
                outputs.append(args[slot])
                continue
            value = entry.slots[slot]
            if position in grown:
                value = narrow(value, grown[position], sizes[0])
            if isinstance(value, Tensor) and not self._static_outputs:
                value = value.clone()
            outputs.append(value)
        return outputs

    def _check_parameters(self, target: tuple[int, ...]) -> None:
        """Why do no captured parameters match this call's? Only other modules may be the reason.

        Captures with a parameter whose memory is gone can never be used again and are
        released. A parameter that lives where the capture did not see it is refused: its
        captures would go on using the old memory.
        """
        for key, entry in list(self._entries.items()):
            if key[0] != target:
                continue
            for i, parameter in zip(self._static, entry.parameters, strict=True):
                if parameter.moved:
                    raise AddressChangedError(
                        f"parameter '{self._program.inputs[i]}' moved since it was captured at {sizes_text(target)}; "
                        "update parameters in place (p.copy_(new)), or start over with torch._dynamo.reset()"
                    )
            if any(p.gone for p in entry.parameters):
                self._entries.pop(key).release()

    def _capture(self, marks: Marks, entry: _Entry, sizes: tuple[int, ...], args: Sequence[Any]) -> None:
        target = entry.sizes
        entry.slots = slots = self._slots(args)
        grown = self._padding.inputs if self._padding is not None and target != sizes else {}
        for i in self._dynamic:
            if i in grown:
                shape = [target[0] if d in grown[i] else n for d, n in enumerate(args[i].shape)]
                slots[i] = static_like(args[i].new_empty(shape))
            elif isinstance(args[i], Tensor):
                slots[i] = static_like(args[i])
            elif target != sizes and isinstance(args[i], int):
                slots[i] = target[0]  # a graph that can be padded has one size, and this is it
        self._load(entry, sizes, args)
        try:
            for step in self._program.steps:
                marks.enter()
                if step.island:
                    entry.actions.append(self._record_island(step, entry))
                elif entry.failed is None:
                    entry.failed = self._record(step, entry)
                else:
                    self._run_piece(step, entry)
                marks.leave()
        except BaseException:  # the model's own
            entry.release()
            raise

    def _keep_or_drop(self, entry: _Entry, together: bool) -> None:
        """Use the captures from now on if every rank that captured has its own; if not, no rank does."""
        key = entry.sizes, entry.addresses
        vote = self._supervision.after_capture if together else self._supervision.after_own_capture
        try:
            failures = vote(entry.failed)
        except BaseException:
            entry.release()
            raise
        if not failures:
            self._entries[key] = entry
            return
        entry.release()
        self._failed.add(key)
        warnings.warn(f"ringfence: {'; '.join(failures)}", CaptureFailedWarning, stacklevel=2)

    def _run_piece(self, step: Step, entry: _Entry) -> Sequence[Any]:
        assert self._graphs is not None
        values = self._graphs.warm_up(step.call, [entry.slots[i] for i in step.inputs])
        for slot, value in zip(step.outputs, values, strict=True):
            entry.slots[slot] = value
        return values

    def _record(self, step: Step, entry: _Entry) -> str | None:
        """Run a piece, capture it, and put what it returned where its replays will put it; why that failed."""
        assert self._graphs is not None
        args = [entry.slots[i] for i in step.inputs]
        values = self._run_piece(step, entry)
        try:
            piece = self._graphs.capture(step.call, args)
        except Exception as error:
            return (
                f"capture of '{step.name}' at {sizes_text(entry.sizes)} failed ({type(error).__name__}: {error}); "
                "calls of these sizes run uncaptured"
            )
        entry.pieces.append(piece)
        for slot, landing, value in zip(step.outputs, piece.outputs, values, strict=True):
            if isinstance(landing, Tensor):
                copy_into(landing, value)
            entry.slots[slot] = landing
        entry.actions.append(piece.replay)
        return None

    def _record_island(self, step: Step, entry: _Entry) -> Callable[[], None]:
        """Run an island now and again; what pieces read of it lands where they look for it.

        What only islands read, or the caller, stays as it comes: it may have another
        size each time.
        """
        call, inputs, slots = step.call, step.inputs, entry.slots
        # Where each output lands, and what the host would else ask the landing buffer in every replay.
        landings: list[tuple[int, bool, Any, Any, Any]] = []
        for slot, value in zip(step.outputs, call(*[slots[i] for i in inputs]), strict=True):
            lands = slot in self._read_by_pieces
            slots[slot] = static_like(value) if lands and isinstance(value, Tensor) else value
            shape, dtype = (value.shape, value.dtype) if isinstance(value, Tensor) else (None, None)
            if slots[slot] is not value:
                copy_into(slots[slot], value)
            landings.append((slot, lands, slots[slot] if lands else None, shape, dtype))

        def run() -> None:
            values = call(*[slots[i] for i in inputs])
            for (slot, lands, landing, shape, dtype), value in zip(landings, values, strict=True):
                if not lands:
                    slots[slot] = value
                elif shape is not None and isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype:
                    copy_into(landing, value)
                elif isinstance(value, Tensor) or isinstance(landing, Tensor) or landing != value:
                    seen, now = (_describe(v) for v in (landing, value))
                    raise DataDependentValueError(
                        f"island '{step.name}' returned {now}, and a captured piece was given {seen}; "
                        "add the ops that read it to split_ops"
                    )

        return run


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
