"""Imported by the server that ranks are forked from (support.py): what torch.compile and Inductor do once.

Their first graph takes a process four seconds, the second some tenths: Inductor runs the preprocessor over torch's
headers and a program that tries its vectors. Caches are all that is left: no group, no thread.
"""

from __future__ import annotations

import gc
import threading
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
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
        torch._dynamo.reset()
        with torch.no_grad(), inductor_config.patch(compile_threads=1):  # its threads would be waited for too
            torch.compile(_Layer(), dynamic=True)(torch.randn(4, 16), torch.randn(4, 16))
    counters.clear()  # a rank counts its own
    dist.destroy_process_group()
    torch._dynamo.reset()
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()


warm()
