"""The fused op in an engine that keeps no graph: torchrun --nproc-per-node 2 examples/engine.py

`prepare` before captures and before memory is measured, the op in the layer, a watch around the step.
On GPUs, the group's backend and the device are others, and nothing else.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import ringfence

HIDDEN, TOKENS = 64, 16


def main() -> None:
    dist.init_process_group("gloo")
    prepared = ringfence.prepare(dist.group.WORLD, HIDDEN, torch.bfloat16, max_tokens=TOKENS)
    watch = ringfence.watch(dist.group.WORLD, on_hang="abort", step_seconds=60)
    residual = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(TOKENS, HIDDEN).bfloat16()  # this rank's part
            with watch.step("decode", tokens=TOKENS):
                norm, residual = ringfence.all_reduce_add_rms_norm(x, residual, weight, 1e-6)
    if dist.get_rank() == 0:
        print(prepared)
        rms = norm.float().pow(2).mean(-1).sqrt()
        print(f"engine: norm of {list(norm.shape)}, root mean square {rms.min():.2f} to {rms.max():.2f}")
    watch.close()
    ringfence.close_workspaces("world")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("start its ranks: torchrun --nproc-per-node 2 examples/engine.py")
    main()
