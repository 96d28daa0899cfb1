"""What can go wrong with a rank, and what the others have to say about it."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

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
