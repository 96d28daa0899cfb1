"""At replay: M36 to M44."""

from __future__ import annotations

from .. import checks
from ..hazard import ALL_REDUCES, CUTEDSL, MOE, TRTLLM, WITH_WORKSPACE, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, When

#: What else has state that belongs to one call at a time.
_ONE_AT_A_TIME = (Collective.SYMMETRIC_MEMORY, Collective.CUSTOM, Collective.NCCL)

ROWS: tuple[Hazard, ...] = (
    Hazard(
        id="M36",
        title="A replayed graph never progresses on B300",
        symptom="A peer spins in twoshotAllreduceKernel; the other rank has an active context and no kernel, every "
        "launch returned success, and event queries stay not ready.",
        mechanism="Not known, and not in the collective: one GPU and the driver alone show it. Graphs are replayed "
        "back to back on one stream while another copies to the host.",
        when=(When(capture=True, capabilities=((10, 3),), facts=(Fact.COPY_ON_OTHER_STREAM,)),),
        decides=Action.WARN,
        invariants=(Invariant.I12,),
        remedy="Make the replay stream wait for the copy before the first piece of a step, or copy on that stream.",
        source="SGL#38300, SGL#38463, PT#196133",
        certainty=Certainty.OPEN,
        shown_by="tests/hangs/test_divergence.py::test_m36_the_rank_that_spins_is_the_victim",
        not_seen="what an engine copies on other streams is not in the graph",
    ),
    Hazard(
        id="M37",
        title="Two calls on one workspace overlap",
        symptom="mnnvl: wrong data, then a spin. trtllm: block 0 spins for a counter that has gone past its grid. "
        "Symmetric memory (one-shot or two-shot), or one NCCL communicator in graphs on two streams: a deadlock.",
        mechanism="Rotation, counter, signal pads and clear size belong to one call at a time. A second call in flight "
        "reads them half changed. NCCL puts calls of one communicator in order itself, but not between graphs that are "
        "replayed at a time.",
        when=(When((*WITH_WORKSPACE, *_ONE_AT_A_TIME), facts=(Fact.TWO_STREAMS,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I4,),
        remedy="Use one workspace, buffer or communicator per group and stream, or order the streams by events.",
        source="TRT#3988, TRT#10633, FI#4393, SGL#31135, PT#189228, ROCm/rccl#2179",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_streams.py::test_m37_two_trtllm_calls_at_a_time_count_past_the_number",
    ),
    Hazard(
        id="M38",
        title="Blocks that must be resident together are not",
        symptom="A collective with a full grid spins while another stream's kernel holds an SM.",
        mechanism="A grid barrier needs all its blocks at once; one that finds no slot never arrives, and the others "
        "never leave. A MoE combine has none: its blocks wait for one block of each peer, so it is enough that another "
        "kernel holds all SMs of a peer and waits, directly or not, for this rank.",
        when=(When((TRTLLM, CUTEDSL, MOE), facts=(Fact.CONCURRENT_PERSISTENT_KERNEL,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I11,),
        remedy="Run no other stream beside the collective, or reserve SMs for it.",
        source="SGL#36657, FI#3615, FI#4595, ROCm/aiter#4977; for trtllm and CuTe DSL inferred",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_scheduling_streams.py::test_m38_two_grids_with_half_of_the_slots_each",
        not_seen="what else runs on the device is not in the graph",
    ),
    Hazard(
        id="M39",
        title="A barrier resets its counter under a spinning peer",
        symptom="A kernel with a grid barrier wedges within some thousand back-to-back launches, never when drained.",
        mechanism="The leading block zeroes the arrival counter while another still tests it for the final value. "
        "FlashInfer's all-reduces reset a counter too, but only the resetting thread waits for it.",
        when=(When(high="0.6.14", facts=(Fact.RESETTING_GRID_BARRIER,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.14 or later; in your own kernels, count up and wait for at least.",
        source="FI#3615",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_streams.py::test_m39_the_leader_resets_the_counter_before_another_block_has_seen_it",
        prevented_by=checks.RELEASES,
    ),
    Hazard(
        id="M40",
        title="An eager op hands on memory that moves",
        symptom="No hang: a piece computes with the values of an earlier step.",
        mechanism="An eager op between pieces allocates its output anew at each call, and the piece after it reads "
        "the address of the call at capture.",
        when=(When(capture=True, facts=(Fact.UNSTABLE_ISLAND_OUTPUT,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I14,),
        remedy="Copy the output into a static buffer that the runner owns, or write into one in place.",
        source="SGL#12106, V#37361, V#57227, V#52339",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_captured_pieces.py::test_m40_a_piece_computes_with_the_output_of_an_earlier_step",
        prevented_by=checks.LANDING,
    ),
    Hazard(
        id="M41",
        title="An input is freed before its reader is done",
        symptom="Wrong data or an illegal access that depends on the memory pool.",
        mechanism="A tensor freed in one piece is given to the next while the eager op between them, or with PDL the "
        "collective itself, still reads it.",
        when=(When(capture=True, facts=(Fact.INPUT_FREED_EARLY,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I14,),
        remedy="Keep the inputs of an eager op alive until the event of its completion.",
        source="inferred from the caching allocator; compare SGL#31023, SGL#33356",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_captured_pieces.py::test_m41_a_replay_reads_memory_that_was_given_to_another_tensor",
        prevented_by=checks.ONE_STREAM,
    ),
    Hazard(
        id="M42",
        title="One executable graph serves several pieces",
        symptom="A spin, or a call with another piece's arguments.",
        mechanism="A graph updated in place before each replay may be updated on one rank and not on another, or "
        "while it is still in flight.",
        when=(When(capture=True, facts=(Fact.SHARED_GRAPH_EXEC,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I2, Invariant.I4),
        remedy="Share executable graphs only among pieces without collectives.",
        source="inferred from SGL#29625",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_scheduling_memory.py::test_m42_a_segment_updated_on_one_rank_only",
        prevented_by=checks.OWN_GRAPHS,
    ),
    Hazard(
        id="M43",
        title="Padded rows send a neighbour into a loop",
        symptom="A collective spins; the rank that did not enter is stuck in a top-k or sparse-attention kernel.",
        mechanism="Rows that pad a batch to its capture size carry lengths from old memory; kernels that loop over "
        "them never end. The same garbage feeds M1.",
        when=(When(capture=True, facts=(Fact.UNDEFINED_PADDING,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I15,),
        remedy="Zero padded rows before each replay, and give padded metadata valid values.",
        source="FI#5015, V#51593",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_captured_pieces.py::test_m43_padding_that_nobody_defines_reaches_the_kernel",
        prevented_by=checks.ZERO_ROWS,
    ),
    Hazard(
        id="M44",
        title="Graphs of different sizes share a workspace",
        symptom="None.",
        mechanism="It was suspected that a replay clears by the size of its own graph. The size is recorded on the "
        "device by the call before, so graphs of different sizes may take turns.",
        when=(When(ALL_REDUCES, capture=True, facts=(Fact.GRAPHS_DIFFER_IN_SIZE,)),),
        decides=Action.CAPTURE,
        invariants=(Invariant.I9,),
        remedy="Capture them. Refuse only when the sizes differ between ranks (M25).",
        source="read in FlashInfer's source; shown by model; 500 steps of mixed graphs on two H200",
        certainty=Certainty.DISPROVED,
        shown_by="tests/hangs/test_divergence.py::test_m44_graphs_of_different_sizes_and_strategies_may_alternate",
    ),
)
