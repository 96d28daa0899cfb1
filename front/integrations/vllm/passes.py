"""Pass mode: find and fuse, as the last pass of vLLM's own pass manager.

The pass runs where a graph is compiled, and not where it is loaded from a cache: a rank may do the one and its peer the
other. So it is a function of the graph, the options and what a worker prepared before (:mod:`.worker`), asks nobody,
makes nothing, and leaves an op that finds everything when it is called: the group by vLLM's name, and the collective as
"prepared".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from ...compile_passes.find import find
from ...compile_passes.fuse import fuse
from ...compile_passes.match import Site
from ...compile_passes.norm_ops import norm_ops_of
from ...compile_passes.switch_off import switch_off
from ...options import Options
from ...runtime.collectives import ops
from ...runtime.collectives.prepared import Prepared
from .digest import digest_of
from .request import FIND, KEY, Request, of_config

log = logging.getLogger("vllm.ringfence")

#: vLLM's all-reduce: it takes the name of the group, which stays in the graph.
ALL_REDUCES: dict[str, Any] = {"vllm::all_reduce": None}
#: Its own passes for the same sites.
_THEIRS = ("AllReduceFusionPass", "RocmAiterAllReduceFusionPass")


def configure(original: Callable[..., None], manager: Any, config: Any) -> None:
    """Around ``PostGradPassManager.configure``: its own fusion of all-reduces goes, ours comes last.

    Where no kernels were prepared, vLLM's passes and its all-reduce stay as they are.
    """
    original(manager, config)
    asked = of_config(config)
    if asked is None or asked.mode != "pass" or not asked.fuses:
        return
    kept = [one for one in manager.passes if type(one).__name__ not in _THEIRS and not isinstance(one, FusePass)]
    kind = str(config.device_config.device_type)
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    manager.passes = [*kept, FusePass(asked, device)]


def settle(config: Any, asked: Request, prepared: Prepared) -> Request:
    """The request as a worker knows it, in its configuration too: before anything is compiled, on all ranks alike.

    Steps that the kernels do not take get a graph of their own, in which nothing is fused. The reference takes all.
    """
    takes, up_to = prepared.largest // prepared.row_bytes, asked.up_to
    most = int(config.scheduler_config.max_num_batched_tokens)
    if not asked.asks_for_reference and 0 < takes < (most if up_to is None else min(most, up_to)):
        up_to, compilation = takes, config.compilation_config
        compilation.compile_ranges_endpoints = sorted({*(compilation.compile_ranges_endpoints or (most,)), takes})
    asked = replace(asked, up_to=up_to, prepared=prepared.collective if takes else "reference")
    asked = replace(asked, digest=digest_of(asked))
    config.additional_config[KEY] = asked.for_config()  # in place: copies of the configuration share it
    return asked


class FusePass(CustomGraphPass):
    """What vLLM calls with each piece of a graph, between its fusions and the lowering of its IR."""

    def __init__(self, asked: Request, device: torch.device) -> None:
        self._options = Options.parse(asked.only(FIND))
        self._uuid = digest_of(asked, device)
        self._up_to = asked.up_to

    def uuid(self) -> str:
        """Of sources, options, FlashInfer, torch, device, size table and collective: Inductor's caches ask for it."""
        return self._uuid

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """vLLM asks this of its passes. The fused op takes every size, and is worth it up to one."""
        return self._up_to is None or compile_range.end <= self._up_to

    def __call__(self, graph: Graph) -> None:
        sites = self.fuse(graph)
        for site in sites:
            if site.decline is not None:
                log.debug("ringfence: site %d stays as it is: %s", site.index, site.decline)

    def fuse(self, graph: Graph) -> list[Site]:
        """Rewrite the graph; its sites, fused or declined."""
        gm, options = graph.owning_module, self._options
        assert gm is not None, "Inductor's graphs belong to a module"
        found = find(
            gm,
            strict=options.numerics == "strict",
            all_reduce_ops=ALL_REDUCES,
            norm_ops=norm_ops_of(gm, options.norm_ops),
        )
        if not found:
            return []
        candidates = switch_off(found, fuse=True, skip_sites=options.skip_sites)
        groups = {c.site.group for c in candidates if c.site.group is not None}
        return fuse(gm, candidates, collectives=dict.fromkeys(groups, ops.PREPARED))
