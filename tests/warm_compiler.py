"""Imported by the server that ranks are forked from (support.py): what torch.compile does once.

Its first graph takes a process two seconds, the second some tenths. Caches are all that is left: no group, no thread.
"""

from __future__ import annotations

import gc
import threading
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from support import aot_graph, measure_no_guards, start_fake_group


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(16, 16, bias=False), nn.RMSNorm(16)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = F.silu(self.up(x)) * 1.0
        dist.all_reduce(y)
        residual = residual + y
        return self.norm(residual), residual


def warm() -> None:
    torch.set_num_threads(1)  # threads do not outlive a fork, and whoever waits for them would wait for ever
    measure_no_guards()
    start_fake_group(2)
    with mock.patch.object(tqdm, "monitor_interval", 0):  # else its monitor is a thread
        for inductor in (False, True):
            aot_graph(_Layer(), torch.randn(4, 16), torch.randn(4, 16), inductor=inductor, dynamic=[(0, 0), (1, 0)])
    dist.destroy_process_group()
    torch._dynamo.reset()
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()


warm()
