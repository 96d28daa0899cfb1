from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

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
