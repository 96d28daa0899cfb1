"""Marks on a device: whether work that was submitted to it is done, without waiting for it."""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Protocol

log = logging.getLogger(__name__)

#: cudaStreamCaptureModeThreadLocal
_THREAD_LOCAL = 1


class DeviceMarks(Protocol):
    """Tells whether work that was submitted to a device is done, without waiting for it."""

    def record(self, slot: int) -> bool:
        """Mark what this thread has submitted so far; False where that is not possible now."""

    def done(self, slot: int) -> bool:
        """Whether what was submitted before the mark is complete. Asked from any thread."""

    def watch_from_here(self) -> None:
        """Called once by each thread that will go on asking."""


class CudaMarks:
    """CUDA events, made once and recorded again and again."""

    def __init__(self, device: Any, slots: int) -> None:
        import torch

        self._device = torch.device(device)
        self._is_capturing = torch.cuda.is_current_stream_capturing
        self._stream = torch.cuda.current_stream
        self._events = [torch.cuda.Event() for _ in range(slots)]

    def record(self, slot: int) -> bool:
        if self._is_capturing():  # the caller captures the whole step: there, the event would be a node of its graph
            return False
        self._events[slot].record(self._stream(self._device))
        return True

    def done(self, slot: int) -> bool:
        try:
            return bool(self._events[slot].query())
        except RuntimeError:  # an error of the device is the main thread's to raise; nothing gets on any more
            return False

    def watch_from_here(self) -> None:
        """Let this thread's queries neither fail for nor break a capture that another thread makes.

        torch.cuda.graph captures in the mode "global" by default, which forbids queries to all
        threads that have not left it. torch has no function for that.
        """
        import torch

        major = (torch.version.cuda or "").split(".")[0]
        try:
            runtime = ctypes.CDLL(f"libcudart.so.{major}")  # loaded already: torch's own
            runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))
        except (OSError, AttributeError):
            log.warning("ringfence: libcudart.so.%s cannot be asked to leave captures of other threads alone", major)
