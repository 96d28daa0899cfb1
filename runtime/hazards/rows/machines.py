"""MoE, devices, handles, nodes, and arithmetic: M45 to M49."""

from __future__ import annotations

from .. import checks
from ..hazard import ALL_REDUCES, CUTEDSL, MNNVL, MOE, TRTLLM, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, Strategy, When

ROWS: tuple[Hazard, ...] = (
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
        prevented_by=checks.RELEASES,
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
        prevented_by=checks.ONE_NODE,
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
        not_seen="whether an engine puts a model to sleep is not in the graph; close_workspaces gives the memory back",
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
        remedy="Use NCCL 2.30.4 or later, with NCCL_GRAPH_REGISTER=0, since releases up to 2.30.7 at least hang "
        "between nodes in another way (M55); or run its collectives eagerly (option split_ops).",
        source="V#52504 (open), V#40969, marin-community/marin#8038; measured on H200",
        certainty=Certainty.OPEN,
        not_shown="seen between DGX Sparks only",
    ),
    Hazard(
        id="M49",
        title="A row with a large element has the norm 0",
        symptom="No hang. Rows of the norm are 0 in float16, those whose residual stream holds an element of 256 or "
        "more, and the model answers nonsense; bfloat16 is right.",
        mechanism="The kernel squares each element in the activation dtype and widens the square. In half precision "
        "256 squares to infinity, so the reciprocal root of the mean is 0, and with it the row. trtllm squares in "
        "float32, as two-shot does from 0.6.13 on; bfloat16 only loses precision.",
        when=(
            When((MNNVL,), low="0.6.0", strategy=Strategy.ONE_SHOT, dtypes=("float16",)),
            When((MNNVL,), high="0.6.13", strategy=Strategy.TWO_SHOT, dtypes=("float16",)),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I18,),
        remedy="Use bfloat16, or trtllm, or the reference: collective='trtllm'.",
        source="FI#2118; read in 0.3.0, 0.5.3, 0.6.0, 0.6.10 to 0.6.13, 0.6.18.post1 and 0.7.2; reproduced on H200",
        certainty=Certainty.CERTAIN,
        shown_by="tests/runtime/test_ready.py::test_float16_is_never_carried_out_by_mnnvl",
    ),
)
