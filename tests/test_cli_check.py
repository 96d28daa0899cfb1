"""``ringfence check``: what it finds, how it shows it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import MNNVL, Run
from command_line import folder as folder
from command_line import ringfence as ringfence

from ringfence.cli import main
from ringfence.commands.terminal import FAILED, OK, UNDECIDED, USAGE
from support import run_python


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
        (["--skip-rank", "9"], "--skip-rank 9 is not within 0 to 3, the ranks of --tp 4"),
        (["--skip-rank", "1"], "--skip-rank (0 to 3) and --skip-call (from 0 on) belong together"),
    ],
)
def test_check_names_the_range_of_what_is_skipped(ringfence: Run, skipped: list[str], message: str) -> None:
    code, out, err = ringfence(*MNNVL, "0.7.0", "--layers", "2", "--pieces", "2", *skipped)
    assert code == USAGE and message in err and err.count("\n") == 1 and not out


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


def test_check_says_for_which_sizes_and_whose_protocol_it_speaks(ringfence: Run) -> None:
    def said(*arguments: str) -> str:
        return " ".join(ringfence("check", "--tp", "2", "--layers", "2", "--pieces", "2", *arguments)[1].split())

    of_mnnvl = said("--collective", "mnnvl", "--flashinfer", "0.7.2")
    assert "token counts 4, 8 (and no others: --capture-sizes)" in of_mnnvl
    assert (
        "judged: the protocol of mnnvl, whatever 'auto' takes" in of_mnnvl and "for others: --collective " in of_mnnvl
    )
    assert "judged: the protocol of moe_all_to_all, " in said("--collective", "moe_all_to_all", "--flashinfer", "0.7.2")
