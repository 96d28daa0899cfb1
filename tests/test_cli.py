from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ringfence as package
from ringfence.cli import FAILED, OK, USAGE, main
from support import run_python

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
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    (folder / "targets.py").write_text(TARGETS)
    (folder / "neighbour.py").write_text(
        "import torch\ndef inputs():\n    return torch.randn(3, 16), torch.randn(3, 16)\n"
    )
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


@pytest.mark.parametrize("function", ["tuple_inputs", "mapping_inputs", "imports_late"])
def test_explain_prints_json_of_a_function_target(explain: Run, function: str) -> None:
    code, out, err = explain(f"targets:{function}", "--tp", "4", "--json")
    assert code == 0, err
    report = json.loads(out)
    (site,) = report["sites"]
    assert site["fused"] and site["source"].endswith("targets.py:11")
    assert report["schema"] == 1


def test_explain_passes_options_on(explain: Run) -> None:
    code, out, err = explain(
        "targets:tuple_inputs", "--tp", "2", "--option", "groups=['other']", "--option", "verify=True"
    )
    assert code == 0, err
    assert "other_group" in out and "0 of 1 all-reduces fused" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["targets:breaks", "--tp", "2"], FAILED, "breaks the graph"),
        (["targets:wrong", "--tp", "2"], FAILED, "must return (model, example_inputs)"),
        (["targets:wrong_pair", "--tp", "2"], FAILED, "and returned ['tuple', 'Model']"),
        (["targets:wrong_shapes", "--tp", "2"], FAILED, "'targets:wrong_shapes' raised"),
        (["targets.py:tuple_inputs", "--tp", "2"], FAILED, "without its suffix: targets:tuple_inputs"),
        (["targets:raises", "--tp", "2"], FAILED, "no weights today"),
        (["targets:empty", "--tp", "2"], FAILED, "at least one token"),
        (["targets:absent", "--tp", "2"], FAILED, "cannot be imported"),
        (["no_such_module:f", "--tp", "2"], FAILED, "cannot be imported"),
        (["no_such_target", "--tp", "2"], FAILED, "neither an existing folder nor module:function"),
        ([".", "--tp", "2"], FAILED, "config.json"),
        (["targets:tuple_inputs"], USAGE, "--tp"),
        (["targets:tuple_inputs", "--tp", "1"], USAGE, "world size"),
        (["targets:tuple_inputs", "--tp", "two"], USAGE, "world size"),
        (["targets:tuple_inputs", "--tp", "2", "--batch", "0"], USAGE, "'0' is not a positive integer"),
        (["targets:tuple_inputs", "--tp", "2", "--option", "colective=auto"], USAGE, "did you mean 'collective'"),
    ],
)
def test_wrong_call_is_refused(explain: Run, arguments: list[str], code: int, message: str) -> None:
    returned, out, err = explain(*arguments)
    assert returned == code, err
    assert message in err and "Traceback" not in err and "{" not in out


def test_explain_says_what_it_cannot_know(explain: Run) -> None:
    code, out, err = explain("targets:without_all_reduce", "--tp", "2")
    assert code == 0 and "has no all-reduce" in err and "note: the graph has no all-reduce" in out
    code, out, err = explain("targets:tuple_inputs", "--tp", "2", "--option", "capture_sizes=[3]")
    assert code == 0 and "over NCCL they stay in the pieces" in err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ringfence {package.__version__}\n"


@pytest.mark.slow
def test_explain_reads_a_model_folder(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    result = run_python("-m", "ringfence", "explain", str(tmp_path), "--tp", "2")  # as a user starts it
    out, err = result.stdout, result.stderr
    assert result.returncode == 0, err
    assert "2 of 2 all-reduces fused" in out and "model.layers.0.mlp.down_proj" in out
    assert "remove_backward_hooks" in err


# -- hazards -----------------------------------------------------------------------------------


def test_hazards_lists_every_row(ringfence: Run) -> None:
    code, out, err = ringfence("hazards")
    assert code == OK, err
    header, _, *lines = out.splitlines()
    assert header.split() == ["id", "title", "applies", "decides", "source"]
    assert [line.split()[0] for line in lines if line.startswith("M")] == [f"M{n}" for n in range(1, 48)]
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize("id", ["M1", "m1"])
def test_hazards_prints_one_row_in_full(ringfence: Run, id: str) -> None:
    code, out, err = ringfence("hazards", id)
    assert code == OK, err
    for label in (
        "symptom",
        "mechanism",
        "applies",
        "decides",
        "invariant",
        "remedy",
        "certainty",
        "source",
        "shown by",
    ):
        assert f"\n{label} " in out
    assert "0.6.12" in out and "I1: " in out and "FI#3304" in out and "M2" not in out


def test_hazards_says_why_a_row_is_not_shown(ringfence: Run) -> None:
    code, out, _ = ringfence("hazards", "M36")
    assert code == OK and "not shown  happens on B300 only" in out


def test_hazards_prints_json(ringfence: Run) -> None:
    code, out, err = ringfence("hazards", "--json")
    assert code == OK, err
    assert len(json.loads(out)["hazards"]) == 47
    code, out, err = ringfence("hazards", "M44", "--json")
    (row,) = json.loads(out)["hazards"]
    assert row["id"] == "M44" and row["decides"] == "capture" and row["certainty"] == "disproved"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["M99"], "there is no hazard 'M99'; the ids are M1 to M47"),
        (["mnnvl"], "there is no hazard 'mnnvl'"),
        (["--json", "--markdown"], "not allowed with"),
        (["M1", "--markdown"], "leave the id out"),
        (["M1", "M2"], "unrecognized arguments"),
    ],
)
def test_hazards_refuses_what_it_does_not_know(ringfence: Run, arguments: list[str], message: str) -> None:
    code, out, err = ringfence("hazards", *arguments)
    assert code == USAGE and message in err and not out and "Traceback" not in err


def test_hazards_may_be_cut_short_by_its_reader() -> None:
    """As in ``ringfence hazards | head``."""
    command = f"{sys.executable} -m ringfence hazards | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0" and not result.stderr
