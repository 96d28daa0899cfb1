"""The command ``ringfence``: its version, its hazards, and what it says to a call that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from command_line import Run
from command_line import ringfence as ringfence

import ringfence as package
from ringfence.cli import main
from ringfence.commands import line
from ringfence.commands.terminal import OK, USAGE

NAMES = [command.__name__.rpartition(".")[2] for command in line.COMMANDS]


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ringfence {package.__version__}\n"


# -- hazards -----------------------------------------------------------------------------------


def test_hazards_lists_every_row(ringfence: Run) -> None:
    code, out, err = ringfence("hazards")
    assert code == OK, err
    header, _, *lines = out.splitlines()
    assert header.split() == ["id", "title", "applies", "decides", "in", "a", "run", "source"]
    assert [line.split()[0] for line in lines if line.startswith("M")] == [f"M{n}" for n in range(1, 70)]
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
        "in a run",
        "invariant",
        "remedy",
        "certainty",
        "source",
        "shown by",
    ):
        assert f"\n{label} " in out
    assert "0.6.12" in out and "I1: " in out and "FI#3304" in out and "M2" not in out


@pytest.mark.parametrize(
    ("id", "line"),
    [
        ("M1", "in a run   prevented: FlashInfer before 0.6.18 is not used"),
        ("M12", "in a run   reached: trtllm: IN_GRAPH"),
        ("M36", "in a run   not seen: what an engine copies"),
        ("M33", "guard      the ranks meet before each capture"),
    ],
)
def test_hazards_says_whether_a_run_can_reach_the_row(ringfence: Run, id: str, line: str) -> None:
    assert f"\n{line}" in ringfence("hazards", id)[1]


def test_hazards_says_why_a_row_is_not_shown(ringfence: Run) -> None:
    code, out, _ = ringfence("hazards", "M35")
    assert code == OK and "not shown  seen on B300 under Nsight Systems only" in out


def test_hazards_prints_json(ringfence: Run) -> None:
    code, out, err = ringfence("hazards", "--json")
    assert code == OK, err
    assert len(json.loads(out)["hazards"]) == 69
    code, out, err = ringfence("hazards", "M44", "--json")
    (row,) = json.loads(out)["hazards"]
    assert row["id"] == "M44" and row["decides"] == "capture" and row["certainty"] == "disproved"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["M99"], "there is no hazard 'M99'; the ids are M1 to M69"),
        (["mnnvl"], "there is no hazard 'mnnvl'"),
        (["--json", "--markdown"], "not allowed with"),
        (["M1", "--markdown"], "leave the id out"),
        (["M1", "M2"], "unrecognized arguments"),
        ([""], "there is no hazard ''"),
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


def test_hazards_says_how_many_rows_it_left_out(ringfence: Run) -> None:
    code, out, err = ringfence("hazards", "--symptom", "replays hang")
    shown = sum(line.startswith("M") for line in out.splitlines())
    assert code == OK and f"these are the {shown} of " in err and "that fit best" in err
    assert ringfence("hazards", "--symptom", "nccl#2389")[2] == ""


# -- wrong usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explian", "x"], r"ringfence: 'explian' is no command; did you mean 'explain'\? \(see"),
        (["jurnal", "/tmp"], ".*did you mean 'journal'?"),
        (["frobnicate"], r"ringfence: 'frobnicate' is no command; there are [a-z, ]* \(see"),
        (["--frobnicate"], "ringfence: unrecognized arguments: --frobnicate"),
        (["journal"], "ringfence journal: .*folder"),
        (["explain"], "ringfence explain: the following arguments are required: target, --tp N"),
        (["bench"], "ringfence bench: the following arguments are required: --write-table FILE"),
        (["hazards", "--symptom", ""], "ringfence hazards: --symptom '' has no word; say what you see: --symptom '"),
        (["hazards", "--symptom", " ?!"], "ringfence hazards: --symptom ' [?]!' has no word"),
        (["check", "--colective", "mnnvl"], "ringfence check: .*--colective mnnvl; did you mean '--collective'?"),
        (
            ["check", "--collective", "mnvl"],
            r"ringfence check: 'mnvl' is no value of --collective; did you mean 'mnnvl'\? \(see",
        ),
        (
            ["check", "--collective", "nccl"],
            "ringfence check: 'nccl' is no value of --collective; there are mnnvl, trt",
        ),
    ],
)
def test_wrong_usage_is_one_line_with_what_was_meant(ringfence: Run, arguments: list[str], said: str) -> None:
    code, out, err = ringfence(*arguments)
    assert code == USAGE and not out
    assert len(err.splitlines()) == 1 and re.match(said, err) and err.rstrip().endswith("--help)"), err


def test_ringfence_alone_lists_its_commands(ringfence: Run) -> None:
    code, out, err = ringfence()
    assert code == USAGE and not out and all(re.search(rf"^ +{name} ", err, re.M) for name in NAMES), err
