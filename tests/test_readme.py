"""README.md as a reader takes it: each block is run, or says why not.

A comment stands before each block:

    <!-- exit: 0 -->            every command in it is run in a copy of the tree, and the last one ends so
    <!-- last: TEXT -->         the same, with 0, and the last line that it prints
    <!-- CI: make demo -->      .ci/run runs it, so it is not run a second time
    <!-- from: FILE -->         lines of a program that test_examples.py runs
    <!-- GPU --> <!-- yours --> <!-- example --> <!-- picture: ... -->      needs a GPU, or what only the reader has
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_examples import RUNS

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
    assert set(kinds) <= NOT_RUN | {"exit", "last", "CI", "from"}, kinds
    assert kinds.count("exit") >= 4 and "last" in kinds and kinds.count("from") >= 4


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind in ("exit", "last")], ids=lambda b: b.text[:40])
def test_commands_do_what_they_are_said_to(block: Block, clone: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    code = int(block.said) if block.kind == "exit" else 0
    commands = block.text.splitlines()
    for i, command in enumerate(commands):
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=clone,
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert ran.returncode == (code if i == len(commands) - 1 else 0), (command, ran.stdout[-500:], ran.stderr)
        assert ran.stdout.strip(), command
        if block.kind == "last":
            assert ran.stdout.splitlines()[-1] == block.said


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
