"""A job is started again where it stands: what its dead processes left in a store or a folder keeps nobody waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.restarted import RANKS

from ringfence.runtime.watch import journals
from support import HARD_END

pytestmark = pytest.mark.xdist_group("faults")


def test_torchrun_starts_a_job_again_that_died_before_it_compiled(tmp_path: Path) -> None:
    """Its rendezvous store is shared with the ranks unless the variable forbids it; gloo cannot begin again in it."""
    job = Path(__file__).parent / "restarted.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--max-restarts=1"]
    launcher += ["--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launcher, str(job), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HARD_END,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(RANKS):
        assert f"attempt 1: rank {rank} served 3 steps" in run.stdout
    older = [path.read_text() for path in tmp_path.glob("journal-rank1.*.json")]
    assert any("rank 1 failed in its own code, before its first step: ValueError" in text for text in older)
    assert "the first attempt's own mistake" not in journals.merge(journals.read_folder(tmp_path)).sentence
