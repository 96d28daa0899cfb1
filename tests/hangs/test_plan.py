"""From a split plan to what each rank launches, by hand for small plans; and what is refused."""

from __future__ import annotations

import pytest

from ringfence.runtime.errors import PlanError, VersionError
from ringfence.runtime.hazards.situation import Payload, Strategy
from ringfence.runtime.protocol.calls import Call, Calls, program, rounds
from ringfence.runtime.protocol.plan import (
    WORLD_SIZES,
    PlannedPiece,
    PlannedRank,
    PlannedSite,
    check,
    even_pieces,
    machine_for,
    programs,
    with_grids,
)
from ringfence.runtime.protocol.rules import (
    Sentinel,
    Words,
    mnnvl_rules,
    moe_rules,
    trtllm_rules,
)

PIECES = (
    PlannedPiece("first", False, (PlannedSite("a"),)),
    PlannedPiece("between", True, (PlannedSite("b"),)),
    PlannedPiece("last", False, (PlannedSite("c"),)),
)


def told(calls: Calls) -> list[tuple[int, str, int | None]]:
    return [(call.tokens, call.where, call.epoch) for call in calls]


def test_an_uncaptured_step_runs_eagerly() -> None:
    (calls,) = programs([PlannedRank(PIECES, steps=(3, 5))])
    assert told(calls) == [
        (3, "step 0, first, eager", 0),
        (3, "step 0, between, eager", 1),
        (3, "step 0, last, eager", 2),
        (5, "step 1, first, eager", 3),
        (5, "step 1, between, eager", 4),
        (5, "step 1, last, eager", 5),
    ]
    assert [call.id for call in calls] == list(range(6))


def test_a_new_size_runs_once_then_replays_and_islands_stay_eager() -> None:
    """The host's number of a replayed call is that of the recording; an island's is new each time."""
    (calls,) = programs([PlannedRank(PIECES, steps=(3, 4), capture_sizes=(4,))])
    assert [call.tokens for call in calls] == [4] * 6
    assert [(call.where, call.epoch) for call in calls] == [
        ("step 0, first, first run", 0),
        ("step 0, between, eager", 2),
        ("step 0, last, first run", 3),
        ("step 1, first, replay", 1),
        ("step 1, between, eager", 5),
        ("step 1, last, replay", 4),
    ]


def test_each_size_is_captured_once_and_larger_steps_run_eagerly() -> None:
    (calls,) = programs([PlannedRank(PIECES[:1], steps=(1, 9, 2, 1), capture_sizes=(1, 2))])
    assert [(call.tokens, call.where.split(", ")[-1]) for call in calls] == [
        (1, "first run"),
        (9, "eager"),
        (2, "first run"),
        (1, "replay"),
    ]


def test_without_padding_only_exact_sizes_are_captured() -> None:
    (calls,) = programs([PlannedRank(PIECES[:1], steps=(1, 2), capture_sizes=(2,), padding=False)])
    assert [(call.tokens, call.where.split(", ")[-1]) for call in calls] == [
        (1, "eager"),
        (2, "first run"),
    ]


def test_a_strategy_is_the_sites_own_or_chosen_by_size() -> None:
    pieces = (PlannedPiece("only", False, (PlannedSite("a"), PlannedSite("b", Strategy.TWO_SHOT))),)
    (calls,) = programs([PlannedRank(pieces, steps=(10, 100), two_shot_from=100, payload=Payload.SUBNORMAL)])
    assert [call.strategy for call in calls] == [Strategy.ONE_SHOT] + [Strategy.TWO_SHOT] * 3
    assert {call.payload for call in calls} == {Payload.SUBNORMAL}


def test_the_same_call_has_the_same_id_on_all_ranks() -> None:
    """Rank 1 has captured size 2 in step 0; rank 0 captures it in step 1."""
    first, second = programs([PlannedRank(PIECES[:1], (1, 2), (1, 2)), PlannedRank(PIECES[:1], (2, 2), (1, 2))])
    assert [call.id for call in first] == [call.id for call in second] == [0, 1]
    assert [call.where for call in second] == ["step 0, first, first run", "step 1, first, replay"]


def test_even_pieces_hold_every_site_once_in_order() -> None:
    pieces = even_pieces(80, 2, 33)
    names = [site.name for piece in pieces for site in piece.sites]
    assert len(pieces) == 33
    assert names == [f"layer {layer} site {site}" for layer in range(80) for site in range(2)]
    assert {len(piece.sites) for piece in pieces} == {4, 5}


def test_grids_differ_where_tokens_do() -> None:
    ranks = with_grids([program([8, 8, 8]), program([8, 4, 8]), program([8, 8, 8])])
    assert [[call.ctas for call in calls] for calls in ranks] == [[1, 2, 1], [1, 1, 1], [1, 2, 1]]


@pytest.mark.parametrize("ranks", [0, 1, 3, 5, 32])
def test_a_world_that_no_kernel_serves_is_refused(ranks: int) -> None:
    with pytest.raises(PlanError, match=f"a world of {ranks} ranks.* 2, 4, 8 or 16"):
        machine_for("mnnvl", "0.6.13", [program([1])] * ranks)


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_the_worlds_that_kernels_serve_are_decided(ranks: int) -> None:
    assert check("mnnvl", "0.6.13", [program([1, 1])] * ranks).safe
    assert check("moe_all_to_all", "0.6.13", [rounds(2)] * ranks).safe


def test_a_plan_without_a_collective_is_refused() -> None:
    with pytest.raises(PlanError, match="no collective"):
        check("trtllm", "0.6.13", programs([PlannedRank(even_pieces(0, 2, 3), steps=(1,))] * 2))


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(PlanError, match="'nccl'; there are mnnvl, trtllm, ringfence or moe_all_to_all"):
        check("nccl", "0.6.13", [(Call(0),)] * 2)


@pytest.mark.parametrize("version", ["", "latest", "0", "0.6.x", "0.6.13 and later"])
def test_a_version_that_cannot_be_read_is_refused(version: str) -> None:
    with pytest.raises(VersionError, match=r"is not a version|are not known here"):
        check("mnnvl", version, [program([1])] * 2)


@pytest.mark.parametrize("rules", [mnnvl_rules, trtllm_rules, moe_rules])
@pytest.mark.parametrize("version", ["0.2.8", "0.5.3", "0.6.0rc1"])
def test_a_version_before_the_known_ones_is_refused(version: str, rules: type) -> None:
    with pytest.raises(VersionError, match=r"known are 0\.6\.0 and later"):
        rules(version)


@pytest.mark.parametrize(
    ("version", "sentinel", "words", "sanitises_sum", "polls_own"),
    [
        ("0.6.0", Sentinel.FLOAT, Words.FIRST, False, True),
        ("0.6.10.post1", Sentinel.FLOAT, Words.FIRST, False, True),
        ("0.6.11.post3", Sentinel.FLOAT, Words.FIRST, False, True),
        ("0.6.12rc1", Sentinel.FLOAT, Words.FIRST, False, True),
        ("0.6.12", Sentinel.BITWISE, Words.FIRST, False, True),
        ("0.6.13", Sentinel.BITWISE, Words.ALL, True, False),
        ("0.7.2.post1", Sentinel.BITWISE, Words.ALL, True, False),
    ],
)
def test_what_mnnvl_releases_do(
    version: str, sentinel: Sentinel, words: Words, sanitises_sum: bool, polls_own: bool
) -> None:
    rules = mnnvl_rules(version)
    assert (rules.sentinel, rules.words, rules.sanitises_sum, rules.polls_own) == (
        sentinel,
        words,
        sanitises_sum,
        polls_own,
    )
