"""MoE assign: for each group with dispatches and combines, who carries them out, made ready on all its ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from .compile_passes.assignment import Assignment
from .compile_passes.moe_calls import calls_of, carried_out_by, in_pairs, sizes_of
from .options import Options
from .runtime.channel import Channel
from .runtime.collectives.moe_ready import (
    MOE,
    REFERENCE,
    MoeReady,
    MoeWanted,
    prepare_moe,
    ready_by,
    reference_pair,
)
from .runtime.collectives.probe import make_probe
from .runtime.collectives.ready import why_reference_only
from .runtime.collectives.workspace import workspaces_of
from .runtime.errors import CollectiveUnavailableError
from .runtime.groups import Group
from .runtime.watch.supervisor import Supervisor


def assign_moe(
    gm: GraphModule,
    assigned: Assignment,
    channels: Mapping[str, Channel],
    device: torch.device,
    options: Options,
    supervisor: Supervisor,
) -> Assignment:
    """``assigned`` with who carries out the dispatches and combines of each group, which their nodes name from now on.

    Halves of a pair that lie in different graphs stay "prepared": who has them is found at the call, as it is where the
    other half is called eagerly. Raises what :func:`prepare_moe` raises.
    """
    found: dict[str, MoeReady] = {}
    for name, calls in calls_of(gm).items():
        group = assigned.groups[name]
        if not in_pairs(calls):
            prepared = workspaces_of(group.name).moe_prepared
            found[name] = ready_by(prepared) if prepared is not None else reference_pair(group.size)
            continue
        sizes = sizes_of(calls, _capacities(options))
        if isinstance(sizes, str) or assigned.planned is not None:
            found[name] = _without_kernels(options.moe_collective, group, sizes if isinstance(sizes, str) else None)
        else:
            capture = bool(options.capture_sizes) or options.outer_capture
            wanted = MoeWanted(options.moe_collective, sizes, options.moe_workspace_bytes, capture)
            found[name] = ready_pair(wanted, group, channels.get(name), device, supervisor)
        carried_out_by(calls, found[name].collective)
    return replace(assigned, moe=found)


def _capacities(options: Options) -> tuple[int, ...]:
    return (*options.capture_sizes, *([options.max_tokens] if options.max_tokens is not None else []))


def _without_kernels(wanted: str, group: Group, why: str | None) -> MoeReady:
    if wanted == MOE and why is not None and group.size > 1:
        raise CollectiveUnavailableError(
            f"moe_collective='{MOE}' cannot be had over group '{group.name}': {why}; leave it 'auto' to fall back"
        )
    return reference_pair(group.size, why)


def ready_pair(
    wanted: MoeWanted, group: Group, channel: Channel | None, device: torch.device, supervisor: Supervisor
) -> MoeReady:
    """Who carries out the pairs of one group. Every rank must call. Raises what :func:`prepare_moe` raises."""
    why = why_reference_only(group, device)
    if channel is None or wanted.collective == REFERENCE or why is not None:
        return _without_kernels(wanted.collective, group, why)
    supervisor.health.share(workspaces_of(group.name))
    # Real memory and real launches, in the midst of a trace with fake tensors.
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad(), here:
        if (probed := f"workspaces of group '{group.name}'") not in supervisor.probes:
            supervisor.probes[probed] = make_probe(group.name, device)
        return prepare_moe(channel, group, device, wanted)
