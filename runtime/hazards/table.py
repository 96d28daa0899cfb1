"""Every known way in which a fused collective hangs, corrupts or crashes: one row each.

A source is a public thread ("FI#3304", see :data:`REPOSITORIES`), what was read in a
released source, or a measurement. ``shown_by`` names the test that shows the mechanism,
or that the shipped policy avoids it; a row without one says why it has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .situation import Collective, Explained, Fact, Payload, Strategy, Transport, When

#: What the abbreviations in sources stand for.
REPOSITORIES: Mapping[str, str] = MappingProxyType(
    {
        "FI": "flashinfer-ai/flashinfer",
        "PT": "pytorch/pytorch",
        "SGL": "sgl-project/sglang",
        "TRT": "NVIDIA/TensorRT-LLM",
        "TS": "lightseekorg/tokenspeed",
        "V": "vllm-project/vllm",
    }
)


class Action(Explained):
    """What a row decides about a plan to which it applies."""

    CAPTURE = "capture", "no reason to keep the call out of a captured piece"
    SPLIT = "split", "run the call eagerly, between captured pieces"
    REFUSE = "refuse", "do not run this plan; splitting does not help"
    CLEAN_PAYLOAD = "clean_payload", "flush the words that a receiver would take for the sentinel"
    WARN = "warn", "run it, and say so"
    RUNTIME_GUARD = "runtime_guard", "run it with the check or the wait that the remedy names"


class Certainty(Explained):
    """How well the cause is known."""

    CERTAIN = "certain", "the cause was found and the fix released, or it was reproduced"
    ANALYSIS = "contributor's analysis", "a contributor's explanation, which the maintainers did not confirm"
    INFERRED = "inferred", "read from the source or the protocol; nobody reported it"
    OPEN = "open", "seen, and not explained yet"
    DISPROVED = "disproved", "suspected once, and shown not to happen"


class Invariant(Explained):
    """What holds in a plan that cannot hang."""

    I1 = "I1", "The FlashInfer release has no known fault in the kernels that the plan calls."
    I2 = "I2", "Every rank issues the same calls, of the same sizes and strategies, in the same order on a workspace."
    I3 = "I3", "Which graph runs, and how far it is padded, follows only from values that are equal on all ranks."
    I4 = "I4", "The calls on one workspace are totally ordered and never overlap."
    I5 = "I5", "All launches of one collective stay in one piece, or in one eager island."
    I6 = "I6", "A captured collective keeps its epoch, slot and flags on the device."
    I7 = (
        "I7",
        "Workspaces are created once, by vote, before the first capture, for the largest call, and frozen.",
    )
    I8 = "I8", "A capture executes nothing, and all ranks have finished the same warm-up calls before it begins."
    I9 = "I9", "The strategy of each captured call is fixed, equal on all ranks, and fits the workspace."
    I10 = (
        "I10",
        "Programmatic dependent launch lets no kernel read what is not written yet, or starve its producer.",
    )
    I11 = "I11", "Every block that spins and every block it waits for can be resident at the same time."
    I12 = "I12", "Copies on other streams are joined before a step's first replay."
    I13 = "I13", "No host waits for another rank's host while a rank spins on the device."
    I14 = "I14", "What captured pieces read and write keeps its address, and stays allocated until the op is complete."
    I15 = "I15", "Padded rows and lengths are defined before each replay, and no call is empty."
    I16 = "I16", "A failure on one rank stops all of them over the host, and the workspace is built anew."
    I17 = "I17", "Every wait has a deadline, and a journal says which rank entered which call."
    I18 = (
        "I18",
        "Before it serves, each collective is tried on this machine, eager and replayed, with hostile payloads.",
    )


@dataclass(frozen=True)
class Hazard:
    """One mechanism. It applies where any of ``when`` holds.

    ``instead`` lists other decisions that avoid it too, for a user who prefers one.
    """

    id: str
    title: str
    symptom: str
    mechanism: str
    when: tuple[When, ...]
    decides: Action
    invariants: tuple[Invariant, ...]
    remedy: str
    source: str
    certainty: Certainty
    instead: tuple[Action, ...] = ()
    shown_by: str | None = None
    not_shown: str | None = None


MNNVL, CUTEDSL, TRTLLM = Collective.MNNVL, Collective.MNNVL_CUTEDSL, Collective.TRTLLM
MOE = Collective.MOE_ALL_TO_ALL
ALL_REDUCES = (MNNVL, CUTEDSL, TRTLLM)
WITH_WORKSPACE = (*ALL_REDUCES, Collective.TRTLLM_CUSTOM, MOE)

HAZARDS: tuple[Hazard, ...] = (
    # -- the sentinel, and what depends on data ------------------------------------------------
    Hazard(
        id="M1",
        title="A negative subnormal word passes for the sentinel",
        symptom="Both GPUs at 100 % for ever in an mnnvl kernel; single lanes poll, their siblings wait in a shuffle. "
        "The polled slot holds a word between 0x80000001 and 0x807FFFFF.",
        mechanism="The kernel polls until a word is not -0.0 and compares as float32; flush-to-zero turns every "
        "negative subnormal into -0.0, so a word that has arrived looks absent. For 16-bit types the element in the "
        "odd column decides: fp16 values between -2**-17 and 0, which small activations hold, are enough.",
        when=(When((MNNVL,), high="0.6.12", payload=Payload.SUBNORMAL),),
        decides=Action.REFUSE,
        instead=(Action.CLEAN_PAYLOAD,),
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.12 or later. Splitting does not help: eager calls hang too.",
        source="FI#3053, FI#3304, FI#2923, V#35772, SGL#23402; reproduced on H200 with FlashInfer's kernel",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_sentinel.py::test_m1_a_negative_subnormal_is_never_seen_before_0_6_12",
    ),
    Hazard(
        id="M2",
        title="A reduced value becomes the sentinel",
        symptom="As M1 in a two-shot call, but the polled slot does hold 0x80000000 while the owner has published.",
        mechanism="The owner multicasts its sum without replacing -0.0. A sum that underflows to a negative "
        "subnormal is flushed to -0.0, and the peers wait for a word that is already there. Sums of fp16 values "
        "cannot underflow in float32.",
        when=(
            When(
                (MNNVL,),
                high="0.6.13",
                strategy=Strategy.TWO_SHOT,
                payload=Payload.SUBNORMAL,
                dtypes=("bfloat16", "float32"),
            ),
        ),
        decides=Action.WARN,
        instead=(Action.REFUSE,),
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.13 or later, or pin the one-shot strategy.",
        source="FI#3385; the comments of TS's port; read in FlashInfer 0.6.12 and 0.6.13",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_sentinel.py::test_m2_a_sum_that_rounds_to_the_sentinel_is_never_seen_in_0_6_12",
    ),
    Hazard(
        id="M3",
        title="A 16-byte read is torn",
        symptom="No hang: rare wrong values after a two-shot call.",
        mechanism="The second half of two-shot checks the first word of 16 bytes and takes the other three for "
        "arrived. Only each 32-bit word is promised to be written at once.",
        when=(When((MNNVL,), high="0.6.13", strategy=Strategy.TWO_SHOT),),
        decides=Action.WARN,
        instead=(Action.REFUSE,),
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.13 or later, or pin the one-shot strategy.",
        source="FI#3385; read in FlashInfer 0.6.12 and 0.6.13",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_sentinel.py::test_m3_a_torn_pack_is_taken_when_only_its_first_word_is_checked",
    ),
    Hazard(
        id="M4",
        title="A legal -0.0 is published as it is",
        symptom="A spin in any Lamport kernel; the polled slot holds the sentinel and every rank has pushed.",
        mechanism="The sentinel is -0.0, and a kernel or path that does not turn a payload's -0.0 into +0.0 sends "
        "the word that means not arrived.",
        when=(When(ALL_REDUCES, payload=Payload.NEGATIVE_ZERO, facts=(Fact.UNSANITISED_PAYLOAD,)),),
        decides=Action.REFUSE,
        instead=(Action.CLEAN_PAYLOAD,),
        invariants=(Invariant.I18,),
        remedy="Replace -0.0 before the push, and test the kernel with payloads full of 0x8000 and 0x80000000.",
        source="FI#1136, FI#3304",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_sentinel.py::test_m4_negative_zero_is_never_seen_unless_the_input_is_sanitised",
    ),
    Hazard(
        id="M5",
        title="A buffer is cleared by the wrong size",
        symptom="No hang: wrong numbers once token counts vary from call to call.",
        mechanism="A call clears the buffer of the call before it. Cleared by another size than it was written with, "
        "such as the current call's, old words survive and pass for new ones when the buffer comes round again.",
        when=(When((MNNVL,), high="0.2.9"),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.2.9 or later, which records the size on the device.",
        source="TRT#6237, FI#1321",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_sentinel.py::test_m5_a_clear_of_the_wrong_size_leaves_old_words",
    ),
    Hazard(
        id="M6",
        title="The clear offset overflows 32 bits",
        symptom="Memory before the buffer is overwritten, and stale words are read three calls later.",
        mechanism="The offset of the buffer to clear is a signed 32-bit product of its index and the buffer's size; "
        "it wraps for index 2 of a buffer over 1 GiB. The offset of the data is computed in 64 bits.",
        when=(When((TRTLLM,), facts=(Fact.LAMPORT_OVER_1_GIB,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I7,),
        remedy="Lower max_tokens until ranks * tokens * hidden size * element size is less than 1 GiB.",
        source="read in FlashInfer's trtllm_allreduce_fusion.cuh",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_arithmetic.py::test_m6_clear_offset_wraps_beyond_one_gib",
    ),
    Hazard(
        id="M7",
        title="The second stage is misaligned",
        symptom="CUDA error: misaligned address, in a two-shot call.",
        mechanism="A Lamport buffer is rounded to 16 bytes and halved for two stages, so the second may begin "
        "8 bytes off a 16-byte access.",
        when=(When((MNNVL,), high="0.6.18rc2", strategy=Strategy.TWO_SHOT, facts=(Fact.MISALIGNED_BUFFER,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Choose max_tokens so that a Lamport buffer is a multiple of 32 bytes, or upgrade to 0.6.18.",
        source="FI#4473",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_arithmetic.py::test_m7_half_of_a_buffer_may_be_misaligned",
    ),
    Hazard(
        id="M8",
        title="A call does not fit the workspace",
        symptom="ValueError during capture; or an out-of-bounds write, Xid 31 and a node that needs a reboot.",
        mechanism="The workspace was sized for other token counts or for another strategy than a captured call uses.",
        when=(When(WITH_WORKSPACE, facts=(Fact.CAPTURE_SIZE_BEYOND_WORKSPACE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I9, Invariant.I7),
        remedy="Size the workspace for the largest capture size under every strategy in use, and pin the strategy.",
        source="V#47284, V#47589, FI#3869 (open)",
        certainty=Certainty.CERTAIN,
        not_shown="the out-of-bounds write needs FlashInfer's kernel on a GPU",
    ),
    Hazard(
        id="M9",
        title="Another kernel writes into the flags",
        symptom="A spin right after an unrelated kernel; a control word holds a value that no call writes.",
        mechanism="An out-of-bounds write of another op lands in the barrier or control words, which are ordinary "
        "device memory.",
        when=(When(WITH_WORKSPACE, facts=(Fact.CONTROL_WORD_ILLEGAL,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I17,),
        remedy="Run compute-sanitizer on the op before; put canaries around the control words and check their range.",
        source="TRT#5698",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_counters.py::test_m9_a_foreign_write_into_a_flag_opens_a_barrier_or_shuts_it",
    ),
    # -- order, memory model, control words ----------------------------------------------------
    Hazard(
        id="M10",
        title="Arrival is counted without release",
        symptom="No hang: wrong results on Hopper.",
        mechanism="The arrival counter was incremented without release semantics, so what a block wrote before it "
        "arrived need not be visible to the one that counts.",
        when=(When((MNNVL,), high="0.6.0", capabilities=((9, 0),)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.0 or later.",
        source="TRT#8612, FI#2118",
        certainty=Certainty.ANALYSIS,
        shown_by="tests/hangs/test_memory_order.py::test_m10_without_release_a_late_clear_wipes_the_next_payload",
    ),
    Hazard(
        id="M11",
        title="A block publishes its head before its payload",
        symptom="No hang: a valid token id arrives with a stale scale.",
        mechanism="In the prepare step of the all-to-all, the FIFO head was published without a block barrier after "
        "the payload's stores.",
        when=(When((MOE,), high="0.6.16"),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.16 or later.",
        source="FI#4092",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_memory_order.py::test_m11_a_head_without_a_block_barrier_overtakes_its_payload",
    ),
    Hazard(
        id="M12",
        title="One-shot and two-shot share a counter",
        symptom="Under load, block 0 spins for its own grid's arrivals although no peer is missing; "
        "the first of the five control words is not 0 between calls.",
        mechanism="Both kernels count arrivals in one word and test it for equality. After any overlap, lost launch "
        "or aborted kernel the count never matches again, for either strategy.",
        when=(When((TRTLLM,), facts=(Fact.STRATEGIES_SHARE_WORKSPACE,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I4,),
        remedy="Give each strategy a workspace of its own, or check between steps that the counter is 0.",
        source="TS#351; the shared counter was read in FlashInfer's source",
        certainty=Certainty.ANALYSIS,
        shown_by="tests/hangs/test_counters.py::test_m12_what_an_aborted_launch_left_hangs_the_next",
    ),
    Hazard(
        id="M13",
        title="The norm's reduction loses a partial warp",
        symptom="The norm is wrong by a constant factor (1.06 for hidden size 2880); the residual sum is right.",
        mechanism="The number of warps is rounded down, so the last, partial warp of a block is left out of the sum "
        "of squares.",
        when=(When((TRTLLM,), high="0.6.15", facts=(Fact.PARTIAL_WARP_HIDDEN_SIZE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.15 or later, or do not fuse hidden sizes that 256 does not divide.",
        source="FI#3879, FI#3880",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_arithmetic.py::test_m13_rounding_warps_down_scales_the_norm",
    ),
    Hazard(
        id="M14",
        title="FP4 one-shot runs with a cluster of seven",
        symptom="No hang: two in five elements of an FP4 output are wrong.",
        mechanism="The launcher picks a cluster whose size is no power of two, 7 for hidden size 7168.",
        when=(
            When(
                (TRTLLM,),
                high="0.6.4",
                strategy=Strategy.ONE_SHOT,
                capabilities=((10, 0), (10, 3)),
                facts=(Fact.FP4_OUTPUT,),
            ),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.4 or later.",
        source="FI#2557, V#34395",
        certainty=Certainty.CERTAIN,
        not_shown="the FP4 epilogue exists on Blackwell only",
    ),
    Hazard(
        id="M15",
        title="A value held by the host is baked into the graph",
        symptom="The first replay works; a later one spins, or repeats old data for ever.",
        mechanism="An epoch, flag, slot, mask or size that the host chose at launch is a constant of the captured "
        "kernel, and every replay repeats it while the protocol has gone on.",
        when=(
            When(capture=True, facts=(Fact.HOST_EPOCH,)),
            When(capture=True, facts=(Fact.HOST_SYNC_IN_PIECE,)),
            When((Collective.TRTLLM_CUSTOM,), capture=True),
        ),
        decides=Action.SPLIT,
        invariants=(Invariant.I6,),
        remedy="Run the op eagerly between pieces; capture only collectives that keep their epoch on the device.",
        source="FI#3903, TRT#16200, microsoft/mscclpp#502, local-inference-lab/b12x#103",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_divergence.py::test_m15_an_epoch_that_the_host_holds_cannot_be_captured",
    ),
    # -- programmatic dependent launch ---------------------------------------------------------
    Hazard(
        id="M16",
        title="Completion is triggered before the output is written",
        symptom="NaN or old values in the norm's output at small batches; no hang.",
        mechanism="With trigger_completion_at_end=False the next kernel of a PDL chain may start before the output "
        "exists, and reads it unless it waits itself. Waits are not transitive along a chain.",
        when=(When((TRTLLM,), strategy=Strategy.ONE_SHOT, facts=(Fact.EARLY_TRIGGER,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I10,),
        remedy="Pass trigger_completion_at_end=True.",
        source="V#45448, V#43103, SGL#29274, TS#842, FI#3323",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_pdl.py::test_m16_early_trigger_lets_the_next_kernel_read_what_is_not_there",
    ),
    Hazard(
        id="M17",
        title="The residual is read before the wait for its producer",
        symptom="Wrong values in the first layer, or after any kernel that has just written the residual; no hang.",
        mechanism="The kernel loads residual, weight and scale before it waits for the grid it depends on, so with "
        "PDL the kernel just before may not have written them.",
        when=(When((TRTLLM,), facts=(Fact.PRODUCER_RIGHT_BEFORE_PDL,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I10,),
        remedy="Pass launch_with_pdl=False where the kernel just before writes the residual, the weight or the scale.",
        source="FI#5081 (open); read in FlashInfer's source",
        certainty=Certainty.ANALYSIS,
        shown_by="tests/hangs/test_scheduling_pdl.py::test_m17_residual_is_loaded_before_its_producer_wrote_it",
    ),
    Hazard(
        id="M18",
        title="Waiting dependants keep their producer off the SMs",
        symptom="One rank's SMs are full of blocks that wait in griddepcontrol.wait; the peers spin in a collective.",
        mechanism="A PDL secondary with a large grid fills every block slot and waits; when another stream launches "
        "in between, the producer's remaining blocks find no slot.",
        when=(When(facts=(Fact.SIDE_STREAM_ACROSS_PDL,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I10, Invariant.I11),
        remedy="Launch kernels with large grids without PDL, and keep other streams out of a PDL pair.",
        source="SGL#34789, FI#3835, FI#4172, FI#4174, FI#3279, V#42186",
        certainty=Certainty.ANALYSIS,
        shown_by="tests/hangs/test_scheduling_pdl.py::test_m18_waiting_dependents_hold_the_slot_that_their_producer_needs",
    ),
    Hazard(
        id="M19",
        title="A rank replays one all-to-all round behind",
        symptom="After 300 seconds a combine traps; the flag it read is exactly 2 behind the one it expects.",
        mechanism="Under replay with PDL one rank ends up a dispatch and a combine behind. The reporter blames PDL; "
        "how is not known.",
        when=(When((MOE,), capture=True, facts=(Fact.PDL,)),),
        decides=Action.SPLIT,
        invariants=(Invariant.I10,),
        remedy="Pass enable_pdl=False to dispatch and combine, or run them eagerly.",
        source="TRT#14066, FI#3697",
        certainty=Certainty.OPEN,
        not_shown="the mechanism is not known, so there is nothing to model",
    ),
    Hazard(
        id="M20",
        title="A collective of several launches is cut in two",
        symptom="A spin, or old data, at the first call after the cut; the two halves ran in different pieces.",
        mechanism="Two-shot leaves its flags for the second launch to rotate; a publish leaves its stage for the "
        "collect. With another call, graph or failure between the halves, the state belongs to no call.",
        when=(When((*ALL_REDUCES, MOE), facts=(Fact.PROTOCOL_CUT,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I5,),
        remedy="Keep all launches of a collective behind one op, so that no split can come between them.",
        source="read in FlashInfer's source (two-shot with rmsNormLamport; the LL and BT protocols of CuTe DSL)",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_scheduling_memory.py::test_m20_another_call_between_the_halves_overwrites_what_was_scattered",
    ),
    # -- ranks that do different things --------------------------------------------------------
    Hazard(
        id="M21",
        title="The workspace's rendezvous spans the wrong ranks",
        symptom="A hang while workspaces are created, under tensor parallelism with data or pipeline parallelism.",
        mechanism="The rendezvous ran over WORLD, and a broadcast took a rank of the group for a global one; ranks "
        "outside the group never come, or the wrong one sends.",
        when=(
            When(ALL_REDUCES, low="0.6.10", high="0.6.13", facts=(Fact.GROUP_IS_NOT_WORLD,)),
            When(ALL_REDUCES, low="0.6.10", facts=(Fact.GROUP_IS_NOT_WORLD, Fact.RENDEZVOUS_WITHOUT_GROUP)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I7,),
        remedy="Use FlashInfer 0.6.13 or later, and pass group and a communicator of your own to the workspace.",
        source="FI#2955, FI#3247, FI#3408, FI#3418, V#45917, SGL#24452",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m21_a_rendezvous_over_world_waits_for_ranks_that_are_elsewhere",
    ),
    Hazard(
        id="M22",
        title="Ranks launch different grids",
        symptom="A spin inside the two-shot barrier of trtllm; both ranks are in the same call.",
        mechanism="A block writes the barrier flags at a stride of its own grid, with three values in turn. With "
        "grids of different sizes, a late block sees a flag that was lapped and takes it for the previous value.",
        when=(When((TRTLLM,), strategy=Strategy.TWO_SHOT, facts=(Fact.DIVERGENT_GEOMETRY,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I2,),
        remedy="Use equal GPUs, MIG slices, binaries and token counts on all ranks; compare a hash of the launch.",
        source="V#43616; shown by model, no incident is known",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_divergence.py::test_m22_unequal_grids_deadlock_and_equal_ones_do_not",
    ),
    Hazard(
        id="M23",
        title="One rank falls back alone",
        symptom="All ranks but one spin in the fused kernel; that one waits in another collective.",
        mechanism="A rank whose workspace could not be created takes the unfused path, so two groups of ranks wait "
        "in two collectives for each other.",
        when=(When(facts=(Fact.RANK_LOCAL_FALLBACK,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I3, Invariant.I7),
        remedy="Vote over the host group after each creation, and let all ranks fall back together, for good.",
        source="V#53377, V#55973; read in SGLang's flashinfer_comm_fusion.py",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m23_one_rank_falls_back_and_both_wait_in_different_collectives",
    ),
    Hazard(
        id="M24",
        title="mnnvl is chosen where multicast is absent or partial",
        symptom="A hang in the rendezvous, or a crash at the first capture although creation succeeded.",
        mechanism="The device attribute says that multicast is supported while the topology cannot carry it: "
        "bridged GPUs, or nodes joined by InfiniBand only.",
        when=(
            When((MNNVL, CUTEDSL), multicast=False),
            When((MNNVL, CUTEDSL), transports=(Transport.NVLINK_BRIDGE, Transport.PCIE, Transport.INFINIBAND)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I18,),
        remedy="Use trtllm or NCCL; choose mnnvl only after a multicast store and load has worked on all ranks.",
        source="V#45800, V#48071, V#45604, V#51986, V#53377, V#47293, TS#925, FI#3701, FI#2546",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m24_ranks_that_probe_differently_never_meet",
    ),
    Hazard(
        id="M25",
        title="Ranks replay different graphs",
        symptom="First wrong numbers, then a spin; the journals of two ranks differ in a graph, a size or a call.",
        mechanism="A rank that skips, adds or resizes a call is one buffer off. Its peers first take a later call's "
        "words for this one's, and wait for ever at the end.",
        when=(
            When(facts=(Fact.DIVERGENT_SEQUENCE,)),
            When(facts=(Fact.RANK_LOCAL_CHOICE,)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I2, Invariant.I3),
        remedy="Pick graph and padding from values that were reduced over the group; compare a hash of the calls.",
        source="V#25906, V#23595, V#42271, V#48720, V#13418",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_divergence.py::test_m25_ranks_that_choose_different_graphs_fail",
    ),
    Hazard(
        id="M26",
        title="Ranks tune to different tactics",
        symptom="A hang during warm-up or capture, often in a registration of scratch memory.",
        mechanism="Each rank measures for itself; near-ties fall differently, so scratch sizes and calls differ.",
        when=(When(facts=(Fact.AUTOTUNE_PER_RANK,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I2, Invariant.I13),
        remedy="Tune over the process group (FlashInfer 0.6.16: set_autotune_process_group), before any capture.",
        source="FI#3187, FI#4192",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m26_tactics_measured_per_rank_register_different_scratch",
    ),
    Hazard(
        id="M27",
        title="A rank has no token",
        symptom="A launch error on the idle rank, or its peers spin.",
        mechanism="A grid without blocks is no legal launch, and a kernel that loops over another number of rows "
        "makes other calls than its peers.",
        when=(When(WITH_WORKSPACE, facts=(Fact.ZERO_TOKENS,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I15, Invariant.I2),
        remedy="Pad every rank to at least one token.",
        source="FI#4531, TS#596; read in FlashInfer's source",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m27_a_rank_without_tokens_skips_the_call",
    ),
    Hazard(
        id="M28",
        title="A rank is slow or dead, and its peers look guilty",
        symptom="The spinning kernel is a collective; the rank that matters is not in it, but compiling, loading a "
        "module, writing a log, or stuck in another kernel.",
        mechanism="A collective waits for all ranks, so whatever stops one stops the others inside the collective.",
        when=(When(facts=(Fact.RANK_DID_NOT_ENTER,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I17, Invariant.I13),
        remedy="Look at the rank that did not enter. Load all kernels before capture (CUDA_MODULE_LOADING=EAGER).",
        source="FI#4032, FI#4814, FI#3329, SGL#30209, TS#486, TRT#17376",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m28_a_lazy_module_load_waits_for_a_kernel_that_waits_for_the_peer",
    ),
    Hazard(
        id="M29",
        title="One rank throws",
        symptom="A hang instead of an error message; one rank waits in a collective that cleans up.",
        mechanism="A rank that fails in a capture leaves, or runs a collective in a finally, while its peers are "
        "elsewhere; the error is never printed.",
        when=(When(facts=(Fact.NO_GROUP_ABORT,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I16,),
        remedy="Put no collective in a finally; tell the others over the host group, and build the workspace anew.",
        source="SGL#11275",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m29_a_collective_in_finally_hides_the_exception_in_a_hang",
    ),
    # -- at capture ----------------------------------------------------------------------------
    Hazard(
        id="M30",
        title="A workspace is created during a capture",
        symptom="A hang or an invalidated capture in the first warm-up of a graph.",
        mechanism="Creation synchronises the device and meets the other ranks at a barrier; a capture allows neither.",
        when=(When(capture=True, facts=(Fact.WORKSPACE_ABSENT_AT_CAPTURE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I7,),
        remedy="Create every workspace before the first capture, and let creation fail while a stream captures.",
        source="TRT#8781, TRT#8803, V#55973",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m30_a_workspace_made_in_warm_up_waits_for_a_rank_that_spins",
    ),
    Hazard(
        id="M31",
        title="A workspace is replaced after a capture",
        symptom="An illegal access, or a spin on memory that nobody writes, at the first replay after a larger call.",
        mechanism="A captured graph holds addresses. A workspace that grew, or whose memory was released and mapped "
        "anew, is not at them any more.",
        when=(When(WITH_WORKSPACE, capture=True, facts=(Fact.WORKSPACE_REPLACED,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I7,),
        remedy="Size for the largest call and freeze; number the generations, and drop graphs of an older one.",
        source="SGL#40648, FI#3745, FI#3727, FI#3950",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_captured_pieces.py::test_m31_a_replay_uses_the_workspace_that_was_captured",
    ),
    Hazard(
        id="M32",
        title="A custom all-reduce is captured unregistered",
        symptom="An illegal memory access at the first replay of a piece.",
        mechanism="Its kernel reads peer addresses from a table that an exchange after the capture fills; a piece "
        "captured outside that context is not in the table.",
        when=(When((Collective.CUSTOM,), capture=True, facts=(Fact.BUFFERS_NOT_REGISTERED,)),),
        decides=Action.SPLIT,
        invariants=(Invariant.I6,),
        remedy="Capture all pieces inside one capture context of the collective, or run it eagerly.",
        source="SGL#14193, SGL#12106, V#30650",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_memory.py::test_m32_a_piece_captured_outside_the_context_has_no_peer_address",
    ),
    Hazard(
        id="M33",
        title="A capture begins while a peer still warms up",
        symptom="A hang at the first capture; seen on H200 with four ranks.",
        mechanism="Where a rank registers memory with the others around a capture, a peer that is still in an eager "
        "call answers another question.",
        when=(When(capture=True, facts=(Fact.NO_BARRIER_BEFORE_CAPTURE,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I8,),
        remedy="Synchronise the device and meet at a host barrier between the last warm-up and the first capture.",
        source="SGL#33795, SGL#34286",
        certainty=Certainty.ANALYSIS,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m33_registration_of_the_capture_meets_a_peer_in_its_warm_up",
    ),
    Hazard(
        id="M34",
        title="A collective is captured that cannot be",
        symptom="A hang or wrong data at replay; the op is over the host, or its author said not to capture it.",
        mechanism="Part of the collective happens on the host or in memory that a replay does not restore, so the "
        "graph repeats only the rest.",
        when=(
            When((Collective.NCCL,), capture=True, transports=(Transport.HOST,)),
            When((Collective.NCCL,), capture=True, facts=(Fact.NCCL_SYMMETRIC_MEMORY,)),
            # Where M48 was reported, twice: between DGX Sparks.
            When(
                (Collective.NCCL,),
                capture=True,
                multi_node=True,
                capabilities=((12, 1),),
                facts=(Fact.NCCL_BEFORE_2_30_4,),
            ),
            When(capture=True, facts=(Fact.UNMARKED_UNSAFE_OP,)),
        ),
        decides=Action.SPLIT,
        invariants=(Invariant.I6, Invariant.I18),
        remedy="Run it eagerly between pieces; use NCCL 2.30.4 or later, without its symmetric memory.",
        source="V#46253, V#46372, V#52504, V#40969, SGL#29946, SGL#37768, pytorch/torchtitan#3685",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_memory.py::test_m34_the_hosts_part_of_a_captured_collective_is_not_replayed",
    ),
    Hazard(
        id="M35",
        title="A replay hangs under Nsight Systems",
        symptom="A replayed symmetric-memory all-reduce hangs when traced, and only then.",
        mechanism="Not known; a profiler may serialise or reorder the nodes of a graph.",
        when=(When((Collective.SYMMETRIC_MEMORY,), capture=True, facts=(Fact.PROFILER_ATTACHED,)),),
        decides=Action.WARN,
        instead=(Action.SPLIT,),
        invariants=(Invariant.I17,),
        remedy="Run collectives eagerly while you profile.",
        source="V#48486 (open)",
        certainty=Certainty.OPEN,
        not_shown="seen on B300 under Nsight Systems only",
    ),
    # -- at replay -----------------------------------------------------------------------------
    Hazard(
        id="M36",
        title="A replayed graph never progresses on B300",
        symptom="A peer spins in twoshotAllreduceKernel; the other rank has an active context and no kernel, every "
        "launch returned success, and event queries stay not ready.",
        mechanism="Not known, and not in the collective: one GPU and the driver alone show it. Graphs are replayed "
        "back to back on one stream while another copies to the host.",
        when=(When(capture=True, capabilities=((10, 3),), facts=(Fact.COPY_ON_OTHER_STREAM,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I12,),
        remedy="Make the replay stream wait for the copy before the first piece of a step, or copy on that stream.",
        source="SGL#38300, SGL#38463, PT#196133",
        certainty=Certainty.OPEN,
        shown_by="tests/hangs/test_divergence.py::test_m36_the_rank_that_spins_is_the_victim",
    ),
    Hazard(
        id="M37",
        title="Two calls on one workspace overlap",
        symptom="mnnvl: wrong data, then a spin. trtllm: block 0 spins for a counter that has gone past its grid.",
        mechanism="Rotation, counter and clear size belong to one call at a time. A second call in flight reads "
        "them half changed.",
        when=(When(WITH_WORKSPACE, facts=(Fact.TWO_STREAMS,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I4,),
        remedy="Use one workspace per group and stream, or order the streams by events.",
        source="TRT#3988, TRT#10633, FI#4393, SGL#31135",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_streams.py::test_m37_two_trtllm_calls_at_a_time_count_past_the_number",
    ),
    Hazard(
        id="M38",
        title="Blocks that must be resident together are not",
        symptom="A collective with a full grid spins while another stream's kernel holds an SM.",
        mechanism="A grid barrier needs all its blocks at once; one that finds no slot never arrives, and the others "
        "never leave.",
        when=(When((TRTLLM, CUTEDSL, MOE), facts=(Fact.CONCURRENT_PERSISTENT_KERNEL,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I11,),
        remedy="Run no other stream beside the collective, or reserve SMs for it.",
        source="SGL#36657, FI#3615, FI#4595, ROCm/aiter#4977; for trtllm and CuTe DSL inferred",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_scheduling_streams.py::test_m38_two_grids_with_half_of_the_slots_each",
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
    # -- MoE, devices, handles -----------------------------------------------------------------
    Hazard(
        id="M45",
        title="The warp-per-token all-to-all policy hangs",
        symptom="A hang in dispatch or combine in some configurations.",
        mechanism="The policy was removed as hanging in some cases; the cause was not published.",
        when=(When((MOE,), high="0.6.14"),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.14 or later.",
        source="FI#3371, TRT#14550; related: FI#4139, FI#3210, FI#4183",
        certainty=Certainty.OPEN,
        shown_by="tests/hangs/test_moe.py::test_m45_flags_in_private_memory_are_seen_by_nobody",
    ),
    Hazard(
        id="M46",
        title="A rank takes the wrong device or pointer",
        symptom="An illegal access, or a hang in the first call.",
        mechanism="The rank in the group served as device index; the older API packed its pointers with a stride "
        "that fits 16 ranks only; IPC handles do not cross nodes.",
        when=(
            When(ALL_REDUCES, high="0.6.7", facts=(Fact.DEVICE_IS_NOT_RANK,)),
            When((Collective.TRTLLM_CUSTOM,), high="0.6.17", world_sizes=(2, 4, 8)),
            When((TRTLLM, Collective.TRTLLM_CUSTOM), multi_node=True),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.17 or later; between nodes use mnnvl on an NVLink fabric, or NCCL.",
        source="FI#2662, V#34458, V#35426, FI#3903, FI#2006, V#38136",
        certainty=Certainty.CERTAIN,
        not_shown="needs several GPUs, or several nodes",
    ),
    Hazard(
        id="M47",
        title="Multicast handles run out",
        symptom="Another library, such as NCCL with NVLS, fails to start while the model sleeps.",
        mechanism="A workspace holds multicast slots of the device until it is destroyed, asleep or not.",
        when=(
            When((MNNVL, CUTEDSL), facts=(Fact.WORKSPACE_KEPT_WHILE_ASLEEP,)),
            When((TRTLLM,), low="0.6.10", high="0.6.15", facts=(Fact.WORKSPACE_KEPT_WHILE_ASLEEP,)),
        ),
        decides=Action.WARN,
        invariants=(Invariant.I7,),
        remedy="Destroy the workspace before the GPU is handed over, and drop the graphs that hold it.",
        source="radixark/miles#935, FI#3745",
        certainty=Certainty.CERTAIN,
        not_shown="needs multicast hardware",
    ),
    Hazard(
        id="M48",
        title="A replay with NCCL before 2.30.4 deadlocks between nodes",
        symptom="Within the first requests, a replay that holds NCCL collectives hangs on the link between nodes. "
        "Eager calls do not.",
        mechanism="Not known. Reported between DGX Sparks (GB10) over RoCE with NCCL 2.28.9, where 2.30.4 ended it and "
        "nothing else was changed; there M34 decides. On ARM hosts, NCCL before 2.29.3 loses the slots of its network "
        "proxy, which is a hang between nodes too, though not of captures alone. Inside one node 2.28.9 replayed "
        "thousands of steps on H200.",
        when=(When((Collective.NCCL,), capture=True, multi_node=True, facts=(Fact.NCCL_BEFORE_2_30_4,)),),
        decides=Action.WARN,
        instead=(Action.SPLIT,),
        invariants=(Invariant.I6, Invariant.I18),
        remedy="Use NCCL 2.30.4 or later, or run its collectives eagerly (option split_ops).",
        source="V#52504 (open), V#40969, marin-community/marin#8038; measured on H200",
        certainty=Certainty.OPEN,
        not_shown="seen between DGX Sparks only",
    ),
)
