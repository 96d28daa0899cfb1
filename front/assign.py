"""Assign: for each group with sites to fuse, the collective that carries them out, made ready on all its ranks."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from .compile_passes.assignment import Assignment
from .compile_passes.called import name_prepared
from .compile_passes.collectives import replace_plain_all_reduces
from .compile_passes.fuse import fuse
from .compile_passes.groups import collectives_of
from .compile_passes.judge import Decision, Verdict, judge
from .compile_passes.match import Candidate, Site
from .compile_passes.op_calls import op_names
from .compile_passes.outer import OuterCapture, outer_capture
from .compile_passes.ranges import is_within
from .compile_passes.reasons import Reason
from .compile_passes.report import GroupCollective
from .options import Options
from .runtime.channel import Channel
from .runtime.collectives.opt_outs import nccl_setting
from .runtime.collectives.probe import make_probe
from .runtime.collectives.ready import ReadyCollective, Wanted, prepare, reference_collective, why_reference_only
from .runtime.collectives.size_table import TABLE, read_table
from .runtime.collectives.tested import Operands
from .runtime.collectives.workspace import workspaces_of
from .runtime.errors import CollectiveUnavailableError, OptionsError
from .runtime.groups import Group, nccl_version
from .runtime.hazards.engine_default import barred_from_capture
from .runtime.hazards.situation import Collective, Situation, facts_of_nccl
from .runtime.replay.capture import CudaGraphs, GraphBackend, SimulatedGraphs
from .runtime.spelling import group_word, ranks_text
from .runtime.watch.supervisor import Supervisor


def assign(
    candidates: Sequence[Candidate],
    groups: Mapping[str, Group],
    channels: Mapping[str, Channel],
    device: torch.device,
    options: Options,
    supervisor: Supervisor,
    planned: Situation | None = None,
) -> Assignment:
    """Who carries out the sites of each group. Ranks come to the groups that they share in the order of their use.

    channels: by group, where there is somebody to talk to. planned: what sites are judged as, where nothing is to be
    made ready here. Raises what :func:`prepare` raises.
    """
    ready: dict[str, ReadyCollective] = {}
    left: dict[str, str] = {}
    for name, group in groups.items():
        sites = [c.site for c in candidates if c.fuses and c.site.group == name]
        if not any(c.site.group == name for c in candidates) or not (options.fuse or sites):
            continue
        summed = {c.site.dtype for c in candidates if c.site.group == name}
        why = why_reference_only(group, device) if planned is None else None
        if planned is not None or options.collective == "reference" or why is not None:
            missing = why
        else:
            operands = {c.operands for c in candidates if c.fuses and c.site.group == name}
            missing, of_all = _sites_of_all(channels[name], len(sites), operands)
            if missing is None and sites:
                wanted = replace(_wanted(sites, summed, options), operands=of_all)
                ready[name] = _prepare(wanted, group, channels[name], device, supervisor)
                if ready[name].workspace is None and options.collective == "auto":
                    left[name] = f"no kernels are to be had over group '{group_word(name)}'"
                continue
        if sites:
            _check_not_insisted(options, group, planned, missing)
            asked = _wanted(sites, summed, options) if planned is None else None
            ready[name] = reference_collective(group.size, missing, asked)
            if planned is None and options.collective == "auto" and device.type == "cuda":
                left[name] = f"no kernels are to be had over group '{group_word(name)}': {missing}"
    return Assignment(groups, ready, planned, nccl_situation(groups, ready, planned), left=left)


def name_collectives(
    gm: GraphModule, candidates: Sequence[Candidate], assigned: Assignment, options: Options
) -> list[Site]:
    """Fuse, and say in the graph who carries out fused sites, and plain all-reduces where that was asked for."""
    sites = fuse(gm, candidates, collectives=assigned.names)
    name_prepared(gm, assigned.names)
    if not options.plain_all_reduce:
        return sites
    keep = {s.node for s in sites if s.decline is not None and s.decline.reason is Reason.SWITCHED_OFF}
    keep |= {n.name for n in collectives_of(gm) if not set(op_names(n)).isdisjoint(options.split_ops)}
    for group, carrier in assigned.ready.items():
        if carrier.workspace is not None:
            worth = functools.partial(_plain_is_worth, assigned, group, options.deterministic)
            replace_plain_all_reduces(gm, group, str(carrier.collective), keep, worth=worth)
    return sites


def _plain_is_worth(assigned: Assignment, group: str, deterministic: bool, value: torch.Tensor) -> bool:
    """Whether the kernels of a group win at a sum of this graph without a norm, or its op has to look at each call."""
    hidden = value.shape[-1]
    limit = assigned.limit(group, hidden, value.dtype, alone=True) if isinstance(hidden, int) else None
    return deterministic or limit is None or is_within(value, limit.counts, group, assigned.groups) is not False


def ready_for(
    wanted: Wanted,
    group: Group,
    channel: Channel | None,
    device: torch.device,
    options: Options,
    supervisor: Supervisor,
) -> ReadyCollective:
    """The collective of one group, of which no graph is known. Every rank must call. Raises as :func:`assign`."""
    why = why_reference_only(group, device)
    if channel is None or options.collective == "reference" or why is not None:
        _check_not_insisted(options, group, None, why)
        return reference_collective(group.size, why, replace(wanted, max_tokens=None))  # which has to be given
    ready = _prepare(wanted, group, channel, device, supervisor)
    supervisor.waits.prepared(supervisor.deadlines.warm_up)
    return ready


def nccl_situation(
    groups: Mapping[str, Group], ready: Mapping[str, ReadyCollective], planned: Situation | None
) -> Situation | None:
    """What the hazard table is asked about NCCL's own collectives: on the nodes of whoever carries out the sites."""
    sizes = [group.size for group in groups.values() if group.backend == "nccl"]
    if not sizes:
        return None
    found = [planned] if planned is not None else [carrier.situation for carrier in ready.values()]
    like = max(found, key=lambda s: s.nodes, default=Situation(Collective.REFERENCE, world_size=max(sizes)))
    facts = facts_of_nccl(nccl_version(), nccl_setting("NCCL_GRAPH_REGISTER"))
    return replace(like, collective=Collective.NCCL, flashinfer=None, facts=facts)


def _sites_of_all(
    channel: Channel, sites: int, operands: Collection[Operands]
) -> tuple[str | None, tuple[Operands, ...]]:
    """Why no rank may have kernels though some have sites: others have none. None where all or none have some.

    And the operands of the sites of all ranks.
    """
    answers = channel.exchange("sites to fuse", (sites, tuple(sorted(operands))))
    without = [rank for rank, (count, _) in zip(channel.ranks, answers, strict=True) if not count]
    why = f"nothing is fused on {ranks_text(without)}" if 0 < len(without) < len(answers) else None
    return why, tuple(sorted({each for _, theirs in answers for each in theirs}))


def _check_not_insisted(options: Options, group: Group, planned: Situation | None, why: str | None) -> None:
    """Raises :class:`CollectiveUnavailableError` where the user asked for kernels that this group cannot have."""
    if planned is not None or group.size < 2:
        return
    if options.collective not in ("auto", "reference"):
        raise CollectiveUnavailableError(
            f"collective='{options.collective}' cannot be had over group '{group_word(group.name)}': {why}; leave it "
            "'auto' to fall back, or name the groups to fuse over in the option groups"
        )
    if options.deterministic:
        why = why or "collective='reference' is not shown to return the same bits"
        raise CollectiveUnavailableError(
            f"deterministic=True needs a fused kernel over group '{group_word(group.name)}': {why}; leave it out"
        )


def _wanted(sites: Sequence[Site], summed: Collection[str], options: Options) -> Wanted:
    """summed: the dtypes of all sums over the group."""
    most = Counter(site.dtype for site in sites).most_common(1)[0][0]
    others = tuple(getattr(torch, n) for n in ("float16", "bfloat16", "float32") if n in summed and n != most)
    hidden = max(site.hidden_size or 0 for site in sites)
    return replace(wanted_by(options, hidden, getattr(torch, most), options.capture_sizes), other_dtypes=others)


def wanted_by(options: Options, hidden: int, dtype: torch.dtype, sizes: Sequence[int]) -> Wanted:
    """What options ask of a group's collective. sizes: token counts that will be captured."""
    table = read_table(options.size_table) if options.size_table is not None else ()
    return Wanted(
        options.collective,
        options.transport,
        hidden=hidden,
        dtype=dtype,
        sizes=tuple(sizes),
        max_tokens=options.max_tokens,
        deterministic=options.deterministic,
        wait_seconds=options.kernel_wait_seconds or options.step_seconds / 2,
        table=(*table, *TABLE),
        alone=options.plain_all_reduce,
    )


@contextlib.contextmanager
def real_memory(group: Group, device: torch.device, supervisor: Supervisor) -> Iterator[None]:
    """Around real memory of a group and real launches, in a trace with fake tensors; a hang looks at it."""
    supervisor.health.share(workspaces_of(group.name))
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad(), here:
        if (probed := f"workspaces of group '{group_word(group.name)}'") not in supervisor.probes:
            supervisor.probes[probed] = make_probe(group.name, device)
        yield


def _prepare(
    wanted: Wanted, group: Group, channel: Channel, device: torch.device, supervisor: Supervisor
) -> ReadyCollective:
    with real_memory(group, device, supervisor):
        ready = prepare(channel, group, device, wanted)
        if ready.workspace is not None:
            supervisor.waits.add(group.name, workspaces_of(group.name), wanted.wait_seconds)
        return ready


def check_deterministic(sites: Sequence[Site], verdicts: Sequence[Verdict], assigned: Assignment) -> None:
    """Raises :class:`CollectiveUnavailableError` for a fused site that another kernel would carry out."""
    refused = {v.site for v in verdicts if v.decision is Decision.REFUSE}
    for site in sites:
        if not site.fused or assigned.planned is not None or assigned.groups[str(site.group)].size < 2:
            continue
        carrier, hidden, dtype = assigned.ready[str(site.group)], site.hidden_size or 0, getattr(torch, site.dtype)
        serves = carrier.workspace is not None and carrier.workspace.strategy(1, hidden, dtype)
        if site.index in refused or not serves:
            raise CollectiveUnavailableError(
                f"deterministic=True: {carrier.collective} does not carry out site {site.index} "
                f"({site.source or site.node}; group '{group_word(site.group)}', hidden size {hidden}, "
                f"{site.dtype}), and the reference is not shown to return the same bits; leave deterministic out"
            )


def judge_outer(gm: GraphModule, assigned: Assignment, verdicts: Sequence[Verdict], options: Options) -> OuterCapture:
    """What a capture may hold that somebody else makes around a graph. verdicts: those that the graph follows."""
    if not options.outer_capture:  # nobody has asked yet
        on_hazard = "split" if options.on_hazard == "raise" else options.on_hazard
        verdicts = judge(
            gm,
            assigned,
            capture=True,
            split_ops=options.split_ops,
            all_reduce_ops=options.all_reduce_ops,
            on_hazard=on_hazard,
            profile=options.profile,
        )
    return outer_capture(gm, assigned, verdicts)


def described(assigned: Assignment) -> tuple[GroupCollective, ...]:
    """Who carries out what, for the report."""
    return tuple(
        GroupCollective(
            group,
            str(carrier.collective),
            tuple(map(str, carrier.candidates)),
            carrier.workspace.largest if carrier.workspace is not None else None,
        )
        for group, carrier in assigned.ready.items()
    )


def graphs_for(options: Options, device: torch.device, assigned: Assignment) -> GraphBackend | None:
    """What captures; None where the profile bars it, or where this device has no graphs and none were simulated."""
    wanted = options.graphs
    if wanted == "cuda" and device.type != "cuda":
        raise OptionsError(f"graphs='cuda', and the inputs are on {device}; use graphs='auto' or 'simulated'")
    if options.profile == "conservative" and barred_from_capture(assigned.judged_collectives):
        return None
    if wanted == "simulated":
        return SimulatedGraphs()
    if device.type != "cuda":
        return None
    return CudaGraphs(device, assigned.words)
