"""What a hazard may depend on: the words of the hazard table, and a plan described in them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Self

from ..versions import in_range, parse_version


class Explained(StrEnum):
    """A code with a sentence that says what it means."""

    meaning: str

    def __new__(cls, code: str, meaning: str = "") -> Self:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


class Collective(Explained):
    """Who carries out a collective call."""

    MNNVL = "mnnvl", "FlashInfer's multicast all-reduce (trtllm_mnnvl_allreduce.cuh)"
    MNNVL_CUTEDSL = "mnnvl_cutedsl", "FlashInfer's CuTe DSL all-reduce, Blackwell with multicast"
    TRTLLM = "trtllm", "FlashInfer's peer-to-peer all-reduce (trtllm_allreduce_fusion.cuh)"
    TRTLLM_CUSTOM = "trtllm_custom", "FlashInfer's older trtllm_custom_all_reduce, whose caller counts the epochs"
    CUSTOM = "custom", "the custom all-reduce of vLLM and SGLang, over registered IPC buffers"
    RINGFENCE = "ringfence", "ringfence's own all-reduce over peer memory, compiled at run time, with bounded waits"
    MOE_ALL_TO_ALL = "moe_all_to_all", "FlashInfer's one-sided MoE dispatch and combine"
    MOE_TWO_SIDED = "moe_two_sided", "FlashInfer's two-sided MoE all-to-all over a FIFO (MnnvlMoe)"
    SYMMETRIC_MEMORY = "symmetric_memory", "torch symmetric-memory all-reduce"
    NCCL = "nccl", "NCCL"
    REFERENCE = "reference", "all-reduce, add and norm on any process group"


class Strategy(StrEnum):
    """How a call is carried out. Dispatch and combine are the two halves of a MoE all-to-all."""

    ONE_SHOT = "one-shot"
    TWO_SHOT = "two-shot"
    DISPATCH = "dispatch"
    COMBINE = "combine"


class Payload(Explained):
    """What the words that are sent look like to a receiver that polls for a sentinel: the worst of them.

    SUBNORMAL: 0x80000001 to 0x807FFFFF, a negative subnormal when read as float32. In half
    precision an odd element of 0x8001 to 0x807F is enough (FI#3053).
    NEGATIVE_ZERO: 0x80000000, the bits of the sentinel itself.
    """

    ORDINARY = "ordinary", "no word is a negative zero or a negative subnormal, nor does a sum round to one"
    SUBNORMAL = "subnormal", "some 32-bit word, read as float32, is a negative subnormal, or a sum underflows to one"
    NEGATIVE_ZERO = "negative-zero", "some element is -0.0"
    ANY = "any", "nothing is known about the values"


class Fact(Explained):
    """Something true of a plan, or seen in a run, that a hazard rests on."""

    # the plan's calls
    DIVERGENT_SEQUENCE = "divergent_sequence", "ranks issue different calls, sizes or strategies, or in another order"
    DIVERGENT_GEOMETRY = "divergent_geometry", "ranks launch the same call with different grids"
    RANK_LOCAL_CHOICE = "rank_local_choice", "a rank picks its graph or its padding from numbers of its own"
    RANK_LOCAL_FALLBACK = "rank_local_fallback", "a rank that lacks the workspace falls back without asking the others"
    AUTOTUNE_PER_RANK = "autotune_per_rank", "each rank measures and picks a tactic of its own"
    ZERO_TOKENS = "zero_tokens", "a rank may come with no token"
    GRIDS_TAKE_TURNS = "grids_take_turns", "calls on one workspace are launched with grids of different sizes"
    GRAPHS_DIFFER_IN_SIZE = "graphs_differ_in_size", "graphs with different token counts take turns on one workspace"
    # a MoE all-to-all
    RANK_OWN_CAPACITY = "rank_own_capacity", "ranks may pass different capacities, from numbers of their own"
    GEOMETRY_CHANGES = "geometry_changes", "calls differ in capacity or widths, and the combine region moves with them"
    INITIALISED_ALONE = "initialised_alone", "no barrier between a rank's clearing of its workspace and the first call"
    ROUTING_UNCHECKED = "routing_unchecked", "more tokens than the capacity, or numbers of no expert, may be passed"
    TOP_K_NOT_COMPILED = "top_k_not_compiled", "no kernel was compiled for the number of experts of a token"
    MISALIGNED_PLANE = "misaligned_plane", "a small payload comes before a larger one in the workspace"
    REDUCED_TWICE = "reduced_twice", "what a combine returned is summed over the same ranks once more"
    PLANES_OUTLIVE = "planes_outlive", "rows that a dispatch returned are read after its combine, or written"
    DISPATCH_UNANSWERED = "dispatch_unanswered", "a dispatch follows a dispatch that no combine has answered"
    # what is inside a captured piece
    HOST_EPOCH = "host_epoch", "an op in a captured piece takes its epoch, flag, slot or mask from the host"
    HOST_SYNC_IN_PIECE = "host_sync_in_piece", "a captured piece waits for the device or reads data on the host"
    UNMARKED_UNSAFE_OP = "unmarked_unsafe_op", "a captured piece holds an op known to be uncapturable and not marked so"
    CONDITIONAL_NODE = "conditional_node", "a collective is captured in the body of a branch or loop"
    PROTOCOL_CUT = "protocol_cut", "the launches of one collective lie in different pieces or islands"
    BUFFERS_NOT_REGISTERED = "buffers_not_registered", "a piece is captured outside the collective's capture context"
    SHARED_GRAPH_EXEC = "shared_graph_exec", "one executable graph is updated in place to serve several pieces"
    # the workspace and other memory
    WORKSPACE_ABSENT_AT_CAPTURE = "workspace_absent_at_capture", "a workspace would be created during a capture"
    WORKSPACE_REPLACED = "workspace_replaced", "a workspace may grow, move or lose its memory after a capture"
    WORKSPACE_KEPT_WHILE_ASLEEP = "workspace_kept_while_asleep", "a workspace outlives the phase that needs it"
    CAPTURE_SIZE_BEYOND_WORKSPACE = "capture_size_beyond_workspace", "a capture size or strategy does not fit into it"
    MISALIGNED_BUFFER = "misaligned_buffer", "the bytes of one Lamport buffer are no multiple of 32"
    LAMPORT_OVER_1_GIB = "lamport_over_1_gib", "one Lamport buffer has 1 GiB or more"
    STRATEGIES_SHARE_WORKSPACE = "strategies_share_workspace", "one-shot and two-shot calls use one workspace"
    UNMAPPED_IN_FLIGHT = "unmapped_in_flight", "memory is unmapped while a submitted step still uses it"
    PINNED_BUFFER_REUSED = "pinned_buffer_reused", "the host writes a pinned buffer that is still being copied from"
    UNSTABLE_ISLAND_OUTPUT = "unstable_island_output", "an eager op hands a captured piece memory that moves"
    INPUT_FREED_EARLY = "input_freed_early", "an input's memory is reused before the op that reads it is complete"
    UNDEFINED_PADDING = "undefined_padding", "padded rows or lengths hold whatever was in memory"
    UNSANITISED_PAYLOAD = "unsanitised_payload", "a kernel publishes -0.0 as it is where -0.0 means not arrived"
    # the group
    GROUP_IS_NOT_WORLD = "group_is_not_world", "the tensor-parallel group is a part of WORLD"
    RENDEZVOUS_WITHOUT_GROUP = "rendezvous_without_group", "the workspace is created without the argument group"
    DEVICE_IS_NOT_RANK = "device_is_not_rank", "a rank's device index differs from its rank in the group"
    # links and machines
    NOT_ALL_NVLINK = "not_all_nvlink", "some pair of ranks reaches each other over PCIe only"
    PEER_COPY_LOST = "peer_copy_lost", "a copy into or out of a peer's memory did not bring the data"
    FABRIC_NOT_READY = "fabric_not_ready", "the fabric manager has not let a GPU into the NVLink fabric"
    NO_IMEX_CHANNEL = "no_imex_channel", "a process has no IMEX channel, or nodes are in different IMEX domains"
    HANDLES_FORBIDDEN = "handles_forbidden", "a process may not take a file descriptor out of another"
    # streams, kernels side by side, and programmatic dependent launch (PDL)
    TWO_STREAMS = "two_streams", "calls on one workspace come from streams that nothing orders"
    COPY_ON_OTHER_STREAM = "copy_on_other_stream", "a copy runs on another stream while pieces are replayed"
    CONCURRENT_PERSISTENT_KERNEL = "concurrent_persistent_kernel", "another kernel holds SMs while a collective spins"
    RESETTING_GRID_BARRIER = "resetting_grid_barrier", "a kernel has a grid barrier that resets its own counter"
    EARLY_TRIGGER = "early_trigger", "trigger_completion_at_end is False"
    PDL = "pdl", "the collective is launched with PDL"
    PRODUCER_RIGHT_BEFORE_PDL = "producer_right_before_pdl", "with PDL, the kernel just before writes what the op reads"
    SIDE_STREAM_ACROSS_PDL = "side_stream_across_pdl", "another stream launches between the two halves of a PDL pair"
    NO_BARRIER_BEFORE_CAPTURE = "no_barrier_before_capture", "no sync and barrier between warm-up and first capture"
    # the model and its surroundings
    PARTIAL_WARP_HIDDEN_SIZE = "partial_warp_hidden_size", "the hidden size makes blocks that are no multiple of a warp"
    FP4_OUTPUT = "fp4_output", "the fused op quantises its output to FP4"
    PROFILER_ATTACHED = "profiler_attached", "Nsight Systems traces the process"
    NCCL_SYMMETRIC_MEMORY = "nccl_symmetric_memory", "a collective over NCCL's symmetric memory is captured"
    NCCL_BEFORE_2_30_4 = "nccl_before_2_30_4", "the process uses NCCL 2.28.9 or later, and before 2.30.4"
    NCCL_REGISTERS_GRAPHS = (
        "nccl_registers_graphs",
        "NCCL 2.28.9 or later registers captured buffers: NCCL_GRAPH_REGISTER is not 0",
    )
    RANK_REJOINS = "rank_rejoins", "a rank that was masked out takes part again"
    NO_GROUP_ABORT = "no_group_abort", "a rank that throws tells nobody, or runs a collective in a finally"
    # seen in a run
    RANK_DID_NOT_ENTER = "rank_did_not_enter", "the journal shows a rank that never entered the call the others spin in"
    SAME_OTHER_KERNEL = "same_other_kernel", "all ranks are in the same kernel, and it is no collective"
    CONTROL_WORD_ILLEGAL = "control_word_illegal", "a control word holds a value that the protocol never writes"


def facts_of_nccl(version: str | None, graph_register: str | None = None) -> frozenset[Fact]:
    """What the version of NCCL says, and the value of NCCL_GRAPH_REGISTER. Releases before 2.28.9 were not reported."""
    if version is None or not in_range(version, "2.28.9", None):
        return frozenset()
    registers = (graph_register or "1").strip() != "0"
    facts = {Fact.NCCL_REGISTERS_GRAPHS: registers, Fact.NCCL_BEFORE_2_30_4: in_range(version, None, "2.30.4")}
    return frozenset(fact for fact, holds in facts.items() if holds)


@dataclass(frozen=True)
class Situation:
    """One collective in one plan.

    collective: one of :class:`Collective`, or another's name, of which the table knows nothing.
    What is not known of the plan (version, strategy, dtype, payload) may be the worst.
    What is not known of the machine (capability, multicast) is taken to be
    nothing special: probe it. A fact that is not listed does not hold.
    """

    collective: str
    flashinfer: str | None = None
    world_size: int = 2
    nodes: int = 1
    capability: tuple[int, int] | None = None
    multicast: bool | None = None
    strategy: Strategy | None = None
    payload: Payload = Payload.ANY
    dtype: str | None = None
    capture: bool = True
    facts: frozenset[Fact] = frozenset()

    def __post_init__(self) -> None:
        if self.flashinfer is not None:
            parse_version(self.flashinfer)

    def __str__(self) -> str:
        """``mnnvl of FlashInfer 0.6.10``; ``ringfence``, whose kernels are no release of FlashInfer's."""
        if self.collective in (Collective.RINGFENCE, Collective.NCCL, Collective.REFERENCE):
            return str(self.collective)
        return f"{self.collective} of {f'FlashInfer {self.flashinfer}' if self.flashinfer else 'an unknown version'}"


@dataclass(frozen=True)
class When:
    """A condition on situations: everything that is given holds, and all of the facts."""

    collectives: tuple[Collective, ...] = ()
    low: str | None = None
    high: str | None = None
    strategy: Strategy | None = None
    payload: Payload | None = None
    dtypes: tuple[str, ...] = ()
    capture: bool | None = None
    world_sizes: tuple[int, ...] = ()
    multi_node: bool | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    multicast: bool | None = None
    facts: tuple[Fact, ...] = ()

    def holds(self, s: Situation) -> bool:
        return (
            (not self.collectives or s.collective in self.collectives)
            and (s.flashinfer is None or in_range(s.flashinfer, self.low, self.high))
            and (self.strategy is None or s.strategy in (None, self.strategy))
            and (self.payload is None or s.payload in (Payload.ANY, self.payload))
            and (not self.dtypes or s.dtype is None or s.dtype in self.dtypes)
            and (self.capture is None or s.capture == self.capture)
            and (not self.world_sizes or s.world_size in self.world_sizes)
            and (self.multi_node is None or (s.nodes > 1) == self.multi_node)
            and (not self.capabilities or s.capability in self.capabilities)
            and (self.multicast is None or s.multicast == self.multicast)
            and s.facts.issuperset(self.facts)
        )

    def __str__(self) -> str:
        parts = [
            ", ".join(self.collectives) or "any collective",
            _range(self.low, self.high),
            self.strategy,
            f"payload {self.payload}" if self.payload else None,
            ", ".join(self.dtypes),
            {None: None, True: "captured", False: "not captured"}[self.capture],
            f"{', '.join(map(str, self.world_sizes))} ranks" if self.world_sizes else None,
            {None: None, True: "several nodes", False: "one node"}[self.multi_node],
            ", ".join(f"SM{major}{minor}" for major, minor in self.capabilities),
            {None: None, True: "with multicast", False: "no multicast"}[self.multicast],
            " and ".join(self.facts),
        ]
        return "; ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, object]:
        """What is given, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, ())}


def _range(low: str | None, high: str | None) -> str | None:
    if low and high:
        return f"FlashInfer {low} to before {high}"
    if high:
        return f"FlashInfer before {high}"
    return f"FlashInfer {low} and later" if low else None
