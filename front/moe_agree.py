"""MoE agree: a rank rewrites the exchanges of its experts where all ranks of their group do, and only there.

A dispatch meets a dispatch, and a gather a gather. What each rank reads of its own experts may differ: a placement that
is not in blocks is seen by some ranks, and a trial may fail on one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from .compile_passes.groups import groups_of
from .compile_passes.moe_choice import agreed, said_of
from .compile_passes.moe_rewrite import dispatch_experts
from .compile_passes.moe_sites import MoeCandidate, MoeSite
from .moe_assign import where_faster
from .options import Options
from .runtime.channel import Channel
from .runtime.groups import Group, same_groups
from .runtime.watch.supervisor import Supervisor


def dispatch_where_agreed(
    gm: GraphModule,
    groups: Mapping[str, Group],
    channels: Mapping[str, Channel],
    device: torch.device,
    options: Options,
    supervisor: Supervisor | None = None,
) -> list[MoeSite]:
    """Rewrite the MoE sites of a graph as options say, where all ranks of a site's group do; the sites, in order.

    channels: by group, where there is somebody to talk to; each has one exchange, also of ranks that see no site.
    supervisor: of whoever makes kernels ready; without one, nobody asks whether there are any.
    """

    def agree(candidates: list[MoeCandidate]) -> list[MoeCandidate]:
        for group, channel in channels.items():
            answers = channel.exchange("experts to dispatch", said_of(gm, candidates, group))
            candidates = agreed(gm, candidates, group, dict(zip(channel.ranks, answers, strict=True)))
            if supervisor is not None:
                candidates = where_faster(candidates, groups[group], groups, channel, device, options, supervisor)
        return candidates

    return dispatch_experts(
        gm,
        groups,
        device,
        rewrite=options.moe_dispatch,
        experts_ops=options.experts_ops,
        strict=options.numerics == "strict",
        verify=options.verify,
        only=same_groups(groups_of(gm), options.groups) if options.groups is not None else None,
        skip_sites=options.skip_sites,
        split_ops=options.split_ops,
        agree=agree,
    )
