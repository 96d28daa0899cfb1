"""What the tests share: graphs on fake groups, threaded ranks, real ranks with a hard end."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo import guards
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringfence.compile_passes import Site, find, fuse
from ringfence.compile_passes import judge as judging
from ringfence.compile_passes.assignment import Assignment
from ringfence.runtime.collectives.moe_ready import MoeReady
from ringfence.runtime.collectives.ready import ReadyCollective
from ringfence.runtime.errors import HangError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Situation

if __name__ != "support":  # of the clone's root, which is no package
    raise ImportError("import support, with tests/ on the path")

#: Largest |ours - reference| / |reference|, by dtype: two roundings in half precision,
#: the order of a sum in float32.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-6}


#: In seconds: when what a test started is ended by force. Far from what anything takes, also on a machine that is busy.
HARD_END = 600.0

#: No test may create an NVLink multicast object: it can take a host's GPUs, which others share, out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def measure_no_guards() -> None:
    """Dynamo measures how long the guards of each graph take, and empties the caches of the processor before it does.

    Nobody reads that here, and it is a seventh of what a small trace costs.
    """
    guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[assignment]


def start_fake_group(world_size: int = 2) -> None:
    """A process group whose collectives do nothing: for the structure of graphs."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def aot_graph(
    fn: Callable[..., Any], *args: Any, inductor: bool = False, dynamic: Sequence[tuple[int, int]] = ()
) -> GraphModule:
    """The functional ATen graph that the backend would see.

    ``inductor`` traces with Inductor's decompositions; ``dynamic`` lists (argument, dimension).
    """
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)  # type: ignore[no-any-return]

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        decompositions = select_decomp_table() if inductor else {}
        return aot_autograd(  # type: ignore[no-any-return]
            fw_compiler=keep,
            inference_compiler=keep,
            decompositions=decompositions,
            keep_inference_input_mutations=True,
        )(gm, example_inputs)

    torch._dynamo.reset()
    for argument, dim in dynamic:
        torch._dynamo.mark_dynamic(args[argument], dim)
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return graphs[-1]


def fuse_graph(gm: GraphModule, **options: Any) -> list[Site]:
    return fuse(gm, find(gm, **options))


def assigned(
    backends: Mapping[str, str],
    situation: Situation | None = None,
    *,
    capture_failure: str | None = None,
    nccl: Situation | None = None,
    moe: Situation | None = None,
) -> Assignment:
    """Groups by name and backend, whose fused sites are carried out as ``situation`` says; by the reference without.

    moe: the same of dispatches and combines.
    """
    groups = {name: Group(name, backend, 2, 0) for name, backend in backends.items()}
    names = groups if situation is not None else ()
    ready = {n: ReadyCollective(situation.collective, situation, capture_failure=capture_failure) for n in names}  # type: ignore[union-attr]
    pairs = {n: MoeReady(str(moe.collective), moe, workspace=cast(Any, object())) for n in groups} if moe else {}
    return Assignment(groups, ready, nccl=nccl, moe=pairs)


def judge(
    gm: GraphModule,
    *,
    backends: Mapping[str, str],
    situation: Situation | None = None,
    capture_failure: str | None = None,
    nccl: Situation | None = None,
    moe: Situation | None = None,
    **options: Any,
) -> list[judging.Verdict]:
    """The verdicts of a graph on :func:`assigned` groups."""
    groups = assigned(backends, situation, capture_failure=capture_failure, nccl=nccl, moe=moe)
    return judging.judge(gm, groups, **options)


@contextlib.contextmanager
def engine_library(namespace: str, *ops: tuple[Any, ...]) -> Iterator[None]:
    """Ops as engines register them: the schema, what it does, what it does to fake tensors, and tags."""
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        for schema, body, fake, *tags in ops:
            name = library.define(schema, tags=tags)
            library.impl(name, body, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        yield


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest |actual - reference| / (|reference| + rms of the reference's row / 100)."""
    reference = reference.double()
    floor = reference.square().mean(-1, keepdim=True).sqrt() / 100 + 1e-12
    return float(((actual.double() - reference).abs() / (reference.abs() + floor)).max())


def run_threaded(world_size: int, body: Callable[[int], Any], timeout: float = HARD_END) -> list[Any]:
    """Run ``body(rank)`` on threads that form a real process group; the results by rank."""
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    errors: list[str] = []

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size)
            results[rank] = body(rank)
        except BaseException:
            errors.append(f"rank {rank}:\n{traceback.format_exc()}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(t.is_alive() for t in threads), f"ranks did not end within {timeout} s; errors: {errors}"
    finally:
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    assert not errors, "\n".join(errors)
    return results


class HostDevice:
    """What a probe reads with, over host memory.

    ``slow``: so many questions until a copy is complete; None: never. It writes only then.
    """

    def __init__(self, staging: int = 2048, slow: int | None = 0) -> None:
        self.staging = torch.full((staging // 4,), 7, dtype=torch.int32)
        self.slow, self.asked, self.copies = slow, 0, 0
        self.pending: tuple[int, int] | None = None

    def copy(self, address: int, size: int) -> None:
        assert self.pending is None, "the copy before may still write"
        assert size <= self.staging.numel() * 4
        self.pending, self.asked = (address, size), 0
        self.copies += 1

    def done(self) -> bool:
        self.asked += 1
        if self.slow is None or self.asked <= self.slow:
            return False
        if self.pending is not None:
            ctypes.memmove(self.staging.data_ptr(), *self.pending)
            self.pending = None
        return True


def save_tiny_model(folder: Path, kind: str, **sizes: Any) -> None:
    """A Hugging Face model of this type with random weights, into ``folder``. sizes: beside or instead of the usual."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    usual: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **usual | sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # a norm of ones would hide a lost weight
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(folder)


def fork_server() -> Any:
    """Processes that start with torch imported and warm, and with the environment of the server's first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ringfence.backend", "torch._inductor.compile_fx", "warm_compiler"])
    here = str(Path(__file__).parent)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])):
        multiprocessing.forkserver.ensure_running()  # Python 3.11 does not tell it sys.path before it imports
    return context


#: Below those that the kernel gives to gloo's listeners, which may take one before the store does.
_PORTS = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """Of this host; each process begins elsewhere."""
    for number in _PORTS:
        port = 10_000 + number % 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    backend: str,
    environment: dict[str, str],
    body: Callable[..., Any],
    args: tuple[Any, ...],
    out: Any,
) -> None:
    torch.set_num_threads(1)
    try:
        os.environ.clear()
        os.environ.update(environment)
        if backend == "nccl":
            os.environ.update(NO_MULTICAST)
            torch.cuda.set_device(rank)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers puts models on a GPU where it sees one
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        out.send((True, body(rank, *args)))
        if rank == 0:  # it serves the store, which others may still read; the parent ends it when all have answered
            time.sleep(60)
        dist.destroy_process_group()
    except BaseException:
        out.send((False, traceback.format_exc()))


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = HARD_END
) -> list[Any]:
    """Run ``body(rank, *args)`` in real processes; killed at the timeout, nothing left behind.

    ``body`` must be importable from a module; its results travel by pickle.
    """
    port = free_port()
    # A server's children cannot use GPUs where it has looked for them.
    context: Any = multiprocessing.get_context("spawn") if backend == "nccl" else fork_server()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    environment = dict(os.environ)
    processes = [
        context.Process(
            target=_rank_main,
            args=(rank, world_size, port, backend, environment, body, args, pipes[rank][1]),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        while waiting:  # whoever fails first says why; the others may wait for it in vain
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} did not answer in {timeout} s"
            for receiver in ready:
                rank = waiting.pop(receiver)  # type: ignore[call-overload]
                ok, results[rank] = receiver.recv()  # type: ignore[union-attr]
                assert ok, f"rank {rank}:\n{results[rank]}"
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_python(*arguments: str, timeout: float = HARD_END, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a child with a hard end; output is captured."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, cwd=cwd, check=False
    )


class BoundedKernels:
    """Of a group, for who bounds their waits: what they were told to wait, and whether one has given up."""

    seconds = 0.0
    lost: HangError | None = None

    def check_kernels(self) -> None:
        if self.lost is not None:
            raise self.lost

    def wait_for(self, seconds: float) -> None:
        self.seconds = seconds
