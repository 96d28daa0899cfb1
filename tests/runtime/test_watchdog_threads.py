"""The threads of a watchdog, and the processes that they end; in the time of the machine."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch.distributed as dist
from watchdogs import Rank

from ringfence.runtime.watch import journals
from ringfence.runtime.watch.told import Told
from ringfence.runtime.watch.watchdog import EXIT_CODE
from support import run_python


def _threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("ringfence-")]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_threads_end_with_their_owner(how: str) -> None:
    rank = Rank(0, dist.HashStore(), ranks=1)
    rank.watchdog.start()
    alive = weakref.ref(rank.watchdog)
    assert len(_threads()) == 2
    if how == "close":
        rank.watchdog.close()
    else:
        del rank
        gc.collect()
    until = time.monotonic() + 60  # a thread that looks at it just now drops it then
    while (_threads() or (how == "drop" and alive() is not None)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _threads() and (how == "close" or alive() is None)


_ENDS = """
import logging, sys, threading, time
import torch.distributed as dist
from ringfence.runtime.errors import HangError
from ringfence.runtime.watch.journal import Journal
from ringfence.runtime.watch.deadlines import Deadlines
from ringfence.runtime.watch.watchdog import Reaction, Watchdog
logging.disable()
class Lost:
    def check_kernels(self): raise HangError("rank 0 waited in vain for rank 1", (1,))
    def wait_for(self, seconds): pass
store, journal, writes, kernels = dist.TCPStore("127.0.0.1", 0, is_master=True), Journal(0), threading.Event(), Lost()
write = journal.try_dump
journal.try_dump = lambda *given, **more: (writes.set(), time.sleep(0.8), write(*given, **more))
watchdog = Watchdog(journal, lambda: store, Reaction("raise", sys.argv[1]), Deadlines(1, beat=0.001))
watchdog.others.join_group("tp", (0, 1))
watchdog.reaction.waits.add("tp", kernels, 1.0)
watchdog.start()
assert writes.wait(60)
"""


def test_a_process_ends_normally_while_it_talks_and_writes_what_was_found(tmp_path: Path) -> None:
    result = run_python("-c", _ENDS, str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "journal-rank0.json").read_text())["report"]["finding"]["ranks"] == [1]


_IN_A_CALL = """
import ctypes, sys, torch.distributed as dist
from ringfence.runtime.watch.journal import Journal, PieceNote, ProgramNote, REPLAY
from ringfence.runtime.watch.deadlines import Deadlines
from ringfence.runtime.watch.watchdog import Reaction, Watchdog
journal = Journal(0)
journal.register(ProgramNote((PieceNote("submod_0", True, ("tp",)),)))
marks = journal.begin(0, (4,), REPLAY); marks.enter(); marks.leave(); marks.end()
watchdog = Watchdog(journal, dist.HashStore, Reaction("abort"), Deadlines(0.3, 1, 0.05, 0.2, 0.1), host=None)
watchdog.others.join_group("tp", (0,))
watchdog.start()
journal.begin(0, (4,), REPLAY).enter()
ctypes.CDLL(None).sleep(300)
"""


def test_it_works_while_the_main_thread_sits_in_a_c_call() -> None:
    result: subprocess.CompletedProcess[str] = run_python("-c", _IN_A_CALL)
    assert result.returncode == EXIT_CODE, "and not 0, after its minute"
    assert "call 1 of group 'tp'" in result.stderr


_TOLD_IN_A_CALL = """
import ctypes, os, signal, subprocess, sys, threading, time, torch.distributed as dist
from ringfence.runtime.watch.journal import Journal, PieceNote, ProgramNote, REPLAY
from ringfence.runtime.watch.deadlines import Deadlines
from ringfence.runtime.watch.process import this_process
from ringfence.runtime.watch.watchdog import Reaction, Watchdog
store, how, number, folder = dist.HashStore(), sys.argv[1], int(sys.argv[2]), sys.argv[3]
def rank(n):
    journal = Journal(n)
    journal.register(ProgramNote((PieceNote("submod_0", True, ("tp",)),)))
    marks = journal.begin(0, (4,), REPLAY); marks.enter(); marks.leave(); marks.end()
    reaction = Reaction("abort", folder)
    watchdog = Watchdog(journal, lambda: store, reaction, Deadlines(60, 60, 0.05, 60, 0.1), host=None)
    watchdog.others.join_group("tp", (0, 1))
    return watchdog
mine, peer, gone = rank(0), rank(1), subprocess.Popen(["true"])
gone.wait()
peer.others._process = (this_process()[0], gone.pid)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it runs in the background
mine.start()
waits = threading.Event()
def launcher():
    waits.wait(60)
    time.sleep(0.5)
    peer.others.end = how and f"rank 1 {how}, after step 0"
    peer.talk()
    os.kill(os.getpid(), number)
    if not how:
        time.sleep(4)
        os._exit(99)
threading.Thread(target=launcher, daemon=True).start()
mine.journal.begin(0, (4,), REPLAY).enter()
lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
waits.set()
libc.pthread_mutex_lock(lock)  # a device that waits: no signal breaks it off
"""


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("was told to end (SystemExit: 0)", signal.SIGTERM, 0),
        ("was interrupted (KeyboardInterrupt)", signal.SIGINT, 130),
        ("", signal.SIGTERM, 99),
    ],
)
def test_a_main_thread_that_cannot_hear_of_a_signal_ends_with_its_peers(
    how: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """A shutdown of ranks that wait for their devices: whoever was told first has ended, and no collective breaks."""
    result: subprocess.CompletedProcess[str] = run_python("-c", _TOLD_IN_A_CALL, how, str(int(number)), str(tmp_path))
    assert result.returncode == code, result.stderr
    if code == 99:  # the peer goes on, and may come
        return
    assert f"ringfence: rank 0 ends with exit code {code}: {number.name}, and its peers have ended" in result.stderr
    said = journals.merge(journals.read_folder(tmp_path)).sentence
    assert said.startswith(f"nobody waited for long: rank 0 was told to end ({number.name}), and could not hear of it")


def test_a_signal_is_seen_until_the_main_thread_has_moved() -> None:
    handler, told, second = signal.signal(signal.SIGTERM, lambda *_: None), Told(), Told()
    signal.set_wakeup_fd(-1)  # of a watchdog that was not closed
    try:
        told.listen()
        second.listen()  # somebody listens already
        assert told.look(5) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert (told.look(5), told.look(5), second.look(5)) == (
            signal.SIGTERM,
            signal.SIGTERM,
            None,
        )
        assert told.look(6) is None and told.look(5) is None
        threading.Thread(target=told.close).start()  # not where it can be taken back
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.look(6) is signal.SIGTERM
    finally:
        told.close()
        second.close()
        signal.signal(signal.SIGTERM, handler)
    assert signal.set_wakeup_fd(-1) == -1
    thread = threading.Thread(target=told.listen)
    thread.start()
    thread.join()
    assert signal.set_wakeup_fd(-1) == -1, "only the main thread may"


_UNANSWERED = """
import os, sys, threading, time
import torch.distributed as dist
from datetime import timedelta
from ringfence.runtime.watch.deadlines import Deadlines
from ringfence.runtime.watch.journal import Journal
from ringfence.runtime.watch.watchdog import Reaction, Watchdog
server, waits = dist.TCPStore("127.0.0.1", 0, is_master=True), threading.Event()
class Unanswered:
    def __init__(self): self.store = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=120))
    def set(self, *given): waits.set(); self.store.get("never set until the end")
    def __getattr__(self, name): return getattr(self.store, name)
class AtTheEnd:
    set = server.set
    sleep = time.sleep
    def __del__(self):
        self.set("never set until the end", "an answer, when the interpreter is gone")
        self.sleep(2)
watchdog = Watchdog(Journal(0), Unanswered, Reaction("raise"), Deadlines(1, beat=0.001))
watchdog.start()
assert waits.wait(60)
sys.modules["at the end"] = AtTheEnd()
began = time.monotonic()
import atexit
atexit._run_exitfuncs()  # as the interpreter does first
print(time.monotonic() - began)
"""


def test_a_process_ends_normally_though_its_store_does_not_answer() -> None:
    """It aborted where the answer came after Python had gone: in C++, a thread cannot end then."""
    result = run_python("-c", _UNANSWERED)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 60, "half of what a request may wait"
