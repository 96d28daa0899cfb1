"""What type checkers say of calls: tests/check_package.py runs mypy --strict over this file; nothing runs it.

Each ``type: ignore`` stands where mypy must complain: one that it does not need is an error too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import ringfence


def right(group: dist.ProcessGroup) -> None:
    ringfence.Backend(capture_sizes=[1, 2], on_hang="abort", groups=[group], norm_ops={"my::norm": 1.0})
    ringfence.Backend(ringfence.Options(capture_sizes=(4,)), verify=True, on_report=print)
    ringfence.Options(all_reduce_ops={"my::all_reduce": None}, journal_dir="/tmp", split_ops={"my::op"})
    with ringfence.watch(group, step_seconds=5).step("decode", tokens=1):
        pass
    prepared = ringfence.prepare(group, 64, torch.bfloat16, 16, collective="mnnvl")
    print(prepared.nbytes + 1)


def wrong(group: dist.ProcessGroup) -> None:
    ringfence.Backend(capture_size=[1])  # type: ignore[call-arg]
    ringfence.Backend(on_hang=3)  # type: ignore[arg-type]
    ringfence.Backend(collective="nccl")  # type: ignore[arg-type]
    ringfence.Backend([4])  # type: ignore[arg-type]
    ringfence.Options(verify=1)  # type: ignore[arg-type]
    ringfence.Options(capture_sizes="4")  # type: ignore[arg-type]
    ringfence.Options([4])  # type: ignore[arg-type]
    ringfence.watch(group, capture_sizes=[1])  # type: ignore[call-arg]
    ringfence.prepare(group, 64, torch.bfloat16, 16, transport="tcp")  # type: ignore[arg-type]
