"""``ringfence explain``: its targets, what it judges a plan as, what it says, and with which exit code it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import MNNVL, Run
from command_line import explain as explain
from command_line import folder as folder
from command_line import ringfence as ringfence

from ringfence.commands import line
from ringfence.commands.terminal import FAILED, OK, UNDECIDED, USAGE


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
