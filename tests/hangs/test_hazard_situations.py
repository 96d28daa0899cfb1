"""In which situations a row of the hazard table applies, and in which close by it does not."""

from __future__ import annotations

import dataclasses

import pytest

from ringfence.runtime.hazards.catalogue import (
    HAZARDS,
    Collective,
    Fact,
    Hazard,
    Payload,
    Situation,
    Strategy,
    applicable,
)
from ringfence.runtime.hazards.situation import facts_of_nccl

NEWEST = "0.7.2.post1"
MNNVL, TRTLLM, MOE = Collective.MNNVL, Collective.TRTLLM, Collective.MOE_ALL_TO_ALL
TWO_SIDED = Collective.MOE_TWO_SIDED
CUTEDSL, NCCL = Collective.MNNVL_CUTEDSL, Collective.NCCL
SYMMETRIC = Collective.SYMMETRIC_MEMORY


def ids(situation: Situation) -> list[str]:
    return [hazard.id for hazard in applicable(situation)]


def newest(collective: Collective, *facts: Fact) -> Situation:
    return Situation(collective, NEWEST, facts=frozenset(facts))


def but(situation: Situation, *facts: Fact, **changes: object) -> Situation:
    """The situation with these facts instead of its own, and with these fields changed."""
    return dataclasses.replace(situation, facts=frozenset(facts), **changes)  # type: ignore[arg-type]


# For each row, situations in which it applies, and situations close by in which it does not.
_m1 = Situation(MNNVL, "0.6.11.post3", payload=Payload.SUBNORMAL, dtype="float16")
_m2 = Situation(MNNVL, "0.6.12", strategy=Strategy.TWO_SHOT, dtype="bfloat16")
_m4 = but(newest(TRTLLM), Fact.UNSANITISED_PAYLOAD, payload=Payload.NEGATIVE_ZERO)
_m7 = but(Situation(MNNVL, "0.6.18rc1"), Fact.MISALIGNED_BUFFER)
_m10 = Situation(MNNVL, "0.5.3", capability=(9, 0))
_m13 = but(Situation(TRTLLM, "0.6.14"), Fact.PARTIAL_WARP_HIDDEN_SIZE)
_m14 = but(Situation(TRTLLM, "0.6.3", capability=(10, 3)), Fact.FP4_OUTPUT)
_m21 = but(Situation(TRTLLM, "0.6.12"), Fact.GROUP_IS_NOT_WORLD)
_m36 = but(newest(MNNVL), Fact.COPY_ON_OTHER_STREAM, capability=(10, 3))
_m39 = but(Situation(TRTLLM, "0.6.13"), Fact.RESETTING_GRID_BARRIER)
_m46 = but(Situation(MNNVL, "0.6.6"), Fact.DEVICE_IS_NOT_RANK)
_m47 = but(Situation(TRTLLM, "0.6.14"), Fact.WORKSPACE_KEPT_WHILE_ASLEEP)
_sparks = but(newest(NCCL), Fact.NCCL_BEFORE_2_30_4, nodes=2, capability=(12, 1))
_m49 = Situation(MNNVL, NEWEST, strategy=Strategy.ONE_SHOT, dtype="float16")
_m58 = but(Situation(TRTLLM, "0.7.1", strategy=Strategy.TWO_SHOT), Fact.GRIDS_TAKE_TURNS)
_m17 = but(Situation(TRTLLM, "0.7.0.post1"), Fact.PRODUCER_RIGHT_BEFORE_PDL)
_custom = Situation(Collective.TRTLLM_CUSTOM, "0.6.16", world_size=8, capture=False)

EXAMPLES: dict[str, tuple[list[Situation], list[Situation]]] = {
    "M1": (
        [_m1, but(_m1, flashinfer="0.6.10", payload=Payload.ANY, dtype=None), but(_m1, capture=False)],
        [but(_m1, flashinfer="0.6.12"), but(_m1, payload=Payload.ORDINARY), but(_m1, collective=TRTLLM)],
    ),
    "M2": (
        [_m2, but(_m2, strategy=None), but(_m2, dtype=None)],
        [but(_m2, flashinfer="0.6.13"), but(_m2, strategy=Strategy.ONE_SHOT), but(_m2, dtype="float16")],
    ),
    "M3": ([_m2, but(_m2, dtype="float16")], [but(_m2, flashinfer="0.6.13"), but(_m2, strategy=Strategy.ONE_SHOT)]),
    "M4": ([_m4], [but(_m4), but(_m4, Fact.UNSANITISED_PAYLOAD, payload=Payload.ORDINARY)]),
    "M5": ([Situation(MNNVL, "0.2.8")], [Situation(MNNVL, "0.2.9"), Situation(TRTLLM, "0.2.8")]),
    "M6": ([newest(TRTLLM, Fact.LAMPORT_OVER_1_GIB)], [newest(TRTLLM), newest(MNNVL, Fact.LAMPORT_OVER_1_GIB)]),
    "M7": (
        [_m7],
        [
            but(_m7, Fact.MISALIGNED_BUFFER, flashinfer="0.6.18rc2"),
            but(_m7, Fact.MISALIGNED_BUFFER, flashinfer="0.6.18"),
            but(_m7, Fact.MISALIGNED_BUFFER, strategy=Strategy.ONE_SHOT),
            but(_m7),
        ],
    ),
    "M8": ([newest(MNNVL, Fact.CAPTURE_SIZE_BEYOND_WORKSPACE)], [newest(NCCL, Fact.CAPTURE_SIZE_BEYOND_WORKSPACE)]),
    "M9": ([newest(TRTLLM, Fact.CONTROL_WORD_ILLEGAL)], [newest(TRTLLM)]),
    "M10": ([_m10], [but(_m10, flashinfer="0.6.0"), but(_m10, capability=(10, 0)), but(_m10, capability=None)]),
    "M11": ([Situation(TWO_SIDED, "0.6.15")], [Situation(TWO_SIDED, "0.6.16"), Situation(MOE, "0.6.15")]),
    "M12": ([newest(TRTLLM, Fact.STRATEGIES_SHARE_WORKSPACE)], [newest(MNNVL, Fact.STRATEGIES_SHARE_WORKSPACE)]),
    "M13": ([_m13], [but(_m13), but(_m13, Fact.PARTIAL_WARP_HIDDEN_SIZE, flashinfer="0.6.15")]),
    "M14": (
        [_m14],
        [
            but(_m14),
            but(_m14, Fact.FP4_OUTPUT, flashinfer="0.6.4"),
            but(_m14, Fact.FP4_OUTPUT, capability=(9, 0)),
            but(_m14, Fact.FP4_OUTPUT, strategy=Strategy.TWO_SHOT),
        ],
    ),
    "M15": (
        [newest(MOE, Fact.HOST_EPOCH), newest(NCCL, Fact.HOST_SYNC_IN_PIECE), but(_custom, capture=True)],
        [newest(MOE), but(newest(MOE), Fact.HOST_EPOCH, capture=False), _custom],
    ),
    "M16": (
        [newest(TRTLLM, Fact.EARLY_TRIGGER)],
        [newest(MNNVL, Fact.EARLY_TRIGGER), but(newest(TRTLLM), Fact.EARLY_TRIGGER, strategy=Strategy.TWO_SHOT)],
    ),
    "M17": (
        [_m17],
        [but(_m17, Fact.PDL), *(but(_m17, Fact.PRODUCER_RIGHT_BEFORE_PDL, flashinfer=v) for v in ("0.7.1", NEWEST))],
    ),
    "M18": ([newest(NCCL, Fact.SIDE_STREAM_ACROSS_PDL)], [newest(NCCL, Fact.PDL)]),
    "M19": ([newest(MOE, Fact.PDL)], [but(newest(MOE), Fact.PDL, capture=False), newest(TRTLLM, Fact.PDL)]),
    "M20": ([newest(MNNVL, Fact.PROTOCOL_CUT)], [newest(MNNVL), newest(MOE, Fact.PROTOCOL_CUT)]),
    "M21": (
        [_m21, newest(TRTLLM, Fact.GROUP_IS_NOT_WORLD, Fact.RENDEZVOUS_WITHOUT_GROUP)],
        [
            but(_m21, Fact.GROUP_IS_NOT_WORLD, flashinfer="0.6.13"),
            but(_m21, Fact.GROUP_IS_NOT_WORLD, flashinfer="0.6.9"),
            newest(TRTLLM, Fact.RENDEZVOUS_WITHOUT_GROUP),
        ],
    ),
    "M22": (
        [newest(TRTLLM, Fact.DIVERGENT_GEOMETRY)],
        [newest(MNNVL, Fact.DIVERGENT_GEOMETRY), but(newest(TRTLLM), Fact.DIVERGENT_GEOMETRY, strategy="one-shot")],
    ),
    "M23": ([newest(MNNVL, Fact.RANK_LOCAL_FALLBACK)], [newest(MNNVL)]),
    "M24": (
        [but(newest(MNNVL), multicast=False), but(newest(CUTEDSL), multicast=False, nodes=2)],
        [newest(MNNVL), but(newest(MNNVL), multicast=True, nodes=2), but(newest(TRTLLM), multicast=False)],
    ),
    "M25": ([newest(MNNVL, Fact.DIVERGENT_SEQUENCE), newest(TRTLLM, Fact.RANK_LOCAL_CHOICE)], [newest(MNNVL)]),
    "M26": ([newest(TRTLLM, Fact.AUTOTUNE_PER_RANK)], [newest(TRTLLM)]),
    "M27": (
        [newest(TRTLLM, Fact.ZERO_TOKENS), but(Situation(MOE, "0.5.3"), Fact.ZERO_TOKENS)],
        [newest(TRTLLM), newest(NCCL, Fact.ZERO_TOKENS), but(Situation(MOE, "0.6.0"), Fact.ZERO_TOKENS)],
    ),
    "M28": ([newest(NCCL, Fact.RANK_DID_NOT_ENTER)], [newest(NCCL)]),
    "M29": ([newest(NCCL, Fact.NO_GROUP_ABORT)], [newest(NCCL)]),
    "M30": (
        [newest(MNNVL, Fact.WORKSPACE_ABSENT_AT_CAPTURE)],
        [but(newest(MNNVL), Fact.WORKSPACE_ABSENT_AT_CAPTURE, capture=False)],
    ),
    "M31": (
        [newest(MNNVL, Fact.WORKSPACE_REPLACED), newest(NCCL, Fact.WORKSPACE_REPLACED)],
        [but(newest(MNNVL), Fact.WORKSPACE_REPLACED, capture=False), newest(NCCL)],
    ),
    "M32": (
        [newest(Collective.CUSTOM, Fact.BUFFERS_NOT_REGISTERED)],
        [newest(Collective.CUSTOM), newest(TRTLLM, Fact.BUFFERS_NOT_REGISTERED)],
    ),
    "M33": ([newest(MNNVL, Fact.NO_BARRIER_BEFORE_CAPTURE)], [newest(MNNVL)]),
    "M34": (
        [
            newest(NCCL, Fact.NCCL_SYMMETRIC_MEMORY),
            _sparks,
            newest(MNNVL, Fact.UNMARKED_UNSAFE_OP),
        ],
        [
            newest(NCCL),
            but(_sparks, capability=(12, 1), nodes=2),
            but(_sparks, Fact.NCCL_BEFORE_2_30_4, nodes=1),
            but(_sparks, Fact.NCCL_BEFORE_2_30_4, capability=(9, 0)),
        ],
    ),
    "M35": (
        [newest(Collective.SYMMETRIC_MEMORY, Fact.PROFILER_ATTACHED)],
        [newest(Collective.SYMMETRIC_MEMORY), newest(MNNVL, Fact.PROFILER_ATTACHED)],
    ),
    "M36": ([_m36], [but(_m36, capability=(10, 3)), but(_m36, Fact.COPY_ON_OTHER_STREAM, capability=(9, 0))]),
    "M37": (
        [newest(c, Fact.TWO_STREAMS) for c in (MNNVL, TRTLLM, SYMMETRIC, Collective.CUSTOM, NCCL)],
        [newest(MNNVL), newest(Collective.REFERENCE, Fact.TWO_STREAMS)],
    ),
    "M38": (
        [newest(TRTLLM, Fact.CONCURRENT_PERSISTENT_KERNEL)],
        [newest(TRTLLM), newest(MNNVL, Fact.CONCURRENT_PERSISTENT_KERNEL)],
    ),
    "M39": ([_m39], [but(_m39), but(_m39, Fact.RESETTING_GRID_BARRIER, flashinfer="0.6.14")]),
    "M40": (
        [newest(NCCL, Fact.UNSTABLE_ISLAND_OUTPUT)],
        [but(newest(NCCL), Fact.UNSTABLE_ISLAND_OUTPUT, capture=False)],
    ),
    "M41": ([newest(TRTLLM, Fact.INPUT_FREED_EARLY)], [newest(TRTLLM)]),
    "M42": ([newest(NCCL, Fact.SHARED_GRAPH_EXEC)], [newest(NCCL)]),
    "M43": ([newest(NCCL, Fact.UNDEFINED_PADDING)], [but(newest(NCCL), Fact.UNDEFINED_PADDING, capture=False)]),
    "M44": ([newest(MNNVL, Fact.GRAPHS_DIFFER_IN_SIZE)], [newest(NCCL, Fact.GRAPHS_DIFFER_IN_SIZE)]),
    "M45": ([Situation(MOE, "0.6.13")], [Situation(MOE, "0.6.14")]),
    "M46": (
        [_m46, _custom, but(newest(TRTLLM), nodes=2)],
        [
            but(_m46, Fact.DEVICE_IS_NOT_RANK, flashinfer="0.6.7"),
            but(_custom, world_size=16),
            but(_custom, flashinfer="0.6.17"),
            but(newest(MNNVL), nodes=2),
        ],
    ),
    "M47": (
        [_m47, newest(MNNVL, Fact.WORKSPACE_KEPT_WHILE_ASLEEP)],
        [
            but(_m47, Fact.WORKSPACE_KEPT_WHILE_ASLEEP, flashinfer="0.6.15"),
            but(_m47, Fact.WORKSPACE_KEPT_WHILE_ASLEEP, flashinfer="0.6.9"),
            newest(MNNVL),
        ],
    ),
    "M48": (
        [but(_sparks, Fact.NCCL_BEFORE_2_30_4, capability=None), _sparks],
        [
            but(_sparks, Fact.NCCL_BEFORE_2_30_4, nodes=1),
            but(_sparks, Fact.NCCL_BEFORE_2_30_4, capture=False),
            but(_sparks, Fact.NCCL_BEFORE_2_30_4, collective=TRTLLM),
            but(_sparks),
        ],
    ),
    "M49": (
        [
            _m49,
            but(_m49, strategy=None),
            but(_m49, dtype=None),
            but(_m49, strategy=Strategy.TWO_SHOT, flashinfer="0.6.12"),
        ],
        [
            but(_m49, dtype="bfloat16"),
            but(_m49, strategy=Strategy.TWO_SHOT),
            but(_m49, collective=TRTLLM),
            but(_m49, flashinfer="0.5.3"),
        ],
    ),
    "M50": ([newest(TRTLLM, Fact.NOT_ALL_NVLINK)], [newest(TRTLLM), newest(NCCL, Fact.NOT_ALL_NVLINK)]),
    "M51": (
        [newest(NCCL, Fact.PEER_COPY_LOST), newest(TRTLLM, Fact.PEER_COPY_LOST)],
        [newest(NCCL), newest(Collective.REFERENCE, Fact.PEER_COPY_LOST)],
    ),
    "M52": ([newest(SYMMETRIC, Fact.FABRIC_NOT_READY)], [newest(SYMMETRIC), newest(TRTLLM, Fact.FABRIC_NOT_READY)]),
    "M53": (
        [but(newest(MNNVL), Fact.NO_IMEX_CHANNEL, nodes=2, multicast=True)],
        [newest(MNNVL, Fact.NO_IMEX_CHANNEL), but(newest(MNNVL), nodes=2)],
    ),
    "M54": ([newest(MOE, Fact.HANDLES_FORBIDDEN)], [newest(MOE), newest(NCCL, Fact.HANDLES_FORBIDDEN)]),
    "M55": (
        [but(newest(NCCL), Fact.NCCL_REGISTERS_GRAPHS, nodes=2)],
        [
            newest(NCCL, Fact.NCCL_REGISTERS_GRAPHS),
            but(newest(NCCL), nodes=2),
            but(newest(NCCL), Fact.NCCL_REGISTERS_GRAPHS, nodes=2, capture=False),
        ],
    ),
    "M56": ([newest(NCCL, Fact.UNMAPPED_IN_FLIGHT)], [newest(NCCL)]),
    "M57": (
        [newest(NCCL, Fact.CONDITIONAL_NODE)],
        [newest(NCCL), but(newest(NCCL), Fact.CONDITIONAL_NODE, capture=False)],
    ),
    "M58": (
        [_m58, but(_m58, Fact.GRIDS_TAKE_TURNS, flashinfer="0.6.18", strategy=None)],
        [
            but(_m58),
            but(_m58, Fact.GRIDS_TAKE_TURNS, flashinfer="0.7.2"),
            but(_m58, Fact.GRIDS_TAKE_TURNS, strategy=Strategy.ONE_SHOT),
            but(_m58, Fact.GRIDS_TAKE_TURNS, collective=MNNVL),
        ],
    ),
    "M59": ([newest(MOE, Fact.RANK_REJOINS)], [newest(MOE), newest(TRTLLM, Fact.RANK_REJOINS)]),
    "M60": ([newest(NCCL, Fact.SAME_OTHER_KERNEL)], [newest(NCCL)]),
    "M61": ([newest(NCCL, Fact.PINNED_BUFFER_REUSED)], [newest(NCCL)]),
    "M62": (
        [newest(MOE, Fact.RANK_OWN_CAPACITY), newest(Collective.REFERENCE, Fact.RANK_OWN_CAPACITY)],
        [newest(MOE), newest(NCCL, Fact.RANK_OWN_CAPACITY)],
    ),
    "M63": ([newest(MOE, Fact.GEOMETRY_CHANGES)], [newest(MOE), newest(TRTLLM, Fact.GEOMETRY_CHANGES)]),
    "M64": (
        [but(Situation(MOE, "0.6.18"), Fact.INITIALISED_ALONE)],
        [but(Situation(MOE, "0.7.0"), Fact.INITIALISED_ALONE), Situation(MOE, "0.6.18")],
    ),
    "M65": ([newest(MOE, Fact.ROUTING_UNCHECKED)], [newest(MOE), newest(TWO_SIDED, Fact.ROUTING_UNCHECKED)]),
    "M66": ([newest(MOE, Fact.TOP_K_NOT_COMPILED)], [newest(MOE)]),
    "M67": (
        [but(Situation(MOE, "0.6.18.post1"), Fact.MISALIGNED_PLANE)],
        [newest(MOE, Fact.MISALIGNED_PLANE), Situation(MOE, "0.6.18.post1")],
    ),
    "M68": ([newest(MOE, Fact.REDUCED_TWICE)], [newest(MOE), newest(NCCL, Fact.REDUCED_TWICE)]),
    "M69": (
        [newest(MOE, Fact.PLANES_OUTLIVE), newest(MOE, Fact.DISPATCH_UNANSWERED)],
        [newest(MOE), newest(Collective.REFERENCE, Fact.PLANES_OUTLIVE)],
    ),
}


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.id)
def test_row_applies_where_it_should_and_not_close_by(hazard: Hazard) -> None:
    where, close_by = EXAMPLES[hazard.id]
    for situation in where:
        assert hazard.id in ids(situation), situation
    for situation in close_by:
        assert hazard.id not in ids(situation), situation
    for when in hazard.when:
        assert any(when.holds(situation) for situation in where), f"no example of {when}"


@pytest.mark.parametrize("collective", Collective)
@pytest.mark.parametrize("capture", [True, False])
def test_a_sound_plan_on_the_newest_release_meets_no_hazard(collective: Collective, capture: bool) -> None:
    captured_with_host_epoch = collective is Collective.TRTLLM_CUSTOM and capture
    assert ids(but(newest(collective), capture=capture, dtype="bfloat16")) == (
        ["M15"] if captured_with_host_epoch else []
    )


def test_unknown_version_strategy_and_payload_may_be_the_worst() -> None:
    unknown = Situation(MNNVL)
    assert ids(unknown) == ["M1", "M2", "M3", "M5", "M49"]
    assert ids(Situation(MNNVL, "0.6.10")) == ["M1", "M2", "M3", "M49"]
    assert ids(Situation(MNNVL, "0.6.12")) == ["M2", "M3", "M49"]
    assert ids(Situation(MNNVL, "0.6.13")) == ["M49"]
    assert ids(Situation(MNNVL, "0.6.13", dtype="bfloat16")) == []


@pytest.mark.parametrize(
    ("version", "graph_register", "rows"),
    [
        ("2.27.5", None, []),
        ("2.28.9", None, ["M48", "M55"]),
        ("2.28.9", "0", ["M48"]),
        ("2.29.7", "1", ["M48", "M55"]),
        ("2.30.3", "", ["M48", "M55"]),
        ("2.30.4", None, ["M55"]),
        ("2.30.7", None, ["M55"]),
        ("2.30.7", " 0 ", []),
        ("2.31.2", "2", ["M55"]),
        (None, None, []),
    ],
)
def test_what_is_known_of_nccl_between_nodes(version: str | None, graph_register: str | None, rows: list[str]) -> None:
    """From 2.30.4 on M48 is past, and the registered buffers of nccl#2389 and nccl#2334 are there."""
    two_nodes = but(newest(NCCL), *facts_of_nccl(version, graph_register), nodes=2, capability=(9, 0))
    assert ids(two_nodes) == rows
    assert ids(dataclasses.replace(two_nodes, nodes=1)) == ids(dataclasses.replace(two_nodes, capture=False)) == []
