"""MoE assign: for each group with dispatches and combines, who carries them out, made ready on all its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import GraphModule

from .assign import real_memory
from .compile_passes.assignment import Assignment
from .compile_passes.moe_calls import calls_of, carried_out_by, in_pairs, sizes_of, sizes_of_sites
from .compile_passes.moe_sites import MoeCandidate
from .compile_passes.ranges import is_within
from .compile_passes.reasons import Decline, Reason
from .compile_passes.roles import arguments, tensor
from .options import Options
from .runtime.channel import Channel
from .runtime.collectives.moe_one_sided import MoeSizes
from .runtime.collectives.moe_ready import (
    REFERENCE,
    MoeReady,
    MoeWanted,
    prepare_moe,
    ready_by,
    reference_pair,
    without_kernels,
)
from .runtime.collectives.ready import why_reference_only
from .runtime.collectives.size_table import MOE_TABLE, read_moe_rows
from .runtime.collectives.workspace import workspaces_of
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
            found[name] = without_kernels(options.moe_collective, group, sizes if isinstance(sizes, str) else None)
        else:
            found[name] = ready_pair(_wanted(sizes, options), group, channels.get(name), device, supervisor)
        carried_out_by(calls, found[name].collective, fuses=options.piece_compiler == "inductor")
    return replace(assigned, moe=found)


def where_faster(
    candidates: list[MoeCandidate],
    group: Group,
    groups: Mapping[str, Group],
    channel: Channel,
    device: torch.device,
    options: Options,
    supervisor: Supervisor,
) -> list[MoeCandidate]:
    """The candidates; those of a group of GPUs that no kernels would carry out stay gathers, unless options insist.

    The reference sends no less than a gather and a reduce-scatter do. Where the token count is a size of the call, the
    graph becomes one for those that kernels take, or for more, as with all-reduces. groups: all of the graph. Every
    rank must call, with the same sites.
    """
    mine = [c for c in candidates if c.match is not None and c.site.group == group.name]
    if not mine or options.moe_collective != "auto" or why_reference_only(group, device) is not None:
        return candidates
    sizes, largest, why = sizes_of_sites([c.match for c in mine if c.match is not None], _capacities(options)), 0, ""
    if isinstance(sizes, MoeSizes):
        ready = ready_pair(_wanted(sizes, options), group, channel, device, supervisor)
        largest = ready.workspace.sizes.capacity if ready.workspace is not None else 0
        why = next((c.why_not for c in ready.candidates if c.why_not is not None), "")
    no_kernel = Decline(Reason.NO_KERNEL, f"no kernels carry out a dispatch here: {why or sizes}")
    beyond = Decline(
        Reason.BEYOND_TABLE,
        f"this graph is for more than the {largest} tokens that kernels were measured or have memory for",
    )

    def decided(candidate: MoeCandidate) -> MoeCandidate:
        if candidate not in mine or candidate.match is None:
            return candidate
        if not largest:
            return candidate.declined(no_kernel)
        ids = tensor(arguments(arguments(candidate.match.ids)[0])[0])  # [tokens, top_k] of this rank, as of all
        within = is_within(ids, (range(1, largest + 1),), group.name, groups)
        return candidate if within is not False else candidate.declined(beyond)  # the op looks again where it is open

    return [decided(candidate) for candidate in candidates]


def _wanted(sizes: MoeSizes, options: Options) -> MoeWanted:
    capture = bool(options.capture_sizes) or options.outer_capture
    table = read_moe_rows(options.size_table) if options.size_table is not None else ()
    return MoeWanted(options.moe_collective, sizes, options.moe_workspace_bytes, capture, (*table, *MOE_TABLE))


def _capacities(options: Options) -> tuple[int, ...]:
    return (*options.capture_sizes, *([options.max_tokens] if options.max_tokens is not None else []))


def ready_pair(
    wanted: MoeWanted, group: Group, channel: Channel | None, device: torch.device, supervisor: Supervisor
) -> MoeReady:
    """Who carries out the pairs of one group. Every rank must call. Raises what :func:`prepare_moe` raises."""
    why = why_reference_only(group, device)
    if channel is None or wanted.collective == REFERENCE or why is not None:
        return without_kernels(wanted.collective, group, why)
    with real_memory(group, device, supervisor):
        return prepare_moe(channel, group, device, wanted)
