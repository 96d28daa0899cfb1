"""What torch.compile, and who calls it, expects of a backend besides compiling graphs."""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule

from .account import Account
from .compile_passes.report import CompileReport, Reports
from .runtime.errors import CapturesWastedWarning, NotFusedWarning, OptionsError
from .runtime.replay.stats import Stats
from .unfused import fuses, say_if_nothing_is_fused


@dataclass
class Use:
    """given: torch.compile was given this backend. graphs: how many it was called with. broken: how the last one ends.

    looked: whether anything is fused was looked at. grad: it was said that grad mode keeps graphs from being looked at.
    traced: how many functions Dynamo had begun to trace when the backend was given to it.
    """

    given: bool = False
    graphs: int = 0
    broken: str | None = None
    looked: bool = False
    grad: bool = False
    traced: int = 0

    def begin(self, gm: GraphModule) -> None:
        self.graphs += 1
        self.broken = where_broken(gm)

    def told(self, report: CompileReport) -> CompileReport:
        return replace(report, notes=(*report.notes, self.broken)) if self.broken is not None else report


class OneObject:
    """One object with its reports, whoever copies it, that says when nothing came to it.

    transformers copies a ``CompileConfig``, and the backend in it, for each ``generate()``.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._use = Use()
        self._unused = weakref.finalize(self, _say_if_unused, self._use)

    def __copy__(self) -> OneObject:
        return self

    def __deepcopy__(self, memo: Any) -> OneObject:
        return self

    def is_called_by_forward(self) -> None:
        """The model's own ``forward`` calls what this compiles, so nothing goes round it."""
        self._unused.detach()

    def look_once(self) -> None:
        """Say it where nothing is fused; when all graphs of a call are there."""
        if not self._use.looked:
            self._use.looked = True
            say_if_nothing_is_fused(self.reports)

    def looking(self, run: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
        """``run``, of the last report, which takes a list. In its second call all graphs of the first are there."""
        if fuses(self.reports[-1]) or self._use.looked:
            return run
        calls = 0

        def call(args: list[Any]) -> Sequence[Any]:
            nonlocal calls
            calls += 1
            if calls == 2:
                self.look_once()
            return run(args)

        return call

    def warn_once_of_grad(self, why: str) -> None:
        """A graph is left as it is."""
        if not self._use.grad:
            self._use.grad = True
            warnings.warn(f"ringfence: {why}", NotFusedWarning, stacklevel=3)

    def cache_grows(self, cache: object, capture_sizes: Sequence[int]) -> None:
        """A call has a cache that is longer in the next one: say once what that makes of captures."""
        if not self._account.told_that_caches_grow:
            self._account.told_that_caches_grow = True
            warnings.warn(
                f"ringfence: a {type(cache).__name__} grows in every step, so captures of capture_sizes="
                f"{list(capture_sizes)} are of one step and not replayed: type generate(..., cache_implementation="
                "'static'), or leave capture_sizes out (ringfence docs generate)",
                CapturesWastedWarning,
                stacklevel=3,
            )

    @property
    def reports(self) -> Reports:
        """A report of each graph, in the order in which they were compiled."""
        return self._account.reports

    @property
    def stats(self) -> Stats:
        """What became of the calls so far."""
        return self._account.stats()

    def __str__(self) -> str:
        """Options and :attr:`stats`, a line for each graph."""
        return f"{self!r}: {self.stats}" if self.reports else repr(self)

    @property
    def __name__(self) -> str:
        """The only thing that torch.compile asks of a backend before a graph is compiled."""
        self._use.given, self._use.traced = True, _traced()
        return "ringfence"


def _traced() -> int:
    """How many functions Dynamo has begun to trace in this process."""
    return int(getattr(torch._dynamo.utils, "curr_frame", 0))


def _say_if_unused(use: Use) -> None:
    """In one process of the job: what is called like ``model.generate()`` may go round what torch.compile returned."""
    if not use.given or use.graphs or os.environ.get("RANK", "0") != "0":
        return
    why = (
        "generate() of what torch.compile(model) returns runs the model uncompiled: type ringfence.compile(model, ...) "
        "instead (ringfence docs generate)"
    )
    if _traced() != use.traced:  # the model was called, or another one
        failed = "Dynamo's error, or TORCH_LOGS=graph_breaks, says what it could not trace"
        there = dist.is_available() and dist.is_initialized()
        why = f"{failed}; or {why}" if there else f"{failed}. {NO_GROUP}"
    text = f"ringfence: torch.compile was given a Backend and no graph ever came to it. {why}"
    warnings.warn(text, UserWarning, stacklevel=2)


#: What the errors mean that torch raises for it, of which Dynamo's is an AssertionError.
NO_GROUP = (
    "This process has no process group, and a model that reduces over one needs it before its first call: "
    "torch.distributed.init_process_group(), in each of the ranks that torchrun --nproc-per-node N starts"
)
_OF_NO_GROUP = re.compile("group cannot be None|process group has not been initialized")


def is_of_no_group(error: BaseException) -> bool:
    """Whether a call failed because the model reduces, and there is no process group."""
    there = dist.is_available() and dist.is_initialized()
    return not there and _OF_NO_GROUP.search(str(error)) is not None


def where_broken(gm: GraphModule) -> str | None:
    """Of a Dynamo graph that a graph break ends: at what."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    what = str(reason.reason).partition("\n")[0].strip()
    frame = reason.user_stack[-1] if reason.user_stack else None
    place = f", at {'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}" if frame else ""
    return f"the graph ends where Dynamo breaks it: {what}{place} (TORCH_LOGS=graph_breaks)"


def check_arguments(mode: str | None, options: Mapping[str, Any] | None = None) -> None:
    """Raises :class:`OptionsError` for what torch.compile was given beside a backend that has options of its own."""
    if mode not in (None, "default"):
        raise OptionsError(
            f"mode='{mode}' has no meaning for ringfence, which captures the token counts in capture_sizes: leave it "
            "out (transformers: CompileConfig(mode=None, ...)), and say what you want by ringfence's own options"
        )
    if options:
        raise OptionsError(
            f"options={dict(options)!r} were given beside a ringfence.Backend, which has its own: "
            f"ringfence.Backend({', '.join(f'{k}={v!r}' for k, v in options.items())})"
        )
