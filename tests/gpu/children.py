"""Child processes with a hard end, for cases that may spin on the device for ever.

A kernel that never returns cannot be stopped from within; killing its process frees the GPU at
once. A child runs a function on several items and prints an outcome for each as it has it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: No NVLink multicast object is ever made here. Streams of two ranks must not share a hardware queue.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "OMP_NUM_THREADS": "2",
}
_MARK, _PROGRESS = "OUTCOME ", "PROGRESS "


def run_child(function: str, items: Sequence[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Call ``function`` ("module:name") on each item, in one child; an outcome for each.

    An outcome is what the function returned. One whose ``stuck`` is true ends the child.
    Outcomes made here have a ``kind`` and a ``note``: "never returned" for the item at which the
    child was killed, "crashed" for one at which it died, "not run" for those after; they have what
    the item said last with :func:`progress`.
    """
    tests = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (tests, os.environ.get("PYTHONPATH")) if p)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "gpu.children", function],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
    ) as process:
        killed = False
        try:
            out, errors = process.communicate(json.dumps(list(items)), timeout=timeout)
        except subprocess.TimeoutExpired:
            killed = True
            process.kill()
            out, errors = process.communicate(timeout=60)
    outcomes = [json.loads(line[len(_MARK) :]) for line in out.splitlines() if line.startswith(_MARK)]
    if len(outcomes) < len(items) and not (outcomes and outcomes[-1].get("stuck")):
        said = out.rpartition(_PROGRESS)[2].partition("\n")[0] if out.rfind(_PROGRESS) > out.rfind(_MARK) else "{}"
        if killed:
            outcomes.append(json.loads(said) | {"kind": "never returned", "note": f"killed after {timeout} s"})
        else:
            outcomes.append(
                json.loads(said) | {"kind": "crashed", "note": f"exit status {process.returncode}\n{errors[-2000:]}"}
            )
    rest = len(items) - len(outcomes)
    return outcomes + [{"kind": "not run", "note": "an item before it ended the child"}] * rest


def progress(**fields: Any) -> None:
    """Say how far the item is, for the outcome of one that is killed."""
    print(_PROGRESS + json.dumps(fields), flush=True)


def main() -> None:
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(module), name)
    for item in json.load(sys.stdin):
        try:
            outcome = function(item)
        except Exception:
            outcome = {"kind": "crashed", "note": traceback.format_exc()[-2000:], "stuck": True}
        print(_MARK + json.dumps(outcome), flush=True)
        if outcome.get("stuck"):
            os._exit(0)  # an ordinary exit would wait for the device


if __name__ == "__main__":
    main()
