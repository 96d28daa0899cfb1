"""Ranks that do different things: M21 to M29."""

from __future__ import annotations

from .. import checks
from ..hazard import (
    ALL_REDUCES,
    CUTEDSL,
    MNNVL,
    MOE,
    SUMMING,
    TRTLLM,
    Action,
    Certainty,
    Hazard,
    Invariant,
)
from ..situation import Fact, Strategy, When

ROWS: tuple[Hazard, ...] = (
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
        prevented_by=checks.CHANNEL,
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
        prevented_by=checks.SAME_MACHINES,
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
        prevented_by=checks.VOTE,
    ),
    Hazard(
        id="M24",
        title="mnnvl is chosen where multicast is absent or partial",
        symptom="A hang in the rendezvous, or a crash at the first capture although creation succeeded.",
        mechanism="The device attribute says that multicast is supported while the topology cannot carry it: "
        "bridged GPUs, or nodes joined by InfiniBand only.",
        when=(When((MNNVL, CUTEDSL), multicast=False),),
        decides=Action.REFUSE,
        invariants=(Invariant.I18,),
        remedy="Use trtllm or NCCL; choose mnnvl only after a multicast store and load has worked on all ranks.",
        source="V#45800, V#48071, V#45604, V#51986, V#53377, V#47293, TS#925, FI#3701, FI#2546",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m24_ranks_that_probe_differently_never_meet",
        prevented_by=checks.MULTICAST,
    ),
    Hazard(
        id="M25",
        title="Ranks replay different graphs",
        symptom="First wrong numbers, then a spin; the journals of two ranks differ in a graph, a size or a call. An "
        "idle data-parallel rank runs eager while a busy one replays, batches differ because each rank aborts by its "
        "own clock, or a race (at a resume, say) lets some ranks enter one collective more.",
        mechanism="A rank that skips, adds or resizes a call is one buffer off. Its peers first take a later call's "
        "words for this one's, and wait for ever at the end. NCCL deadlocks at once.",
        when=(
            When(facts=(Fact.DIVERGENT_SEQUENCE,)),
            When(facts=(Fact.RANK_LOCAL_CHOICE,)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I2, Invariant.I3),
        remedy="Pick graph and padding from values that were reduced over the group; compare a hash of the calls.",
        source="V#25906, V#23595, V#42271, V#48720, V#13418, SGL#37561, SGL#37933, SGL#33871, SGL#27221, "
        "volcengine/verl#7846",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_divergence.py::test_m25_ranks_that_choose_different_graphs_fail",
        prevented_by=checks.AGREEMENT,
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
        prevented_by=checks.SIZE_TABLE,
    ),
    Hazard(
        id="M27",
        title="A rank has no token",
        symptom="A launch error on the idle rank, or its peers spin.",
        mechanism="A grid without blocks is no legal launch, and a kernel that loops over another number of rows "
        "makes other calls than its peers.",
        when=(
            When(SUMMING, facts=(Fact.ZERO_TOKENS,)),
            When((MOE,), high="0.6.0", facts=(Fact.ZERO_TOKENS,)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I15, Invariant.I2),
        remedy="Pad every rank to at least one token. The one-sided MoE all-to-all needs none from 0.6.0 on.",
        source="FI#4531, TS#596, FI#2247, SGL#22394; read in FlashInfer's source",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m27_a_rank_without_tokens_skips_the_call",
        prevented_by=checks.NOT_EMPTY,
    ),
    Hazard(
        id="M28",
        title="A rank is slow or dead, and its peers look guilty",
        symptom="The spinning kernel is a collective in which its peers wait; the rank that matters is not in it, but "
        "compiling, loading a module, writing a log, spinning in the driver (while sampling, say), or stuck in another "
        "kernel.",
        mechanism="A collective waits for all ranks, so whatever stops one stops the others inside the collective.",
        when=(When(facts=(Fact.RANK_DID_NOT_ENTER,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I17, Invariant.I13),
        remedy="Look at the rank that did not enter. Load all kernels before capture (CUDA_MODULE_LOADING=EAGER).",
        source="FI#4032, FI#4814, FI#3329, SGL#30209, TS#486, TRT#17376, V#41725",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m28_a_lazy_module_load_waits_for_a_kernel_that_waits_for_the_peer",
        guard=checks.CULPRIT,
        not_seen="not a fact of a plan: what stops a rank shows when its peers wait",
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
        guard=checks.TELLS_OTHERS,
        not_seen="not a fact of a plan: it happens when a step breaks off",
    ),
)
