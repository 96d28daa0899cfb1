"""Seams: to run something eagerly in the midst of a capture that an engine makes.

vLLM and SGLang capture their models in segments, and let a function be run between two of them:

    vllm...breakable_cudagraph    eager_break_during_capture(function)
    sglang...breakable_cuda_graph eager_on_graph(True)(function)

Both end the segment, run the function, write it down for the replays with the addresses of its tensor arguments, and
begin another segment. So its results must be in the same memory in every replay. Outside of such a capture both call
the function as it is, also in the midst of a capture that has no segments. An engine that is not loaded is not asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .capturing import is_capturing
from .errors import DataDependentValueError

#: Package, what the name of its module holds, its function, and what that is given before the function to wrap.
_SEAMS: tuple[tuple[str, str, str, tuple[Any, ...]], ...] = (
    ("vllm", "breakable_cudagraph", "eager_break_during_capture", ()),
    ("sglang", "breakable_cuda_graph", "eager_on_graph", (True,)),
)


def run_between(
    call: Callable[..., Sequence[Any]], args: Sequence[Any], device: torch.device
) -> tuple[Any, ...] | None:
    """The results of ``call(*args)``, run between two segments of a capture and again in each of its replays.

    None, and nothing was run, where no engine captures in segments now. The results keep their memory as long as the
    engine keeps the capture. Raises :class:`DataDependentValueError` in a replay for a number that is another one then.
    """
    landing: list[Any] = []
    runs = 0

    def eagerly(*given: Any) -> None:
        nonlocal runs
        if is_capturing(device):  # no segments: it was called as it is
            return
        values = call(*given)
        if not runs:
            landing.extend(values)
        for to, value in zip(landing, values, strict=True) if runs else ():
            if isinstance(to, Tensor):
                to.copy_(value)
            elif to != value:
                raise DataDependentValueError(
                    f"what runs between two captured segments returned {value!r}, and the capture holds {to!r}"
                )
        runs += 1

    for seam in _seams():
        seam(eagerly)(*args)
        if runs:
            return tuple(landing)
    return None


def _seams() -> Iterator[Callable[..., Callable[..., Any]]]:
    for package, part, name, given in _SEAMS:
        if package not in sys.modules:
            continue
        for path, module in list(sys.modules.items()):
            found = getattr(module, name, None) if path.startswith(f"{package}.") and part in path else None
            if callable(found):
                yield found(*given) if given else found
                break
