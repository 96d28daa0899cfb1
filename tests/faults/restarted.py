"""A job that a launcher starts again where it stands. Run by tests/faults/test_restart.py, as torchrun's script too."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

RANKS = 2


def served(folder: str, steps: int = 3) -> int:
    """Compile, and call a model some times; how often it returned."""
    import ringfence

    backend = ringfence.Backend(
        piece_compiler="eager",
        split_ops=["ringfence_restarted::island"],
        on_hang="abort",
        step_seconds=10,
        warm_up_seconds=60,
        agree_seconds=180,
        journal_dir=folder,
    )

    @torch.library.custom_op("ringfence_restarted::island", mutates_args=())
    def island(x: Tensor) -> Tensor:
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
