"""examples/reproduce.py: all of it but the kernels' call. A GPU sees the same with the kernels (docs/reproduce.md)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu import emulate, recipes
from gpu.cases import NEVER, RETURNED, WRONG
from support import HARD_END

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "reproduce.py"


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["reproduce"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_answers_anywhere() -> None:
    """Every case, the trace of each that hangs, and what is decided."""
    process = subprocess.run([sys.executable, SCRIPT, "--model"], capture_output=True, text=True, timeout=HARD_END)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    hang = [line.split()[0] for line in lines if line.endswith(NEVER)]
    assert hang == list(recipes.RECIPES) and sum(line.endswith(f"  {RETURNED}") for line in lines) == 15
    assert process.stdout.count("deadlock: a shortest trace has") == 3 and lines[-1] == "all as expected"
    said = {line.partition(":")[0]: line for line in lines if ": " in line}
    assert said["ringfence decides with 0.6.10.post1"].split(": ")[1:3] == [
        "REFUSE",
        "M1, a negative subnormal word passes for the sentinel",
    ]
    assert ": IN_GRAPH: " in said["ringfence decides with 0.6.13"]
    assert "IN_GRAPH and CLEAN" in said['with on_hazard="clean"']
    assert "nothing is captured" in said['with profile="conservative"']


def test_without_a_gpu_it_says_what_answers_instead(
    reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    assert reproduce.main() == 2
    assert capsys.readouterr() == ("", "no CUDA device here; the model answers without: reproduce.py --model\n")


class StandIn:
    """In torch, what both ranks' call returns; and whether an affected kernel would have polled for ever."""

    def __init__(self, affected: bool, off_by: float = 0.0) -> None:
        self.weight = recipes._weight(torch.device("cpu"))
        self._affected, self._off_by = affected, off_by
        self._absent = torch.zeros((), dtype=torch.bool)

    def launch(self, x: Sequence[Tensor], residual: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        for part in x:
            words = part.view(torch.int32)  # sign 1, exponent 0: minus nothing, where subnormals are flushed
            self._absent.logical_or_(((words < -(2**31) + 0x800000) & (words != -(2**31))).any())
        for rank in range(2):
            norm, added = emulate.reference(x[0] + x[1], residual[rank], self.weight)
            out[rank].copy_(norm + self._off_by)
            out[2 + rank].copy_(added)

    def returned(self) -> bool:
        return not (self._affected and bool(self._absent))


CASES: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("A", recipes.PUBLISHED, {"affected": True}, NEVER, "2 captured pieces, 2 islands"),
    ("B", recipes.PUBLISHED, {"affected": True}, NEVER, "4 captured pieces, 4 islands"),
    ("eager", recipes.PUBLISHED, {"affected": True}, NEVER, "nothing captured, 2 islands"),
    ("A", recipes.NO_LEFT_OVERS, {"affected": True}, RETURNED, "2 captured pieces, 2 islands"),
    ("B", recipes.CLEANED, {"affected": True}, RETURNED, "4 captured pieces, 4 islands"),
    ("A", recipes.BY_REFERENCE, {"affected": True}, RETURNED, "4 captured pieces, 4 islands"),
    ("A", recipes.PUBLISHED, {"affected": False}, RETURNED, "2 captured pieces, 2 islands"),
    ("B", recipes.PUBLISHED, {"affected": False, "off_by": 0.1}, WRONG, "4 captured pieces, 4 islands"),
]


def test_the_models_plan_is_the_backends(reproduce: ModuleType) -> None:
    for recipe, _, _, _, plan in CASES[:3]:
        pieces = reproduce.pieces(recipes.RECIPES[recipe], recipes.LAYERS)
        islands = sum(piece.island for piece in pieces)
        captured = f"{len(pieces) - islands} captured pieces" if recipes.RECIPES[recipe].capture else "nothing captured"
        assert plan == f"{captured}, {islands} islands"


@pytest.mark.parametrize(("recipe", "how", "kernels", "kind", "plan"), CASES)
def test_the_recipes_run_through_the_backend(
    recipe: str, how: str, kernels: dict[str, Any], kind: str, plan: str
) -> None:
    outcome = recipes.serve(StandIn(**kernels), recipe, how, torch.device("cpu"))
    assert (outcome["kind"], outcome["plan"]) == (kind, plan)
    assert outcome["step"] == (0 if kind == WRONG else recipes.STEPS - 1)


def test_the_table_tells_what_is_not_as_expected(reproduce: ModuleType) -> None:
    asked = list(reproduce.cases(["A"]))
    found = {case: {"kind": case.expected, "step": 3, "plan": "3 captured pieces"} for case in asked}
    table, right = reproduce.report(asked, found)
    assert right and "never returned, in step 3" in table
    for case in asked:
        other = found | {case: {"kind": WRONG, "note": "numbers of another call"}}
        table, right = reproduce.report(asked, other)
        assert not right and table.endswith("numbers of another call")
