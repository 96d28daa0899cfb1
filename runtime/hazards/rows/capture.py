"""At capture: M30 to M35."""

from __future__ import annotations

from .. import checks
from ..hazard import WITH_WORKSPACE, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, When

#: Who registers the buffers of captured calls.
_REGISTERED = (Collective.NCCL, Collective.CUSTOM, Collective.SYMMETRIC_MEMORY)

ROWS: tuple[Hazard, ...] = (
    Hazard(
        id="M30",
        title="A workspace is created during a capture",
        symptom="A hang or an invalidated capture in the first warm-up of a graph; an engine that fails at start "
        "because NCCL registers a symmetric-memory window during a capture.",
        mechanism="Creation, and the registration of a window, synchronise the device and meet the other ranks at a "
        "barrier; a capture allows neither.",
        when=(When(capture=True, facts=(Fact.WORKSPACE_ABSENT_AT_CAPTURE,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I7,),
        remedy="Create every workspace before the first capture, and let creation fail while a stream captures.",
        source="TRT#8781, TRT#8803, V#55973, V#54626",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_scheduling_hosts.py::test_m30_a_workspace_made_in_warm_up_waits_for_a_rank_that_spins",
        prevented_by=checks.NOT_IN_CAPTURE,
    ),
    Hazard(
        id="M31",
        title="A workspace is replaced after a capture",
        symptom="An illegal access, or a spin on memory that nobody writes, at the first replay after a larger call, "
        "or after the graphs' memory pool was paused and resumed (sleep and wake-up): with NCCL a hang.",
        mechanism="A captured graph holds addresses. A workspace that grew, or whose memory was released and mapped "
        "anew, is not at them any more. NCCL registers the buffers of captured calls with the device and the network, "
        "and a registration does not follow memory that is mapped anew at the same address.",
        when=(When((*WITH_WORKSPACE, *_REGISTERED), capture=True, facts=(Fact.WORKSPACE_REPLACED,)),),
        decides=Action.RUNTIME_GUARD,
        invariants=(Invariant.I7,),
        remedy="Size for the largest call and freeze; number the generations, and drop graphs of an older one. With "
        "NCCL, keep its buffers out of memory that is paused, capture anew after waking, or set NCCL_GRAPH_REGISTER=0.",
        source="SGL#40648, fzyzcjy/torch_memory_saver#88, FI#3745, FI#3727, FI#3950",
        certainty=Certainty.CERTAIN,
        shown_by="tests/hangs/test_captured_pieces.py::test_m31_a_replay_uses_the_workspace_that_was_captured",
        guard=checks.CLOSED,
        prevented_by=checks.NEVER_REPLACED,
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
        prevented_by=checks.NOT_OURS,
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
        guard=checks.BEFORE_CAPTURE,
        prevented_by=checks.BEFORE_CAPTURE,
    ),
    Hazard(
        id="M34",
        title="A collective is captured that cannot be",
        symptom="A hang or wrong data at replay; part of the op is the host's, or its author said not to capture it. "
        "Or an engine fails at start: NCCL's symmetric memory registers its windows during a capture.",
        mechanism="Part of the collective happens on the host or in memory that a replay does not restore, so the "
        "graph repeats only the rest.",
        when=(
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
        remedy="Run it eagerly between pieces; use NCCL 2.30.4 or later with NCCL_GRAPH_REGISTER=0 between nodes (M48, "
        "M55), without its symmetric memory, or register its windows before the capture.",
        source="V#46253, V#46372, V#52504, V#40969, V#54626, SGL#29946, SGL#37768, pytorch/torchtitan#3685",
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
        prevented_by=checks.NOT_OURS,
    ),
)
