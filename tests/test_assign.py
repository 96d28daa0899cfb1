"""Who carries out what: each group with sites has a collective of its own, and ranks come to them in one order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringfence.assign import assign
from ringfence.compile_passes.assignment import Assignment
from ringfence.compile_passes.find import find
from ringfence.compile_passes.fuse import SITE, fuse
from ringfence.compile_passes.groups import describe_groups
from ringfence.compile_passes.judge import judge
from ringfence.compile_passes.match import Site
from ringfence.compile_passes.report import CompileReport, GroupCollective
from ringfence.compile_passes.roles import c10d
from ringfence.options import Options
from ringfence.runtime.collectives.ready import ReadyCollective
from ringfence.runtime.errors import CollectiveUnavailableError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Situation
from ringfence.runtime.spelling import group_word
from support import aot_graph

H = 16
CPU = torch.device("cpu")


def layer(x: Tensor, r: Tensor, group: str) -> tuple[Tensor, Tensor]:
    r = r + c10d.wait_tensor(c10d.all_reduce(x.sin(), "sum", group))
    return F.rms_norm(r, (H,), None, 1e-6), r


def model(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    for group in ("1", "0", "1"):
        x, r = layer(x, r, group)
    return x, r


@pytest.fixture
def graph(fake_group: None) -> Any:
    assert dist.new_group([0, 1]).group_name == "1"
    return aot_graph(model, torch.randn(4, H), torch.randn(4, H))


class Peer:
    """A channel to another rank, which has so many sites in the group."""

    ranks = (0, 1)

    def __init__(self, sites: int) -> None:
        self.sites = sites

    def exchange(self, topic: str, value: Any) -> list[Any]:
        assert topic == "sites to fuse"
        return [value, (self.sites, value[1])]


def assigned(graph: Any, mine: tuple[str, ...], peer: dict[str, int], **options: Any) -> tuple[Assignment, list[str]]:
    """As a rank that has sites to fuse in ``mine`` only; and the groups that were made ready, in order."""
    groups, seen = describe_groups(graph, CPU), []
    candidates = [c if c.site.group in mine else replace(c, match=None) for c in find(graph)]

    def prepare(channel: Peer, group: Group, device: torch.device, wanted: Any) -> ReadyCollective:
        seen.append(group.name)
        return ReadyCollective(Collective.MNNVL, Situation(Collective.MNNVL, "0.7.0", world_size=group.size))

    supervisor = mock.Mock(probes={f"workspaces of group '{group_word(name)}'": None for name in groups})
    channels: Any = {name: Peer(peer[name]) for name in groups}
    with (
        mock.patch("ringfence.assign.why_reference_only", lambda group, device: None),
        mock.patch("ringfence.assign.prepare", prepare),
    ):
        return assign(candidates, groups, channels, CPU, Options.parse(options), supervisor), seen


def test_each_group_gets_a_collective_in_the_order_of_its_use(graph: Any) -> None:
    found, seen = assigned(graph, ("0", "1"), {"0": 1, "1": 2})
    assert seen == ["1", "0"] and list(found.groups) == ["1", "0"]
    assert found.names == {"1": "mnnvl", "0": "mnnvl"} and found.judged == "mnnvl"
    assert all(s.fused for s in fuse(graph, find(graph), collectives=found.names))
    verdicts = judge(graph, found, capture=True)
    assert [(v.group, v.rule) for v in verdicts] == [(g, "device_epoch") for g in ("1", "0", "1")]
    assert [n.args[-2:] for n in graph.graph.nodes if SITE in n.meta] == [(g, "mnnvl") for g in ("1", "0", "1")]


def test_no_rank_has_kernels_in_a_group_where_another_fuses_nothing(graph: Any) -> None:
    found, seen = assigned(graph, ("0", "1"), {"0": 0, "1": 2})
    assert seen == ["1"] and found.names == {"1": "mnnvl", "0": "reference"}
    assert "nothing is fused on rank 1" in str(found.ready["0"].candidates[0])
    found, seen = assigned(graph, ("1",), {"0": 1, "1": 2})  # as the other rank sees it
    assert seen == ["1"] and found.names == {"1": "mnnvl"}
    assert found.judged == "mnnvl" and found.collective("0") is Collective.REFERENCE
    found, seen = assigned(graph, (), {"0": 0, "1": 0})
    assert seen == [] and found.names == {} and found.judged == "reference"
    with pytest.raises(
        CollectiveUnavailableError, match=r"over group 'world': nothing is fused on rank 1.*option groups"
    ):
        assigned(graph, ("0", "1"), {"0": 0, "1": 2}, collective="mnnvl")


def test_the_report_tells_of_each_group() -> None:
    collectives = (GroupCollective("1", "mnnvl", ("mnnvl/peer: chosen",), 1 << 20), GroupCollective("0", "reference"))
    site = Site(0, "n", "all_reduce_rms_norm", None, "1", "bfloat16", 16, 1e-6, False, None, None)
    report = CompileReport((site,), (), (), {}, {}, None, collectives)
    assert report.summary.startswith("1 of 1 all-reduces fused (collective: mnnvl, reference over group 'world');")
    assert (report.collective, report.fused_bytes, report.candidates) == ("mnnvl", 1 << 20, ("mnnvl/peer: chosen",))
    data = report.to_dict()
    assert [(c["group"], c["collective"], c["fused_bytes"]) for c in data["collectives"]] == [
        ("1", "mnnvl", 1 << 20), ("0", "reference", None)
    ]  # fmt: skip
    assert "up to 1 MiB on a rank (32768 tokens of 16 bfloat16) over group '1'" in str(report)
    assert "collective mnnvl/peer: chosen (group '1')" in str(report)
