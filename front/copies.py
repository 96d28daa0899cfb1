"""Copies between the GPUs of one machine, tried in a process of their own: one that hangs cannot be taken back."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

#: Which device copies to which, and whether the data arrived; None: it is on its way. Or why it could not be tried.
TriedPair = tuple[int, int, bool | str | None]

#: Why nothing is known of copies that nobody asked for.
NOT_TRIED = "not tried: --copies"

_SECONDS = 60.0


def try_all(count: int, *, seconds: float = _SECONDS, target: Callable[..., None] | None = None) -> dict[Any, bool]:
    """For each pair of devices, from and to, whether data arrives. What hangs counts as lost, and what comes behind
    it is not tried.

    target: what runs in the other process. Raises what cannot be started as :class:`RuntimeError`.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=target or _run, args=(send, count), daemon=True)
    child.start()
    send.close()
    found: dict[Any, bool] = {}
    under_way: tuple[int, int] | None = None
    deadline = time.monotonic() + seconds
    try:
        while receive.poll(max(0.0, deadline - time.monotonic())):
            of, to, arrived = receive.recv()
            under_way = (of, to) if arrived is None else None
            if isinstance(arrived, str):
                raise RuntimeError(f"copies could not be tried: {arrived}")
            if arrived is not None:
                found[of, to] = arrived
    except EOFError:  # it is done
        child.join(max(1.0, deadline - time.monotonic()))
        if child.exitcode:
            raise RuntimeError(f"copies could not be tried: that process ended with {child.exitcode}") from None
    finally:
        child.kill()
    if under_way is not None:
        found[under_way] = False
    return found


def _run(send: Connection, count: int) -> None:
    import torch

    for step in steps(count, torch.cuda.can_device_access_peer, _copy):
        send.send(step)
    send.close()


def steps(count: int, reachable: Callable[[int, int], bool], copy: Callable[[int, int], bool]) -> Iterator[TriedPair]:
    """Every pair that is within reach, both ways; each is announced."""
    for of, to in itertools.permutations(range(count), 2):
        try:
            if reachable(of, to):
                yield of, to, None
                yield of, to, copy(of, to)
        except Exception as error:  # of CUDA, after which nothing can be tried any more
            yield of, to, f"{type(error).__name__}: {' '.join(str(error).split())}"
            return


def _copy(of: int, to: int) -> bool:
    """By the copy engine, and by a kernel that stores into the other device: a row of gaps is no plain copy."""
    import torch

    sent = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int32)
    there = torch.zeros(2, 1 << 17, dtype=torch.int32, device=f"cuda:{to}")
    here = sent.to(f"cuda:{of}")
    there[0, : 1 << 16].copy_(here)
    there[1, ::2].copy_(here)
    for device in (of, to):
        torch.cuda.synchronize(device)
    back = there.cpu()
    return bool(torch.equal(back[0, : 1 << 16], sent) and torch.equal(back[1, ::2], sent) and not back[1, 1::2].any())
