"""A run with two workers, of files that note who ran them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from support import HARD_END

_TEST = """
import os, pathlib, pytest

pytestmark = [{marks}]

@pytest.mark.parametrize("i", range({tests}))
def test(i):
    with pathlib.Path({log!r}).open("a") as log:
        log.write("{name} " + os.environ["PYTEST_XDIST_WORKER"] + chr(10))
"""


def test_a_group_is_run_by_one_worker_and_slow_ones_are_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    marks = {"a": "", "b": "", "c": "pytest.mark.xdist_group('pair')", "d": "pytest.mark.xdist_group('pair')"}
    marks["e"] = "pytest.mark.slow"
    for name, mark in marks.items():
        text = _TEST.format(name=name, marks=mark, tests=1 if name == "e" else 6, log=str(log))
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    xdist_group(name)\n")
    options = ["-q", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder", "-p", "xdist", "-p", "grouping"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HARD_END,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    workers, first = defaultdict(set), {}
    for name, worker in (line.split() for line in log.read_text().splitlines()):
        workers["pair" if name in "cd" else name].add(worker)
        first.setdefault(worker, name)
    assert {group: len(by) for group, by in workers.items()} == {"a": 1, "b": 1, "pair": 1, "e": 1}
    assert set(first.values()) == {"e", "c"}  # then the largest
