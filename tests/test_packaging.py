from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

import ringfence

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_folder_is_listed() -> None:
    """A folder missing from the list works in an editable install and vanishes from the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = setuptools["package-dir"]
    assert sorted(setuptools["packages"]) == sorted(listed)
    for top in ("front", "compile_passes", "runtime"):
        for init in (ROOT / top).rglob("__init__.py"):
            folder = str(init.parent.relative_to(ROOT))
            name = "ringfence." + folder.replace("/", ".")
            assert listed.get(name.replace("ringfence.front", "ringfence")) == folder


def test_version_is_the_installed_one() -> None:
    assert ringfence.__version__ == importlib.metadata.version("ringfence")


def test_runtime_never_imports_the_passes() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert not any("compile_passes" in line for line in imports), path


def test_what_is_exported_has_the_name_that_messages_print() -> None:
    """A traceback shows a class's own name; it must be the one that a user can catch."""
    assert {name: getattr(ringfence, name).__name__ for name in ringfence.__all__} == {n: n for n in ringfence.__all__}


@pytest.mark.parametrize(
    ("module", "instead"),
    [
        ("runtime.errors", "import ringfence.runtime"),
        ("compile_passes.find", "import ringfence.compile_passes"),
        ("front", "import ringfence"),
        ("front.options", "import ringfence"),
        ("tests.support", "import support"),
        ("ringfence.tests", "No module named"),
        ("ringfence.benchmarks", "No module named"),
        ("ringfence.front", "No module named"),
    ],
)
def test_nothing_is_importable_from_the_clone_by_accident(module: str, instead: str) -> None:
    """A module of two names is two modules, whose errors are not each other's."""
    result = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and instead in result.stderr.splitlines()[-1], result.stderr


def test_no_class_name_has_two_homes() -> None:
    """One word, one meaning: a reader who meets a name knows which class it is."""
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for top in ("front", "compile_passes", "runtime"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    homes[node.name].add(str(path.relative_to(ROOT)))
    double = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert not double


def test_the_glossary_is_short_and_has_each_word_once() -> None:
    section = (ROOT / "docs" / "design.md").read_text().partition("## Words\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    words = [word.strip("| ") for row in rows for word in row[0].split(",")]
    assert 20 <= len(rows) <= 25 and len(set(words)) == len(words)
    assert all(len(row) == 2 and row[1].strip("| ") for row in rows)
