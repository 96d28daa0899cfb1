"""``ringfence doctor``: on a machine without a GPU, and on machines that are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_flashinfer import FACTS

from ringfence import doctor
from ringfence.cli import main
from ringfence.commands.doctor import as_dict, as_text
from ringfence.commands.terminal import FAILED, OK, USAGE
from ringfence.doctor import DeviceLinks, Facts, Found, Gpu, KnownHazard, advise, gather, hazards_of_version
from ringfence.runtime.collectives import rank_facts
from ringfence.runtime.collectives.links import Links
from ringfence.runtime.collectives.opt_outs import MULTICAST_OPT_OUTS
from ringfence.runtime.hazards.hazard import Action
from ringfence.runtime.hazards.situation import Collective

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def _pretend(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    found = Found(version) if version else Found[str](None, "FlashInfer is not installed")
    monkeypatch.setattr(doctor, "_flashinfer_version", lambda: found)
    monkeypatch.setattr(doctor, "nccl_version", lambda: None)


def test_where_an_opt_out_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in MULTICAST_OPT_OUTS:
        monkeypatch.delenv(name, raising=False)
    conf = tmp_path / "nccl.conf"
    conf.write_text("NCCL_NVLS_ENABLE=0\n")
    monkeypatch.setenv("NCCL_CONF_FILE", str(conf))
    main(["doctor"])
    assert f"turned off by NCCL_NVLS_ENABLE=0 in {conf}" in capsys.readouterr().out
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["opt_outs"] == [f"NCCL_NVLS_ENABLE=0 in {conf}"]


@WITHOUT_GPU
def test_a_machine_without_a_gpu_is_healthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch, None)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert main(["doctor"]) == OK
    out, err = capsys.readouterr()
    assert not err and torch.__version__ in out and "devices: none (" in out
    assert "turned off by NCCL_NVLS_ENABLE=0" in out
    for size in (2, 4, 8):
        assert f"{size} ranks (not here: 0 devices): reference" in out
    assert "hazards that decide against capture: none" in out


@WITHOUT_GPU
def test_json_says_why_a_value_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _pretend(monkeypatch, None)
    assert main(["doctor", "--json"]) == OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == 1 and facts["healthy"] and facts["hazards"] == []
    for name in ("nccl", "flashinfer", "driver", "devices", "links"):
        assert facts[name]["value"] is not None or facts[name]["why"], name
    assert [a["collective"] for a in facts["advice"]] == ["reference"] * 3
    assert facts["advice"][0]["candidates"][-1] == "reference: chosen"


@pytest.mark.parametrize(
    ("version", "code", "ids"),
    [
        ("0.6.10", FAILED, ["M1", "M2", "M3"]),
        ("0.6.12", OK, ["M2", "M3"]),  # these two warn
        ("0.6.18", OK, []),
        ("no version", OK, []),
    ],
)
def test_hazards_of_an_installed_flashinfer_count_though_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str, code: int, ids: list[str]
) -> None:
    _pretend(monkeypatch, version)
    monkeypatch.setattr(doctor, "_devices", lambda: ())
    assert main(["doctor", "--json"]) == code
    facts = json.loads(capsys.readouterr().out)
    assert facts["flashinfer"]["value"] == version
    assert [h["id"] for h in facts["hazards"]] == ids
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert f"FlashInfer     {version}" in out
    if version == "0.6.10":
        before, _, after = out.partition("other hazards")
        assert "  M1 A negative subnormal word" in before and "mnnvl of FlashInfer 0.6.10" in before
        assert "remedy: Upgrade" in before and "  M2 " in after


@pytest.mark.parametrize("arguments", [["--yaml"], ["now"]])
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == USAGE and "unrecognized arguments" in capsys.readouterr().err


def test_what_auto_would_choose_on_two_h200s() -> None:
    advice, hazards = advise([replace(FACTS, peers=True)] * 2)
    assert [(a.world_size, a.not_here, a.collective, a.transport) for a in advice] == [
        (2, None, Collective.RINGFENCE, "peer"),
        (4, "not here: 2 devices", Collective.RINGFENCE, "peer"),
        (8, "not here: 2 devices", Collective.TRTLLM, "peer"),
    ]
    assert advice[0].candidates[0].startswith("mnnvl/multicast: multicast is turned off (NCCL_NVLS_ENABLE=0")
    assert advice[0].one_shot == advice[0].fused > 0 and not hazards


def test_what_it_would_choose_where_nothing_can_be_compiled() -> None:
    advice, hazards = advise([replace(FACTS, peers=True, nvrtc_missing="no cuda-bindings")] * 2)
    assert [(a.world_size, a.collective) for a in advice[:2]] == [(2, Collective.MNNVL), (4, Collective.TRTLLM)]
    # Only with four ranks do both strategies share a workspace.
    assert [(h.id, what) for h, what in hazards] == [("M12", "trtllm/peer, 4 ranks")]


def test_advice_is_about_the_devices_that_are_here() -> None:
    other = replace(FACTS, device="NVIDIA H100", multiprocessors=114)
    advice, _ = advise([FACTS, other])
    assert advice[0].collective is Collective.RINGFENCE, "its kernels work among unlike devices"
    assert "ranks differ in multiprocessors" in advice[0].candidates[0]
    (two, *_), hazards = advise([replace(FACTS, flashinfer=None, flashinfer_missing="it is too old")])
    assert two.not_here == "not here: 1 device" and two.collective is Collective.RINGFENCE and not hazards


def test_no_version_has_no_hazards() -> None:
    assert hazards_of_version(None) == []
    assert {h.id for h, _ in hazards_of_version("0.6.10")} == {"M1", "M2", "M3"}


def test_an_old_nccl_is_named_and_does_not_make_the_machine_ill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One machine is one node, where it was never seen to hang."""
    _pretend(monkeypatch, None)
    monkeypatch.setattr(doctor, "_devices", lambda: ())
    for version, ids in (("2.28.9", ["M48", "M55"]), ("2.30.4", ["M55"]), ("2.27.5", [])):
        monkeypatch.setattr(doctor, "nccl_version", lambda version=version: version)
        assert main(["doctor", "--json"]) == OK
        facts = json.loads(capsys.readouterr().out)
        assert facts["nccl"]["value"] == version and [h["id"] for h in facts["hazards"]] == ids
        assert main(["doctor"]) == OK
        out = capsys.readouterr().out.partition("other hazards")[2]
        assert (f"NCCL {version}, captured, in a group of several nodes" in out) == bool(ids)


def _made_up() -> Facts:
    advice, _ = advise([FACTS] * 2)
    devices = tuple(
        Gpu(i, "NVIDIA H200", (9, 0), 141 << 30, Found(True), Found((None, True) if i == 0 else (True, None)))
        for i in range(2)
    )
    links = Found((DeviceLinks((0, 6), 12, 12, (None, "NV6")), DeviceLinks((6, 0), 12, 12, ("NV6", None))))
    return replace(gather(), devices=Found(devices), links=links, advice=advice, hazards=())


def test_devices_and_links_are_shown() -> None:
    facts = _made_up()
    text = as_text(facts)
    assert "141 GiB" in text and "SM90" in text and "peer, NV6" in text and "12 NVLinks" in text
    assert "2 ranks: ringfence/peer, one-shot up to " in text
    assert json.loads(json.dumps(as_dict(facts)))["links"]["value"][0] == {
        "to": [0, 6],
        "elsewhere": 12,
        "switch": 12,
        "near": [None, "NV6"],
        "fabric_state": None,
    }
    text = as_text(replace(facts, links=Found(None, "no pynvml")))
    assert "NVLinks: unknown (no pynvml)" in text and "peer" in text and "to 1" in text


@pytest.mark.parametrize("width", [80, 160])
def test_lines_fit_the_terminal(width: int) -> None:
    hazard = KnownHazard("M1", "x " * 90, Action.SPLIT, True, "y " * 90, ("z " * 90,))
    facts = replace(gather(), driver=Found[str](None, "word " * 40), hazards=(hazard,))
    plain, fitted = as_text(facts), as_text(facts, width)
    assert max(map(len, plain.splitlines())) > 160 and max(map(len, fitted.splitlines())) <= width
    assert plain.split() == fitted.split(), "nothing is lost"
    driver, *rest = [line for line in fitted.splitlines() if "word" in line]
    assert driver.startswith("driver  ") and rest
    assert all(line.startswith(" " * driver.index("unknown")) for line in rest)


def test_a_device_that_fails_to_answer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA driver\n initialization failed")

    _pretend(monkeypatch, None)
    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setattr(doctor, "load", broken)
    facts = gather()
    assert facts.devices.why == facts.flashinfer_unusable == "RuntimeError: CUDA driver initialization failed"
    assert facts.advice[0].candidates[0] == f"mnnvl: {facts.devices.why}" and facts.healthy
    assert as_text(facts)


def test_a_machine_with_gpus_is_read_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up as far as torch can tell; here without a driver to ask about multicast, and without NVML."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 << 30, uuid="a")
    properties.multi_processor_count = 132
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: properties,
        "can_device_access_peer": lambda index, other: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    load = doctor.ctypes.CDLL

    def driver(name: str | None, *args: Any, **kwargs: Any) -> Any:
        if name is not None and name.startswith("libcuda."):
            return SimpleNamespace(cuInit=lambda flags: 100)
        return load(name, *args, **kwargs)  # that of the kernels' compiler is looked for too

    monkeypatch.setattr(doctor.ctypes, "CDLL", driver)
    monkeypatch.setattr(rank_facts, "read", lambda uuids: 1 / 0)
    facts = gather()
    assert facts.devices.value is not None
    assert [d.peers.value for d in facts.devices.value] == [(None, True), (True, None)]
    assert facts.devices.value[0].multicast.why == "cuInit returned 100"
    assert facts.links.why == "ZeroDivisionError: division by zero"
    assert [a.not_here for a in facts.advice] == [None, "not here: 2 devices", "not here: 2 devices"]
    text = as_text(facts)
    assert "unknown (cuInit returned 100)" in text and "NVLinks: unknown (Zero" in text and "2 ranks: " in text


def test_the_matrix_is_that_of_nvidia_smi() -> None:
    bridged = [Links("a", to=(("b", 12),), switch=2, pcie=(("b", "NODE"), ("c", "SYS")), fabric_state="completed")]
    bridged += [Links("b", to=(("a", 12),)), Links("c")]
    assert doctor.device_links(bridged[0], bridged) == DeviceLinks((0, 12, 0), 2, 2, (None, "NV12", "SYS"), "completed")
    assert doctor.device_links(bridged[2], bridged).near == ("PCIe", "PCIe", None)
    switched = [Links(name, switch=18) for name in "ab"]
    assert doctor.device_links(switched[1], switched) == DeviceLinks((0, 0), 18, 18, ("NV18", None))
    hidden = [Links(name, hidden=18) for name in "ab"]
    assert doctor.device_links(hidden[0], hidden).near == (None, "unknown")


def test_copies_that_are_lost_make_a_machine_ill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch, None)
    monkeypatch.setattr(doctor, "nccl_version", lambda: None)
    monkeypatch.setattr(doctor, "_devices", lambda: _made_up().devices.value)
    monkeypatch.setattr(doctor, "probe", lambda device: replace(FACTS, peers=True))
    for lost, code in ((False, OK), (True, FAILED)):
        monkeypatch.setattr(doctor, "try_all", lambda count, lost=lost: {(0, 1): True, (1, 0): not lost})
        assert main(["doctor", "--copies", "--json"]) == code
        facts = json.loads(capsys.readouterr().out)
        assert facts["copies"]["value"] == [[None, True], [not lost, None]]
        assert ("M51" in [h["id"] for h in facts["hazards"]]) == lost and facts["healthy"] is not lost
        assert main(["doctor", "--copies"]) == code
        out = capsys.readouterr().out
        assert "linked by: NVSwitch" in out
        assert (
            "copies between devices: LOST 1 to 0 (of 2)" in out
            and "applies to: copies from device 1 to device 0" in out
            if lost
            else "copies between devices: all 2 arrive" in out and "M51" not in out
        )
    assert main(["doctor", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["copies"] == {"value": None, "why": "not tried: --copies"}


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (0, "not tried: there is nothing to copy between: no device"),
        (1, "not tried: there is nothing to copy between: one device"),
        (2, "not tried: no device reaches another's memory (peer access)"),
    ],
)
def test_copies_that_were_asked_for_and_cannot_be_tried_are_no_fault_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, says: str
) -> None:
    _pretend(monkeypatch, None)
    monkeypatch.setattr(doctor, "nccl_version", lambda: None)
    monkeypatch.setattr(doctor, "_devices", lambda: (_made_up().devices.value or ())[:count])
    monkeypatch.setattr(doctor, "probe", lambda device: FACTS)
    monkeypatch.setattr(doctor, "try_all", lambda count: {})
    assert main(["doctor", "--copies"]) == OK
    assert f"copies between devices: {says}" in capsys.readouterr().out.splitlines()


def test_what_may_go_wrong_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _pretend(monkeypatch, None)
    unready = replace(FACTS, peers=True, links=Links("gpu", switch=18, fabric_state="in progress"))
    monkeypatch.setattr(doctor, "_devices", lambda: _made_up().devices.value)
    monkeypatch.setattr(doctor, "probe", lambda device: unready)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    assert main(["doctor", "--journal-dir", str(tmp_path / "not" / "yet")]) == FAILED
    out = capsys.readouterr().out
    assert "  ! fabric: the fabric manager has not let these GPUs in" in out and "(M52 The NVLink fabric" in out
    assert "remedy: Restart nvidia-fabricmanager" in out and "NCCL_GRAPH_REGISTER=0" in out
    assert f"free in {tmp_path / 'not' / 'yet'}" in out


def test_the_dtype_that_is_asked_for_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    """A row of float16 alone (M49) is none of bfloat16's."""
    from ringfence.doctor import hazards_of_version

    half = {hazard.id for hazard, _ in hazards_of_version("0.6.18", "float16")}
    assert half - {hazard.id for hazard, _ in hazards_of_version("0.6.18")} == {"M49"}
    assert main(["doctor", "--dtype", "float16"]) in (0, 1)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["doctor", "--dtype", "int8"])
    assert "'int8' is no value of --dtype" in capsys.readouterr().err
