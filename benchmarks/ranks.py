"""What the benchmarks of several ranks share: start-up, agreement between ranks, timing, results.

A benchmark that hangs would use up the machine, so each step has a time limit after which the
process ends itself, and the ranks agree on who goes on: a rank that failed alone is not waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ringfence.runtime.errors import CaptureFailedWarning

T = TypeVar("T")

#: NVLink multicast has taken whole hosts out of service; nothing here may create an object of it.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}

#: Further than roundings explain, over a whole model: no figure is given for a wrong result.
WRONG = 0.2


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; with the options that every benchmark has."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder for the JSON file of results")
    parser.add_argument("--deadline", type=float, default=1e9, help="start nothing new after this many seconds")
    parser.add_argument("--step-limit", type=float, default=90, help="a step that takes longer ends the process")
    return parser.parse_args()


def numbers(text: str) -> tuple[int, ...]:
    """``"1,16"`` as ``(1, 16)``."""
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


class Ranks:
    """This process among its peers. A second group over gloo carries what is not measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._start = time.monotonic()
        self._options = options
        self.cuda = options.device == "cuda"
        if self.cuda:
            wrong = [name for name, value in NO_MULTICAST.items() if os.environ.get(name) != value]
            if wrong:
                wanted = " ".join(f"{name}={value}" for name, value in NO_MULTICAST.items())
                sys.exit(f"refusing to start with NVLink multicast possible ({', '.join(wrong)}); run with: {wanted}")
        if "RANK" not in os.environ:
            sys.exit(f"start me with: torchrun --nproc-per-node N {sys.argv[0]} ...")
        self._limit()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", device_id=self.device)
        else:
            torch.set_num_threads(1)
            dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group_name: str = dist.group.WORLD.group_name  # type: ignore[union-attr]
        self._gloo = dist.new_group(backend="gloo")
        self.results: list[dict[str, Any]] = []

    # -- agreement -----------------------------------------------------------------

    def say(self, *text: object) -> None:
        if self.rank == 0:
            print(f"[{self.seconds():5.1f} s]", *text, flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def time_left(self) -> bool:
        """Whether to start another step: rank 0's answer, on all ranks."""
        answer = [self.seconds() < self._options.deadline]
        dist.broadcast_object_list(answer, src=0, group=self._gloo)
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._gloo)
        return values

    def together(self, body: Callable[[], Any]) -> tuple[Any, str | None]:
        """``(body(), None)``; or ``(None, why)`` on every rank, if it failed on one.

        A peer that the failed rank left waiting in a collective is ended by the limit of the
        step. ``body`` makes no call to :meth:`gather`: it would meet the one that is made here.
        """
        self._limit()
        value, error = None, None
        try:
            value = body()
            self.synchronize()
        except Exception as caught:
            error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
            if self.rank == 0:
                traceback.print_exc(limit=-3)
        errors = self.gather(error)
        failed = next((f"rank {rank}: {e}" for rank, e in enumerate(errors) if e), None)
        return (None if failed else value), failed

    def _limit(self) -> None:
        """From now, one limit. The watchdog needs neither the GIL nor a device that answers."""
        faulthandler.dump_traceback_later(self._options.step_limit, exit=True)

    def forget(self) -> None:
        """Drop what was compiled, and the memory of graphs that nobody holds any more."""
        torch._dynamo.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    # -- timing --------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def stream_us(self, call: Callable[[], object], calls: int) -> tuple[float, float]:
        """Time of one of ``calls`` back-to-back calls in microseconds: on the stream, and on the host.

        The call and the all-reduce before the first event bring the ranks' streams in line and
        let the host run ahead, so that what is timed is the slower of host and device.
        """
        call()
        dist.all_reduce(torch.zeros(1, device=self.device))
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            spent = (time.perf_counter() - start) / calls * 1e6
            return spent, spent
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        host = (time.perf_counter() - start) / calls * 1e6
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls, host

    def barrier(self) -> None:
        """Idle devices on all ranks; over the measured group, see :meth:`together`."""
        dist.all_reduce(torch.zeros(1, device=self.device))
        self.synchronize()

    def median_of_max(self, samples: list[float]) -> float:
        """The median over the repeats, each as slow as the slowest rank had it."""
        return statistics.median(max(each) for each in zip(*self.gather(samples), strict=True))

    # -- results -------------------------------------------------------------------

    def made(self, makers: Mapping[str, Callable[[], T]], **about: Any) -> list[T]:
        """What could be made on all ranks, by contender; of the others why not is recorded. about: of the record."""
        found = []
        for name, make in makers.items():
            contender, why = self.together(make)
            if why is None:
                found.append(contender)
            else:
                self.record(**about, contender=name, failed=why)
        return found

    def record(self, **fields: Any) -> None:
        """Keep one measurement, and print it: what was measured survives a hang in the next step."""
        if not fields.get("difference", 0) <= WRONG:  # also NaN
            fields["failed"] = f"wrong result, of distance {fields['difference']:.3g}"
        self.results.append(fields)
        self.say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items()))
        self.write()

    def write(self) -> None:
        if self.rank == 0 and self._options.out is not None:
            self._options.out.mkdir(parents=True, exist_ok=True)
            name = f"{Path(sys.argv[0]).stem}-x{self.size}.json"
            text = json.dumps(self._header | {"results": self.results}, indent=1)
            (self._options.out / name).write_text(text + "\n")

    @functools.cached_property
    def _header(self) -> dict[str, Any]:
        program = f"benchmarks/{Path(sys.argv[0]).name}"
        return {
            "command": shlex.join(["torchrun", "--nproc-per-node", str(self.size), program, *sys.argv[1:]]),
            "environment": {name: os.environ.get(name) for name in NO_MULTICAST},
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(self.size if self.cuda else 0),
            "versions": versions(),
        }

    def end(self) -> None:
        """No ``destroy_process_group``: graphs that hold NCCL calls may still be alive, and it would wait for them."""
        self.write()
        self.synchronize()
        self.gather(None)
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def hardware(gpus: int) -> str:
    if not gpus:
        return f"{os.cpu_count()} CPU cores, {platform.machine()}"
    with contextlib.suppress(Exception):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
        return f"{gpus} x {torch.cuda.get_device_name()}, driver {driver}"
    return f"{gpus} x {torch.cuda.get_device_name()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in ("ringfence", "flashinfer-python", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(Exception):
        where = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True, timeout=10, check=True
        )
        found["commit"] = commit.stdout.strip()
    return found


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, over all elements. Roundings add up over the sites, so this only tells right from wrong."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """One CUDA graph of ``call`` by hand, and what the call returned: the buffers that replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # the first compiles, the second finds everything warm
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread is watched: NCCL's watchdog thread queries events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = call()
    return graph, outputs


@contextlib.contextmanager
def failed_capture_is_an_error() -> Iterator[None]:
    """Ringfence goes on uncaptured with a warning; here that would be a wrong figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureFailedWarning)
        yield
