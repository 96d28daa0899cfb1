"""Scripts in processes that have imported torch: what is looked at is what they do, not how they are started."""

from __future__ import annotations

import multiprocessing.connection
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from support import HARD_END, fork_server, free_port


def run_script(path: Path, ranks: int = 0) -> CompletedProcess[str]:
    """Run it alone, or on so many ranks with the variables that torchrun sets, until all have ended or one has failed.

    Output is captured; the return code is the first that is not 0. Nothing is left running but what it left itself.
    """
    context, port = fork_server(), free_port()
    shared = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    of_ranks = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**shared, **of_ranks, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)] or [shared]
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"out{i}"), Path(folder, f"err{i}")) for i in range(len(environments))]
        started = [
            context.Process(target=_main, args=(str(path), environment, *map(str, pair)))
            for environment, pair in zip(environments, files, strict=True)
        ]
        deadline = time.monotonic() + HARD_END
        try:
            for process in started:
                process.start()
            while (waiting := [p for p in started if p.exitcode is None]) and not any(p.exitcode for p in started):
                left = deadline - time.monotonic()
                assert left > 0, f"{path.name} did not end in {HARD_END} s"
                multiprocessing.connection.wait([p.sentinel for p in waiting], left)
            code = next((p.exitcode for p in started if p.exitcode), 0)
        finally:
            for process in started:
                process.kill()
                process.join()
        out, err = ("".join(file.read_text() for file in some if file.exists()) for some in zip(*files, strict=True))
    return CompletedProcess([str(path)], code, out, err)


def _main(path: str, environment: dict[str, str], out: str, err: str) -> None:
    import torch.multiprocessing as mp

    os.environ.clear()
    os.environ.update(environment)
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    start_processes = mp.start_processes

    def forked(*args: Any, **options: Any) -> Any:
        return start_processes(*args, **{**options, "start_method": "fork"})

    mp.start_processes = forked  # a script that starts its ranks itself: this process has no threads yet
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
