"""NVLink multicast is not used where it is barred: by whom, how a rank finds out, and what it makes then."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import B200, H200, FakeFlashInfer, fakes

from ringfence.runtime.channel import open_channel
from ringfence.runtime.collectives import group_facts, rank_facts, table
from ringfence.runtime.collectives.choice import choose
from ringfence.runtime.collectives.opt_outs import nccl_files, opt_outs
from ringfence.runtime.collectives.rank_facts import RankFacts, multicast_barred, numbered
from ringfence.runtime.collectives.ready import Wanted, prepare
from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of
from ringfence.runtime.errors import CollectiveUnavailableError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective
from support import run_threaded

MNNVL, TRTLLM, REFERENCE = Collective.MNNVL, Collective.TRTLLM, Collective.REFERENCE

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
    fine = probed(monkeypatch, {})
    found = [choose(ranks) for ranks in ([fine, facts], [fine, fine])]
    assert [(one.collective, one.transport) for one in found] == [(TRTLLM, "peer"), (MNNVL, "multicast")]


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
