"""Which collective is chosen, and why not another."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import B200, H200, FakeFlashInfer, fakes

from ringfence.runtime.channel import open_channel
from ringfence.runtime.collectives import group_facts, rank_facts, table
from ringfence.runtime.collectives import mnnvl as mnnvl_module
from ringfence.runtime.collectives import opt_outs as opt_outs_module
from ringfence.runtime.collectives import trtllm as trtllm_module
from ringfence.runtime.collectives.choice import Choice, choose
from ringfence.runtime.collectives.links import Topology
from ringfence.runtime.collectives.rank_facts import RankFacts
from ringfence.runtime.collectives.ready import Wanted, prepare
from ringfence.runtime.collectives.size_table import TABLE, SizeRow, forced_row
from ringfence.runtime.collectives.workspace import close_workspaces
from ringfence.runtime.errors import CollectiveUnavailableError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Strategy
from support import run_threaded

MNNVL, TRTLLM, REFERENCE = Collective.MNNVL, Collective.TRTLLM, Collective.REFERENCE
RINGFENCE = Collective.RINGFENCE
#: For what is said of FlashInfer's collectives where ringfence's own would be taken.
OTHERS = tuple(one for one in table.ALL if one.name is not RINGFENCE)


def chosen(ranks: list[RankFacts], **wanted: Any) -> tuple[Collective, str | None]:
    found = choose(ranks, **wanted)
    assert found.candidates[-1].why_not is None and found.candidates[-1].collective == found.collective
    assert all(c.why_not for c in found.candidates[:-1])
    assert (found.row is None) == (found.collective is REFERENCE)
    return found.collective, found.transport


def why_not(found: Choice, collective: Collective, transport: str) -> str:
    (said,) = [c.why_not for c in found.candidates if (c.collective, c.transport) == (collective, transport)]
    assert said is not None
    return said


# -- preference


def test_in_order_of_preference() -> None:
    assert chosen([B200] * 2) == (MNNVL, "multicast")
    assert chosen([H200] * 2) == (RINGFENCE, "peer")
    assert chosen([H200] * 2, failed={("ringfence", "peer"): "no"}) == (MNNVL, "peer")
    assert chosen([H200] * 4) == (RINGFENCE, "peer")
    assert chosen([H200] * 4, failed={("ringfence", "peer"): "no"}) == (TRTLLM, "peer")
    alone = replace(H200, flashinfer=None, flashinfer_missing="it is not there")
    assert chosen([alone] * 4) == (RINGFENCE, "peer")
    assert chosen([alone] * 8) == (REFERENCE, None)


def test_the_row_is_that_of_the_choice() -> None:
    for ranks in ([B200] * 2, [H200] * 2, [H200] * 4, [B200] * 8):
        found = choose(ranks)
        row = found.row
        assert row is not None and row in TABLE
        assert (row.collective, row.transport) == (found.collective, found.transport)
        assert (row.capability, row.world_size) == (ranks[0].capability, len(ranks))


def test_the_reasons_are_sentences_in_order() -> None:
    assert choose([H200] * 8).reasons == (
        "mnnvl/multicast: the device of rank 0 has no NVLink multicast",
        "ringfence/peer: no row of the size table knows 8 GPUs of SM90; name it to force it",
        "mnnvl/peer: one-shot over the peer's own pointer is for two ranks, not 8",
        "trtllm/peer: chosen",
    )


def test_the_choice_depends_on_nothing_but_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    before = choose([B200, replace(B200, opt_outs=("NVSHMEM_DISABLE_NVLS=1",))])
    monkeypatch.setattr(rank_facts, "own_opt_outs", lambda: pytest.fail("a rank looked at itself"))
    monkeypatch.setattr(rank_facts, "load", lambda: pytest.fail("a rank looked at itself"))
    for name in opt_outs_module.MULTICAST_OPT_OUTS:
        monkeypatch.delenv(name, raising=False)
    assert choose([B200, replace(B200, opt_outs=("NVSHMEM_DISABLE_NVLS=1",))]) == before


@pytest.mark.parametrize("odd", range(3))
def test_a_fact_of_any_rank_decides_for_all(odd: int) -> None:
    """Which rank it is does not matter, so no rank can see another answer."""
    for other in (
        {"flashinfer_missing": "gone", "flashinfer": None},
        {"flashinfer": "0.7.0"},
        {"multiprocessors": 78},
        {"host": "node1"},
        {"peers": False},
        {"multicast": False},
        {"opt_outs": ("NCCL_NVLS_ENABLE=0",)},
    ):
        ranks = [replace(B200) for _ in range(3)]
        usual = choose(ranks, wanted="mnnvl")
        ranks[odd] = replace(B200, **other)  # type: ignore[arg-type]
        if other in ({"host": "node1"}, {"peers": False}):
            assert choose(ranks, wanted="mnnvl") == usual  # multicast does not go over peer memory
            with pytest.raises(CollectiveUnavailableError):
                choose(ranks, wanted="trtllm", table=())
        else:
            assert choose(ranks).collective is not MNNVL


# -- every reason

REASONS: dict[str, tuple[list[RankFacts], Collective, str, dict[str, Any], str]] = {
    "no package": ([H200, replace(H200, flashinfer_missing="not here")], TRTLLM, "peer", {}, "not here"),
    "versions": (
        [H200, replace(H200, flashinfer="0.7.0")],
        TRTLLM,
        "peer",
        {},
        "ranks differ in flashinfer: rank 0: 0.7.2.post1; rank 1: 0.7.0",
    ),
    "capabilities": (
        [H200, replace(H200, capability=(10, 0))],
        TRTLLM,
        "peer",
        {},
        "ranks differ in capability: rank 0: (9, 0); rank 1: (10, 0)",
    ),
    "multiprocessors": (
        [H200, H200, H200, replace(H200, multiprocessors=78)],
        TRTLLM,
        "peer",
        {},
        "ranks differ in multiprocessors: ranks 0, 1, 2: 132; rank 3: 78",
    ),
    "opt-out": (
        [B200, replace(B200, opt_outs=("NVSHMEM_DISABLE_NVLS=1",))],
        MNNVL,
        "multicast",
        {},
        "multicast is turned off (NVSHMEM_DISABLE_NVLS=1 on rank 1)",
    ),
    "no multicast": (
        [B200, replace(B200, multicast=False)],
        MNNVL,
        "multicast",
        {},
        "the device of rank 1 has no NVLink multicast",
    ),
    "nodes": (
        [H200, replace(H200, host="node1")],
        TRTLLM,
        "peer",
        {},
        "the ranks are on several nodes, and peer memory is reached within one",
    ),
    "no peer access": (
        [replace(H200, peers=None), replace(H200, peers=False)],
        MNNVL,
        "peer",
        {},
        "a GPU cannot address the memory of another",
    ),
    "four ranks": (
        [H200] * 4,
        MNNVL,
        "peer",
        {},
        "one-shot over the peer's own pointer is for two ranks, not 4",
    ),
    "old package": (
        [replace(H200, flashinfer="0.6.12")] * 2,
        MNNVL,
        "peer",
        {},
        "FlashInfer 0.6.12 polls a rank's own slot; 0.6.13 is needed",
    ),
    "not bitwise": (
        [H200] * 8,
        TRTLLM,
        "peer",
        {"deterministic": True},
        "not shown to return the same bits whatever the token count",
    ),
    "hazard": ([replace(B200, flashinfer="0.6.10")] * 2, MNNVL, "multicast", {}, "M1, "),
    "failed before": (
        [H200] * 2,
        TRTLLM,
        "peer",
        {"failed": {(TRTLLM, "peer"): "its workspace could not be created"}},
        "its workspace could not be created",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_reason_passes_a_candidate_over_and_is_named_where_it_was_insisted_on(case: str) -> None:
    ranks, collective, transport, given, said = REASONS[case]
    if given.get("deterministic"):
        with pytest.raises(CollectiveUnavailableError, match=re.escape(f"{collective}/{transport}: {said}")):
            choose(ranks, **given)
    else:
        preferred = {(MNNVL, "multicast"): "it failed", (MNNVL, "peer"): "it failed"}
        preferred.pop((collective, transport), None)
        found = choose(ranks, among=OTHERS, **{"failed": preferred | given.get("failed", {})})
        assert why_not(found, collective, transport).startswith(said)
    with pytest.raises(CollectiveUnavailableError) as caught:
        choose(ranks, wanted=str(collective), transport=transport, **given)
    assert str(caught.value).startswith(f"collective='{collective}'") and "cannot be had here: " in str(caught.value)
    assert f"{collective}/{transport}: {said}" in str(caught.value)
    assert "reference" not in str(caught.value)


def test_the_same_facts_without_the_reason_are_served() -> None:
    for _, (ranks, collective, transport, given, _said) in REASONS.items():
        fine = B200 if transport == "multicast" else H200
        count = 2 if transport == "peer" and collective is MNNVL else len(ranks)
        assert chosen([fine] * count, wanted=str(collective), transport=transport) == (collective, transport), given


def test_every_reason_of_a_forced_collective_is_named() -> None:
    with pytest.raises(CollectiveUnavailableError) as caught:
        choose([H200] * 4, wanted="mnnvl")
    assert str(caught.value) == (
        "collective='mnnvl' cannot be had here: mnnvl/multicast: the device of rank 0 has no NVLink multicast; "
        "mnnvl/peer: one-shot over the peer's own pointer is for two ranks, not 4"
    )


def test_deterministic_takes_what_is_shown_and_never_the_reference() -> None:
    assert chosen([H200] * 2, deterministic=True) == (RINGFENCE, "peer")
    assert chosen([H200] * 2, deterministic=True, among=OTHERS) == (MNNVL, "peer")
    assert chosen([H200] * 2, deterministic=True, wanted="trtllm") == (TRTLLM, "peer")
    for wanted in ("auto", "reference"):
        with pytest.raises(CollectiveUnavailableError, match=r"deterministic=True cannot be had .*reference: not"):
            choose([H200] * 8, wanted=wanted, deterministic=True)


def test_a_size_that_no_row_knows_is_for_those_who_insist() -> None:
    ranks = [replace(H200, capability=(12, 0))] * 2
    found = choose(ranks)
    assert found.collective is REFERENCE
    for transport_of in ((MNNVL, "peer"), (TRTLLM, "peer")):
        assert why_not(found, *transport_of) == ("no row of the size table knows 2 GPUs of SM120; name it to force it")
    forced = choose(ranks, wanted="trtllm")
    assert forced.row == forced_row(trtllm_module.IMPLEMENTATION, (12, 0), 2, Topology.NVSWITCH)
    assert choose([B200] * 3, wanted="mnnvl").row == forced_row(mnnvl_module.MULTICAST, (10, 0), 3, Topology.NVSWITCH)
    with pytest.raises(CollectiveUnavailableError, match="not shown"):  # a forced row was not measured
        choose(ranks, wanted="trtllm", deterministic=True)


def test_a_table_of_ones_own_comes_first() -> None:
    mine = SizeRow(TRTLLM, "peer", (9, 0), 2, 1, 2, 3, "mine")
    assert choose([H200] * 2, wanted="trtllm", table=(mine, *TABLE)).row is mine
    assert chosen([H200] * 2, table=(mine,)) == (TRTLLM, "peer")


def test_what_failed_is_not_tried_again() -> None:
    failed: dict[tuple[Collective, str], str] = {}
    order = []
    for _ in range(4):
        collective, transport = chosen([B200] * 2, failed=failed)
        order.append((collective, transport))
        if transport is not None:
            failed[collective, transport] = "it failed"
    assert order == [(MNNVL, "multicast"), (TRTLLM, "peer"), (REFERENCE, None), (REFERENCE, None)]


def test_ranks_are_named_by_their_global_rank() -> None:
    """As everywhere else: the second group of a job has ranks 4 and 5, and no rank 1."""
    off = choose([B200, replace(B200, opt_outs=("X=1",))], numbers=(4, 5))
    assert why_not(off, MNNVL, "multicast") == "multicast is turned off (X=1 on rank 5)"
    unlike = choose([H200, replace(H200, flashinfer="0.7.0")], numbers=(4, 5), among=OTHERS)
    assert why_not(unlike, TRTLLM, "peer") == "ranks differ in flashinfer: rank 4: 0.7.2.post1; rank 5: 0.7.0"
    none = choose([replace(B200, multicast=False)] * 2, numbers=(6, 7))
    assert why_not(none, MNNVL, "multicast") == "the device of rank 6 has no NVLink multicast"


def test_a_hidden_size_that_does_not_fit_says_nothing_of_other_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(rank: int) -> list[Any]:
        name = dist.group.WORLD.group_name
        packages[rank] = FakeFlashInfer(name)
        group, seen = Group(name, "nccl", 2, rank), []
        for hidden in (100, 256, 100):
            wish = Wanted("auto", "auto", hidden, torch.float32, max_tokens=4)
            ready = prepare(open_channel(group.name, seconds=120), group, torch.device("cpu"), wish)
            seen.append((ready.collective, " ".join(map(str, ready.candidates))))
        close_workspaces(name)
        return seen

    packages: dict[int, FakeFlashInfer] = {}
    monkeypatch.setattr(table, "ALL", fakes(lambda: packages[dist.get_rank()]))
    monkeypatch.setattr(group_facts, "probe", lambda device: replace(H200, flashinfer="0.7.2.post1"))
    for small, fits, again in run_threaded(2, body):
        assert small == again and small[0] is REFERENCE and "trtllm/peer: hidden size 100 of torch.float32" in small[1]
        assert fits[0] is MNNVL


def test_one_strategy_for_every_size_of_a_forced_peer_transport() -> None:
    row = choose([replace(H200, capability=(8, 0))] * 2, wanted="mnnvl").row
    assert row is not None and row.one_shot == row.fused
    assert row.strategy(row.fused) is Strategy.ONE_SHOT and row.strategy(row.fused + 1) is None


@pytest.mark.parametrize(("version", "two_shot"), [("0.6.18", False), ("0.7.1", False), ("0.7.2", True)])
def test_two_shot_of_trtllm_is_used_where_its_barrier_is_right(version: str, two_shot: bool) -> None:
    """M58: before 0.7.2 sizes that only two-shot serves go to the reference, also where trtllm is insisted on."""
    for ranks, wanted in (
        ([H200] * 4, "trtllm"),
        ([B200] * 4, "trtllm"),
        ([replace(H200, capability=(12, 0))] * 2, "trtllm"),
    ):
        row = choose([replace(facts, flashinfer=version) for facts in ranks], wanted=wanted).row
        assert row is not None and row.one_shot > 0
        assert (row.fused > row.one_shot) == two_shot
        assert row.strategy(row.one_shot + 1) is (Strategy.TWO_SHOT if two_shot else None)
        assert row.all_reduce <= row.fused
    row = choose([replace(B200, flashinfer=version)] * 4).row
    assert row is not None and row.collective is MNNVL and row.fused > row.one_shot, "of mnnvl it is another barrier"
