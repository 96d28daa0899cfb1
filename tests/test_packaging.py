from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import api_page
import ringfence
from ringfence.commands import docs

ROOT = Path(__file__).resolve().parent.parent

#: Of https://www.apache.org/licenses/LICENSE-2.0.txt, without the space around it.
LICENSE_SHA256 = "283ea6cc2997a1a70da0049e09adf9317bb60ca1b51279b65196b83a69e1996b"


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


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def test_bounds_are_those_of_the_support_page() -> None:
    """The page says what was seen working; nothing else may be installed beside it."""
    page = (ROOT / "docs" / "support.md").read_text()
    pythons = re.findall(r"3\.(\d+)", re.search(r"^\| Python \| (.*) \|$", page, re.M)[1])  # type: ignore[index]
    torches = re.search(r"^\| torch \| 2\.(\d+) to 2\.(\d+): ", page, re.M)
    assert torches is not None
    low, high = int(pythons[0]), int(pythons[-1])
    project = _project()
    assert project["requires-python"] == f">=3.{low},<3.{high + 1}"
    listed = [c for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3.")]
    assert listed == [f"Programming Language :: Python :: 3.{minor}" for minor in range(low, high + 1)]
    (torch,) = (d for d in project["dependencies"] if d.startswith("torch"))
    assert torch == f"torch>=2.{torches[1]},<2.{int(torches[2]) + 1}"
    assert f"Python 3.{low} or 3.{high}, torch 2.{torches[1]} to 2.{torches[2]}" in (ROOT / "README.md").read_text()


def test_the_page_of_the_api_is_fresh_and_whole() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert text == api_page.page(), "stale: PYTHONPATH=tests python tests/api_page.py"
    for name in ringfence.__all__:
        assert f"### `{name}`\n" in text or f"| `{name}` |" in text, name
        assert (getattr(ringfence, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_what_the_pages_call_is_public() -> None:
    """As ``ringfence.name(...)`` or ``ringfence.name.other(...)``, and completed by an interactive session."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    called = {name for page in pages for name in re.findall(r"(?<![\w./-])ringfence\.(\w+)[\w.]*\(", page.read_text())}
    assert {"moe", "compile", "Backend", "watch"} <= called
    assert called <= set(ringfence.__all__) and called <= set(dir(ringfence)), called - set(ringfence.__all__)


def test_every_section_of_the_api_names_what_there_is() -> None:
    listed = [name for names in api_page.SECTIONS.values() for name in names if name != "compile"]
    assert set(listed) <= set(ringfence.__all__) and len(set(listed)) == len(listed)


def test_the_licence_is_the_one_that_the_metadata_names() -> None:
    assert (_project()["license"], _project()["license-files"]) == ("Apache-2.0", ["LICENSE"])
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and hashlib.sha256(text.strip().encode()).hexdigest() == LICENSE_SHA256


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first is not None and first[1] == ringfence.__version__


def _texts() -> Iterator[tuple[Path, str]]:
    """What a user may be shown: strings of the sources that are no docstrings, docstrings of public names."""
    for top in ("front", "compile_passes", "runtime"):
        for path in sorted((ROOT / top).rglob("*.py")):
            tree = ast.parse(path.read_text())
            quiet = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
                    yield path, node.value
    for name in ringfence.__all__:
        yield Path(name), getattr(ringfence, name).__doc__ or ""


def test_messages_lead_somewhere_from_a_wheel() -> None:
    """No docs/ is there where only the wheel is installed, and the name is not published: no path, no such extra."""
    found = set(docs.pages())
    named = 0
    for path, text in _texts():
        assert "docs/" not in text.replace("hazards --markdown > docs/hazards.md", "") or path.name == "docs.py", text
        assert "ringfence[" not in text, (path, text)
        for page in re.findall(r"ringfence docs (\w+)", text):
            named += 1
            assert page in found, (path, text)
    assert named > 10


def test_version_is_the_installed_one() -> None:
    assert ringfence.__version__ == importlib.metadata.version("ringfence")


def test_runtime_never_imports_the_passes() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert not any("compile_passes" in line for line in imports), path


def test_what_is_exported_has_the_name_that_messages_print() -> None:
    """A traceback shows a class's own name; it must be the one that a user can catch. A module has its path."""
    own = {name: getattr(ringfence, name).__name__.removeprefix("ringfence.") for name in ringfence.__all__}
    assert own == {name: name for name in ringfence.__all__}


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


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    """CONTRIBUTING.md, Size."""
    kinds = ("*.py", "*.cu", "*.cuh")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *kinds], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0")[:-1]]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in paths if path.is_file()}
    assert len(lines) > 200 and {name: count for name, count in lines.items() if count > 400} == {}


_TYPE_NAME = re.compile(r"[A-Z][a-z]\w+$")


def test_no_class_name_has_two_homes() -> None:
    """One word, one meaning: a reader who meets a name knows which class it is."""
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for top in ("front", "compile_passes", "runtime"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.name] if isinstance(node, ast.ClassDef) else []
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.col_offset == 0:  # a type by another name
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [t.id for t in targets if isinstance(t, ast.Name) and _TYPE_NAME.match(t.id)]
                for name in names if "TypeVar" not in ast.unparse(node) or isinstance(node, ast.ClassDef) else ():
                    homes[name].add(str(path.relative_to(ROOT)))
    double = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert not double


def test_the_glossary_is_short_and_has_each_word_once() -> None:
    section = (ROOT / "docs" / "design.md").read_text().partition("## Words\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    words = [word.strip("| ") for row in rows for word in row[0].split(",")]
    assert 20 <= len(rows) <= 25 and len(set(words)) == len(words)
    assert all(len(row) == 2 and row[1].strip("| ") for row in rows)
