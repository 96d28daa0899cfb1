"""A job that a launcher starts again where it stands. Run by tests/faults/test_restart.py, as torchrun's script too."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

RANKS = 2
#: What rank 1 does in each attempt but the last. "serves": nothing.
DIES = ("killed before compiling", "throws in a step", "serves")


def served(folder: str | None, throws_at: int = -1, steps: int = 3) -> int:
    """Compile, and call a model some times; how often it returned."""
    import ringfence

    mine = dist.get_rank() == 1
    backend = ringfence.Backend(
        piece_compiler="eager",
        split_ops=["ringfence_restarted::island"],
        on_hang="abort",
        step_seconds=10,
        warm_up_seconds=60,
        agree_seconds=30,
        journal_dir=folder,
    )
    calls = [0]

    @torch.library.custom_op("ringfence_restarted::island", mutates_args=())
    def island(x: Tensor) -> Tensor:
        calls[0] += 1
        if mine and calls[0] == throws_at:
            raise ValueError("the attempt's own mistake")
        return x.clone()

    island.register_fake(torch.empty_like)

    def model(x: Tensor) -> Tensor:
        y = torch.ops.ringfence_restarted.island(x) * 2
        dist.all_reduce(y)
        return F.rms_norm(y, (64,), None, 1e-5)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(11))  # the same on all ranks
    with torch.no_grad():
        for _ in range(steps):
            expected = x * 2 * RANKS
            torch.testing.assert_close(compiled(x), F.rms_norm(expected, (64,), None, 1e-5))
    return steps


def over_one_store(rank: int, attempt: int, port: int, folder: str, pipe: Any) -> None:
    """One rank of one attempt; the groups have fresh keys, and what ringfence writes goes to the store as it is."""
    from torch.distributed import distributed_c10d

    torch.set_num_threads(1)
    shared = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    groups = dist.PrefixStore(f"groups of attempt {attempt}", shared)
    dist.init_process_group("gloo", store=groups, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    distributed_c10d._get_default_store = lambda: dist.PrefixStore("default_pg", shared)
    if rank == 1 and DIES[attempt] == "killed before compiling":
        shared.wait(["default_pg/ringfence/here/0"])  # the other has begun to wait for it
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        pipe.send(served(folder, throws_at=2 if DIES[attempt] == "throws in a step" else -1))
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {getattr(error, 'inner_exception', error)}")
        time.sleep(1)
    os._exit(0)


def main(folder: str) -> None:
    """For torchrun: the first attempt ends while rank 1 reads its weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    import ringfence

    watched = ringfence.Backend(on_hang="abort", step_seconds=10, journal_dir=folder)
    if attempt == "0" and dist.get_rank() == 1:
        raise ValueError("the first attempt's own mistake")
    print(f"attempt {attempt}: rank {dist.get_rank()} served {served(folder)} steps", flush=True)
    watched.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
