"""Order, memory model and control words, and programmatic dependent launch: M10 to M20."""

from __future__ import annotations

from .. import checks
from ..hazard import ALL_REDUCES, MNNVL, MOE, TRTLLM, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, Strategy, When

ROWS: tuple[Hazard, ...] = (
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
        prevented_by=checks.RELEASES,
    ),
    Hazard(
        id="M11",
        title="A block publishes its head before its payload",
        symptom="No hang: a valid token id arrives with a stale scale.",
        mechanism="In the two-sided all-to-all (PacketPipeline::sendFinalize), the FIFO head was published without a "
        "block barrier after the payload's stores. The one-sided one has no FIFO.",
        when=(When((Collective.MOE_TWO_SIDED,), high="0.6.16"),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.6.16 or later.",
        source="FI#4092; read in trtllm_alltoall_prepare.cuh",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_memory_order.py::test_m11_a_head_without_a_block_barrier_overtakes_its_payload",
        prevented_by=checks.NOT_OURS,
    ),
    Hazard(
        id="M12",
        title="One-shot and two-shot share a counter",
        symptom="Under load, block 0 spins for its own grid's arrivals although no peer is missing; "
        "the first of the five control words is not 0 between calls.",
        mechanism="Both kernels count arrivals in one word and test it for equality. After any overlap, lost launch "
        "or aborted kernel the count never matches again, for either strategy.",
        when=(When((TRTLLM,), facts=(Fact.STRATEGIES_SHARE_WORKSPACE,)),),
        decides=Action.WARN,
        invariants=(Invariant.I4,),
        remedy="Nothing, while calls on a workspace never overlap (M37). With max_tokens within the one-shot sizes of "
        "the size table, or deterministic=True, a workspace serves one strategy; after a failure, make it anew.",
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.HOST_RULES,
    ),
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
        prevented_by=checks.TRTLLM_LAUNCH,
    ),
    Hazard(
        id="M17",
        title="The residual is read before the wait for its producer",
        symptom="Wrong values in the first layer, or after any kernel that has just written the residual; no hang.",
        mechanism="The kernel loads residual, weight and scale before it waits for the grid it depends on, so with "
        "PDL the kernel just before may not have written them.",
        when=(When((TRTLLM,), high="0.7.1", facts=(Fact.PRODUCER_RIGHT_BEFORE_PDL,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I10,),
        remedy="Upgrade FlashInfer to 0.7.1 or later, which loads them after the wait; before that pass "
        "launch_with_pdl=False where the kernel just before writes the residual, the weight or the scale.",
        source="FI#5081; read in FlashInfer 0.7.0.post1, which has it, and 0.7.1, which has not",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_pdl.py::test_m17_residual_is_loaded_before_its_producer_wrote_it",
        prevented_by=checks.TRTLLM_LAUNCH,
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
        not_seen="what an engine launches on other streams is not in the graph; mnnvl's one-shot is launched with PDL",
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
        prevented_by=checks.MOE_LAUNCH,
    ),
    Hazard(
        id="M20",
        title="A collective of several launches is cut in two",
        symptom="A spin, or old data, at the first call after the cut; the two halves ran in different pieces.",
        mechanism="Two-shot leaves its flags for the second launch to rotate; a publish leaves its stage for the "
        "collect. With another call, graph or failure between the halves, the state belongs to no call. A MoE dispatch "
        "and its combine are two calls, and may lie in different pieces (M69).",
        when=(When(ALL_REDUCES, facts=(Fact.PROTOCOL_CUT,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I5,),
        remedy="Keep all launches of a collective behind one op, so that no split can come between them.",
        source="read in FlashInfer's source (two-shot with rmsNormLamport; the LL and BT protocols of CuTe DSL)",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_scheduling_memory.py::test_m20_another_call_between_the_halves_overwrites_what_was_scattered",
        prevented_by=checks.ONE_OP,
    ),
)
