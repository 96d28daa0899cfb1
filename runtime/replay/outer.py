"""A program inside a capture that somebody else makes: broken in two around what must not be captured, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..capturing import is_capturing
from ..errors import CaptureError
from ..seams import run_between
from .program import Program


def with_seams(program: Program, device: torch.device) -> Program:
    """The program, whose islands run between two segments of a capture that has any."""

    def between(call: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        def run(*args: Any) -> Sequence[Any]:
            found = run_between(call, args, device) if is_capturing(device) else None
            return found if found is not None else call(*args)

        return run

    steps = (replace(step, call=between(step.call)) if step.island else step for step in program.steps)
    return replace(program, steps=tuple(steps))


def guarded(
    run: Callable[[list[Any]], Sequence[Any]],
    barred: Sequence[str],
    device: torch.device,
    *,
    cut: bool,
    refuses: Callable[[Exception], object] = lambda error: None,
) -> Callable[[list[Any]], Sequence[Any]]:
    """``run``, which takes its arguments in a list, and which no capture holds in silence that must not.

    barred: what must not be captured, and why. cut: it breaks the capture by itself where that can be broken; if not,
    all of it runs between two segments. refuses: told of the error. Raises :class:`CaptureError` where the capture has
    none.
    """
    if not barred:
        return run

    def call(args: list[Any]) -> Sequence[Any]:
        if not is_capturing(device):
            return run(args)
        if cut and run_between(tuple, (), device) is not None:
            return run(args)
        found = run_between(lambda *given: run(list(given)), args, device) if not cut else None
        if found is not None:
            return list(found)
        more = f"; and {len(barred) - 1} more" if len(barred) > 1 else ""
        error = CaptureError(
            f"the compiled model was called inside a capture that must not hold it: {barred[0]}{more}. Let ringfence "
            "capture it (capture_sizes), or capture in segments between which that runs (vLLM's and SGLang's breakable "
            "graphs)"
        )
        refuses(error)
        raise error

    return call
