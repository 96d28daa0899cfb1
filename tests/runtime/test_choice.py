"""Which collective is chosen, and why not another; and that multicast is not used where it is barred."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import FACTS, FakeFlashInfer, fakes

from ringfence.runtime.channel import open_channel
from ringfence.runtime.collectives import group_facts, rank_facts, table
from ringfence.runtime.collectives import mnnvl as mnnvl_module
from ringfence.runtime.collectives import opt_outs as opt_outs_module
from ringfence.runtime.collectives import trtllm as trtllm_module
from ringfence.runtime.collectives.choice import Choice, choose
from ringfence.runtime.collectives.links import Links, Topology
from ringfence.runtime.collectives.opt_outs import nccl_files, opt_outs
from ringfence.runtime.collectives.rank_facts import RankFacts, multicast_barred, numbered
from ringfence.runtime.collectives.ready import Wanted, prepare
from ringfence.runtime.collectives.size_table import TABLE, SizeRow, forced_row
from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of
from ringfence.runtime.errors import CollectiveUnavailableError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Strategy
from support import run_threaded

MNNVL, TRTLLM, REFERENCE = Collective.MNNVL, Collective.TRTLLM, Collective.REFERENCE
RINGFENCE = Collective.RINGFENCE
#: For what is said of FlashInfer's collectives where ringfence's own would be taken.
OTHERS = tuple(one for one in table.ALL if one.name is not RINGFENCE)

H200 = replace(FACTS, opt_outs=(), peers=True, links=Links("gpu", switch=18, fabric="a rack"))
B200 = replace(H200, device="NVIDIA B200", capability=(10, 0), multiprocessors=148, multicast=True)


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


# -- multicast

VARIABLES = {
    "NCCL_NVLS_ENABLE": ("0", "1"),
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": ("1", "0"),
    "NVSHMEM_DISABLE_NVLS": ("1", "0"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_turns_multicast_off(name: str) -> None:
    off, on = VARIABLES[name]
    assert opt_outs({name: off}) == (f"{name}={off}",)
    assert opt_outs({name: f" {off} "}) == (f"{name}={off}",)
    assert opt_outs({name: on}) == opt_outs({name: ""}) == opt_outs({}) == ()


def test_other_spellings_turn_it_off_too() -> None:
    assert opt_outs({"NVSHMEM_DISABLE_NVLS": "true"}) == ("NVSHMEM_DISABLE_NVLS=true",)
    assert opt_outs({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "YES"}) == ("TORCH_SYMM_MEM_DISABLE_MULTICAST=YES",)
    assert opt_outs({"NVSHMEM_DISABLE_NVLS": "False", "NCCL_NVLS_ENABLE": "2"}) == ()


@pytest.mark.parametrize("given", ["0", "00", "0x0", "-0", "false", "off", "0 # not here", "0.5"])
def test_what_nccl_reads_as_zero(given: str) -> None:
    assert opt_outs({"NCCL_NVLS_ENABLE": given}) == (f"NCCL_NVLS_ENABLE={given}",)


@pytest.mark.parametrize("given", ["1", "2", "-1", "0x10", "10", "01", "1 # on", "", " "])
def test_what_nccl_does_not_read_as_zero(given: str) -> None:
    assert opt_outs({"NCCL_NVLS_ENABLE": given}) == ()


OFF, ON = "NCCL_NVLS_ENABLE=0\n", "NCCL_NVLS_ENABLE=1\n"


@pytest.mark.parametrize(
    ("environment", "texts", "expected"),
    [
        ({}, [OFF], "NCCL_NVLS_ENABLE=0 in a"),
        ({}, ["", OFF], "NCCL_NVLS_ENABLE=0 in b"),
        ({}, [OFF, ON], "NCCL_NVLS_ENABLE=0 in a"),
        ({}, [ON, OFF], None),
        ({}, [ON + OFF], None),
        ({}, [OFF + ON], "NCCL_NVLS_ENABLE=0 in a"),
        ({"NCCL_NVLS_ENABLE": "1"}, [OFF, OFF], None),
        ({"NCCL_NVLS_ENABLE": ""}, [OFF], None),  # set, to nothing: NCCL's default
        ({"NCCL_NVLS_ENABLE": "0"}, [ON], "NCCL_NVLS_ENABLE=0"),
        ({}, ["# " + OFF], None),
        ({}, ["#" + OFF], None),
        ({}, ["NCCL_DEBUG=WARN\n\nnonsense\n=\n" + OFF], "NCCL_NVLS_ENABLE=0 in a"),
        ({}, ["NCCL_NVLS_ENABLE=0"], "NCCL_NVLS_ENABLE=0 in a"),
        ({}, ["NCCL_NVLS_ENABLE=0\r\n"], "NCCL_NVLS_ENABLE=0 in a"),
        ({}, ["NCCL_NVLS_ENABLE=\n"], None),
        ({}, [" " + OFF], None),  # a name with a blank is another name to NCCL
        ({}, ["NVSHMEM_DISABLE_NVLS=1"], "NVSHMEM_DISABLE_NVLS=1 in a"),
    ],
)
def test_configuration_files_turn_it_off(environment: dict[str, str], texts: list[str], expected: str | None) -> None:
    files = list(zip("ab", texts, strict=False))
    assert opt_outs(environment, files) == ((expected,) if expected else ())


def test_which_files_nccl_reads(tmp_path: Path) -> None:
    home, named, system = tmp_path / "home", tmp_path / "named.conf", tmp_path / "nccl.conf"
    home.mkdir()
    read = partial(nccl_files, home=str(home), system=str(system))
    assert read({}) == []
    (home / ".nccl.conf").write_text("A=1")
    assert read({}) == [(f"{home}/.nccl.conf", "A=1")]
    system.write_bytes(b"B=\xff\n")
    assert read({"NCCL_CONF_FILE": ""}) == [(f"{home}/.nccl.conf", "A=1"), (str(system), "B=\ufffd\n")]
    named.write_text("C=1")
    assert [path for path, _ in read({"NCCL_CONF_FILE": str(named)})] == [str(named), str(system)]
    assert [path for path, _ in read({"NCCL_CONF_FILE": str(tmp_path / "gone")})] == [str(system)]
    assert [path for path, _ in read({"NCCL_CONF_FILE": str(home)})] == [str(system)]  # a folder
    assert [path for path, _ in read({}, home=None)] == [str(system)]


def test_a_file_that_turns_multicast_off_is_seen_by_the_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "nccl.conf"
    path.write_text(OFF)
    facts = probed(monkeypatch, {"NCCL_CONF_FILE": str(path)})
    assert facts.opt_outs == (f"NCCL_NVLS_ENABLE=0 in {path}",)
    assert (
        multicast_barred(numbered([B200, facts])) == f"multicast is turned off (NCCL_NVLS_ENABLE=0 in {path} on rank 1)"
    )


def test_ranks_are_named_by_their_global_rank() -> None:
    """As everywhere else: the second group of a job has ranks 4 and 5, and no rank 1."""
    off = choose([B200, replace(B200, opt_outs=("X=1",))], numbers=(4, 5))
    assert why_not(off, MNNVL, "multicast") == "multicast is turned off (X=1 on rank 5)"
    unlike = choose([H200, replace(H200, flashinfer="0.7.0")], numbers=(4, 5), among=OTHERS)
    assert why_not(unlike, TRTLLM, "peer") == "ranks differ in flashinfer: rank 4: 0.7.2.post1; rank 5: 0.7.0"
    none = choose([replace(B200, multicast=False)] * 2, numbers=(6, 7))
    assert why_not(none, MNNVL, "multicast") == "the device of rank 6 has no NVLink multicast"


def test_all_variables_are_named() -> None:
    assert len(opt_outs({name: values[0] for name, values in VARIABLES.items()})) == len(VARIABLES)


def test_multicast_is_barred_by_any_rank() -> None:
    assert multicast_barred([B200] * 4) is None
    for rank in range(4):
        for other, said in (
            ({"multicast": False}, f"the device of rank {rank} has no NVLink multicast"),
            ({"opt_outs": ("X=1",)}, f"multicast is turned off (X=1 on rank {rank})"),
        ):
            ranks = [B200] * 4
            ranks[rank] = replace(B200, **other)  # type: ignore[arg-type]
            assert multicast_barred(numbered(ranks)) == said


def probed(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> RankFacts:
    """The facts of a B200 in a process with this environment, by the real probe."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    device = type(
        "Properties", (), {"name": "NVIDIA B200", "major": 10, "minor": 0, "multi_processor_count": 148, "uuid": 1}
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(rank_facts, "_device_has_multicast", lambda index: True)
    monkeypatch.setattr(rank_facts, "read", lambda uuids: (H200.links,))
    monkeypatch.setattr(rank_facts, "load", lambda: FakeFlashInfer("0"))
    return rank_facts.probe(torch.device("cuda", 0))


@pytest.mark.parametrize("name", VARIABLES)
def test_the_probe_reads_the_variables_of_its_process(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    facts = probed(monkeypatch, {name: VARIABLES[name][0]})
    assert facts.opt_outs == (f"{name}={VARIABLES[name][0]}",)
    assert facts.capability == (10, 0) and facts.multicast and facts.peers and facts.flashinfer == "0.7.2.post1"
    assert chosen([probed(monkeypatch, {}), facts]) == (TRTLLM, "peer")
    assert chosen([probed(monkeypatch, {})] * 2) == (MNNVL, "multicast")


def made(facts: list[RankFacts], wanted: str, transport: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each rank makes a workspace of, prepared from these facts."""
    count = len(facts)

    def body(rank: int) -> list[str]:
        name = dist.group.WORLD.group_name
        package = packages[rank] = FakeFlashInfer(name)
        wish = Wanted(wanted, transport, 256, torch.float32, max_tokens=4)
        try:
            ready = prepare(
                open_channel(name, seconds=120), Group(name, "nccl", count, rank), torch.device("cpu"), wish
            )
        except CollectiveUnavailableError:
            return [m[0] for m in package.made]
        assert (ready.workspace is None) == (ready.collective is REFERENCE)
        close_workspaces(name)
        assert not workspaces_of(name).open
        return [m[0] for m in package.made]

    packages: dict[int, FakeFlashInfer] = {}
    monkeypatch.setattr(table, "ALL", fakes(lambda: packages[dist.get_rank()]))
    monkeypatch.setattr(group_facts, "probe", lambda device: facts[dist.get_rank()])
    return run_threaded(count, body)


BARRED = {
    **{f"{name} on rank {rank}": (rank, {"opt_outs": (f"{name}=x",)}) for name in VARIABLES for rank in range(2)},
    **{f"no multicast on rank {rank}": (rank, {"multicast": False}) for rank in range(2)},
}
WISHES = list(itertools.product(("auto", "trtllm", "mnnvl"), ("auto", "peer", "multicast")))


@pytest.mark.parametrize("bar", BARRED)
def test_no_path_makes_a_multicast_object_where_it_is_barred(bar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, other = BARRED[bar]
    facts = [B200, B200]
    facts[rank] = replace(B200, **other)  # type: ignore[arg-type]
    for wanted, transport in WISHES:
        for both in made(facts, wanted, transport, monkeypatch):
            assert "mnnvl/multicast" not in both
            if wanted != "mnnvl":
                assert both == ["trtllm"]
            else:
                assert both == ([] if transport == "multicast" else ["mnnvl/peer"])


def test_without_the_bar_those_paths_do_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above could not fail otherwise."""
    for wanted, transport in WISHES:
        expected = "trtllm" if wanted == "trtllm" or (wanted, transport) == ("auto", "peer") else "mnnvl/multicast"
        expected = "mnnvl/peer" if (wanted, transport) == ("mnnvl", "peer") else expected
        assert made([B200, B200], wanted, transport, monkeypatch) == [[expected]] * 2
    monkeypatch.setattr(rank_facts, "multicast_barred", lambda ranks: None)
    barred = [B200, replace(B200, opt_outs=("NCCL_NVLS_ENABLE=0",), multicast=False)]
    assert made(barred, "auto", "auto", monkeypatch) == [["mnnvl/multicast"]] * 2


def test_a_multicast_workspace_that_fails_is_followed_by_none_that_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = replace(H200, opt_outs=("NCCL_NVLS_ENABLE=0",))
    assert made([refused] * 2, "auto", "auto", monkeypatch) == [["mnnvl/peer"]] * 2


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
