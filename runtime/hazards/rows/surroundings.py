"""NCCL's own buffers, newer faults of the kernels, and what is around them: M55 to M61."""

from __future__ import annotations

from .. import checks
from ..hazard import MOE, TRTLLM, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, Strategy, When

ROWS: tuple[Hazard, ...] = (
    Hazard(
        id="M55",
        title="NCCL loses the flag of a graph-registered buffer",
        symptom="Between nodes, in replays: all ranks at 100 % without an error, log line or timeout, after minutes or "
        "hours; the host may block in cuGraphLaunch once its queue is full. GPUDirect or RoCE, small and large calls "
        "in one graph.",
        mechanism="NCCL registers the buffers of captured collectives with the network. A receive that is late to be "
        "accounted for resets a slot in which the kernel of the next, registered receive has already published its "
        "flag, and both sides wait for ever.",
        when=(When((Collective.NCCL,), capture=True, multi_node=True, facts=(Fact.NCCL_REGISTERS_GRAPHS,)),),
        decides=Action.WARN,
        instead=(Action.SPLIT,),
        invariants=(Invariant.I6, Invariant.I18),
        remedy="Set NCCL_GRAPH_REGISTER=0 on all ranks: captures stay, without registered buffers. Or run NCCL's "
        "collectives eagerly (option split_ops).",
        source="NVIDIA/nccl#2389, NVIDIA/nccl#2390, NVIDIA/nccl#2334 (open); read in NCCL 2.30.7; compare SGL#29548",
        certainty=Certainty.ANALYSIS,
        not_shown="needs two nodes with GPUDirect",
    ),
    Hazard(
        id="M56",
        title="Memory is unmapped under a collective",
        symptom="An illegal memory access when the model is put to sleep or woken, after the request for it was "
        "answered with success.",
        mechanism="Sleeping unmaps weights, caches and buffers while a step that was submitted before, or a collective "
        "of it on another rank, still uses them.",
        when=(When(facts=(Fact.UNMAPPED_IN_FLIGHT,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I14, Invariant.I2),
        remedy="Drain first: stop scheduling on all ranks, synchronise every device, meet at a host barrier, and only "
        "then unmap; wake in the same order.",
        source="V#45520, V#45552, V#44483, V#50011",
        certainty=Certainty.CERTAIN,
        not_shown="an engine's fault: ringfence unmaps nothing",
        not_seen="whether an engine puts a model to sleep is not in the graph",
    ),
    Hazard(
        id="M57",
        title="A collective is captured inside a conditional node",
        symptom="cudaErrorStreamCaptureMerge, or an invalidated capture, for an NCCL call in a branch or loop of a "
        "graph when another capture went before.",
        mechanism="The body of a conditional node (torch.cond, while_loop) is a graph of its own; NCCL orders its "
        "captured launches by a stream that belongs to the capture before.",
        when=(When(capture=True, facts=(Fact.CONDITIONAL_NODE,)),),
        decides=Action.SPLIT,
        invariants=(Invariant.I6,),
        remedy="Keep collectives out of captured branches and loops: decide on the host, and capture each branch by "
        "itself.",
        source="PT#191681 (open)",
        certainty=Certainty.OPEN,
        not_shown="conditional nodes exist on a device only",
        prevented_by=checks.HOST_RULES,
    ),
    Hazard(
        id="M58",
        title="A two-shot flag that is two barriers old passes",
        symptom="No hang: rare wrong sums in trtllm two-shot calls, where token counts vary from call to call.",
        mechanism="Until 0.7.1 a block raises its own flag first, and only then those of blocks that its grid does not "
        "have. A peer waits for the former alone; in the next launch, with a larger grid, it may still see one of the "
        "latter as it was two barriers before, which is no less a change.",
        when=(When((TRTLLM,), high="0.7.2", strategy=Strategy.TWO_SHOT, facts=(Fact.GRIDS_TAKE_TURNS,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I1,),
        remedy="Upgrade FlashInfer to 0.7.2 or later; before that, one-shot only, or one token count per workspace.",
        source="read in FlashInfer 0.6.18.post1 to 0.7.2: Barrier::sync of trtllm_allreduce_fusion.cuh; shown by model",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_divergence.py::test_m58_before_0_7_2_a_larger_grid_takes_a_flag_that_is_two_barriers_old",
        prevented_by=checks.SAFE_STRATEGIES,
    ),
    Hazard(
        id="M59",
        title="A masked MoE rank rejoins with an old epoch",
        symptom="Elastic expert parallelism: after a rank was masked out and comes back, dispatch or combine hangs, or "
        "traps after its time-out.",
        mechanism="While it is masked, the rank's epoch does not advance and its peers' flags do. Setting its bit in "
        "the mask again makes the others wait for a value that it will not write.",
        when=(When((MOE,), facts=(Fact.RANK_REJOINS,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I16, Invariant.I2),
        remedy="Restoring the bit is not enough: stop all ranks between rounds, make the workspace anew on all of them "
        "(or copy epoch and flags from a healthy rank), then let the rank in.",
        source="read in FlashInfer 0.7.2 (trtllm_moe_alltoall.py); V#39942, V#30112, kvcache-ai/Mooncake#3963",
        certainty=Certainty.CERTAIN,
        not_shown="the model has no mask that changes between rounds",
        prevented_by=checks.MOE_LAUNCH,
    ),
    Hazard(
        id="M60",
        title="All ranks are in a kernel that is no collective",
        symptom="Every rank spins in the same GEMM, attention, sampling or speculative verify kernel (EAGLE), at "
        "little power; mbarrier or barrier waits, and no collective is running on any of them.",
        mechanism="The kernel itself never ends: a fault of its build, or inputs that are wrong in the same way on all "
        "ranks. Nobody waits for another rank, so nothing about ranks, captures or collectives cures it.",
        when=(When(facts=(Fact.SAME_OTHER_KERNEL,)),),
        decides=Action.WARN,
        invariants=(Invariant.I1, Invariant.I15),
        remedy="Take the kernel's name to its library and change that version: FlashInfer 0.6.14 hangs so in batched "
        "GEMMs on SM103, 0.6.15 is mended. Or choose another backend for that op.",
        source="FI#3971, FI#3708, SGL#30919, SGL#35822 (open)",
        certainty=Certainty.CERTAIN,
        not_shown="needs those kernels",
        not_seen="not a fact of a plan: seen when a job stands still",
    ),
    Hazard(
        id="M61",
        title="A pinned buffer is written while it is still being copied",
        symptom="With asynchronous scheduling: some ranks spin at 100 %, others stand at 0 % and wait on the host in a "
        "gloo all-reduce or broadcast. The ranks at 100 % are the stuck ones.",
        mechanism="The host fills the next step's inputs into the pinned buffer from which the step before is still "
        "being copied. The device of one rank gets a mixture, and runs another step than the rest.",
        when=(When(facts=(Fact.PINNED_BUFFER_REUSED,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I14, Invariant.I12),
        remedy="Give each step in flight a pinned buffer of its own, or wait for the copy's event before writing; "
        "meanwhile turn asynchronous scheduling off.",
        source="V#54269 (open)",
        certainty=Certainty.ANALYSIS,
        not_shown="an engine's fault, before the graph; ranks that then differ are M25's",
        not_seen="what an engine copies before a call is not in the graph",
    ),
)
