"""Whether a capture runs on this thread, whoever started it."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .replay.tape import Tape


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now is recorded: by a CUDA graph, or by the simulation of one.

    May be asked inside a custom op that is written in Python. Costs about a microsecond.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return any(isinstance(mode, Tape) for mode in _get_current_dispatch_mode_stack())
