"""Rules: what a captured piece may hold, as data.

The first row that applies to an op decides, and its verdict says what it rests on. A kind of op that must not be
captured is a row here and a value of :class:`ringfence.compile_passes.host.Unsafe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ..runtime.collectives import table
from ..runtime.groups import HOST_BACKENDS
from ..runtime.hazards.situation import Collective, Fact
from .host import Unsafe


class Decision(StrEnum):
    """Where an op runs: inside a piece, eagerly between pieces, or not at all.

    A fused site that is refused is carried out by the reference collective, between pieces.
    """

    IN_GRAPH = "IN_GRAPH"
    SPLIT = "SPLIT"
    REFUSE = "REFUSE"


@dataclass(frozen=True)
class OpFacts:
    """What the rules may ask about an op that a node runs.

    ``carrier`` is who carries out a fused site; ``engine_op`` says that it is an all-reduce of an engine, of whose
    inside nothing is known; ``unsafe`` is why a replay would not do what the op does.
    """

    op: str
    backend: str | None
    carrier: str | None
    named_split: bool
    capture: bool
    collective: bool
    unsafe: frozenset[Unsafe]
    engine_op: bool = False
    capture_failure: str | None = None

    @property
    def matters(self) -> bool:
        """Whether anything is to be decided about it."""
        return self.named_split or self.collective or bool(self.unsafe) or self.op in KNOWN_UNSAFE


@dataclass(frozen=True)
class Rule:
    id: str
    applies: Callable[[OpFacts], bool]
    decision: Decision
    message: str
    source: str


#: Who keeps the epoch, slot and flags of a call in words on the device.
_DEVICE_EPOCH = frozenset({*(one.name for one in table.ALL if one.epoch_on_device), Collective.MOE_ALL_TO_ALL})

#: Engines' attention, and what writes their caches: they read slots and lengths from a context that Python holds.
#: vLLM's are CompilationConfig._attention_ops and the updates of its caches; TensorRT-LLM's are where it splits itself.
_READ_A_CONTEXT = (
    "vllm::unified_attention",
    "vllm::unified_attention_with_output",
    "vllm::unified_mla_attention",
    "vllm::unified_mla_attention_with_output",
    "vllm::unified_kv_cache_update",
    "vllm::unified_mla_kv_cache_update",
    "vllm::mamba_mixer",
    "vllm::mamba_mixer2",
    "vllm::plamo2_mamba_mixer",
    "vllm::short_conv",
    "vllm::linear_attention",
    "vllm::gdn_attention",
    "vllm::gdn_attention_core",
    "vllm::kda_attention",
    "vllm::sparse_attn_indexer",
    "sglang::unified_attention_with_output",
    "trtllm::attn_custom_op_inplace",
    "trtllm::mla_custom_op_inplace",
)

#: Ops of engines and of FlashInfer that must not be in a captured piece, though nothing marks them.
KNOWN_UNSAFE: Mapping[str, Fact] = {
    "flashinfer::trtllm_custom_all_reduce": Fact.HOST_EPOCH,
    "_C_custom_ar::all_reduce": Fact.BUFFERS_NOT_REGISTERED,
    "sgl_kernel::all_reduce": Fact.BUFFERS_NOT_REGISTERED,
    **dict.fromkeys(_READ_A_CONTEXT, Fact.HOST_EPOCH),
}

#: The rule of every op where no size is captured.
NO_CAPTURE = "no_capture"

RULES: tuple[Rule, ...] = (
    Rule(
        "split_op",
        lambda f: f.named_split,
        Decision.SPLIT,
        "named in split_ops",
        "option split_ops",
    ),
    Rule(
        NO_CAPTURE,
        lambda f: not f.capture,
        Decision.IN_GRAPH,
        "nothing is captured, so nothing needs to be split off",
        "option capture_sizes",
    ),
    Rule(
        "data_dependent",
        lambda f: Unsafe.DATA_DEPENDENT in f.unsafe,
        Decision.SPLIT,
        "a shape or value that it reads or returns depends on data; a replay would repeat the one seen at capture",
        "CUDA C++ Programming Guide, CUDA Graphs: a synchronising call invalidates the capture",
    ),
    Rule(
        "control_flow",
        lambda f: Unsafe.CONTROL_FLOW in f.unsafe,
        Decision.SPLIT,
        "the host reads a value to decide what runs next; a replay would go the way that was seen at capture",
        "torch/_inductor/scheduler.py should_partition: Conditional ops; utils.py is_cudagraph_unsafe_op: WhileLoop",
    ),
    Rule(
        "host_memory",
        lambda f: Unsafe.HOST_MEMORY in f.unsafe,
        Decision.SPLIT,
        "it moves a value between the host and the device; a replay would repeat the one seen at capture",
        "torch/_inductor/scheduler.py should_partition: DeviceCopy ops; CUDA C++ Programming Guide, CUDA Graphs: "
        "kernel arguments are recorded, pageable copies synchronise",
    ),
    Rule(
        "cpu_op",
        lambda f: Unsafe.CPU_OP in f.unsafe,
        Decision.SPLIT,
        "its tensors are on the CPU, of which a capture records nothing; a replay would repeat the result seen then",
        "torch/_inductor/scheduler.py should_partition: cpu ops",
    ),
    Rule(
        "other_device",
        lambda f: Unsafe.OTHER_DEVICE in f.unsafe,
        Decision.SPLIT,
        "it has a tensor on a device that is neither the graph's nor the CPU; a capture records one device only",
        "torch/_inductor/cudagraph_utils.py check_multiple_devices_or_any_cpu_nodes",
    ),
    Rule(
        "sparse",
        lambda f: Unsafe.SPARSE in f.unsafe,
        Decision.SPLIT,
        "it has a tensor that is not strided; the number of its values is the host's to know",
        "torch/_inductor/utils.py is_cudagraph_unsafe_fx_node: sparse tensor outputs",
    ),
    Rule(
        "boolean_index",
        lambda f: Unsafe.BOOLEAN_INDEX in f.unsafe,
        Decision.SPLIT,
        "it writes where a mask is set, and asks the device how often that is",
        "torch/_inductor/utils.py _fx_node_is_input_dependent_cudagraph_unsafe",
    ),
    Rule(
        "rng_state",
        lambda f: Unsafe.RNG_STATE in f.unsafe,
        Decision.SPLIT,
        "it reads or sets the state of a random generator, which the host keeps",
        "torch/_inductor/utils.py FORBIDDEN_CUDAGRAPH_OPS",
    ),
    Rule(
        "host_op",
        lambda f: Unsafe.HOST_OP in f.unsafe,
        Decision.SPLIT,
        "it is known to wait for the device or to ask the host, though no tag says so",
        "torch/_inductor/utils.py FORBIDDEN_CUDAGRAPH_OPS; ATen/native/BatchLinearAlgebra.cpp _linalg_check_errors",
    ),
    Rule(
        "effect",
        lambda f: Unsafe.EFFECT in f.unsafe,
        Decision.SPLIT,
        "it has an effect besides its value, such as printing; a replay would not have it again",
        "torch/_higher_order_ops/effects.py",
    ),
    Rule(
        "higher_order",
        lambda f: Unsafe.HIGHER_ORDER in f.unsafe,
        Decision.SPLIT,
        "it is a higher-order op of which nothing is known; host code inside would not run again in a replay",
        "ringfence docs design: what decides capture",
    ),
    Rule(
        "cudagraph_unsafe",
        lambda f: Unsafe.TAGGED in f.unsafe,
        Decision.SPLIT,
        "it carries torch.Tag.cudagraph_unsafe",
        "torch/_C Tag.cudagraph_unsafe: its author says that it cannot be captured",
    ),
    Rule(
        "named_to_inductor",
        lambda f: Unsafe.NAMED in f.unsafe,
        Decision.SPLIT,
        "torch._inductor.config.custom_should_partition_ops names it",
        "torch/_inductor/scheduler.py, Scheduler.should_partition",
    ),
    Rule(
        "known_unsafe",
        lambda f: f.op in KNOWN_UNSAFE,
        Decision.SPLIT,
        "it is known that it cannot be captured in a piece, and it does not carry torch.Tag.cudagraph_unsafe",
        "hazards M15 and M32",
    ),
    Rule(
        "self_test",
        lambda f: f.capture_failure is not None,
        Decision.SPLIT,
        "{capture_failure}",
        "the start-up self-test of its workspace",
    ),
    Rule(
        "device_epoch",
        lambda f: f.carrier in _DEVICE_EPOCH,
        Decision.IN_GRAPH,
        "{carrier} keeps the epoch and the flags of its calls on the device, so a replay goes on from the last call",
        "invariant I6; read in FlashInfer 0.6.0 to 0.7.x",
    ),
    Rule(
        "host_collective",
        lambda f: f.collective and f.backend in HOST_BACKENDS and f.carrier in (None, Collective.REFERENCE),
        Decision.SPLIT,
        "runs on the host over {backend}; a replayed piece would not run it again",
        "ringfence docs design: what decides capture",
    ),
    Rule(
        "nccl",
        lambda f: (
            f.collective
            and not f.engine_op
            and f.backend == "nccl"
            and f.carrier in (None, Collective.NCCL, Collective.REFERENCE)
        ),
        Decision.IN_GRAPH,
        "over NCCL it is stream work with its epoch on the device",
        "NCCL user guide, Using NCCL with CUDA Graphs (2.9 and later)",
    ),
    Rule(
        "unknown_collective",
        lambda f: f.collective,
        Decision.SPLIT,
        "nothing is known about it under capture; an epoch held by the host would be baked into the graph",
        "ringfence docs design: what decides capture",
    ),
)
