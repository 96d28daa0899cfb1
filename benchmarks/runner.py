"""What the runner costs beside what it runs, in CPU time: `python benchmarks/runner.py --against COMMIT`.

Pieces do nothing, so that all that is timed is the runner, the check of addresses and the journal included.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import against
import torch
from torch import Tensor

PIECES = 161  # two sites per layer, each an island
PARAMETERS = 5  # per piece
LAYER_PARAMETERS = 51  # of one piece that holds a whole model of 50 sites
TOKENS, HIDDEN, ONE_HIDDEN = 4, 64, 8192

#: What a piece may cost at most, in bare calls: what it cost at f34fbeff, and for a replay the journal besides.
TARGETS = {"uncaptured": 2.0, "replayed": 2.2, "islands of a replay": 3.3, "one piece": 40}


def package() -> Any:
    """What is asked of the package, wherever a commit has it."""
    try:
        from ringfence.runtime.replay.capture import SimulatedGraphs
        from ringfence.runtime.replay.program import Program, SizeRule, Step
        from ringfence.runtime.replay.runner import PiecewiseRunner
    except ImportError:  # before the runtime had folders
        from ringfence.runtime.capture import SimulatedGraphs
        from ringfence.runtime.program import Program, SizeRule, Step
        from ringfence.runtime.runner import PiecewiseRunner

    class Replays(SimulatedGraphs):
        """Captures whose replay does nothing, as a device's is to the host: what the simulation needs is left out."""

        by_owner = False

        def capture(self, call: Callable[..., Any], args: Any) -> Any:
            piece = super().capture(call, args)
            piece.replay = _nothing
            return piece

    return SimpleNamespace(
        PiecewiseRunner=PiecewiseRunner, Program=Program, SizeRule=SizeRule, Step=Step, Graphs=Replays
    )


def _nothing() -> None: ...


def _piece(x: Tensor, *parameters: Tensor) -> tuple[Tensor]:
    return (x,)


def program(of: Any, pieces: int, parameters: int, island: bool) -> Any:
    """A line of pieces, each with parameters of its own behind the one value that goes through."""
    first = 1 + pieces * parameters
    values = [0, *range(first, first + pieces)]
    mine = [tuple(range(1 + i * parameters, 1 + (i + 1) * parameters)) for i in range(pieces)]
    steps = tuple(
        of.Step(f"submod_{i}", _piece, (values[i], *mine[i]), (values[i + 1],), island, (values[i],) if i else ())
        for i in range(pieces)
    )
    names = ("x", *(f"parameter_{i}" for i in range(first - 1)))
    return of.Program(steps, names, (values[-1],), first + pieces, (), frozenset(range(1, first)))


def calls() -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, each with how many pieces it has."""
    of = package()
    x, parameters = torch.randn(TOKENS, HIDDEN), [torch.randn(2) for _ in range(PIECES * PARAMETERS)]
    arguments = [x, *parameters]
    statics = [range(1 + i * PARAMETERS, 1 + (i + 1) * PARAMETERS) for i in range(PIECES)]

    def bare() -> None:
        value = x
        for mine in statics:
            (value,) = _piece(value, *[arguments[i] for i in mine])

    sizes = of.SizeRule((), lambda _: TOKENS)
    uncaptured = of.PiecewiseRunner(program(of, PIECES, PARAMETERS, False), sizes)
    replayed = of.PiecewiseRunner(program(of, PIECES, PARAMETERS, False), sizes, of.Graphs(), [TOKENS])
    islands = of.PiecewiseRunner(program(of, PIECES, PARAMETERS, True), sizes, of.Graphs(), [TOKENS])
    one = of.PiecewiseRunner(program(of, 1, LAYER_PARAMETERS, False), sizes, of.Graphs(), [TOKENS])
    alone = [torch.randn(1, ONE_HIDDEN), *(torch.randn(2) for _ in range(LAYER_PARAMETERS))]
    replayed(*arguments), islands(*arguments), one(*alone)
    found: dict[str, tuple[Callable[[], object], int]] = {"bare": (bare, PIECES)}
    for name, runner in (("uncaptured", uncaptured), ("replayed", replayed), ("islands of a replay", islands)):
        found[name] = partial(runner, *arguments), PIECES
    found["one piece"] = partial(one, *alone), 1
    return found


def cost(repeats: int) -> dict[str, float]:
    """The least CPU time in us of a piece, of so many runs that take turns."""
    least: dict[str, float] = {}
    with torch.no_grad():  # as compiled code is called
        timed = calls()
        gc.collect()
        gc.disable()
        for _ in range(repeats):
            for name, (call, pieces) in timed.items():
                times = max(PIECES // pieces // 4, 1)  # of short ones some, since the clock is not that fine
                start = time.process_time_ns()
                for _ in range(times):
                    call()
                spent = (time.process_time_ns() - start) / times / pieces / 1e3
                least[name] = min(least.get(name, spent), spent)
        gc.enable()
    return least


def shown(processes: Iterable[dict[str, float]]) -> str:
    """The least of several processes, in us and in bare calls."""
    least = {name: min(each[name] for each in processes) for name in next(iter(processes))}
    return ", ".join(f"{name} {us:.2f} us ({us / least['bare']:.2f})" for name, us in least.items())


if __name__ == "__main__":
    against.main(__file__, __doc__ or "", cost, shown, repeats=400)
