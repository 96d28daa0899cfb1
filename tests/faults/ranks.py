"""Ranks that go wrong on purpose: real processes, a small model; gloo and simulated graphs, or GPUs.

:func:`run_fault` starts the ranks of a :class:`Fault`, lets one of them misbehave, and says how and when each ended.
Used by the tests and by ``benchmarks/soak.py``.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from support import NO_MULTICAST, fork_server, free_port

LAYERS = 2
#: 512 bytes: what the kernels ask of a row.
HIDDEN = {"cpu": 128, "cuda": 256}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Token counts of the steps, again and again. 3 is not captured.
SIZES = (4, 8, 3, 8, 4)
#: How long a step may stand still.
DEADLINE = 2.0
#: What the watchdog may take beyond it.
MARGIN = 2.0
#: When a run is broken off by force.
HARD_END = 240.0
#: A rank computes more until its end than who only looks at it: so much more it may be late than that one is.
_LATER = 4.0


@dataclass(frozen=True)
class Fault:
    """One way to go wrong, and what the other ranks have to say about it.

    says: a pattern that the error of every rank but ``rank`` must match. None: nothing may go wrong.
    journal: the same of what the merged journals say, where that is another sentence. signalled: the signal that all
    ranks get, and how many seconds after the fault. exit_code: of every rank, where all must end in one way.
    could_not_write: a rank whose disk is full. before: how the attempt before this one went wrong, where the job is
    started again in place, over one store and one folder. late: how many seconds the rank comes too late for a call.
    settles: how many seconds all ranks wait before the step of the fault, so that no warm-up is heard of any more.
    blamed: whom the errors name, where that is not ``rank`` alone.
    device: "cpu" or "cuda"; first_device: of rank 0.
    """

    name: str
    rank: int
    says: str | None
    journal: str | None = None
    on_hang: str | None = "raise"
    ranks: int = 3
    device: str = "cpu"
    first_device: int = 0
    steps: int = 12
    sizes: tuple[int, ...] = SIZES
    signalled: tuple[int, float] | None = None
    exit_code: int | None = None
    could_not_write: int | None = None
    before: Fault | None = None
    late: float = 0.0
    settles: float = 0.0
    blamed: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ending:
    """How a rank ended: ``error`` is what it raised, or wrote before its process ended."""

    rank: int
    exit_code: int | None = None
    error: str = ""
    kind: str = ""
    culprits: tuple[int, ...] = ()
    steps: int = 0
    seconds: float = 0.0  # after the fault


@dataclass
class Outcome:
    fault: Fault
    endings: list[Ending]
    journal: str = ""
    could_not_write: tuple[int, ...] = ()
    left_running: bool = False
    before: Outcome | None = None
    left_on_gpus: str = ""
    late: float = 0.0  # for how many seconds the machine kept this process, which follows the run, from looking

    @property
    def others(self) -> list[Ending]:
        return [e for e in self.endings if e.rank != self.fault.rank]

    @property
    def margin(self) -> float:
        """What the watchdog may take beyond the deadline, on a machine that is as busy as this one was."""
        return MARGIN + _LATER * self.late

    def problems(self) -> list[str]:
        """What is not as it must be; empty where all is."""
        problems = [f"in the attempt before: {p}" for p in self.before.problems()] if self.before is not None else []
        problems += ["a process is left running"] if self.left_running else []
        problems += [f"left on the GPUs: {self.left_on_gpus}"] if self.left_on_gpus else []
        if self.fault.could_not_write is not None and self.could_not_write != (self.fault.could_not_write,):
            problems.append(f"the journals do not say that it could not write, but {self.could_not_write}")
        if self.fault.journal is not None and not re.search(self.fault.journal, self.journal):
            problems.append(f"the journals do not say /{self.fault.journal}/: {self.journal}")
        if self.fault.exit_code is not None:
            # An interpreter takes time to end, and longer where it has used a GPU; who cannot hear waits for that.
            limit = DEADLINE + self.margin + (10.0 if self.fault.device == "cuda" else 0.0)
            return problems + [
                f"rank {e.rank} ended with {e.exit_code}, {e.seconds:.1f} s after the fault: {e.error}"
                for e in self.endings
                if e.exit_code != self.fault.exit_code or e.error or e.seconds > limit
            ]
        if self.fault.says is None:
            return problems + [
                f"rank {e.rank} ended with {e.exit_code} after {e.steps} steps: {e.error}"
                for e in self.endings
                if e.exit_code != 0 or e.error or e.steps != self.fault.steps
            ]
        for e in self.others:
            if not e.error:
                problems.append(f"rank {e.rank} ended with {e.exit_code} and says nothing")
            elif not re.search(self.fault.says, e.error):
                problems.append(f"rank {e.rank} does not say /{self.fault.says}/: {e.error}")
            if e.culprits and tuple(e.culprits) != (self.fault.blamed or (self.fault.rank,)):
                problems.append(f"rank {e.rank} blames {e.culprits}: {e.error}")
            if e.seconds > DEADLINE + self.margin + (self.fault.signalled or (0, 0.0))[1]:
                problems.append(f"rank {e.rank} ended {e.seconds:.1f} s after the fault")
        if self.fault.journal is None and not re.search(self.fault.says, self.journal):
            problems.append(f"the journals do not say /{self.fault.says}/: {self.journal}")
        return problems


def _model(fault: Fault, rank: int, say: Callable[..., None]) -> Any:
    """A tensor-parallel model by hand, with an island before each all-reduce where ``fault`` strikes."""
    calls = {"pause": 0, "work": 0}
    hidden = HIDDEN[fault.device]
    mine = rank == fault.rank

    @torch.library.custom_op("ringfence_faults::pause", mutates_args=())
    def pause(x: Tensor) -> Tensor:
        calls["pause"] += 1
        if mine and calls["pause"] == 7 * LAYERS + 1:  # the first layer of the eighth step
            if fault.name in ("killed", "stopped"):
                say("fault")
                os.kill(os.getpid(), signal.SIGKILL if fault.name == "killed" else signal.SIGSTOP)
            if fault.name == "throws":
                say("fault")
                raise ValueError("the island was told to throw")
            if fault.name == "paused":  # as by a debugger: its parent lets it go on
                say("fault")
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault.name in ("stuck", "disk full", "interrupted"):
                say("fault")
                time.sleep(3600)
            if fault.name == "late":
                say("fault")
                time.sleep(fault.late)
        if fault.name == "slow":  # each step of one rank takes longer than the deadline, and five times the others'
            time.sleep(DEADLINE * 0.65 if mine else DEADLINE * 0.13)
        return x.clone()

    @pause.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @torch.library.custom_op("ringfence_faults::work", mutates_args=())
    def work(x: Tensor) -> Tensor:
        calls["work"] += 1
        # Size 4 is captured in the first step, twice for each layer; size 8 in the second.
        if mine and fault.name == "capture" and calls["work"] == 2 * LAYERS + 2:
            say("fault")
            raise ValueError("the capture was told to throw")
        return x.clone()

    @work.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(hidden, hidden, bias=False), nn.RMSNorm(hidden, eps=1e-5)

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.ops.ringfence_faults.work(F.silu(self.up(x)))
            y = torch.ops.ringfence_faults.pause(y) * 1.0
            dist.all_reduce(y)
            residual = residual + y
            return self.norm(residual), residual

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, x: Tensor) -> Tensor:
            residual = x
            for layer in self.layers:
                x, residual = layer(x, residual)
            return x

    torch.manual_seed(0)
    return Model().to(fault.device, DTYPE[fault.device])


def _draft(fault: Fault, options: Any) -> Any:
    """A small model beside the other, with a backend of its own and one call."""
    import ringfence

    def draft(x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return F.rms_norm(y, (HIDDEN[fault.device],), None, 1e-5)

    watch = {name: getattr(options, name) for name in ("on_hang", "step_seconds", "warm_up_seconds", "journal_dir")}
    backend = ringfence.Backend(piece_compiler="eager", agree_seconds=options.agree_seconds, **watch)
    return torch.compile(draft, backend=backend, fullgraph=True)


def _stop_before_the_others_come(mine: bool, say: Callable[..., None]) -> None:
    """One rank is stopped in its compilation. To the others any request to the store is the first that hangs."""
    from ringfence import stages
    from ringfence.runtime.watch.supervisor import Supervisor

    opened = Supervisor.open

    def late(self: Any, groups: Any, device: Any) -> Any:
        time.sleep(2)
        say("fault")
        return opened(self, groups, device)

    def stop(*args: Any, **options: Any) -> None:
        say("fault")
        os.kill(os.getpid(), signal.SIGSTOP)

    if mine:
        stages.find = stop
    else:
        Supervisor.open = late


def _leave_out_a_call(say: Callable[..., None]) -> None:
    """The first collective of the eighth step does not reach the other ranks, on this one."""
    from ringfence.runtime.collectives import ops, reference

    calls = 0

    def instead_of(original: Callable[..., Any], skipped: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 7 * LAYERS + 1:
                say("fault")
                return skipped(*args)
            return original(*args)

        return call

    def _nothing(workspace: Any, strategy: Any, epilogue: Any, x: Any, *_: Any) -> Any:
        return torch.empty_like(x), torch.empty_like(x)

    reference.all_reduce = instead_of(reference.all_reduce, lambda x, group: x.clone())
    ops._fused = instead_of(ops._fused, _nothing)


def _while_a_workspace_is_made(strike: Callable[[], None]) -> None:
    """Do that on this rank, where the others already wait for its handles."""
    from fake_flashinfer import FakeFlashInfer

    from ringfence.runtime.collectives import mnnvl, ringfence, trtllm

    def make(*args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        strike()

    FakeFlashInfer.make = mnnvl.create_peer = trtllm.create = ringfence.create = make


def _rank_main(orders: Connection, pipe: Connection) -> None:
    """A process that has imported all that it needs when it is told which rank of which fault it is, or never is."""
    import torch._inductor.compile_fx  # noqa: F401

    import ringfence.backend  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(("ready", time.monotonic()))
    try:
        order: tuple[Fault, int, int, int | None, str] = orders.recv()
    except EOFError:
        return
    _rank(*order, pipe)


def _rank(fault: Fault, rank: int, port: int, attempt: int | None, folder: str, pipe: Connection) -> None:
    def say(*message: Any) -> None:
        pipe.send((message[0], time.monotonic(), *message[1:]))

    # Who interrupts a soak waits for the runs that have begun.
    interrupts = fault.signalled is not None and fault.signalled[0] == signal.SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler if interrupts else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as servers do
    clock = time.time
    time.time = lambda: clock() + 7200.0 * rank  # nothing may rest on the clocks of hosts being equal
    errors = os.open(os.path.join(folder, f"stderr-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(errors, 2)
    try:
        _run(fault, rank, port, attempt, folder, say)
    except SystemExit as error:
        sys.exit(error.code)  # with all that a process does when it ends
    except BaseException as error:
        inner = getattr(error, "inner_exception", error)
        say("error", type(inner).__name__, str(inner) or type(inner).__name__, getattr(inner, "ranks", ()))
        sys.excepthook(type(error), error, error.__traceback__)  # as in a process that multiprocessing did not start
        time.sleep(0.5)  # as a server would, between an error and its end: the watchdogs talk on
        os._exit(1)
    os._exit(0)  # a process group whose peers are gone must not be waited for


def _run(fault: Fault, rank: int, port: int, attempt: int | None, folder: str, say: Callable[..., None]) -> None:
    """attempt: of a job that is started again in place, whose store is its launcher's."""
    from fake_flashinfer import FakeFlashInfer, installed

    import ringfence
    from ringfence import stages
    from ringfence.runtime.meeting import world_store
    from ringfence.runtime.watch import agree

    mine = rank == fault.rank
    torch.set_num_threads(2 + rank if fault.name == "other thread count" else 1)
    device = None
    where: dict[str, Any] = {"init_method": f"tcp://127.0.0.1:{port}"}
    if fault.device == "cuda":
        os.environ.update(NO_MULTICAST)
        device = torch.device("cuda", fault.first_device + rank)
        torch.cuda.set_device(device)
    if attempt is not None:
        where = {"store": _over_one_store(port, attempt)}
    dist.init_process_group(
        "nccl" if device is not None else "gloo", rank=rank, world_size=fault.ranks, device_id=device, **where
    )
    sizes = (4,) if mine and fault.name == "other option" else (4, 8)
    backend = ringfence.Backend(
        piece_compiler="eager",
        capture_sizes=sizes,
        graphs="simulated" if device is None else "auto",
        split_ops=["ringfence_faults::pause"],
        on_hang=fault.on_hang,
        **{
            "step_seconds": DEADLINE,
            "warm_up_seconds": 60 * DEADLINE,
            "agree_seconds": 30 * DEADLINE,
            "journal_dir": folder,
            **fault.options,
        },
    )
    model = torch.compile(_model(fault, rank, say), backend=backend, fullgraph=True, dynamic=True)
    x = {n: torch.randn(n, HIDDEN[fault.device], device=device, dtype=DTYPE[fault.device]) for n in {*fault.sizes, 4}}
    pretended = contextlib.ExitStack()
    own = fault.options.get("collective") == "ringfence"
    if fault.device == "cpu" and ("preparing" in fault.name or own):  # kernels by torch, over gloo
        pretended.enter_context(installed(FakeFlashInfer(dist.group.WORLD.group_name, own=own, bounded=own)))
    if mine and "preparing" in fault.name:

        def strike() -> None:
            say("fault")
            if fault.name == "fails preparing":
                raise RuntimeError("cuMemCreate: out of memory")
            os.kill(os.getpid(), signal.SIGKILL if fault.name == "killed preparing" else signal.SIGSTOP)

        _while_a_workspace_is_made(strike)
    if mine and fault.name == "throws compiling":

        def lower(*args: Any) -> Any:
            say("fault")
            raise ValueError("the compiler was told to throw")

        stages.lower = lower
    if fault.name == "stopped compiling":
        _stop_before_the_others_come(mine, say)
    if rank == fault.could_not_write:
        _fill_the_disk()
    if mine and fault.name in ("dies before compiling", "killed before compiling"):  # the others wait for it
        world_store().wait([f"here/{other}" for other in range(fault.ranks) if other != rank])
        say("fault")
        if fault.name == "killed before compiling":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("out of memory while the weights are read")
    if mine and fault.name == "skipped call":
        _leave_out_a_call(say)
    if fault.name in ("other option", "compiles alone"):  # time counts from when the last rank has come to compare
        compare = agree.agree

        def agree_later(*args: Any, **options: Any) -> None:
            say("fault")
            compare(*args, **options)

        agree.agree = agree_later
    draft = _draft(fault, backend.options)
    with torch.no_grad():
        for step in range(fault.steps):
            if fault.name == "skipped draft":
                if mine and step == 7:
                    say("fault")
                else:
                    draft(x[fault.sizes[0]])
            if mine and fault.name == "compiles alone" and step == 7:
                model(x[4][:1])
            if mine and fault.name == "throws between calls" and step == 7:
                say("fault")
                raise ValueError("the scheduler was told to throw")
            if fault.name == "told to end" and step == 7:
                say("fault")
            if mine and fault.name == "skipped step" and step == 7:
                say("fault")
                continue
            if step == 7:
                time.sleep(fault.settles)
            size = fault.sizes[step % len(fault.sizes)]
            if mine and fault.name == "other size" and step == 7:
                say("fault")
                size = next(n for n in x if n != size)
            out = model(x[size])
            if fault.device == "cuda":
                out.sum().item()  # the main thread sits in a call of the device
            say("step", step)
    if fault.says is None:
        dist.barrier()
    until = time.monotonic() + (1.5 * DEADLINE if fault.says is None else 60)
    while time.monotonic() < until:  # idle, as a server without requests
        backend.supervisor.health.check()
        time.sleep(0.05)


def _over_one_store(port: int, attempt: int) -> dist.Store:
    """For the groups of one attempt, which have fresh keys; ringfence writes to the launcher's store as it is."""
    from torch.distributed import distributed_c10d

    shared = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    distributed_c10d._get_default_store = lambda: dist.PrefixStore("default_pg", shared)
    return dist.PrefixStore(f"groups of attempt {attempt}", shared)


def _fill_the_disk() -> None:
    """Whatever this rank writes from now on is cut off."""
    write = Path.write_text

    def full(self: Path, text: str) -> int:
        write(self, text[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    Path.write_text = full


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
        process = context.Process(target=_rank_main, args=(theirs, said), daemon=True)
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
        said = [line for line in written.splitlines() if line.startswith(f"ringfence: rank {rank}")]
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


def faults(ranks: int = 3, device: str = "cpu", first_device: int = 0, **options: Any) -> tuple[Fault, ...]:
    """What can go wrong, and what the others have to say about it. options: of the backend."""

    def wait(culprit: int, count: int = ranks) -> str:
        others = [str(rank) for rank in range(count) if rank != culprit]
        return f"ranks {', '.join(others)} wait" if len(others) > 1 else f"rank {others[0]} waits"

    def fault(name: str, rank: int, says: str | None, journal: str | None = None, **more: Any) -> Fault:
        more = {"ranks": ranks, **more, "options": {**options, **more.get("options", {})}}
        return Fault(name, rank, says, journal, device=device, first_device=first_device, **more)

    last = ranks - 1
    named = {"options": {"collective": options.get("collective", "trtllm")}, "ranks": 2}  # no kernels are for three
    not_there, host_not_there = r"^rank 1 (has not been heard of|left no journal)", r"^rank 0 serves the store"
    gone = rf"rank 1 has not been heard of.*; {wait(1)} in step 7 .*calls? 14 "
    host_gone = r"rank 0 serves the store.*; .*rank.* waits? in step 7 .*calls? 14 "
    preparing = rf"rank 1 has not been heard of.*; {wait(1, 2)} in the exchange '.*', before its first step"
    found = (
        fault("killed", 1, gone, not_there),
        fault("killed", 0, host_gone, host_not_there),
        fault("stopped", 1, gone, not_there),
        fault("stopped", 0, host_gone, host_not_there, on_hang="abort"),
        fault("stuck", 1, r"rank 1 did not come to call 14 .*step 7", r"^rank 1 did not come", on_hang="abort"),
        # Of one size, because gloo ends a process that receives more than it expects. Kernels would go on spinning.
        fault(
            "skipped call",
            last,
            rf"rank {last} left out a call of .*call 23, in which ranks? 0.*step 11",
            rf"^rank {last} left out a call",
            sizes=(3,),
        ),
        fault(
            "skipped step",
            1,
            rf"rank 1 did not come to call 22 .*step 11.*{wait(1)}: .*step 10",
            r"^rank 1 did not come",
            sizes=(4,),
        ),
        fault(
            "skipped step",
            1,
            r"their step 7: sizes differs: ranks? 0.*: sizes \(3,\); rank 1: sizes \(8,\)",
            options={"check_every_step": True},
        ),
        fault("throws", 1, r"rank 1 failed in step 7 .*the island was told to throw", r"^rank 1 failed in step 7"),
        fault(
            "capture",
            last,
            rf"rank {last}: capture of 'submod_\d+' at sizes \(8,\) failed .*told to throw",
            options={"on_capture_failure": "raise"},
        ),
        fault("throws compiling", 1, r"rank 1 failed in the compilation of a graph: .*to throw", r"^rank 1 failed"),
        fault(
            "throws compiling",
            1,
            r"rank 1 left: ValueError: .* told to throw",
            r"^rank 1 failed in the comp",
            on_hang=None,
        ),
        fault("fails preparing", 1, r"cannot be had here: .*rank 1: .*out of memory", **named),
        fault("killed preparing", 1, preparing, not_there, **named),
        fault("stopped preparing", 1, preparing, not_there, on_hang="abort", **named),
        fault("stopped compiling", 0, r"rank 0 serves the store, which does not answer", on_hang="abort"),
        fault("other option", 1, r"sizes differs: ranks? 0.*: [\[(]4, 8[\])]; rank 1: [\[(]4,?[\])]"),
        fault("other thread count", 1, None),
        fault("slow", 1, None, steps=5),
    )
    if device == "cpu":  # on GPUs there would be a fall back too, to the other kernels
        return (
            *found,
            *ends(fault, wait(1)),
            fault("fails preparing", 1, None, ranks=2),
            # Each step is a call of the draft's and two of the other's. One left out shows where the count runs out.
            fault(
                "skipped draft",
                1,
                r"rank 1 did not come to call 35 of group 'world' \(step 23 of sizes \(4,\) of Model.forward \d/0, "
                r"piece "
                rf".*{wait(1)}: rank 1 is outside of the model",
                r"^rank 1 did not come to call 35 ",
                sizes=(4,),
            ),
            fault(
                "compiles alone",
                1,
                r"rank 1 compiles Model.forward 0/1 anew, because of a guard that failed: .*2 <= .*x.*\[1, 128\].*"
                r"; ranks 0, 2 do not, and wait for rank 1 in step 7 .*call 14 .*mark_unbacked",
                r"^rank 1 compiles Model.forward 0/1 anew",
            ),
        )
    # Who only reports goes on waiting, and its main thread sits in a call of the device, where it hears of no signal.
    return (*found, *(f for f in ends(fault, wait(1)) if (f.name, f.on_hang) != ("interrupted", "report")))


def quiet(draw: random.Random, like: Fault, most_steps: int = 400) -> Fault:
    """A run of many steps of mixed sizes in which nothing may go wrong, on the devices of ``like``."""
    sizes = tuple(draw.choice((1, 2, 3, 4, 5, 8, 13)) for _ in range(draw.randrange(3, 30)))
    steps, on_hang = draw.randrange(50, most_steps), draw.choice(("raise", "abort"))
    return replace(like, name="no fault", rank=0, says=None, journal=None, on_hang=on_hang, steps=steps, sizes=sizes)


def ends(fault: Callable[..., Fault], waits: str) -> tuple[Fault, ...]:
    """Ranks that are ended, paused or cut off from outside, those that end between two calls, and jobs that are
    started again in place. waits: who waits for rank 1."""
    behind = rf"^rank 1 did not come to call 14 .*in which {waits}"
    told = r"KeyboardInterrupt|SIGINT, and its peers have ended|rank 1 did not come to call 14 .*rank 1 was interrupted"
    patient, report, abort = {"step_seconds": 30.0}, {"on_hang": "report"}, {"on_hang": "abort"}
    ends, unheard = (signal.SIGTERM, 0.2), r"^rank 1 has not been heard of.*in step 7"
    throws = fault("throws", 1, r"rank 1 failed in step 7 .*the island was told to throw", r"^rank 1 failed in step 7")
    absent = fault(
        "killed before compiling", 1, "rank 1 did not come to 'meet'", "rank 1", **abort, options={"agree_seconds": 3.0}
    )
    return (
        # Ctrl-C on a frozen job: before the deadline, and after the hang was reported.
        fault("interrupted", 1, told, behind, signalled=(signal.SIGINT, 2.6), options=patient),
        fault("interrupted", 1, told, behind, signalled=(signal.SIGINT, 4.0), **report),
        fault("told to end", 1, "", "^nobody waited", signalled=ends, steps=2000, exit_code=0, **abort),
        fault("disk full", 1, behind[1:], behind, could_not_write=0, **abort),
        fault("paused", 1, None, unheard, signalled=(signal.SIGCONT, 4.0), **report),
        fault("throws between calls", 1, r"rank 1 failed in its own code, after step 6 .*scheduler was told to throw"),
        fault("dies before compiling", 1, r"rank 1 failed in its own code, .*out of memory", **abort),
        *(fault("restarted", 1, None, r"^ranks 0, 1.* began and wrote", before=before) for before in (absent, throws)),
    )


FAULTS = faults()
