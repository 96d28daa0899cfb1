from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ringfence as package
from ringfence.cli import main
from ringfence.commands import line
from ringfence.commands.terminal import FAILED, OK, UNDECIDED, USAGE
from support import run_python

NAMES = [command.__name__.rpartition(".")[2] for command in line.COMMANDS]

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
        (["targets:breaks", "--tp", "2"], USAGE, "breaks the graph"),
        (["targets:wrong", "--tp", "2"], USAGE, "must return (model, example_inputs)"),
        (["targets:wrong_pair", "--tp", "2"], USAGE, "and returned ['tuple', 'Model']"),
        (["targets:wrong_shapes", "--tp", "2"], USAGE, "'targets:wrong_shapes': the model raised"),
        (["targets:raises", "--tp", "2"], USAGE, "no weights today"),
        (["targets:empty", "--tp", "2"], USAGE, "at least one token"),
        ([".", "--tp", "2"], USAGE, "config.json"),
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


WRONG_TARGETS = {
    # of a file
    "targets.py:tuple_inputs": "names a file, and a module is named as for import, without its suffix: targets:tuple_",
    "./targets.py:f": "without its suffix: targets:f",
    "package/inner:f": "without its suffix: package.inner:f",
    "../no_such.py:f": "there is no file '../no_such.py'; a target is module:function",
    "targets.py": "of a file, name the module and a function: targets:FUNCTION",
    "~/no_such/file.py:f": "there is no file '",
    # of a module
    "..targets:f": "'..targets' is none that can be imported by its name",
    ".:f": "'.' is none that can be imported",
    "no_such_module:f": "there is no module 'no_such_module', neither installed nor in '",
    "target:f": "there is no module 'target'",
    "target:g": "did you mean 'targets'?",
    "targets.inner:f": "there is no module 'targets.inner'",
    "no_syntax:f": "'no_syntax' raised SyntaxError",
    "script:f": "'script' ends the process (SystemExit: 4); what a script does stands under if __name__",
    "throws:f": "'throws' raised ZeroDivisionError: division by zero",
    # of a function
    "targets:": "names no function; a target is module:function",
    ":f": "names no module; a target is module:function",
    "targets:f()": "'f()' is no name of one in 'targets'",
    "targets:tuple_input": "module 'targets' has no 'tuple_input'; did you mean 'tuple_inputs'?",
    "targets:zz": "has no 'zz'; its functions: tuple_inputs, mapping_inputs, breaks, ",
    "package:f": "it is a package of inner: package.inner:f",
    "package:inner": "'inner' is a module of it: package.inner:FUNCTION",
    "targets:number": "is of type int, and no function",
    "targets:needs": "is called without arguments, and: missing a required argument: 'size'; name a function ",
    "targets:exits": "ends the process (SystemExit: needs a GPU)",
    "targets:destroys": "destroyed the process group that it was called in",
    # of a folder
    "package": "has no config.json; a model folder is what save_pretrained writes; of a package, name a function too",
    "config.json": "name the folder of it: .",
    "": "a folder has a config.json, and a function is named as my_module:make_model",
    "no_such_target": "neither an existing folder nor module:function; of a module, name a function too: no_such_",
    "meta/llama": "a model of the Hub is downloaded first",
}


@pytest.mark.parametrize("target", WRONG_TARGETS)
def test_a_wrong_target_is_one_line_that_says_what_to_type(explain: Run, target: str) -> None:
    code, out, err = explain(target, "--tp", "2")
    said = [line for line in err.splitlines() if not line.endswith(" ...")]  # loading takes seconds once
    assert code == USAGE and not out and len(said) == 1, err
    assert WRONG_TARGETS[target] in said[0] and f"'{target}" in said[0]


def test_a_file_elsewhere_is_named_with_where_it_is_looked_for(
    explain: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "here")
    for target, name in (("../targets.py:f", "targets:f"), ("../package/inner.py:f", "package.inner:f")):
        code, _, err = explain(target, "--tp", "2")
        assert code == USAGE and err.endswith(f": PYTHONPATH={folder.resolve()} ringfence explain {name}\n")


def test_explain_says_what_it_cannot_know(explain: Run) -> None:
    code, out, err = explain("targets:without_all_reduce", "--tp", "2")
    assert code == FAILED and "has no all-reduce: nothing is reduced" in err and "note: the graph has no all-" in out
    assert "safe" not in out and "reference (" not in out, "nothing was asked of a plan, nor of a collective"
    code, out, err = explain("targets:tuple_inputs", "--tp", "2", "--option", "capture_sizes=[3]")
    assert code == 0 and "exit code" not in err and "over NCCL it is stream work" in out and "host" not in out, (
        "as on GPUs"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["without_all_reduce"], FAILED, "exit code 1: there is no all-reduce (none); what counts: --fail-on unsafe,"),
        (["without_all_reduce", "--fail-on", "nothing"], OK, None),
        (["tuple_inputs", "--fail-on=declined", "--option=skip_sites=['*']"], FAILED, "is not fused (declined); what"),
        (["tuple_inputs", "--collective=mnnvl", "--flashinfer=0.6.10"], FAILED, "must not carry out a site (refused);"),
        (
            ["tuple_inputs", "--collective=mnnvl", "--flashinfer=0.6.10", "--option=profile=conservative"],
            FAILED,
            "the plan can hang or corrupt (unsafe);",
        ),
    ],
)
def test_explain_says_why_its_exit_code_is_not_0(
    explain: Run, arguments: list[str], code: int, said: str | None
) -> None:
    target, *options = arguments
    returned, out, err = explain(f"targets:{target}", "--tp", "2", *options)
    assert returned == code and (said in err if said else "exit code" not in err), err
    assert ("; 1 piece and 1 island; " if "refused" in str(said) else "; one piece; ") in out


def test_explain_says_why_the_reference_is_the_collective(explain: Run) -> None:
    why = "note: the collective is the reference (an all-reduce, then add and norm), because neither --gpu nor"
    code, out, _ = explain("targets:tuple_inputs", "--tp", "2")
    assert code == OK and why in out and "--collective mnnvl or trtllm or ringfence the one" in out
    assert "IN_GRAPH" not in out, "where nothing is captured, nothing is in a captured graph"
    for other in ("--gpu=h200", "--collective=ringfence", "--option=collective=reference"):
        assert why not in explain("targets:tuple_inputs", "--tp", "2", other)[1], other


def test_the_default_group_is_called_world(explain: Run) -> None:
    """torch numbers it 0, which nobody types."""
    _, out, _ = explain("targets:tuple_inputs", "--tp", "2", "--option", "groups=['other']")
    assert "reduces over group 'world', and only ['other'] are to be fused" in out
    assert "the graph's sites are over ['world']" in out and " world " in out.splitlines()[4] and "'0'" not in out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ringfence {package.__version__}\n"


@pytest.mark.slow
def test_explain_reads_a_model_folder(tmp_path: Path, ringfence: Run) -> None:
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
    code, out, err = ringfence("explain", str(tmp_path), "--tp", "2")
    assert code == OK, err
    assert "2 of 2 all-reduces fused" in out and "model.layers.0.mlp.down_proj" in out
    assert "note: without the backward hooks of" in out and "remove_backward_hooks" in out


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


# -- check ---------------------------------------------------------------------------------

MNNVL = ("check", "--collective", "mnnvl", "--tp", "4", "--flashinfer")


def test_check_finds_a_sound_plan_safe(ringfence: Run) -> None:
    code, out, err = ringfence(*MNNVL, "0.7.0", "--pieces", "33", "--payload", "subnormal")
    assert code == OK, err
    assert out.startswith("safe: no order of the steps fails") and "hazard" not in out


def test_check_shows_how_a_plan_hangs(ringfence: Run, tmp_path: Path) -> None:
    picture = tmp_path / "trace.svg"
    code, out, err = ringfence(*MNNVL, "0.6.10", "--pieces", "33", "--payload", "subnormal", "--svg", str(picture))
    assert code == FAILED, err
    assert out.startswith("deadlock: a shortest trace") and "hazard: M1" in out and "remedy: Upgrade" in out
    assert all(f"rank {rank} in call 0" in out for rank in range(4))
    assert picture.read_text().startswith("<svg") and "rank 3" in picture.read_text()


def test_check_lets_a_rank_skip_a_call(ringfence: Run) -> None:
    code, out, err = ringfence(*MNNVL, "0.7.0", "--skip-rank", "1", "--skip-call", "7", "--json")
    assert code == FAILED, err
    answer = json.loads(out)
    assert (answer["safe"], answer["kind"], answer["hazard"]) == (False, "stale_read", "M25")
    assert answer["states"] > 0 and answer["remedy"] and answer["trace"][-1]["failure"] == "stale_read"


def test_check_prints_the_plan_that_it_assumed(ringfence: Run) -> None:
    code, out, err = ringfence("check", "--collective", "ringfence", "--tp", "2", "--layers", "2", "--pieces", "2")
    assert code == OK, err
    last = " ".join(out[out.index("plan: ") :].split())
    assert last == (
        "plan: ringfence, 2 ranks, 2 layers of two calls in 2 pieces, token counts 4, 8 (and no others: "
        "--capture-sizes), strategy auto, payload any judged: the protocol of ringfence, whatever 'auto' takes, which "
        "'ringfence doctor' says; for others: --collective mnnvl, trtllm, moe_all_to_all"
    )
    code, out, err = ringfence("check", "--collective", "ringfence", "--tp", "2", "--flashinfer", "0.7.0")
    assert code == USAGE and "uses no FlashInfer" in err and not out


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        (["--skip-rank", "9", "--skip-call", "0"], "--skip-rank 9 is not within 0 to 3"),
        (["--skip-rank", "0", "--skip-call", "9999"], "--skip-call 9999 is not within 0 to "),
        (["--skip-rank", "1"], "--skip-rank (0 to 3) and --skip-call (from 0 on) belong together"),
    ],
)
def test_check_names_the_range_of_what_is_skipped(ringfence: Run, skipped: list[str], message: str) -> None:
    code, out, err = ringfence(*MNNVL, "0.7.0", "--layers", "2", "--pieces", "2", *skipped)
    assert code == USAGE and message in err and err.count("\n") == 1 and not out


def test_hazards_says_how_many_rows_it_left_out(ringfence: Run) -> None:
    code, out, err = ringfence("hazards", "--symptom", "replays hang")
    shown = sum(line.startswith("M") for line in out.splitlines())
    assert code == OK and f"these are the {shown} of " in err and "that fit best" in err
    assert ringfence("hazards", "--symptom", "nccl#2389")[2] == ""


def test_check_ends_when_its_time_is_over(ringfence: Run) -> None:
    code, out, err = ringfence(*MNNVL, "0.7.0", "--timeout", "1e-9")
    assert code == UNDECIDED and out.startswith("not decided: the search ended at its bound of 1e-09 seconds"), err
    code, out, _ = ringfence(*MNNVL, "0.7.0", "--timeout", "1e-9", "--json")
    answer = json.loads(out)
    assert (
        code == UNDECIDED and (answer["safe"], answer["kind"]) == (None, "not_decided") and "bound" in answer["message"]
    )
    code, _, err = ringfence(*MNNVL, "0.7.0", "--timeout", "-1")
    assert code == USAGE and "no number of seconds" in err


def test_check_answers_for_sixteen_ranks_and_an_engines_sizes(ringfence: Run) -> None:
    sizes = ",".join(map(str, (1, 2, 4, *range(8, 257, 8))))
    arguments = ("check", "--collective", "mnnvl", "--tp", "16", "--capture-sizes", sizes, "--flashinfer")
    code, out, err = ringfence(*arguments, "0.7.0")
    assert code == OK and out.startswith("safe"), err
    code, out, err = ringfence(*arguments, "0.6.10")
    assert code == FAILED and "hazard: M1" in out and "4 ranks stand for all 16" in out, err
    code, out, err = ringfence(*arguments, "0.7.0", "--skip-rank", "9", "--skip-call", "500")
    assert code == FAILED and "hazard: M25" in out and "stand for" not in out, err


def test_check_counts_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says before the search how long it may take, and goes on counting."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("ringfence.commands.terminal._QUIET_SECONDS", 0.0)
    assert main(["check", "--collective", "mnnvl", "--tp", "2", "--flashinfer", "0.7.0", "--timeout", "77"]) == OK
    out, err = capsys.readouterr()
    assert (
        out.startswith("safe") and "exploring, for 77 s at most: " in err and " states, " in err and err.endswith("\n")
    )


@pytest.mark.parametrize(("strategy", "code"), [("one-shot", OK), ("two-shot", FAILED), ("auto", FAILED)])
def test_check_depends_on_the_strategy(ringfence: Run, strategy: str, code: int) -> None:
    """FlashInfer 0.6.12 compares bitwise, but does not sanitise sums: two-shot only (M2)."""
    arguments = (*MNNVL, "0.6.12", "--layers", "2", "--pieces", "2", "--strategy", strategy)
    assert ringfence(*arguments)[0] == code


@pytest.mark.parametrize(("version", "noted"), [("0.7.2.post1", False), ("0.7.0", False), ("9.9", True)])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_check_says_that_a_release_was_not_read(
    ringfence: Run, version: str, noted: bool, form: tuple[str, ...]
) -> None:
    code, out, err = ringfence(*MNNVL, version, "--layers", "1", "--pieces", "1", *form)
    assert code == OK and ("read up to FlashInfer 0.7.2.post1; 9.9 may differ" in err) == noted
    assert "safe" in out and "may differ" not in out


def test_check_hazards_and_journal_need_no_torch(tmp_path: Path) -> None:
    check = ["check", "--collective", "mnnvl", "--tp", "2", "--flashinfer", "9.9", "--layers", "1"]
    lines = [
        f"assert main({a}) == {c}" for a, c in ((check, OK), (["hazards"], OK), (["journal", str(tmp_path)], USAGE))
    ]
    script = ["import sys", "from ringfence.cli import main", *lines, "assert 'torch' not in sys.modules"]
    result = run_python("-c", "; ".join(script))
    assert result.returncode == OK and "9.9 may differ" in result.stderr, result.stderr


MOE = ("check", "--collective", "moe_all_to_all", "--tp", "4", "--layers", "4", "--pieces", "2", "--flashinfer")


def test_check_knows_dispatch_and_combine(ringfence: Run) -> None:
    code, out, err = ringfence(*MOE, "0.7.0")
    assert code == OK and out.startswith("safe"), err
    code, out, err = ringfence(*MOE, "0.6.13")
    assert code == OK and "not in the model: M45" in out and "M11" not in out, err
    code, out, err = ringfence(*MOE, "0.7.0", "--skip-rank", "2", "--skip-call", "3")
    assert code == FAILED and "combine" in out and "hazard: M25" in out, err
    code, out, err = ringfence(*MOE, "0.7.0", "--strategy", "one-shot")
    assert code == USAGE and "a MoE layer is a dispatch and a combine" in err


def test_check_names_what_is_not_in_the_model(ringfence: Run) -> None:
    """Torn reads (M3) show in wrong numbers of a safe plan."""
    arguments = (*MNNVL, "0.6.12", "--layers", "2", "--strategy", "two-shot", "--payload", "ordinary")
    code, out, _ = ringfence(*arguments)
    assert code == OK and "not in the model: M3" in out and "Upgrade FlashInfer to 0.6.13" in out
    assert json.loads(ringfence(*arguments, "--json")[1])["also"] == ["M3", "M49"]


def test_check_shows_a_trace_again(ringfence: Run, tmp_path: Path) -> None:
    """With what it was called and how to mend it, as text and as picture; a file of the trace alone has neither."""
    asked = (*MNNVL, "0.6.10", "--layers", "1", "--pieces", "1")
    trace, pictures = tmp_path / "trace.json", [tmp_path / "first.svg", tmp_path / "again.svg"]
    _, first, _ = ringfence(*asked, "--svg", str(pictures[0]))
    _, saved, _ = ringfence(*asked, "--json")
    trace.write_text(saved)
    code, out, err = ringfence("check", "--trace", str(trace), "--svg", str(pictures[1]))
    assert (code, out) == (FAILED, first), err
    assert max(map(len, out.splitlines())) <= 80 and "hazard: M1" in out and "remedy: Upgrade" in out
    assert pictures[0].read_text() == pictures[1].read_text() and "remedy: Upgrade" in pictures[1].read_text()
    code, again, _ = ringfence("check", "--trace", str(trace), "--json")
    assert (code, json.loads(again)) == (FAILED, json.loads(saved))
    trace.write_text(json.dumps(json.loads(saved) | {"hazard": 7, "remedy": None, "also": "M1", "payload": []}))
    code, out, err = ringfence("check", "--trace", str(trace))
    assert code == FAILED and out.startswith("deadlock: a shortest trace") and "hazard" not in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collective", "mnnvl", "--tp", "4"], "needs --flashinfer, as in: --flashinfer 0.7.2; or --trace FILE"),
        ([], "needs --collective, --flashinfer, --tp, as in: --collective mnnvl --flashinfer 0.7.2 --tp 4; or"),
        (["--collective", "nccl"], "'nccl' is no value of --collective; there are mnnvl"),
        (["--collective", "mnnvl", "--flashinfer", "newest", "--tp", "4"], "'newest' is not a version"),
        (["--collective", "mnnvl", "--flashinfer", "0.5.0", "--tp", "4"], "0.5.0 are not known"),
        (["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "1"], "world size"),
        (["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "3"], "2, 4, 8 or 16"),
        (["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "2", "--layers", "0"], "not a positive integer"),
        (["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "2", "--pieces", "0"], "not a positive integer"),
        (["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "2", "--capture-sizes", "4;8"], "write it as 4,8"),
        (["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "2", "--skip-rank", "1"], "belong together"),
        (
            ["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "2", "--skip-rank", "2", "--skip-call", "0"],
            "--skip-rank 2 is not within 0 to 1",
        ),
        (
            ["--collective", "mnnvl", "--flashinfer", "0.7.0", "--tp", "2", "--payload", "odd"],
            "'odd' is no value of --payload",
        ),
        (
            [
                "--collective",
                "mnnvl",
                "--flashinfer",
                "0.7.0",
                "--tp",
                "2",
                "--layers",
                "1",
                "--svg",
                "/no/folder/x.svg",
            ],
            "cannot be written",
        ),
        (["--trace", "no_such_file"], "'no_such_file' cannot be read"),
        (["--trace", "targets.py", "--tp", "4"], "leave --collective, --flashinfer and --tp out"),
        (["--collective", "mnnvl", "--layers", "1001"], "more than 1000"),
        (["--trace", "targets.py"], "cannot be read"),
    ],
)
def test_wrong_check_is_refused(
    ringfence: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    code, out, err = ringfence("check", *arguments)
    assert code == USAGE, (out, err)
    assert message in err and "Traceback" not in err and not out


# -- explain, as another collective ----------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "decision", "rule", "expected"),
    [("0.6.10", "REFUSE", "M1", FAILED), ("0.7.0", "IN_GRAPH", "device_epoch", OK)],
)
def test_explain_judges_as_a_collective_that_need_not_run_here(
    explain: Run, version: str, decision: str, rule: str, expected: int
) -> None:
    as_mnnvl = ("--collective", "mnnvl", "--flashinfer", version, "--option", "capture_sizes=[3]", "--json")
    code, out, err = explain("targets:tuple_inputs", "--tp", "2", *as_mnnvl)
    assert code == expected, err
    report = json.loads(out)
    assert report["judged_as"] == f"mnnvl of FlashInfer {version}" and report["captured"] == [3]
    (verdict,) = report["verdicts"]
    assert (verdict["decision"], verdict["rule"], report["plan"]["kind"]) == (decision, rule, "safe")
    assert report["summary"].startswith("REFUSED: ") == (decision == "REFUSE")


@pytest.mark.parametrize(
    ("version", "judged"), [(("--flashinfer", "0.6.10"), "FlashInfer 0.6.10"), ((), "an unknown version")]
)
def test_explain_says_what_it_judged_the_plan_as(explain: Run, version: tuple[str, ...], judged: str) -> None:
    code, out, err = explain("targets:tuple_inputs", "--tp", "2", "--collective", "trtllm", *version)
    assert code == OK, err
    assert f"fused, judged as trtllm of {judged};" in out.splitlines()[0]
    assert "judged as" not in explain("targets:tuple_inputs", "--tp", "2")[1]


def test_explain_says_first_what_is_refused_and_fails_on_it(explain: Run) -> None:
    old = ("targets:tuple_inputs", "--tp", "2", "--collective", "mnnvl", "--flashinfer", "0.6.10")
    code, out, _ = explain(*old)
    said = "REFUSED: 1 of 1 all-reduces fused, 0 by mnnvl of FlashInfer 0.6.10, 1 by the reference (M1 refuses);"
    assert code == FAILED and out.splitlines()[0].startswith(f"ringfence: {said}")
    assert explain(*old, "--fail-on", "unsafe")[0] == explain(*old, "--fail-on", "nothing")[0] == OK
    split = ("targets:tuple_inputs", "--tp", "2", "--option", "split_ops=['aten::mul']")
    assert explain(*split)[0] == OK and explain(*split, "--fail-on", "split,refused")[0] == FAILED
    declined = ("targets:tuple_inputs", "--tp", "2", "--option", "groups=['other']", "--fail-on", "declined")
    assert explain(*declined)[0] == FAILED
    code, _, err = explain("targets:tuple_inputs", "--tp", "2", "--fail-on", "hangs")
    assert code == USAGE and "not a list of unsafe, undecided, refused, none, declined, split, nothing" in err


def test_explain_fails_on_a_model_without_any_site(explain: Run) -> None:
    """Nothing was fused and nothing was said of a plan, so nothing is as it should be."""
    code, _, err = explain("targets:without_all_reduce", "--tp", "2")
    assert code == FAILED and "has no all-reduce" in err
    assert explain("targets:without_all_reduce", "--tp", "2", "--fail-on", "unsafe,declined")[0] == OK


def test_explain_says_that_a_plan_was_not_decided(explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.compile_passes.prove.MOST_CALLS", 0)
    two_shot = ("targets:tuple_inputs", "--tp", "2", "--collective", "trtllm", "--flashinfer", "0.7.2")
    code, out, err = explain(*two_shot)
    assert code == UNDECIDED and "plan: not_decided: 1 sites in 1 steps" in out, (out, err)
    assert explain(*two_shot, "--fail-on", "unsafe,refused")[0] == OK
    assert explain(*two_shot, "--fail-on", "undecided,split", "--option", "split_ops=['aten::mul']")[0] == FAILED


@pytest.mark.parametrize(
    ("sizes", "captured", "said"),
    [("[3]", [3], None), ("[3,8]", [3], "captures of 8 tokens are"), ("[4,8]", [], "captures of 4, 8 tokens are")],
)
def test_explain_names_the_captures_of_its_own_graph(
    explain: Run, sizes: str, captured: list[int], said: str | None
) -> None:
    as_mnnvl = ("--collective", "mnnvl", "--flashinfer", "0.7.2", "--option", f"capture_sizes={sizes}", "--json")
    report = json.loads(explain("targets:tuple_inputs", "--tp", "2", *as_mnnvl)[1])
    assert report["captured"] == captured
    assert ("capture: off" in report["summary"]) == (not captured)
    notes = [note for note in report["notes"] if "other graphs'" in note]
    assert len(notes) == (said is not None) and all(
        note.startswith(said) and "this one is of 3 alone" in note for note in notes
    )


def test_explain_names_an_unsafe_plan_first(explain: Run) -> None:
    two_shot = ("--collective", "mnnvl", "--flashinfer", "0.6.12", "--option", "capture_sizes=[3]")
    code, out, err = explain("targets:tuple_inputs", "--tp", "2", *two_shot)
    assert (code, out.split()[1]) == (FAILED, "REFUSED:") or (code, out.split()[1]) == (FAILED, "UNSAFE"), (out, err)


def test_explain_says_that_a_release_was_not_read(explain: Run) -> None:
    for version, noted in (("9.9", True), ("0.7.0", False)):
        code, _, err = explain("targets:tuple_inputs", "--tp", "2", "--collective", "mnnvl", "--flashinfer", version)
        assert code == OK and ("9.9 may differ" in err) == noted


def test_explain_refuses_a_version_of_nothing(explain: Run) -> None:
    code, _, err = explain("targets:tuple_inputs", "--tp", "2", "--flashinfer", "0.7.0")
    assert code == USAGE and "without --collective" in err


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


def test_files_are_looked_at_before_the_work(explain: Run, ringfence: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is explored, loaded or read for a picture that cannot be written."""
    for module in line.COMMANDS:
        monkeypatch.setattr(module, "run", lambda _: pytest.fail("it was begun"))
    ways = (("explain", "targets:f", "--tp", "2"), (*MNNVL, "0.7.0"), ("journal", "."))
    wrong = {"no/x.svg": "there is no folder 'no'", "here": "it is a folder", "a\0b": "embedded null", "": "a folder"}
    for arguments in ways:
        for path, why in wrong.items():
            code, out, err = ringfence(*arguments, "--svg", path)
            assert (code, out) == (USAGE, "") and f"'{path}' cannot be written: " in err and why in err, err


def test_options_are_looked_at_before_the_trace(explain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    import ringfence as package
    from ringfence import explaining

    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    config.save_pretrained(tmp_path)
    for name in ("_folded", "_compiled"):
        monkeypatch.setattr(explaining, name, lambda *_: pytest.fail("it was traced"))
    wrong = {
        "split_ops=['no::op']": "no such op is registered",
        "norm_ops=['no::op']": "no such op is registered",
        "group_names={'tp:0':'none'}": "'none' is no process group",
        "size_table=none": "cannot be read",
        "capture_size=[1]": "unknown option 'capture_size'; did you mean 'capture_sizes'?\n",
        "frobnicate=1": "unknown option 'frobnicate'; the options are fuse, ",
    }
    for target in (str(tmp_path), "targets:tuple_inputs"):
        for option, why in wrong.items():
            code, out, err = explain(target, "--tp", "2", "--option", option)
            assert code == USAGE and not out and why in err, (target, err)
    monkeypatch.setattr(explaining, "fake_model", lambda *_, **__: pytest.fail("it was built"))
    values: list[tuple[dict[str, Any], str]] = [
        ({"gpu": "h2000"}, "did you mean 'h200'?"),
        ({"gpu": 3}, "'3' is no GPU that is known; known are a100"),
        ({"collective": "nccl"}, "collective='nccl' is not one of"),
        ({"flashinfer": 0.7, "gpu": "h200"}, "flashinfer=0.7 is no version"),
        ({"flashinfer": "new", "gpu": "h200"}, "'new' is not a version"),
        ({"batch": 0}, "batch=0 is not a positive integer"),
        ({"tokens": "8"}, "tokens='8' is not"),
        ({"context": -1}, "context=-1 is not"),
        ({"tp": 1}, "tp=1 is no tensor-parallel world size"),
        ({"tp": "2"}, "tp='2' is not a positive integer"),
        ({"capture_sizes": [0]}, "capture_sizes holds 0"),
    ]
    for given, why in values:
        with pytest.raises(package.RingfenceError, match=re.escape(why)):
            package.explain(config, **{"tp": 2} | given)


def test_check_says_for_which_sizes_and_whose_protocol_it_speaks(ringfence: Run) -> None:
    def said(*arguments: str) -> str:
        return " ".join(ringfence("check", "--tp", "2", "--layers", "2", "--pieces", "2", *arguments)[1].split())

    of_mnnvl = said("--collective", "mnnvl", "--flashinfer", "0.7.2")
    assert "token counts 4, 8 (and no others: --capture-sizes)" in of_mnnvl
    assert (
        "judged: the protocol of mnnvl, whatever 'auto' takes" in of_mnnvl and "for others: --collective " in of_mnnvl
    )
    assert "judged: the protocol of moe_all_to_all, " in said("--collective", "moe_all_to_all", "--flashinfer", "0.7.2")
