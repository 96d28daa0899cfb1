"""The command ``ringfence`` in this process, and a folder of what ``ringfence explain`` may be given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.cli import main

Run = Callable[..., tuple[int, str, str]]

TARGETS = """
import torch, torch.distributed as dist, torch.nn.functional as F
H = 16

class Model(torch.nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.weight, self.breaks = torch.nn.Parameter(torch.randn(H)), breaks
    def forward(self, x, r):
        y = x * 2
        dist.all_reduce(y)
        if self.breaks:
            print("not traceable")
        return F.rms_norm(y + r, (H,), self.weight, 1e-5)

def tuple_inputs():
    return Model(), (torch.randn(3, H), torch.randn(3, H))

def mapping_inputs():
    return Model(), {"x": torch.randn(3, H), "r": torch.randn(3, H)}

def breaks():
    return Model(breaks=True), (torch.randn(3, H), torch.randn(3, H))

def empty():
    return Model(), (torch.randn(0, H), torch.randn(0, H))

def wrong():
    return Model()

def raises():
    raise RuntimeError("no weights today")

def wrong_pair():
    return (torch.randn(3, H), torch.randn(3, H)), Model()

def wrong_shapes():
    return Model(), (torch.randn(3, H), torch.randn(5, H))

def imports_late():
    import neighbour
    return Model(), neighbour.inputs()

def without_all_reduce():
    return torch.nn.Linear(H, H), (torch.randn(3, H),)

def needs(size, *, layers):
    return tuple_inputs()

def exits():
    raise SystemExit("needs a GPU")

def destroys():
    dist.destroy_process_group()
    return tuple_inputs()

number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    (folder / "targets.py").write_text(TARGETS)
    (folder / "neighbour.py").write_text(
        "import torch\ndef inputs():\n    return torch.randn(3, 16), torch.randn(3, 16)\n"
    )
    for name, text in (("no_syntax", "x = ("), ("script", "import sys; sys.exit(4)"), ("throws", "1 / 0")):
        (folder / f"{name}.py").write_text(text)
    (folder / "package").mkdir()
    for name in ("__init__", "inner"):
        (folder / "package" / f"{name}.py").write_text("")
    (folder / "here").mkdir()
    return folder


@pytest.fixture
def ringfence(capsys: pytest.CaptureFixture[str]) -> Run:
    """``ringfence`` in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as usage:  # argparse
            code = int(str(usage.code))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def explain(folder: Path, monkeypatch: pytest.MonkeyPatch, ringfence: Run) -> Run:
    monkeypatch.chdir(folder)
    return functools.partial(ringfence, "explain")


#: A check of mnnvl; the next argument is the release.
MNNVL = ("check", "--collective", "mnnvl", "--tp", "4", "--flashinfer")
