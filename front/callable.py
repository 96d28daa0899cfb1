"""The fused op as a function, and its collective made ready ahead: for engines that keep no graph.

    ringfence.prepare(group, hidden, dtype, max_tokens)                 # every rank, before captures and profiling
    norm, residual = ringfence.all_reduce_add_rms_norm(x, residual, weight, eps, group=group)

The functions run eagerly, may be traced (``torch.compile`` with any backend) and stand inside captures that somebody
else makes. Who carries them out is found at the call, through the group.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .assign import nccl_situation, ready_for, wanted_by
from .compile_passes.assignment import Assignment
from .compile_passes.fuse import SITE
from .compile_passes.judge import Decision, Verdict, judge
from .compile_passes.op_options import OnHazard
from .keywords import CollectiveName, Transport
from .options import Options
from .runtime.capturing import is_capturing
from .runtime.channel import Channel
from .runtime.collectives import ops
from .runtime.collectives.epilogue import DTYPES, Epilogue, RmsNorm
from .runtime.collectives.prepared import Prepared
from .runtime.collectives.ready import ReadyCollective
from .runtime.collectives.workspace import Workspaces, workspaces_of
from .runtime.errors import OptionsError, WorkspaceError
from .runtime.groups import Group, describe_group, device_for, name_of_group
from .runtime.replay.tape import Tape
from .runtime.watch.agree import PlanDigest, agree
from .runtime.watch.refusal import refused_by_all
from .runtime.watch.supervision import Asked
from .runtime.watch.supervisor import Supervisor, supervisor_for

_CALL = "ringfence.prepare"


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    group: dist.ProcessGroup | str | None = None,
) -> tuple[Tensor, Tensor]:
    """``(norm, sum)``: the sum of ``x`` over the ranks and the residual, and its RMSNorm, both new and contiguous.

    x: ``[..., hidden]``, float16, bfloat16 or float32. residual: of the same shape and dtype, or None for none.
    weight: ``[hidden]`` of the same dtype, or None for ones; ``weight_bias`` is added to it (1.0 for Gemma's).
    group: a process group, or its name; None is the default group. Every rank of it must make the call, in the same
    order. Roundings are those of :mod:`ringfence.runtime.collectives.reference`.

    Carried out by what :func:`prepare` chose, where it takes this shape and dtype, else by the reference.
    Raises :class:`InputError`, :class:`GroupError`, :class:`GradModeError`, and in a capture that may not hold the call
    :class:`CaptureError`.
    """
    name = name_of_group(group)
    if not is_traced(x):
        norm, summed = ops.normed(x, residual, weight, eps, weight_bias, name, ops.PREPARED)
        return norm, summed
    ops.check_is_number("eps", eps)
    ops.check_is_number("weight_bias", weight_bias)
    if residual is None:
        norm, summed = torch.ops.ringfence.all_reduce_rms_norm(x, weight, eps, weight_bias, name, ops.PREPARED)
    else:
        norm, summed = torch.ops.ringfence.all_reduce_add_rms_norm(
            x, residual, weight, eps, weight_bias, name, ops.PREPARED
        )
    return norm, summed


def all_reduce(x: Tensor, *, group: dist.ProcessGroup | str | None = None) -> Tensor:
    """The sum of ``x`` over the ranks of a group, in a new contiguous tensor. See :func:`all_reduce_add_rms_norm`."""
    name = name_of_group(group)
    if not is_traced(x):
        return ops.summed(x, name, ops.PREPARED)
    summed: Tensor = torch.ops.ringfence.all_reduce(x, name, ops.PREPARED)
    return summed


def is_traced(x: Tensor) -> bool:
    """Whether somebody writes down what is called, who is to see one op."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return True
    return any(not isinstance(mode, Tape) for mode in _get_current_dispatch_mode_stack())


def prepare(
    group: dist.ProcessGroup | str | None,
    hidden: int,
    dtype: torch.dtype,
    max_tokens: int,
    *,
    device: torch.device | str | None = None,
    collective: CollectiveName = "auto",
    transport: Transport = "auto",
    size_table: str | os.PathLike[str] | None = None,
    on_hazard: OnHazard = "split",
    agree_seconds: float = 600.0,
) -> Prepared:
    """Choose who carries out the calls of a group, make its workspace by vote and test it. Every rank must call.

    Before any capture, and before an engine measures how much memory is left: what it takes is in ``nbytes``.
    group: a process group, or its name; None is the default group. hidden, dtype, max_tokens: the largest call,
    ``[max_tokens, hidden]``. device: of the tensors; the current CUDA device where the group serves one, else the CPU.
    The others are the options of :class:`ringfence.Options`. ``ringfence.close_workspaces(group)`` undoes it.

    Raises :class:`OptionsError`, :class:`GroupError`, :class:`CollectiveUnavailableError`, :class:`HazardError`,
    :class:`RankMismatch` where ranks ask for different things, and :class:`WorkspaceError` inside a capture.
    """
    with refused_by_all(group, _CALL, agree_seconds):
        options = _checked(
            hidden, dtype, max_tokens, collective, transport, size_table, on_hazard, agree_seconds=agree_seconds
        )
        name = name_of_group(group)
        on = device_for(name, device)
        described = describe_group(name, on)
        if is_capturing(on):
            raise WorkspaceError("prepare was called inside a capture, where nothing may be made; call it before")
    asked = Asked({}, agree_seconds=options.agree_seconds)
    supervisor = supervisor_for(asked)
    with supervisor.compiling(asked, f"call {_CALL}"), supervisor.compilation():
        before = _free(on)
        ready = _ready(described, hidden, dtype, options, on, supervisor)
        verdict = _verdict(ready, described, hidden, dtype, on, on_hazard)
        found = _prepared(ready, verdict, described, hidden, dtype, max_tokens, max(0, before - _free(on)))
    workspaces_of(name).prepared[dtype] = found
    return found


def _checked(
    hidden: int,
    dtype: torch.dtype,
    max_tokens: int,
    collective: str,
    transport: str,
    size_table: str | os.PathLike[str] | None,
    on_hazard: str,
    **others: object,
) -> Options:
    if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
        raise OptionsError(f"hidden={hidden!r} is not a positive integer")
    if dtype not in DTYPES:
        raise OptionsError(f"dtype={dtype!r} is none of {', '.join(map(str, DTYPES))}")
    if on_hazard == "clean":
        raise OptionsError("on_hazard='clean' rewrites a graph, and there is none; use 'split', 'refuse' or 'raise'")
    given = {
        "collective": collective,
        "transport": transport,
        "size_table": size_table,
        "max_tokens": max_tokens,
        "on_hazard": on_hazard,
    }
    if max_tokens is None:
        raise OptionsError("max_tokens=None is not a positive integer")
    return Options.parse(given | others)


def _ready(
    group: Group, hidden: int, dtype: torch.dtype, options: Options, device: torch.device, supervisor: Supervisor
) -> ReadyCollective:
    channels = supervisor.open([group], device)
    parts = {"hidden": hidden, "dtype": dtype, "max_tokens": options.max_tokens, "collective": options.collective}
    if channels:
        told = tuple((name, str(value)) for name, value in parts.items())
        digest = PlanDigest(told, what=f"arguments of {_CALL}", arguments=True)
        agree(channels[group.name], supervisor.compared(digest))
    begin_anew(channels.get(group.name), workspaces_of(group.name))
    sizes = tuple(sorted({1, options.max_tokens or 1}))  # an engine captures several
    wanted = wanted_by(options, hidden, dtype, sizes)
    ready = ready_for(wanted, group, channels.get(group.name), device, options, supervisor)
    bare = Epilogue(norm=RmsNorm(0.0, has_weight=False))
    if ready.workspace is not None and not ready.workspace.implementation.takes(bare):
        # what calls without a residual or a weight need may not be made in a capture
        for constant in ("zeros", "ones"):
            ready.workspace.constant(constant, torch.empty(0, dtype=dtype, device=device), 0)
    return ready


def begin_anew(channel: Channel | None, workspaces: Workspaces) -> None:
    """Give back what a failure left behind, on any rank."""
    if channel is None:
        workspaces.invalid = None
        return
    left = next(filter(None, channel.exchange("workspaces that a failure left", workspaces.invalid)), None)
    if left is not None:
        workspaces.discard(channel, left)


def _verdict(
    ready: ReadyCollective, group: Group, hidden: int, dtype: torch.dtype, device: torch.device, on_hazard: str
) -> Verdict:
    """What the judge says of one call in a capture."""
    graph = Graph()
    with FakeTensorMode():
        value = torch.empty(1, hidden, dtype=dtype, device=device)
    operands = [graph.placeholder(name) for name in ("x", "residual", "weight")]
    for node in operands:
        node.meta["val"] = value
    call = graph.call_function(ops.all_reduce_add_rms_norm, (*operands, 1e-6, 0.0, group.name, str(ready.collective)))
    call.meta = {"val": (value, value), SITE: 0}
    graph.output((call,))
    of_group = {group.name: ready}
    assigned = Assignment({group.name: group}, of_group, None, nccl_situation({group.name: group}, of_group, None))
    (verdict,) = judge(GraphModule(torch.nn.Module(), graph), assigned, capture=True, on_hazard=on_hazard)
    return verdict


def _prepared(
    ready: ReadyCollective,
    verdict: Verdict,
    group: Group,
    hidden: int,
    dtype: torch.dtype,
    max_tokens: int,
    nbytes: int,
) -> Prepared:
    refused = verdict.decision is Decision.REFUSE
    workspace = ready.workspace if not refused else None
    earlier = workspaces_of(group.name).prepared.get(dtype)
    captured = verdict.decision is Decision.IN_GRAPH and (earlier is None or earlier.captured)
    return Prepared(
        group.name,
        str(ready.collective) if not refused else "reference",
        tuple(map(str, ready.candidates)),
        hidden,
        str(dtype).removeprefix("torch."),
        max_tokens,
        workspace.largest if workspace is not None else 0,
        nbytes,
        captured,
        f"{verdict.rule}: {verdict.message}",
        ready.notes,
    )


def _free(device: torch.device) -> int:
    """Bytes of the device that nobody has."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return int(torch.cuda.mem_get_info(device)[0])
