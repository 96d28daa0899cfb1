"""Lower: compile the pieces, and line everything up for the runner."""

from __future__ import annotations

import contextlib
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from ..runtime.collectives.moe import moe_combine_buffer, moe_dispatch
from ..runtime.errors import ArgumentError
from ..runtime.replay.program import Program, ReturnedView, Step, last_reads
from .elided import keep_snapshots
from .functional import written_inputs
from .given import check_graph, check_one
from .groups import collectives_of, group_of
from .inductor_order import compute_in_time, order_kept
from .roles import arguments, calls
from .split import SplitPlan
from .storage_offsets import begin_at_first_elements, told_unaligned, traced_offsets, unaligned_inputs
from .symbols import forget_sizes

_log = logging.getLogger(__name__)

PieceCompiler = Callable[[GraphModule], Callable[..., Sequence[Any]]]

#: Nothing is shown for work that ends sooner than this.
_QUIET_SECONDS = 2

_NO_VIEWS: Mapping[int, ReturnedView] = {}


def lower(
    plan: SplitPlan,
    whole: GraphModule,
    compile_piece: PieceCompiler,
    names: Sequence[str],
    static_inputs: frozenset[int],
    written: frozenset[int] = frozenset(),
    views: Mapping[int, ReturnedView] = _NO_VIEWS,
    caches: frozenset[int] = frozenset(),
) -> Program:
    """A :class:`Program` of compiled pieces and eager islands, in the plan's order.

    ``names`` are those of the inputs, for messages; ``static_inputs`` and ``written`` positions among the inputs.
    ``caches`` are those of ``static_inputs`` that the graph writes and
    no module owns: another call may have another one. Raises :class:`ArgumentError`.
    """
    check_one(plan, SplitPlan, "lower", "split(gm, parts)")
    check_graph(whole, "lower")
    slot_of = {node: i for i, node in enumerate(whole.graph.find_nodes(op="placeholder"))}
    slots = len(slot_of)
    _check_inputs(slots, names, static_inputs | written)
    constants: list[tuple[int, Any]] = []
    for node in whole.graph.find_nodes(op="get_attr"):
        slot_of[node] = slots
        constants.append((slots, attrgetter(str(node.target))(whole)))
        slots += 1
    islands = {p.name: p.island for p in plan.pieces}
    calls = whole.graph.find_nodes(op="call_module")
    steps: list[Step] = []
    for node in _progress(calls, "ringfence: compiling pieces"):
        name = str(node.target)
        piece: Any = whole.get_submodule(name)
        forget_sizes(piece)
        returned = _return_tuple(piece)
        outputs = tuple(range(slots, slots + returned))
        slots += returned
        items = [u for u in node.users if u.op == "call_function" and u.target is operator.getitem]
        if len(items) == len(node.users) and items:
            slot_of |= {item: outputs[arguments(item)[1]] for item in items}
        elif node.users:
            slot_of[node] = outputs[0]
        groups = tuple(group_of(n) for n in collectives_of(piece))
        call = eager_piece(piece) if islands[name] else compile_piece(piece)
        inputs, why = tuple(slot_of[n] for n in arguments(node)), getattr(call, "why", None)
        steps.append(Step(name, call, inputs, outputs, islands[name], calls=groups, op_by_op=why))

    (output,) = whole.graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    result_slots = []
    for result in results:
        if not isinstance(result, Node):
            constants.append((slots, result))
            result_slots.append(slots)
            slots += 1
        else:
            result_slots.append(slot_of[result])
    stay = {*static_inputs, *written, *result_slots, *(slot for slot, _ in constants)}
    return Program(
        steps=tuple(replace(step, frees=frees) for step, frees in zip(steps, last_reads(steps, stay), strict=True)),
        inputs=tuple(names),
        outputs=tuple(result_slots),
        slots=slots,
        constants=tuple(constants),
        static_inputs=static_inputs - caches,
        written=written,
        views=views,
        marked=caches,
    )


def _check_inputs(count: int, names: Sequence[str], positions: frozenset[int]) -> None:
    if isinstance(names, str) or len(names) != count:
        raise ArgumentError(f"lower was given names={names!r} for the {count} inputs of the graph; name each")
    beyond = sorted(position for position in positions if not 0 <= position < count)
    if beyond:
        raise ArgumentError(f"lower was given the inputs {beyond}, and the graph has inputs 0 to {count - 1}")


def _return_tuple(piece: GraphModule) -> int:
    """Make a piece's graph return a tuple, also of one; the number of its values."""
    (output,) = piece.graph.find_nodes(op="output")
    values = output.args[0]
    if not isinstance(values, tuple | list):
        output.args = ((values,),)
        return 1
    return len(values)


def _progress(items: Sequence[Node], label: str) -> Iterator[Node]:
    from tqdm import tqdm

    yield from tqdm(items, desc=label, delay=_QUIET_SECONDS, leave=False, disable=None, file=sys.stderr)


# -- piece compilers ---------------------------------------------------------------


def eager_piece(piece: GraphModule) -> Callable[..., Sequence[Any]]:
    """Run the piece's ATen ops as they are.

    AOT's graph modules may be lazy: their ``forward`` would go through the whole of ``Module.__call__`` in every step.
    """
    return GraphModule(piece, piece.graph).forward


def inductor_piece(piece: GraphModule) -> Callable[..., Sequence[Any]]:
    """Compile a piece with Inductor.

    The graph was traced with Inductor's decompositions, so the piece goes straight to
    its back half: a second AOT pass per piece would double the compile time.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.utils import BoxedBool

    begins, unaligned = traced_offsets(piece), unaligned_inputs(piece)
    otherwise = eager_piece(piece) if begins else None
    begun = begin_at_first_elements(piece)
    if isinstance(begun, str):
        _log.warning("ringfence: a piece of %d nodes runs op by op: %s", len(piece.graph.nodes), begun)
        return _OpByOp(piece, begun)
    piece = begun
    (output,) = piece.graph.find_nodes(op="output")
    # The next piece was traced with these strides, so Inductor may not choose its own.
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    written = written_inputs(piece)  # Inductor changes the graph
    if written:
        keep_snapshots(piece)
    compute_in_time(piece)
    for node in piece.graph.find_nodes(op="placeholder"):
        node.meta["val"] = _current(node.meta["val"])
    with _own_tracing_context(), order_kept(), _planes_left_alone(piece):
        piece = joint_graph_passes(piece)
        inputs = [n.meta["val"] for n in piece.graph.find_nodes(op="placeholder")]
        with told_unaligned([inputs[i] for i in unaligned]):
            compiled = compile_fx_inner(piece, inputs, is_inference=True, cudagraphs=BoxedBool(False))

    return _Compiled(compiled, written) if otherwise is None else _WhereTraced(compiled, written, begins, otherwise)


class _OpByOp:
    """A piece beside those that Inductor compiles, which runs as it is. why: in a sentence, for the report."""

    def __init__(self, piece: GraphModule, why: str) -> None:
        self._run, self.why = eager_piece(piece), why

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._run(*args)


class _Compiled:
    """A piece that Inductor compiled. What it returns looks at no memory that it writes into, nor at another output's.

    Inductor drops the clone of a slice that was written (``remove_noop_ops``, which compares the storages of the
    functional graph), and then writes that slice in place: what is left of the clone is a view of the input.
    """

    def __init__(self, compiled: Callable[[list[Any]], Sequence[Any]], written: frozenset[int]) -> None:
        self._compiled, self._written = compiled, sorted(written)

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self.boxed(list(args))

    def boxed(self, args: list[Any]) -> Sequence[Any]:
        """The same for arguments in a list, which die with their last use."""
        if not self._written:
            return self._compiled(args)
        taken = {args[i].untyped_storage()._cdata for i in self._written}
        outputs = []
        for output in self._compiled(args):
            if isinstance(output, torch.Tensor):
                if output.untyped_storage()._cdata in taken:
                    output = output.clone()
                taken.add(output.untyped_storage()._cdata)
            outputs.append(output)
        return outputs


class _WhereTraced(_Compiled):
    """A piece that Inductor compiled for inputs that begin at these offsets of their storages; op by op for others."""

    def __init__(
        self,
        compiled: Callable[[list[Any]], Sequence[Any]],
        written: frozenset[int],
        begins: Mapping[int, int],
        otherwise: Callable[..., Sequence[Any]],
    ) -> None:
        super().__init__(compiled, written)
        self._begins, self._otherwise = begins, otherwise
        self.why = (
            "only where an input begins elsewhere in its storage than when this was traced: a view counts from where "
            "the storage begins"
        )

    def boxed(self, args: list[Any]) -> Sequence[Any]:
        if all(args[i].storage_offset() == offset for i, offset in self._begins.items()):
            return super().boxed(args)
        return self._otherwise(*args)


def _planes_left_alone(piece: GraphModule) -> contextlib.AbstractContextManager[Any]:
    """Inductor writes later results into memory that an op returned, and that may be a workspace's."""
    if not any(calls(node, moe_dispatch, moe_combine_buffer) for node in piece.graph.nodes):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[Any] = inductor_config.patch(
        allow_buffer_reuse=False, inplace_buffers=False
    )
    return patched


def _current(value: Any) -> Any:
    """A size in the symbols that hold now: Inductor would bind one that was found equal to another since.

    One that was found to be a number stays as it is, as the graph of a branch or a loop has it too.
    """
    if not isinstance(value, torch.SymInt) or value.node.expr.is_Integer:
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


@contextlib.contextmanager
def _own_tracing_context() -> Iterator[None]:
    """Inductor writes output strides into the tracing context, which has room for one graph."""
    current = TracingContext.try_get()
    fake_mode = current.fake_mode if current is not None else None
    with torch._inductor.virtualized.V.set_fake_mode(fake_mode), tracing(TracingContext(fake_mode)):
        yield
