"""Start the ranks of a fault, follow them to their ends, and say how and when each of them ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from faults.catalogue import HARD_END, Ending, Fault, Outcome
from faults.ranks import rank_main

from support import fork_server, free_port


def run_fault(fault: Fault, ahead: Ahead | None = None) -> Outcome:
    """Run it to its end; whatever still runs at the hard end is killed, and so is a stopped rank. Any thread may.

    ahead: where its ranks come from, if not from new processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        if fault.before is None:
            return _run_attempt(fault, free_port(), None, folder, ahead)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        before = _run_attempt(fault.before, store.port, 0, folder, ahead)
        outcome = _run_attempt(fault, store.port, 1, folder, ahead)
        outcome.before = before
        return outcome


#: Who starts a process looks at all others, and of two threads that look at one that has ended, one reads 255.
_CHILDREN = threading.Lock()


@dataclass
class _Process:
    """A rank that waits for its orders. orders, says: this process's ends of the pipes; said: the rank's, kept open."""

    process: Any
    orders: Connection
    says: Connection
    said: Connection


def _start(device: str, count: int) -> list[_Process]:
    with _CHILDREN:
        # Where a server has looked for GPUs, its children cannot use them.
        context = fork_server() if device == "cpu" else multiprocessing.get_context("spawn")
    started = []
    for _ in range(count):
        (theirs, orders), (says, said) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(theirs, said), daemon=True)
        with _CHILDREN:
            process.start()
        theirs.close()  # so that it ends where nobody orders anything
        started.append(_Process(process, orders, says, said))
    return started


class Ahead:
    """The next run's ranks, which import what they need (six seconds) while this run's are at work."""

    def __init__(self, device: str, count: int) -> None:
        self._device, self._count = device, count
        self._next = _start(device, count)

    def take(self) -> list[_Process]:
        taken, self._next = self._next, _start(self._device, self._count)
        return taken

    def close(self) -> None:
        _end(self._next)


def _end(some: list[_Process]) -> list[int | None]:
    for one in some:
        with _CHILDREN:
            one.process.kill()
    return [_exit_code(one.process, 60) for one in some]


def _run_attempt(fault: Fault, port: int, attempt: int | None, folder: str, ahead: Ahead | None) -> Outcome:
    some = ahead.take() if ahead is not None else _start(fault.device, fault.ranks)
    try:
        for one in some:
            one.says.poll(2 * HARD_END)  # what imports take is no part of the run
        for rank, one in enumerate(some):
            one.orders.send((fault, rank, port, attempt, folder))
        outcome = _follow(fault, [one.process for one in some], [one.says for one in some], folder)
    finally:
        codes = _end(some)
    outcome.left_running = None in codes
    outcome.journal, outcome.could_not_write = _merged(folder)
    return outcome


def _exit_code(process: Any, seconds: float) -> int | None:
    """None where it still runs after some seconds."""
    if not wait([process.sentinel], seconds):
        return None
    until = time.monotonic() + 5
    while True:  # what it held is closed a moment before it has ended
        with _CHILDREN:
            code: int | None = process.exitcode
        if code is not None or time.monotonic() > until:
            return code
        time.sleep(0.01)


def _follow(fault: Fault, processes: list[Any], pipes: list[Connection], folder: str) -> Outcome:
    endings = [Ending(rank) for rank in range(fault.ranks)]
    struck, ended = None, dict[int, float]()
    signals = [fault.signalled] if fault.signalled is not None else []
    end, late = time.monotonic() + HARD_END, 0.0
    waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
    watched = set(range(fault.ranks))
    if fault.name.startswith("stopped"):  # it never ends by itself
        del waiting[processes[fault.rank].sentinel]
        watched.discard(fault.rank)
    while waiting and time.monotonic() < end:
        asked = time.monotonic()
        ready = wait(list(waiting), timeout=0.05)
        late += max(0.0, time.monotonic() - asked - 0.05)
        for sentinel in ready:
            ended.setdefault(waiting.pop(sentinel), time.monotonic())
        for rank, pipe in enumerate(pipes):
            while pipe.poll():
                what, at, *more = pipe.recv()
                if what == "fault":
                    struck = at if struck is None else max(struck, at)
                elif what == "step":
                    endings[rank].steps += 1
                elif what == "error":
                    endings[rank].kind, endings[rank].error, endings[rank].culprits = more
                    ended.setdefault(rank, at)  # what counts is when the error was raised
        if struck is not None and signals and time.monotonic() > struck + signals[0][1]:
            number, _ = signals.pop()
            some = processes if number != signal.SIGCONT else processes[fault.rank : fault.rank + 1]
            for process in some:  # one after the other, as a launcher does
                os.kill(process.pid, number)
                time.sleep(0.03)
    for rank, ending in enumerate(endings):
        ending.exit_code = _exit_code(processes[rank], 5 if rank in ended else 0)  # its files are closed before
        written = Path(folder, f"stderr-{rank}").read_text(errors="replace")
        ours = f"ringfence: rank {rank}"  # a library that sets logging up puts its own words before it
        said = [line[line.index(ours) :] for line in written.splitlines() if ours in line]
        if (
            not ending.error and said and "ends with exit code" in said[-1] and ending.exit_code
        ):  # in brief, after the whole sentence
            ending.error, ending.kind = "; ".join(said), "exit"
        ending.seconds = ended.get(rank, time.monotonic()) - (struck if struck is not None else time.monotonic())
    return Outcome(fault, endings, late=late)


def _merged(folder: str) -> tuple[str, tuple[int, ...]]:
    from ringfence.runtime.watch.journals import merge, read_folder

    try:
        merged = merge(read_folder(Path(folder)))
    except ValueError as error:
        return str(error), ()
    return merged.sentence, merged.could_not_write
