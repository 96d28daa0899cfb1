"""What depends on the words that are sent, and on the memory that they are sent to: M1 to M9."""

from __future__ import annotations

from .. import checks
from ..hazard import ALL_REDUCES, MNNVL, TRTLLM, WITH_WORKSPACE, Action, Certainty, Hazard, Invariant
from ..situation import Fact, Payload, Strategy, When

ROWS: tuple[Hazard, ...] = (
    Hazard(
        id="M1",
        title="A negative subnormal word passes for the sentinel",
        symptom="A model with mnnvl hangs in piecewise CUDA graphs, and eager too: both GPUs at 100 % for ever; single "
        "lanes poll, their siblings wait in a shuffle. The polled slot holds a word between 0x80000001 and 0x807FFFFF.",
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.SELF_TEST,
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.BUFFER_SIZE,
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
        prevented_by=checks.RELEASES,
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
        source="V#47284, V#47589, FI#3869 (open), SGL#29485",
        certainty=Certainty.CERTAIN,
        not_shown="the out-of-bounds write needs FlashInfer's kernel on a GPU",
        prevented_by=checks.FITS,
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
        guard=checks.BUFFER_DUMP,
        not_seen="not a fact of a plan: another op's fault, looked for when a job hangs",
    ),
)
