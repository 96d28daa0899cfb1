"""README.md as a reader takes it: each block is run, or says why not.

A comment stands before each block:

    <!-- exit: 0 -->            every command in it is run in a copy of the tree, and the last one ends so
    <!-- last: TEXT -->         the same, with 0, and the last line that it prints; or test_examples.py runs it
    <!-- CI: make demo -->      .ci/run runs it, so it is not run a second time
    <!-- file: FILE -->         a program, whole; a command in the block behind it runs it
    <!-- model: FOLDER -->      every command is run, with 0, beside a small Hugging Face model in that folder
    <!-- from: FILE -->         lines of a program that test_examples.py runs
    <!-- GPU --> <!-- yours --> <!-- picture: ... -->      needs a GPU, or what only the reader has
    <!-- yours: FOLDER --> <!-- example -->      a command about a config in that folder, and what it prints
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_examples import RUNS

from ringfence.cli import main
from support import HARD_END, save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = {"GPU", "yours", "example", "picture"}


@dataclass(frozen=True)
class Block:
    """kind and said: of the comment, ``<!-- kind: said -->``; None where there is none."""

    text: str
    kind: str | None
    said: str


def blocks(page: str) -> list[Block]:
    """Blocks between fences, and those that are indented, each with the comment before it."""
    found, kind, said, lines = [], None, "", page.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        if comment := re.fullmatch(r"<!-- (\w+)(?:: (.*))? -->", line):
            kind, said = comment[1], comment[2] or ""
        elif line.startswith(("```", "    ")):
            fenced = line.startswith("```")
            end = at + 1
            while end < len(lines) and (lines[end] != "```" if fenced else lines[end].startswith("    ")):
                end += 1
            text = "\n".join(lines[at + 1 : end] if fenced else lines[at:end])
            found.append(Block(textwrap.dedent(text), kind, said))
            kind, said = None, ""
            at = end if fenced else end - 1
        elif line:
            kind = None
        at += 1
    return found


BLOCKS = blocks((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, where no earlier run has left anything."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_every_block_says_what_becomes_of_it() -> None:
    kinds = [block.kind for block in BLOCKS]
    assert set(kinds) <= NOT_RUN | {"exit", "last", "CI", "from", "file", "model"}, kinds
    assert kinds.count("exit") >= 4 and "last" in kinds and kinds.count("from") >= 2


def run(command: str, clone: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HARD_END,
    )


def is_of_the_examples(block: Block) -> bool:
    """Whether test_examples.py starts that program in the same way, and looks for the line."""
    command = block.text.split("#")[0].strip()
    return any(command == f"python examples/{name}" and block.said in said for name, (_, said) in RUNS.items())


RUN_HERE = [b for b in BLOCKS if b.kind in ("exit", "last") and not is_of_the_examples(b)]


def test_the_program_that_is_not_run_here_ends_with_its_line() -> None:
    (block,) = [b for b in BLOCKS if b.kind == "last"]
    assert is_of_the_examples(block)


@pytest.mark.parametrize("block", RUN_HERE, ids=lambda b: b.text[:40])
def test_commands_do_what_they_are_said_to(block: Block, clone: Path) -> None:
    code = int(block.said) if block.kind == "exit" else 0
    commands = block.text.splitlines()
    for i, command in enumerate(commands):
        ran = run(command, clone)
        assert ran.returncode == (code if i == len(commands) - 1 else 0), (command, ran.stdout[-500:], ran.stderr)
        assert ran.stdout.strip(), command
        if block.kind == "last":
            assert ran.stdout.splitlines()[-1] == block.said


def save_model_and_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_tiny_model(folder, "llama", num_hidden_layers=2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    words = ["?", "The", "hobbit", "looked", "into", "the", *map(str, range(120))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


@pytest.mark.slow
def test_a_whole_program_runs_as_it_is_copied(clone: Path) -> None:
    programs = [b for b in BLOCKS if b.kind == "file"]
    commands = [b for b in BLOCKS if b.kind == "model"]
    assert len(programs) == len(commands) == 1
    save_model_and_tokenizer(clone / commands[0].said)
    (clone / programs[0].said).write_text(programs[0].text)
    (command,) = commands[0].text.splitlines()
    ran = run(command, clone)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("The hobbit looked into the ") and "captures" in ran.stdout, ran.stdout
    assert "Warning" not in ran.stderr, ran.stderr


def test_the_plan_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its picture is docs/plan.svg. Lines of transformers' sources change with its version."""
    from transformers import LlamaConfig

    (asked,) = [block for block in BLOCKS if block.kind == "yours" and block.said]
    (printed,) = [block for block in BLOCKS if block.kind == "example"]
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5).save_pretrained(tmp_path / asked.said)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(asked.text)
    assert program == "ringfence" and main(arguments) == 0
    assert _without_lines(capsys.readouterr().out.rstrip("\n")) == _without_lines(printed.text)
    picture = (tmp_path / "plan.svg").read_text()
    assert _without_lines(picture) == _without_lines((ROOT / "docs" / "plan.svg").read_text())


def _without_lines(text: str) -> str:
    return re.sub(r"(?<=\.py:)\d+", lambda line: "N" * len(line[0]), text)


def test_figures_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "measurements.md").read_text()
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(r"\| \d+\.\d", line)]
    figures = [figure for row in rows for figure in re.findall(r"\d+\.\d+", row)]
    assert len(figures) > 30
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", page)]


def test_what_ci_runs_is_not_run_twice() -> None:
    run = (ROOT / ".ci" / "run").read_text().splitlines()
    for block in (b for b in BLOCKS if b.kind == "CI"):
        assert block.said in run and block.text.startswith(block.said)


def test_programs_are_lines_of_examples_that_run() -> None:
    for block in (b for b in BLOCKS if b.kind == "from"):
        assert Path(block.said).name in RUNS, block
        program = [line.strip() for line in (ROOT / block.said).read_text().splitlines()]
        lines = [line.strip() for line in block.text.splitlines()]
        assert any(program[i : i + len(lines)] == lines for i in range(len(program))), block


def test_what_is_named_is_there() -> None:
    """Links of README and of the pages lead to files."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


def test_nothing_is_installed_by_a_name_that_is_not_published() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"pip install '?ringfence", page.read_text()), page.name


def test_the_reader_of_blocks_misses_none() -> None:
    page = "<!-- GPU -->\n\n    a\n    b\n\ntext\n\n<!-- last: x: y -->\n\n```python\nc\n\nd\n```\n\n    e\n"
    assert blocks(page) == [Block("a\nb", "GPU", ""), Block("c\n\nd", "last", "x: y"), Block("e", None, "")]
    assert blocks("<!-- GPU -->\n\ntext\n\n    a\n") == [Block("a", None, "")]
