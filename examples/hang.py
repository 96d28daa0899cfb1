"""A job that freezes, and who is to blame: python examples/hang.py

Two gloo ranks run steps under a watch. Before step 5 rank 1 falls asleep. Two seconds later both processes end, each
with the name of rank 1, and `ringfence journal` says which line it was in.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ringfence.cli import main as ringfence

STEP_SECONDS, ASLEEP_IN = 2.0, 5
#: What "abort" ends a process with.
ABORTED = 85


def rank_main(rank: int, port: int, folder: str) -> None:
    from ringfence import watch

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    watched = watch(on_hang="abort", step_seconds=STEP_SECONDS, journal_dir=folder)
    for step in range(100):
        if rank == 1 and step == ASLEEP_IN:
            time.sleep(3600)  # the fault: a lock, a disk, a debugger
        with watched.step("decode", tokens=1):
            dist.all_reduce(torch.ones(4))


def main() -> int:
    print(f"two ranks run steps, rank 1 falls asleep before step {ASLEEP_IN}; deadline {STEP_SECONDS} s", flush=True)
    # It outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.spawn(rank_main, args=(store.port, folder), nprocs=2, join=False)  # type: ignore[attr-defined]
        for process in ranks.processes:
            process.join(timeout=240)
        codes = [process.exitcode for process in ranks.processes]
        for process in ranks.processes:
            process.kill()
        print(
            f"exit codes of the ranks: {codes}\n\n$ ringfence journal {folder}    # it is removed at the end",
            flush=True,
        )
        files = list(Path(folder).glob("journal-rank*.json"))
        found = codes == [ABORTED, ABORTED] and bool(files) and ringfence(["journal", folder]) == 0
    print("hang: rank 1 was named by both" if found else "hang: not as it should be")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
