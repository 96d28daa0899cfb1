"""A job is started again where it stands: what its dead processes left in a store or a folder keeps nobody waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from faults.restarted import DIES, RANKS, over_one_store

from ringfence.runtime.watch import journals
from ringfence.runtime.watch.reaction import EXIT_CODE
from support import fork_server

pytestmark = pytest.mark.xdist_group("faults")


def test_every_attempt_over_one_store_is_told_from_the_one_before(tmp_path: Path) -> None:
    """The store holds the counters, answers and reports of two attempts that died, before compiling and in a step."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fork_server()
    codes: list[tuple[int | None, ...]] = []
    said: list[list[Any]] = []
    for attempt in range(len(DIES)):
        pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
        ranks = [
            context.Process(target=over_one_store, args=(rank, attempt, server.port, str(tmp_path), pipes[rank][1]))
            for rank in range(RANKS)
        ]
        try:
            for process in ranks:
                process.start()
            ranks[1].join(60)
            if DIES[attempt] != "killed before compiling":  # a launcher ends the other then
                ranks[0].join(60)
            codes.append(tuple(process.exitcode for process in ranks))
            said.append([pipe.recv() for pipe, _ in pipes if pipe.poll()])
        finally:
            for process in ranks:
                process.kill()
                process.join()
    assert codes == [(None, -signal.SIGKILL), (EXIT_CODE, 0), (0, 0)], said
    assert "the attempt's own mistake" in str(said[1]) and said[2] == [3, 3]
    merged = journals.merge(journals.read_folder(tmp_path))
    assert merged.sentence.startswith("ranks 0, 1 began and wrote nothing since")


def test_torchrun_starts_a_job_again_that_died_before_it_compiled(tmp_path: Path) -> None:
    """Its rendezvous store is shared with the ranks unless the variable forbids it; gloo cannot begin again in it."""
    job = Path(__file__).parent / "restarted.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--max-restarts=1"]
    launcher += ["--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launcher, str(job), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(RANKS):
        assert f"attempt 1: rank {rank} served 3 steps" in run.stdout
    older = [path.read_text() for path in tmp_path.glob("journal-rank1.*.json")]
    assert any("rank 1 failed in its own code, before its first step: ValueError" in text for text in older)
    assert "the first attempt's own mistake" not in journals.merge(journals.read_folder(tmp_path)).sentence
