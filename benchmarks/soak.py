"""The long runs of the watchdog: faults again and again, and steps of mixed sizes without any.

    python benchmarks/soak.py --repetitions 50      every fault of tests/faults 50 times
    python benchmarks/soak.py --minutes 60          mixed sizes, captures and faults for an hour

Prints a row per fault: runs, misses (a rank that did not end in time, or named no rank or the wrong one),
false alarms, and how long the slowest rank took. Exits with 1 where there is a miss or a false alarm.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from faults.ranks import FAULTS, Fault, Outcome, run_fault


def key(fault: Fault) -> str:
    return f"{fault.name}, rank {fault.rank}" + (
        ", every step checked" if fault.options.get("check_every_step") else ""
    )


def in_turn(repetitions: int, only: list[str]) -> Iterator[Fault]:
    for _ in range(repetitions):
        yield from (f for f in FAULTS if not only or f.name in only)


def at_random(seconds: float, seed: int) -> Iterator[Fault]:
    """Faults, and between them runs of many steps of mixed sizes in which nothing may go wrong."""
    draw, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        yield draw.choice(FAULTS)
        sizes = tuple(draw.choice((1, 2, 3, 4, 5, 8, 13)) for _ in range(draw.randrange(3, 30)))
        steps, on_hang = draw.randrange(50, 400), draw.choice(("raise", "abort"))
        yield Fault("no fault", 0, None, on_hang=on_hang, steps=steps, sizes=sizes)


def table(outcomes: dict[str, list[Outcome]]) -> tuple[str, int]:
    rows, bad = [], 0
    for name, some in outcomes.items():
        wrong = sum(bool(o.problems()) for o in some)
        bad += wrong
        quiet = some[0].fault.says is None
        took = [max(e.seconds for e in o.others) for o in some]
        rows.append(
            (
                name,
                len(some),
                "" if quiet else wrong,
                wrong if quiet else "",
                "" if quiet else f"{statistics.median(took):.2f}",
                "" if quiet else f"{max(took):.2f}",
            )
        )
    headers = ("fault", "runs", "misses", "false alarms", "median s", "slowest s")
    return tabulate(rows, headers, disable_numparse=True), bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--repetitions", type=int)
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="with --repetitions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.minutes is not None:
        faults = at_random(60 * arguments.minutes, arguments.seed)
    else:
        faults = in_turn(arguments.repetitions, arguments.only)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts this in the background ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    start = time.monotonic()
    try:
        for fault in faults:
            outcome = run_fault(fault)
            outcomes[key(fault)].append(outcome)
            for problem in outcome.problems():
                print(f"{time.monotonic() - start:.0f} s: {key(fault)}: {problem}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    text, bad = table(outcomes)
    runs = sum(map(len, outcomes.values()))
    print(f"{runs} runs in {(time.monotonic() - start) / 60:.1f} minutes, {bad} with a miss or a false alarm")
    print(text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
