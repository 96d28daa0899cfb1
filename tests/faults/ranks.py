"""A rank that goes wrong on purpose: a real process, a small model; gloo and simulated graphs, or GPUs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from faults.catalogue import DEADLINE, DTYPE, HIDDEN, LAYERS, Fault
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from support import NO_MULTICAST


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


def while_a_workspace_is_made(strike: Callable[[], None]) -> None:
    """Do that on this rank, where the others already wait for its handles."""
    from fake_flashinfer import FakeFlashInfer

    from ringfence.runtime.collectives import mnnvl, ringfence, trtllm

    def make(*args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        strike()

    FakeFlashInfer.make = mnnvl.create_peer = trtllm.create = ringfence.create = make


def rank_main(orders: Connection, pipe: Connection) -> None:
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
    dynamo_config.specialize_float = True  # else the epsilon is an input at first, and the model is traced three times
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

        while_a_workspace_is_made(strike)
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
