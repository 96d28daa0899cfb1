"""The one-sided MoE all-to-all: M62 to M69."""

from __future__ import annotations

from .. import checks
from ..hazard import MOE, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, When

ROWS: tuple[Hazard, ...] = (
    Hazard(
        id="M62",
        title="Ranks pass different capacities",
        symptom="No hang: garbage or NaN after a MoE layer, accuracy 0, or an illegal memory access.",
        mechanism="The capacity of a call (runtime_max_tokens_per_rank) decides at which row of a peer's memory a rank "
        "writes. It comes from each rank's own arguments, nobody compares it, and a captured call keeps the one of its "
        "capture.",
        when=(When((MOE, Collective.REFERENCE), facts=(Fact.RANK_OWN_CAPACITY,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I2, Invariant.I3),
        remedy="Pass the largest token count of all ranks, which they agreed on before, and capture for each such "
        "number; ranks of a captured bucket pass the bucket.",
        source="SGL#30242, SGL#30450, SGL#27945, SGL#25685, TRT#13723; on two H200s 8 of 8 rows were wrong",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_moe_planes.py::test_m62_ranks_with_different_capacities_read_what_nobody_wrote_there",
        prevented_by=checks.CAPACITY,
    ),
    Hazard(
        id="M63",
        title="The rows of a larger dispatch lie over what a slow rank still combines",
        symptom="Rare wrong rows where calls of different capacity or row width follow one another: layers that differ "
        "in their payloads, buckets that take turns, a draft model on the same workspace.",
        mechanism="The combine region begins behind the received rows, so it moves with capacity and widths. Nothing "
        "waits for a peer to finish its combine: it has told that it began. A fast rank's next dispatch, if larger, "
        "writes over what that peer still reads.",
        when=(When((MOE,), facts=(Fact.GEOMETRY_CHANGES,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I4, Invariant.I7),
        remedy="Put the combine region at one offset, behind the largest rows of all calls (the functional API's "
        "combine_payload_offset), or give each geometry a workspace of its own.",
        source="read in FlashInfer 0.6.18.post1 and 0.7.2.post1 (moeAlltoAllKernels.cu); shown by model; not provoked "
        "in 80 calls on two H200s",
        certainty=Certainty.INFERRED,
        shown_by="tests/hangs/test_moe_planes.py::test_m63_a_larger_dispatch_overwrites_what_a_slow_rank_combines",
        prevented_by=checks.MOE_MEMORY,
    ),
    Hazard(
        id="M64",
        title="A workspace is cleared after a peer's first flag",
        symptom="The first dispatch hangs, on some starts.",
        mechanism="Each rank clears its own part of the workspace when it is made. Without a barrier behind that, a "
        "peer's first rows and flag may arrive before, and are wiped.",
        when=(When((MOE,), high="0.7.0", facts=(Fact.INITIALISED_ALONE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I7, Invariant.I8),
        remedy="Meet at a barrier of all ranks between moe_a2a_initialize and the first dispatch.",
        source="read in FlashInfer 0.7.2 (trtllm_moe_alltoall.py), which has the barrier",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_moe_planes.py::test_m64_without_a_barrier_a_first_flag_is_wiped",
        prevented_by=checks.MOE_MEMORY,
    ),
    Hazard(
        id="M65",
        title="More tokens than the capacity, or ids of no expert",
        symptom="No hang: rows of another rank's tokens are wrong, or a counter of the workspace is.",
        mechanism="The kernels check neither. A token too many lies in the next rank's block; an id that is no "
        "expert's (padding of -1, or the number of experts) goes to rank 0, or beyond the counters.",
        when=(When((MOE,), facts=(Fact.ROUTING_UNCHECKED,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I15,),
        remedy="Check the token count against the capacity before the call; give padding an expert of its own rank and "
        "a weight of 0, or clamp ids.",
        source="read in FlashInfer 0.6.18.post1 and 0.7.2.post1, and seen with the library's own checks",
        certainty=Certainty.CERTAIN,
        shown_by="tests/runtime/test_moe.py::test_a_dispatch_that_would_overwrite_others_rows_is_an_error",
        prevented_by=checks.ROUTING,
    ),
    Hazard(
        id="M66",
        title="A top-k that was not compiled throws half-way",
        symptom="'Unsupported top_k' from a dispatch, and peers that hang if they do not throw as well.",
        mechanism="The check passes 3, 5, 7, 9 and 20, the first kernel advances the flag of the call, and only then "
        "the launcher finds no dispatch kernel.",
        when=(When((MOE,), facts=(Fact.TOP_K_NOT_COMPILED,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I9, Invariant.I16),
        remedy="Use 1, 2, 4, 6, 8, 10, 12, 14, 16, 18 or 22 experts per token, or pad to the next with weights of 0; "
        "after the error make the workspace anew.",
        source="seen with FlashInfer 0.6.18.post1 without a GPU",
        certainty=Certainty.CERTAIN,
        not_shown="needs the library",
        prevented_by=checks.MOE_LAUNCH,
    ),
    Hazard(
        id="M67",
        title="A small payload misaligns the next one",
        symptom="A CUDA error (misaligned address) in the first dispatch of a payload with scales.",
        mechanism="Before 0.7 the received rows of one payload begin where those of the one before end, and rows are "
        "copied by 16 bytes where their size allows that.",
        when=(When((MOE,), high="0.7.0", facts=(Fact.MISALIGNED_PLANE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Pass payloads by falling width, or upgrade FlashInfer to 0.7 or later.",
        source="TRT#10539; read in FlashInfer 0.6.18.post1 and 0.7.2",
        certainty=Certainty.CERTAIN,
        not_shown="needs the library",
        prevented_by=checks.MOE_LAUNCH,
    ),
    Hazard(
        id="M68",
        title="What a combine returned is summed once more",
        symptom="No hang: outputs too large by the number of ranks, accuracy lost.",
        mechanism="A combine has summed over the ranks already; an all-reduce that the layer had for another way of "
        "moving tokens sums again.",
        when=(When((MOE,), facts=(Fact.REDUCED_TWICE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I2,),
        remedy="Leave out the layer's all-reduce where its experts' result was combined.",
        source="V#41382, SGL#22669",
        certainty=Certainty.CERTAIN,
        not_shown="a fault of a model, whose every collective does what it is asked",
        not_seen="an all-reduce of a combined value may be meant, over another group",
    ),
    Hazard(
        id="M69",
        title="Received rows are used after their combine, or a dispatch is not answered",
        symptom="No hang: experts compute with rows of the next layer. Or a dispatch hangs, whose predecessor had "
        "no combine.",
        mechanism="What a dispatch returns is the workspace's memory, which peers fill again once they have passed the "
        "combine; a compiler may also give it to a later result. And its flags alternate with the combine's: after two "
        "dispatches in a row a peer may miss one.",
        when=(
            When((MOE,), facts=(Fact.PLANES_OUTLIVE,)),
            When((MOE,), facts=(Fact.DISPATCH_UNANSWERED,)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I4, Invariant.I14),
        remedy="Read received rows before the combine, copy what is needed later, and answer each dispatch by one "
        "combine before the next, on every rank; after a failure between them make the workspace anew.",
        source="read in FlashInfer's source; Inductor was seen to write into memory that an op returned",
        certainty=Certainty.CERTAIN,
        shown_by="tests/compile_passes/test_moe_calls.py::test_m69_rows_that_outlive_their_combine_and_unanswered_dispatches",
    ),
)
