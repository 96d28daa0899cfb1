"""Random programs against eager: ``python tests/fuzz/run.py --programs 10000 --seed 1 --jobs 2``.

Prints each failure with its seed and its smallest program, and a line of counts at the end.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: what it imports is a package beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

#: How long a worker may take to its first program: it imports torch, on a machine that is busy with others.
_START_SECONDS = 1800
#: A worker ends after so many programs: what Dynamo and the C++ library keep of each is never freed.
_PER_WORKER = 400


def _work(seeds: list[int], settings: dict[str, Any], shrink_seconds: float, out: Any) -> None:
    import torch
    from fuzz.check import check, check_all, draw
    from fuzz.shrink import shrink

    torch.set_num_threads(1)
    gc.freeze()  # torch is imported for good: a collection need not look through it
    gc.set_threshold(50_000, 20, 100)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # what plain torch.compile refuses is no news
    for seed in seeds:
        out.send(("begin", seed, ""))
        program, drawn = draw(seed, **settings)
        shown: set[str] = set()
        for setting, outcome in zip(drawn, check_all(program, drawn), strict=True):
            message = outcome.message
            if outcome.kind == "wrong":
                left = 0 if _kind(message) in shown else shrink_seconds
                shown.add(_kind(message))
                message = _smallest(check, shrink, program, setting, message, left)
            out.send((outcome.kind, seed, message))
        out.send(("end", seed, ""))
    out.send(("done", -1, ""))


def _smallest(check: Any, shrink: Any, program: Any, setting: Any, message: str, seconds: float) -> str:
    """The failure as a program that can be read."""
    kind = _kind(message)
    if seconds:
        program, setting = shrink(
            program,
            setting,
            lambda p, s: (o := check(p, s)).kind == "wrong" and _kind(o.message) == kind,
            seconds=seconds,
        )
        message = check(program, setting).message or message
    inputs = ", ".join(f"{n}: {s}" for n, s in (*program.inputs, *(("self." + n, s) for n, s in program.buffers)))
    return f"{message}\n  {setting}\n  inputs {inputs}\n{program.source()}"


def _kind(message: str) -> str:
    """What a failure is told apart by: the error's type, or that numbers are off."""
    words = message.replace(",", ":").split(":")
    return next(
        (w.strip() for w in words if w.strip().endswith(("Error", "Exception", "Warning", "Mismatch"))), "numbers"
    )


class Worker:
    """A process with a share of the seeds. The program at which it dies or hangs twice is wrong."""

    def __init__(self, seeds: list[int], arguments: tuple[Any, ...]) -> None:
        self.seeds, self._arguments = seeds, arguments
        self._again: set[int] = set()
        self._start()

    def _start(self) -> None:
        from support import fork_server

        # Who was forked after CUDA was looked for cannot use it.
        context: Any = fork_server() if self._arguments[0]["device"] == "cpu" else multiprocessing.get_context("spawn")
        self.pipe, out = context.Pipe(duplex=False)
        batch = self.seeds[:_PER_WORKER]
        self.process = context.Process(target=_work, args=(batch, *self._arguments, out), daemon=True)
        self.process.start()
        out.close()
        self._at: int | None = None
        self._heard = time.monotonic()

    def receive(self) -> Iterator[tuple[str, int, str]]:
        """What there is to say: outcomes, the end of a program, or that the process died."""
        self._heard = time.monotonic()
        try:
            kind, seed, message = self.pipe.recv()
        except EOFError:
            self.process.join()
            yield from self._lost(f"the process died (exit code {self.process.exitcode})")
            return
        if kind == "begin":
            self._at = seed
        elif kind == "end":
            self.seeds.remove(seed)
            yield kind, seed, message
        elif kind == "done":
            self.process.join()
            self._restart()
        else:
            yield kind, seed, message

    def late(self, limit: float) -> Iterator[tuple[str, int, str]]:
        """That the process did not answer for so many seconds, and was killed."""
        if time.monotonic() - self._heard > (limit if self._at is not None else _START_SECONDS):
            self.process.kill()
            self.process.join()
            yield from self._lost(f"no answer in {limit:.0f} s")

    def _lost(self, why: str) -> Iterator[tuple[str, int, str]]:
        if self._at is None:
            raise RuntimeError(f"a worker of the fuzzer came to nothing: {why}")
        if self._at not in self._again:  # who ended it is not known: the program has a second try
            self._again.add(self._at)
            self.seeds.sort(key=lambda seed: seed != self._at)
        else:
            self.seeds.remove(self._at)
            yield "wrong", self._at, why
            yield "end", self._at, ""
        self._restart()

    def _restart(self) -> None:
        if self.seeds:
            self._start()


def run(
    seeds: Sequence[int],
    jobs: int,
    *,
    inductor: float,
    device: str,
    shrink_seconds: float,
    limit: float = 180,
    seconds: float | None = None,
    every: int = 0,
    show_upstream: bool = False,
) -> tuple[Counter[str], list[str]]:
    """Counts by kind, and the failures as text. Ends after ``seconds``.

    every: say how far it is after so many programs.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    counts: Counter[str] = Counter()
    failures: list[str] = []
    arguments = ({"inductor": inductor, "device": device}, shrink_seconds)
    workers = [Worker(list(seeds[j::jobs]), arguments) for j in range(min(jobs, len(seeds)))]
    end = time.monotonic() + seconds if seconds else float("inf")
    while workers and time.monotonic() < end:
        ready = multiprocessing.connection.wait([w.pipe for w in workers], 5)
        for worker in workers:
            for kind, at, message in worker.receive() if worker.pipe in ready else worker.late(limit + shrink_seconds):
                counts["programs" if kind == "end" else kind] += 1
                if kind == "end" and every and counts["programs"] % every == 0:
                    print(f"... {counts['programs']} programs, {counts['wrong']} wrong", file=sys.stderr, flush=True)
                if kind == "wrong" or (kind in ("upstream", "unsure") and show_upstream):
                    failures.append(f"{'FAILED' if kind == 'wrong' else kind.upper()} seed {at}: {message}")
                    print(failures[-1], flush=True)
        workers = [w for w in workers if w.seeds]
    for worker in workers:
        worker.process.kill()
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="the first seed; a new one each time by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--inductor", type=float, default=0.1, help="share of the programs whose pieces Inductor compiles"
    )
    parser.add_argument("--seconds", type=float, help="end after so long, however many programs there were")
    parser.add_argument("--shrink-seconds", type=float, default=60)
    parser.add_argument("--upstream", action="store_true", help="also print what plain torch.compile gets wrong")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else int(time.time()) % 10**7 * 10**4
    start = time.monotonic()
    counts, _ = run(
        range(seed, seed + given.programs),
        given.jobs,
        inductor=given.inductor,
        device=given.device,
        shrink_seconds=given.shrink_seconds,
        seconds=given.seconds,
        every=100,
        show_upstream=given.upstream,
    )
    took = time.monotonic() - start
    kinds = ", ".join(f"{counts[k]} {k}" for k in ("right", "upstream", "invalid", "unsure", "wrong"))
    print(
        f"{counts['programs']} programs from seed {seed}, each under up to 4 settings: {kinds}; "
        f"{took:.0f} s, {counts['programs'] / took:.1f} programs a second"
    )
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
