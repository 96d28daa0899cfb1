"""The code of a commit beside the one that is installed, in processes that take turns: `--against COMMIT`.

A benchmark that is asked so imports torch alone, and the package in a function, so that old commits can be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

Figures = dict[str, float]


def unpack(commit: str, folder: Path) -> None:
    """The package as it was at a commit, under its name; the folders were one until they became front/ and others."""
    tree, package = folder / "tree", folder / "ringfence"
    tree.mkdir()
    archive = subprocess.run(
        ["git", "archive", commit], capture_output=True, check=True, cwd=Path(__file__).parent.parent
    )
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive.stdout, check=True)
    if not (tree / "front").is_dir():
        tree.rename(package)
        return
    (tree / "front").rename(package)
    for name in ("compile_passes", "runtime", "docs"):
        shutil.move(tree / name, package / name)


def _ask(script: str, folder: Path | None, repeats: int) -> Figures:
    """Figures of a process of its own, of the package in ``folder`` or of the one that is installed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(folder)} if folder else {})
    command = [sys.executable, script, "--here", "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(
    script: str, about: str, measured: Callable[[int], Figures], shown: Callable[[list[Figures]], str], repeats: int
) -> None:
    """The command line of ``script``. measured: the figures of so many repeats; shown: those of several processes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--here", action="store_true", help="ask the package that this process imports, once")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measured(given.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        packages: dict[str, Path | None] = {"this": None}
        if given.against:
            unpack(given.against, Path(folder))
            packages[given.against] = Path(folder)
        found: dict[str, list[Figures]] = {name: [] for name in packages}
        for _ in range(given.processes):
            for name, at in packages.items():
                found[name].append(_ask(script, at, given.repeats))
    for name, each in found.items():
        print(f"{name}: {shown(each)}")
