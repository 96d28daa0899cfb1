"""In each worker: what has to happen once per process, whether its graphs were compiled or loaded from a cache.

init_device               groups get vLLM's names; the collective is chosen, made and tested, ahead of vLLM's
                          measuring of memory; the watch begins
compile_or_warm_up_model  fused sites are counted, sizes are captured, and rank 0 says what came of it
execute_model             each step is watched, where a watch was asked for; where our own kernels may wait in it, a
                          lost wait is told, and their patience with a warm-up ends
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ... import __version__
from ...callable import prepare
from ...compile_passes.report import CompileReport
from ...runtime.channel import Channel
from ...runtime.collectives import ops
from ...runtime.collectives.prepared import Prepared
from ...runtime.errors import VersionError
from ...runtime.groups import describe_group, register_group
from ...runtime.hazards.table import HAZARDS
from ...runtime.versions import in_range
from ...runtime.watch.steps import Watch
from ...runtime.watch.supervision import Asked
from ...runtime.watch.supervisor import supervisor_for
from ...watching import watch
from . import guard, hooked, passes, whole
from .request import PREPARE, WATCH, Request, of_config
from .wrapping import wrap

log = logging.getLogger("vllm.ringfence")

#: The attribute of a worker's wrapper: what :class:`Running` says of itself, for ``llm.collective_rpc("ringfence")``.
STATUS = "ringfence"


#: Of every worker, whatever was asked for.
WRAPPED = (hooked.INIT_DEVICE, hooked.EXECUTE_MODEL)


def install() -> None:
    """Wrap what every worker calls. It does nothing in a worker whose configuration asks for nothing."""
    wrap(hooked.INIT_DEVICE, start)
    wrap(hooked.EXECUTE_MODEL, step)


class Running:
    """What the adapter has made in one worker."""

    def __init__(self, asked: Request, config: Any, group: Any) -> None:
        self.asked, self.config, self.group = asked, config, group
        self.prepared: Prepared | None = None
        self.watch: Watch | None = None
        self.watched = asked.mode == "backend" and "on_hang" in asked.options
        self.reports: list[CompileReport] = []
        self.guarded = guard.Guarded()
        self.fused = self.sums = 0

    def status(self) -> dict[str, Any]:
        """Of this rank: mode; all-reduces of a step that are ``fused``, of ``sites``; who carries them out."""
        return {
            "mode": self.asked.mode,
            "rank": self.group.rank_in_group,
            "sites": self.fused + self.sums,
            "fused": self.fused,
            "collective": self.collective,
            "captured": self.captured,
            "hazards": self.hazards,
            "compiled": len(self.reports),
        }

    @property
    def largest(self) -> int:
        """Tokens of the largest step that the pass fuses in."""
        most = int(self.config.scheduler_config.max_num_batched_tokens)
        return most if self.asked.up_to is None else min(most, self.asked.up_to)

    @property
    def collective(self) -> str:
        if self.asked.mode == "guard":
            return self.guarded.collective
        if self.prepared is not None:
            return self.prepared.collective if self.asked.fuses else "none"
        named = [one.collective for report in self.reports for one in report.collectives]
        return ", ".join(dict.fromkeys(named)) or "none"

    @property
    def captured(self) -> str:
        if self.asked.mode == "backend":
            sizes = sorted({size for report in self.reports for size in report.captured})
            return f"sizes {', '.join(map(str, sizes))}" if sizes else "nothing"
        if self.prepared is None or not self.asked.fuses:
            return "as vLLM does"
        return f"{'in' if self.prepared.captured else 'not in'} vLLM's graphs ({self.prepared.capture})"

    @property
    def hazards(self) -> list[str]:
        """Rows of the hazard table that apply to what runs here."""
        if self.asked.mode == "guard":
            return list(self.guarded.hazards)
        if self.prepared is not None:
            if not self.asked.fuses:
                return []
            rule = self.prepared.capture.partition(":")[0]  # of the hazard table, or another one
            return [rule] if any(rule == hazard.id for hazard in HAZARDS) else []
        return sorted({v.hazard for report in self.reports for v in report.verdicts if v.hazard is not None})

    @property
    def line(self) -> str:
        import vllm

        fused = "" if self.asked.mode == "guard" else f"{self.fused} of {self.fused + self.sums} all-reduces fused, "
        carrier = "vLLM's fused all-reduce:" if self.asked.mode == "guard" else "carried out by"
        who = f"{carrier} {self.collective}"
        if self.prepared is not None and not self.asked.fuses:
            why = "; ".join(one for one in self.prepared.why if not one.startswith("reference"))
            who = f"all of them are vLLM's own, because no kernels serve here ({why})"
        release = f"{vllm.__version__}{_unread(vllm.__version__)}"
        return (
            f"ringfence {__version__} in vLLM {release}: {self.asked.mode}, {fused}{who}; "
            f"captured: {self.captured}; hazards: {', '.join(self.hazards) or 'none'}"
            f"{'; steps are watched' if self.watched else ''}"
        )


def _unread(version: str) -> str:
    low, high = hooked.SUPPORTED
    try:
        read = in_range(version, low, high)
    except VersionError:  # somebody's own build
        read = False
    return "" if read else f" (read from {low} to before {high})"


def start(original: Callable[..., Any], wrapper: Any) -> Any:
    """Around ``WorkerWrapperBase.init_device``: every rank comes here, with its groups made and nothing loaded yet."""
    result = original(wrapper)
    asked = of_config(wrapper.vllm_config)
    if asked is None:
        return result
    from vllm.distributed import parallel_state

    config, group = wrapper.vllm_config, parallel_state.get_tp_group()
    running = Running(asked, config, group)
    _register_groups(parallel_state)
    if group.world_size > 1:
        _begin(running)
    wrapper.__dict__["_ringfence"] = running
    wrapper.__dict__[STATUS] = running.status
    worker = wrapper.worker
    worker.compile_or_warm_up_model = functools.partial(warm_up, worker.compile_or_warm_up_model, running, worker)
    return result


def _register_groups(parallel_state: Any) -> None:
    """Graphs name groups as vLLM does: those of this worker, which differ from another's by their ranks alone."""
    for name in hooked.GROUPS:
        try:
            group = getattr(parallel_state, name)()
        except (AttributeError, AssertionError):  # this release has no such group, or this model needs none
            continue
        if group.world_size > 1:
            register_group(group.unique_name, group.device_group)


def _begin(running: Running) -> None:
    asked, config, group = running.asked, running.config, running.group
    name, device = group.unique_name, torch.device(group.device)
    if asked.mode == "pass":
        wrap(hooked.CONFIGURE, passes.configure)
        given = asked.only(PREPARE) | {"max_tokens": running.largest}
        model = config.model_config
        running.prepared = prepare(name, model.get_hidden_size(), model.dtype, device=device, **given)
        running.asked = asked = passes.settle(config, asked, running.prepared)
    elif asked.mode == "backend":
        wrap(hooked.INIT_BACKEND, functools.partial(whole.init_backend, asked, running.reports.append))
    else:
        wrap(hooked.CREATE_WORKSPACE, _guarding(running))
        guard.make_ahead(config, group)
    wanted = asked.only(WATCH)
    if asked.mode == "guard":
        wanted = {"on_hang": "report"} | wanted
    asks = bool(set(wanted) - {"agree_seconds"})
    if asked.mode != "backend" and (asks or (asked.mode == "pass" and asked.fuses)):
        running.watch = watch(name, device=device, **wanted)  # where nobody asks, it starts no thread, writes no file
        running.watched = asks


def _guarding(running: Running) -> Callable[..., Any]:
    from vllm.config import CUDAGraphMode

    captured = running.config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    on_hazard = str(running.asked.options.get("on_hazard", "refuse"))
    supervised = Asked({}, **running.asked.only(("agree_seconds",)))

    tp, device = running.group, torch.device(running.group.device)

    def open_channel(group: Any) -> Channel:
        """vLLM gives the group of the hosts; that of the devices has the same ranks, and is watched."""
        same = group in (tp.cpu_group, tp.device_group)
        name = tp.unique_name if same else str(group.group_name)
        supervisor = supervisor_for(supervised)
        with supervisor.compiling(supervised), supervisor.compilation():
            return supervisor.open([describe_group(name, device)], device)[name]

    return functools.partial(guard.create_workspace, running.guarded, open_channel, device, on_hazard, captured)


def warm_up(original: Callable[..., Any], running: Running, worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the worker's ``compile_or_warm_up_model``: its caches exist, and what compiles has been compiled."""
    result = original(*args, **kwargs)
    if running.group.world_size > 1 and running.asked.mode == "pass":
        with _Counts() as counts:  # of what runs: a rank that loaded its graphs has no report of them
            _step(worker, running.largest, is_profile=True)
        running.fused, running.sums = counts.fused, counts.sums
    if running.asked.mode == "backend":
        sites = [site for report in running.reports for site in report.sites]
        running.fused = sum(site.fused for site in sites)
        running.sums = len(sites) - running.fused
        for size in sorted({size for report in running.reports for size in report.captured}, reverse=True):
            _step(worker, size)  # the call that captures is an ordinary one, and must not be a user's
    if running.group.rank_in_group == 0:
        log.info("%s", running.line)
    return result


def _step(worker: Any, tokens: int, *, is_profile: bool = False) -> None:
    """As vLLM warms up. is_profile: by no CUDA graph of vLLM's, in which nothing could be counted."""
    worker.model_runner._dummy_run(tokens, skip_eplb=True, is_profile=is_profile)


class _Counts(TorchDispatchMode):
    """What a step calls: fused all-reduces, and vLLM's own over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.sums = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo runs what it compiled under such a mode, and refuses to under another."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func in ops.FUSED
        self.sums += func is ops.all_reduce or func.name().partition(".")[0] in passes.ALL_REDUCES
        return func(*args, **(kwargs or {}))


def step(original: Callable[..., Any], wrapper: Any, scheduler_output: Any) -> Any:
    """Around ``WorkerWrapperBase.execute_model``: all ranks of the group make the same steps, in the same order."""
    running: Running | None = wrapper.__dict__.get("_ringfence")
    watched = running.watch if running is not None else None
    with _watched(watched, int(scheduler_output.total_num_scheduled_tokens)):
        return original(wrapper, scheduler_output)


@contextlib.contextmanager
def _watched(watched: Watch | None, tokens: int) -> Iterator[None]:
    if watched is None or not tokens:  # only bookkeeping: nothing is launched
        yield
        return
    with watched.step("step", tokens):
        yield
