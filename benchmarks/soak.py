"""The long runs of the watchdog: faults again and again, and steps of mixed sizes without any.

    python benchmarks/soak.py --repetitions 50      every fault of tests/faults 50 times
    python benchmarks/soak.py --minutes 60          mixed sizes, captures and faults for an hour
    python benchmarks/soak.py --repetitions 3 --collective mnnvl    on two GPUs, with that collective
    python benchmarks/soak.py --repetitions 9 --collective ringfence --jobs 4 --only "late, rank 1"    one row
    python benchmarks/soak.py --repetitions 9 --collective ringfence --ranks 4     on four GPUs

Among them are Ctrl-C on a frozen job ("interrupted"), SIGTERM to all ranks ("told to end"), a full disk, a debugger's
pause ("paused") and a job that is started again in place ("restarted"). In all of them the ranks' clocks are two hours
apart.

Prints a row per fault: runs, misses (a rank that did not end in time, or named no rank or the wrong one),
false alarms, and how long the slowest rank took. Exits with 1 where there is a miss or a false alarm.

Jobs on GPUs take the pairs (or fours) of devices in turn, so there may be more jobs than pairs. Processes of several
jobs on one GPU run in time slices of milliseconds, and what faults are told apart by is seconds. While a run works,
the next one's ranks import what they need. Nothing may be left on a GPU: looked at after each run where no other job
has the devices, and after the last.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from faults.catalogue import Fault, Outcome, faults, quiet
from faults.gpus import left_behind, used
from faults.own_kernels import on_gpus
from faults.run import Ahead, run_fault


def key(fault: Fault) -> str:
    which = f" after '{fault.before.name}'" if fault.before is not None else ""
    which += f", rank {fault.rank}"
    which += ", within the bound" if fault.name == "late" and fault.says is None else ""
    which += ", every step checked" if fault.options.get("check_every_step") else ""
    reported = ", after the report" if fault.name == "interrupted" and fault.on_hang == "report" else ""
    fall_back = ", others fall back" if "fails" in fault.name and fault.says is None else ""
    return f"{fault.name}{which}{reported}{fall_back}{', unwatched' * (fault.on_hang is None)}"


def in_turn(some: Sequence[Fault], repetitions: int) -> Iterator[Fault]:
    for _ in range(repetitions):
        yield from some


def at_random(some: Sequence[Fault], like: Fault, seconds: float, seed: int) -> Iterator[Fault]:
    """Faults, and between them quiet runs on the devices of ``like``."""
    draw, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        yield draw.choice(some)
        yield quiet(draw, like)


def table(outcomes: dict[str, list[Outcome]]) -> tuple[str, int]:
    rows, bad = [], 0
    for name, some in outcomes.items():
        wrong = sum(bool(o.problems()) for o in some)
        bad += wrong
        is_quiet = some[0].fault.says is None
        took = [max((e.seconds for e in o.others), default=0.0) for o in some]
        rows.append(
            (
                name,
                len(some),
                "" if is_quiet else wrong,
                wrong if is_quiet else "",
                "" if is_quiet else f"{statistics.median(took):.2f}",
                "" if is_quiet else f"{max(took):.2f}",
            )
        )
    headers = ("fault", "runs", "misses", "false alarms", "median s", "slowest s")
    return tabulate(rows, headers, disable_numparse=True), bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--repetitions", type=int)
    parser.add_argument("--only", action="append", default=[], metavar="FAULT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time; on GPUs each takes --ranks of them")
    parser.add_argument("--collective", choices=("ringfence", "mnnvl", "trtllm", "reference"), help="on GPUs")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2, help="of a job on GPUs (default: 2)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    ranks = arguments.ranks
    every = faults() if arguments.collective is None else on_gpus(arguments.collective, 0, ranks)
    if unknown := set(arguments.only) - {f.name for f in every} - set(map(key, every)):
        parser.error(f"there is no fault {sorted(unknown)}; there are {sorted({f.name for f in every})}")
    pairs = torch.cuda.device_count() // ranks if arguments.collective is not None else 0
    if arguments.collective is not None and not pairs:
        parser.error(f"--collective takes {ranks} GPUs; there are {torch.cuda.device_count()}")
    first_devices = [ranks * (job % pairs) if pairs else 0 for job in range(arguments.jobs)]
    before = {}
    try:
        before = {first: used(range(first, first + ranks)) for first in sorted(set(first_devices)) if pairs}
    except (OSError, subprocess.SubprocessError) as error:
        print(f"what is left on the GPUs is not looked at: {error}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts this in the background ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    start, stop, lock = time.monotonic(), threading.Event(), threading.Lock()

    def work(job: int) -> None:
        every = faults() if not pairs else on_gpus(arguments.collective, first_devices[job], ranks)
        some = tuple(f for f in every if not arguments.only or {f.name, key(f)} & set(arguments.only))
        if arguments.minutes is not None:
            turns = at_random(some, every[0], 60 * arguments.minutes, arguments.seed + job)
        else:
            turns = itertools.islice(in_turn(some, arguments.repetitions), job, None, arguments.jobs)
        ahead = Ahead("cuda", ranks) if pairs else None
        try:
            for fault in turns:
                if stop.is_set():
                    return
                outcome = run_fault(fault, ahead)
                if arguments.jobs <= pairs and before:
                    outcome.left_on_gpus = left_behind(before[fault.first_device])
                with lock:
                    outcomes[key(fault)].append(outcome)
                    for problem in outcome.problems():
                        print(f"{time.monotonic() - start:.0f} s: {key(fault)}: {problem}", flush=True)
        finally:
            if ahead is not None:
                ahead.close()

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for done in as_completed([pool.submit(work, job) for job in range(arguments.jobs)]):
                done.result()
        except KeyboardInterrupt:
            stop.set()
            print("interrupted")
    text, bad = table(outcomes)
    runs = sum(map(len, outcomes.values()))
    print(f"{runs} runs in {(time.monotonic() - start) / 60:.1f} minutes, {bad} with a miss or a false alarm")
    print(text)
    left = "; ".join(filter(None, map(left_behind, before.values())))
    if before:
        print(f"left on the GPUs: {left or 'nothing'}")
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main())
