"""What an op asks of the host: a replayed graph would not ask again.

Each function answers a question about one op, as in :mod:`.roles`. The kinds are those that PyTorch's own partitioner
splits at (``torch/_inductor/scheduler.py``, ``Scheduler.should_partition``, and ``torch/_inductor/utils.py``,
``is_cudagraph_unsafe_fx_node``), and a few that it leaves to its user.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch._inductor.config as inductor_config
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .constants import is_constant
from .devices import accelerators_of
from .op_calls import OpCall, op_arguments, tensors_of
from .roles import asks_for_shape, aten, calls


class Unsafe(StrEnum):
    """Why a replay would not do what an op does. Each is a row of :data:`.rules.RULES`."""

    DATA_DEPENDENT = "data_dependent"
    CONTROL_FLOW = "control_flow"
    HOST_MEMORY = "host_memory"
    CPU_OP = "cpu_op"
    OTHER_DEVICE = "other_device"
    SPARSE = "sparse"
    BOOLEAN_INDEX = "boolean_index"
    RNG_STATE = "rng_state"
    HOST_OP = "host_op"
    EFFECT = "effect"
    HIGHER_ORDER = "higher_order"
    TAGGED = "cudagraph_unsafe"
    NAMED = "named_to_inductor"


#: Ops that ask the host for something, though no tag says so. ``FORBIDDEN_CUDAGRAPH_OPS`` of torch/_inductor/utils.py,
#: ``_linalg_check_errors``, which reads ``infos.any().item()`` (ATen/native/BatchLinearAlgebra.cpp), and transformers'
#: loop over experts, which reads ``offs.tolist()`` (integrations/moe.py), for dtypes and devices without grouped GEMM.
HOST_OPS = frozenset(
    {
        "aten::_fused_moving_avg_obs_fq_helper",
        "aten::_fused_moving_avg_obs_fq_helper_functional",
        "aten::_linalg_check_errors",
        "fbgemm::dense_to_jagged",
        "fbgemm::jagged_to_padded_dense",
        "transformers::grouped_mm_fallback",
        *(["aten::topk"] if torch.version.hip is not None else []),  # faults in the second replay there
    }
)

#: The host decides what runs next, or how often. Inductor makes loops of ``scan`` and ``map``.
_CONTROL_FLOW = frozenset({"cond", "while_loop", "while_loop_stack_output", "scan", "map_impl"})
#: They do something besides their value.
_EFFECTS = frozenset({"with_effects", "call_torchbind", "invoke_leaf_function", "print"})
#: They read or set the state of a generator; nobody registers another one than the default with the capture.
_RNG_STATE = frozenset(
    {"run_and_save_rng_state", "run_with_rng_state", "graphsafe_run_with_rng_state", "run_dtensor_rng_op"}
)
_HIGHER_ORDER = {
    **dict.fromkeys(_CONTROL_FLOW, Unsafe.CONTROL_FLOW),
    **dict.fromkeys(_EFFECTS, Unsafe.EFFECT),
    **dict.fromkeys(_RNG_STATE, Unsafe.RNG_STATE),
}
#: Higher-order ops that do nothing but what the ops inside do, or launch one kernel.
_TRANSPARENT = frozenset(
    {
        "associative_scan",
        "auto_functionalized",
        "auto_functionalized_v2",
        "control_deps",
        "flex_attention",
        "flex_attention_backward",
        "foreach_map",
        "hints_wrapper",
        "inline_asm_elementwise",
        "invoke_quant",
        "invoke_quant_packed",
        "invoke_subgraph",
        "local_map_hop",
        "out_dtype",
        "run_const_graph",
        "strict_mode",
        "tag_activation_checkpoint",
        "triton_kernel_wrapper_functional",
        "triton_kernel_wrapper_mutation",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)

_INDEX_PUTS = frozenset({"aten::index_put", "aten::index_put_", "aten::_unsafe_index_put", "aten::_index_put_impl_"})
#: Besides the pointwise ones, ops whose kernel takes a zero-dimensional tensor of the CPU as a number.
_TAKE_A_NUMBER = (aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor)


@dataclass(frozen=True)
class Surroundings:
    """What is known of the graph as a whole.

    accelerator: the device of its kernels; None for a graph that is on the CPU as a whole, which is its own device.
    given: unbacked sizes that the caller gives; the others are born from data in this graph.
    """

    accelerator: torch.device | None
    given: frozenset[object]


def surroundings_of(gm: GraphModule) -> Surroundings:
    """Of a graph, also of one that :func:`.split` has cut."""
    devices = accelerators_of(gm)
    given = frozenset(symbol for node in gm.graph.find_nodes(op="placeholder") for symbol in _unbacked(node))
    return Surroundings(devices[0] if devices else None, given)


def unsafe_for(call: OpCall, about: Surroundings) -> frozenset[Unsafe]:
    """Everything that keeps an op out of a captured piece, whatever it computes."""
    found = {*_of_the_target(call), *_of_the_values(call, about)}
    if _reads_data(call, about.given) or _waits_for_device(call):
        found.add(Unsafe.DATA_DEPENDENT)
    return frozenset(found)


def stream_of(node: Node) -> int | None:
    """The index of the stream that Dynamo saw the op on; None for the stream of the call."""
    custom = node.meta.get("custom") or {}
    stream = custom.get("stream")
    return stream if isinstance(stream, int) else None


def _of_the_target(call: OpCall) -> set[Unsafe]:
    name, overload = call.names
    found = set()
    if {name, overload} & set(inductor_config.custom_should_partition_ops):
        found.add(Unsafe.NAMED)
    if torch.Tag.cudagraph_unsafe in call.tags:
        found.add(Unsafe.TAGGED)
    if name in HOST_OPS:
        found.add(Unsafe.HOST_OP)
    if isinstance(call.target, torch._ops.HigherOrderOperator) and name not in _TRANSPARENT:
        found.add(_HIGHER_ORDER.get(name, Unsafe.HIGHER_ORDER))
    return found


def _of_the_values(call: OpCall, about: Surroundings) -> set[Unsafe]:
    """What the tensors that it reads and returns say: their layouts, their dtypes, and the devices that they are on."""
    node = call.node
    if not asks_for_shape(node) and not _is_item(node):
        inputs = [(n, t) for n in node.all_input_nodes for t in tensors_of(n)]
        outputs = tensors_of(node)
        found = _of_the_devices(call, inputs, outputs, about)
        if any(t.layout is not torch.strided for t in (*outputs, *(t for _, t in inputs))):
            found.add(Unsafe.SPARSE)
        if call.names[0] in _INDEX_PUTS and _has_boolean_index(node):
            found.add(Unsafe.BOOLEAN_INDEX)
        return found
    return set()


def _of_the_devices(
    call: OpCall, inputs: list[tuple[Node, torch.Tensor]], outputs: list[torch.Tensor], about: Surroundings
) -> set[Unsafe]:
    if about.accelerator is None:
        return set()
    devices = {t.device for t in (*outputs, *(t for _, t in inputs))}
    here = {d for d in devices if d == about.accelerator}
    if any(d.type != "cpu" for d in devices - here):
        return {Unsafe.OTHER_DEVICE}
    if devices == here:
        return set()
    if not here:
        return set() if is_constant(call.node) else {Unsafe.CPU_OP}
    read = [(n, t) for n, t in inputs if t.device.type == "cpu"]
    if any(t.device.type == "cpu" for t in outputs) or not all(_is_a_number(n, t) for n, t in read):
        return {Unsafe.HOST_MEMORY}
    takes_numbers = torch.Tag.pointwise in call.tags or call.target in _TAKE_A_NUMBER
    return set() if takes_numbers and len(read) < len(inputs) else {Unsafe.HOST_MEMORY}


def _is_a_number(node: Node, value: torch.Tensor) -> bool:
    """Whether a tensor on the CPU may be an argument of a captured kernel: what was recorded stays right."""
    return value.ndim == 0 and is_constant(node)


def _is_item(node: Node) -> bool:
    """Of several values of one op, which was judged as a whole."""
    return calls(node, operator.getitem)


def _has_boolean_index(node: Node) -> bool:
    indices = op_arguments(node).get("indices") or ()
    masks = (torch.bool, torch.uint8)
    return any(t.dtype in masks for index in indices if isinstance(index, Node) for t in tensors_of(index))


def _reads_data(call: OpCall, given: frozenset[object]) -> bool:
    """Whether a value or size that it reads or returns depends on data."""
    if torch.Tag.data_dependent_output in call.tags:
        return True
    if torch.Tag.dynamic_output_shape in call.tags and not _has_a_known_size(call.node):
        return True
    return any(_unbacked(n) - given for n in (call.node, *call.node.all_input_nodes))


def _has_a_known_size(node: Node) -> bool:
    """Of ops that are tagged for some of their calls: whether this call returns a size that no data decides."""
    if calls(node, aten.index.Tensor):
        return not _has_boolean_index(node)
    return calls(node, aten.repeat_interleave.Tensor) and op_arguments(node).get("output_size") is not None


def _waits_for_device(call: OpCall) -> bool:
    """Whether it is one of Dynamo's ops for ``torch.cuda.synchronize``, ``Event.synchronize``, ..."""
    return call.names[0].startswith("streams::synchronize")


def _unbacked(node: Node) -> set[object]:
    value = node.meta.get("val")
    return set(free_unbacked_symbols(list(value) if isinstance(value, tuple | list) else value))
