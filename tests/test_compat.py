"""`make compat`: how it lays releases over each other and what its table says; the releases themselves are not run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compat
import pytest
from compat import Answer, Layer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compat, "FOLDER", tmp_path)
    return tmp_path


def test_the_pinned_release_is_the_environments_own(folder: Path) -> None:
    import torch

    release = torch.__version__.partition("+")[0]
    assert compat.layer("torch", release) == Layer("torch", release)
    assert compat.environment([Layer("torch", release)])["PYTHONPATH"] == ""


def test_a_release_that_pip_refuses_is_said_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def refuse(command: list[str], **_: Any) -> SimpleNamespace:
        calls.append(command)
        Path(command[command.index("--target") + 1]).mkdir()
        said = "WARNING: slow\nERROR: no torch of that version\n  asked: (constraint) torch<9\nERROR: help: x\n"
        return SimpleNamespace(returncode=1, stdout="", stderr=said)

    monkeypatch.setattr(compat.subprocess, "run", refuse)
    found = compat.layer("torch", "9.9.9")
    assert found.missing == "no torch of that version asked: (constraint) torch<9" and found.folder is None
    assert "--no-deps" in calls[0] and calls[0][-1] == "torch==9.9.9"
    assert not (folder / "torch-9.9.9").exists(), "half a release is tried again"
    answer = compat.run([Layer("flashinfer-python", "1", folder), found], "-c", "raise SystemExit('was run')")
    assert answer == Answer(found.missing, 0.0)


def test_a_layer_is_found_before_what_it_covers(folder: Path) -> None:
    other = folder / "tabulate-0"
    other.mkdir()
    (other / "tabulate.py").write_text("WHICH = 'the layer'")
    where = "import tabulate, sys; sys.exit(tabulate.WHICH)"
    assert compat.run([Layer("tabulate", "0", other)], "-c", where).said == "the layer"
    assert compat.run([], "-c", "import tabulate; tabulate.tabulate").said == "ok"
    noisy = "import sys; print('x.py: ValueError: it broke'); print('a warning of somebody else'); sys.exit(1)"
    assert compat.run([], "-c", noisy).said == "x.py: ValueError: it broke"
    torch = folder / "torch-2.12.1"
    paths = compat.environment([Layer("x", "1", other), Layer("torch", "2.12.1", torch)])["PYTHONPATH"].split(
        os.pathsep
    )
    assert paths == [str(other), str(torch), str(folder / f"torch-{compat.WITH_LIBRARIES}")]


def test_a_check_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "SECONDS", 1)
    assert compat.run([], "-c", "import time; time.sleep(60)").said == "not done in 1 s"


def test_the_table_says_what_was_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def layer(package: str, version: str) -> Layer:
        return Layer(package, version, missing="cannot be had" if version == "2.15.0" else None)

    def run(layers: Any, *arguments: str) -> Answer:
        if any(one.missing for one in layers):
            return Answer("cannot be had", 0.0)
        return Answer("it broke" if {"2.14.1", "0.7.1"} <= {one.version for one in layers} else "ok", 1.0)

    monkeypatch.setattr(compat, "KEPT", folder / "answers.json")
    monkeypatch.setattr(compat, "layer", layer)
    monkeypatch.setattr(compat, "run", run)
    for only, code in ((["torch==2.15.0"], 0), (["torch==2.14.1"], 1)):  # what cannot be had here is not broken
        monkeypatch.setattr(sys, "argv", ["compat.py", *(f"--only={one}" for one in only)])
        assert compat.main() == code
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][-6:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    cells = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows}
    assert cells["2.14.1"]["FlashInfer 0.7.1"] == "no [1]" and cells["2.14.1"]["FlashInfer 0.6.18"] == "ok"
    assert cells["2.15.0"]["smoke"] == "not tried [2]" and cells["2.14.1"]["day"].startswith("20")
    assert set(cells["2.12.1"].values()) == {"2.12.1", "not run", ""}
    assert compat.table(compat._read()).endswith("[1] it broke  \n[2] cannot be had")


def test_a_release_that_is_not_listed_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["compat.py", "--only", "torch==1.0"])
    with pytest.raises(SystemExit):
        compat.main()
    assert "--only torch==1.0: none of torch==2.11.0" in capsys.readouterr().err


def test_the_page_has_the_table_of_every_listed_release() -> None:
    text = compat.PAGE.read_text().partition(compat.BEGIN)[2].partition(compat.END)[0]
    assert "`make compat`, Python 3" in text
    for package, versions in compat.PACKAGES.items():
        for version in versions:
            assert version in text, f"{package} {version}: run make compat"
