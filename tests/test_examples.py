"""Each example, as its first line says, or in processes that are there where its start is like another's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked_script import run_script

from support import HARD_END

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")

#: Run by make demo and test_reproduce.py.
ELSEWHERE = {"demo.py", "reproduce.py"}

#: Their ranks are forked: their start is engine.py's, and that of examples/demo.py, which make demo runs.
FORKED = {"torchrun.py": 2, "passes.py": 2, "generate.py": 2, "demo_moe.py": 0}

#: By file: what runs it, and what it prints among other things.
RUNS = {
    "torchrun.py": (TORCHRUN, ["2 of 2 all-reduces fused", "capture: off"]),
    "passes.py": (TORCHRUN, ["1 of 1 all-reduces fused", "captured: [(4,)]", "passes: largest difference from eager"]),
    "engine.py": (TORCHRUN, ["reference, all calls", "engine: norm of [16, 64], root mean square 1.00 to 1.00"]),
    "generate.py": (TORCHRUN, ["tokens: ", "all-reduces fused"]),
    "demo_moe.py": ((sys.executable,), ["10 steps equal to eager, two of them with an empty rank", "2, 4, 8 tokens"]),
    "hang.py": ((sys.executable,), ["rank 1 is at hang.py:", "time.sleep(3600)", "hang: rank 1 was named by both"]),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example(name: str) -> None:
    command, expected = RUNS[name]
    if name in FORKED:
        ran = run_script(EXAMPLES / name, FORKED[name])
    else:
        ran = subprocess.run(
            [*command, str(EXAMPLES / name)], capture_output=True, text=True, timeout=HARD_END, cwd=EXAMPLES.parent
        )
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stdout[-1500:]}{ran.stderr[-3000:]}"
    for text in expected:
        assert text in ran.stdout, ran.stdout[-3000:]
    assert "FutureWarning" not in ran.stderr, ran.stderr
    said = [line for line in ran.stderr.splitlines() if line.startswith("ringfence: rank")]
    assert all(len(re.findall(r"call 5 of group", line)) == 1 for line in said) and len(said) in (0, 4), said


def test_an_example_of_ranks_says_how_to_start_them() -> None:
    for name, (command, _) in RUNS.items():
        says = f'sys.exit("start its ranks: torchrun --nproc-per-node 2 examples/{name}")'
        assert (says in (EXAMPLES / name).read_text()) == (command is TORCHRUN), name
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    ran = subprocess.run([sys.executable, str(EXAMPLES / "engine.py")], capture_output=True, text=True, env=alone)
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        1,
        "",
        "start its ranks: torchrun --nproc-per-node 2 examples/engine.py\n",
    )
