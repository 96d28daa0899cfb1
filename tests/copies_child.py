"""What plays the process that copies: it sends steps, and hangs, ends or dies. Imported by a process of its own."""

from __future__ import annotations

import os
import time
from typing import Any


def hangs(send: Any, count: int) -> None:
    for step in ((0, 1, None), (0, 1, True), (1, 0, None)):
        send.send(step)
    time.sleep(60)


def fails(send: Any, count: int) -> None:
    send.send((0, 1, "RuntimeError: no CUDA"))


def dies(send: Any, count: int) -> None:
    send.send((0, 1, None))
    os._exit(3)


def ends(send: Any, count: int) -> None:
    for step in ((0, 1, None), (0, 1, False), (1, 0, None), (1, 0, True)):
        send.send(step)
