"""A group is known by any of its names, wherever a user gives one; and what is no group's name is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import ringfence
from ringfence.runtime.collectives import ops
from ringfence.runtime.collectives.workspace import workspaces_of
from support import aot_graph, start_fake_group

H = 16
pytestmark = pytest.mark.usefixtures("fake_group", "engines")


def names() -> list[Any]:
    """What the default group is called, and the group itself."""
    ringfence.register_group("tp:0", dist.group.WORLD)
    return ["0", "world", "tp:0", "ranks:0,1", dist.group.WORLD]


def by_torchs_name(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = funcol.all_reduce(x * 2, "sum", "0") + r
    return F.rms_norm(h, (H,), w, 1e-6), h


def by_engines_name(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = engine_ops.op("vllm::all_reduce")(x * 2, "tp:0") + r
    return F.rms_norm(h, (H,), w, 1e-6), h


def called(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = ringfence.all_reduce(x * 2) + r  # which a graph calls "world"
    return F.rms_norm(h, (H,), w, 1e-6), h


def given() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, H), torch.randn(4, H), torch.rand(H)


MODELS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (by_torchs_name, {}),
    (by_engines_name, {"all_reduce_ops": ["vllm::all_reduce"]}),
    (called, {}),
]


def carriers(gm: GraphModule) -> list[Any]:
    return [node.args[-1] for node in gm.graph.nodes if node.target in ops.OPS]


@pytest.mark.parametrize(("model", "options"), MODELS, ids=["torch", "engine", "called"])
def test_single_passes_know_a_group_by_each_of_its_names(model: Callable[..., Any], options: dict[str, Any]) -> None:
    graph = aot_graph(model, *given())
    for name in names():
        assert [c.fuses for c in ringfence.find(graph, groups=[name], **options)] == [True], name
    for name in names():
        graph = aot_graph(model, *given())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ringfence.fuse(graph, ringfence.find(graph, **options), collectives={name: "prepared"})
        assert carriers(graph) == ["prepared"], name


@pytest.mark.parametrize(("model", "options"), MODELS, ids=["torch", "engine", "called"])
def test_the_backend_knows_it_by_each(model: Callable[..., Any], options: dict[str, Any]) -> None:
    for name in names():
        torch._dynamo.reset()
        backend = ringfence.Backend(piece_compiler="eager", groups=[name], **options)
        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*given())
        (report,) = backend.reports
        assert report.sites[0].fused and not any("option groups" in note for note in report.notes), str(report)


def test_so_do_all_that_take_a_group() -> None:
    x, _, _ = given()
    here = workspaces_of("0")
    for name in names():
        ringfence.prepare(name, H, torch.float32, 8)
        assert here.prepared.keys() == {torch.float32}, name
        assert torch.equal(ringfence.all_reduce(x, group=name), x)
        ringfence.watch(name).close()
        ringfence.close_workspaces(name)
        assert not here.prepared, name
        ringfence.register_group("tp:0", name)
        for options in ({"all_reduce_ops": {"vllm::all_reduce": name}}, {"group_names": {"ep:0": name}}):
            torch._dynamo.reset()
            backend = ringfence.Backend(piece_compiler="eager", **{"all_reduce_ops": ["vllm::all_reduce"]} | options)
            with torch.no_grad():
                torch.compile(by_engines_name, backend=backend, fullgraph=True)(*given())
            assert backend.reports[0].sites[0].fused, name
    with pytest.raises(ringfence.GroupError, match="'world' stands for the group of ranks"):
        ringfence.register_group("world", dist.new_group([0]))


def test_no_group_is_the_default_one_and_sites_are_fused_once() -> None:
    ringfence.prepare(None, H, torch.float32, 8)
    ringfence.close_workspaces()
    assert not workspaces_of("0").prepared
    graph = aot_graph(by_torchs_name, *given())
    found = ringfence.find(graph)
    ringfence.fuse(graph, found)
    with pytest.raises(ringfence.GraphMetadataError, match=r"site 0 is fused already; call find\(gm\) again"):
        ringfence.fuse(graph, found)


def test_an_op_between_pieces_that_sites_have_fused_is_noted() -> None:
    ringfence.register_group("tp:0", dist.group.WORLD)
    for split, noted in (("vllm::all_reduce", True), ("ringfence::all_reduce_add_rms_norm", False)):
        torch._dynamo.reset()
        backend = ringfence.Backend(piece_compiler="eager", all_reduce_ops=["vllm::all_reduce"], split_ops=[split])
        with torch.no_grad():
            torch.compile(by_engines_name, backend=backend, fullgraph=True)(*given())
        (report,) = backend.reports
        said = [note for note in report.notes if "split_ops names" in note]
        assert len(said) == noted and report.sites[0].fused, report.notes
        if noted:
            assert (
                "vllm::all_reduce, which sites of this graph have fused" in said[0] and "(ringfence::all_r" in said[0]
            )
        else:
            assert [v.rule for v in report.verdicts if v.site == 0] == ["split_op"], "as the note says"


def test_calls_of_one_group_by_two_names_have_one_collective() -> None:
    from ringfence.compile_passes.called import name_prepared

    def both(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return *by_torchs_name(x, r, w), ringfence.all_reduce(x)

    graph = aot_graph(both, *given())
    ringfence.fuse(graph, ringfence.find(graph), collectives={"0": "trtllm"})
    assert name_prepared(graph, {"0": "trtllm"}) == 1
    assert carriers(graph) == ["trtllm", "trtllm"]


def test_what_names_no_group_is_told() -> None:
    names()
    other = dist.new_group([0, 1])

    def fused(collectives: Any) -> list[Any]:
        graph = aot_graph(by_torchs_name, *given())
        ringfence.fuse(graph, ringfence.find(graph), collectives=collectives)
        return carriers(graph)

    for wrong, kind, message in (
        ({"wrold": "prepared"}, ringfence.GroupError, r"group 'wrold' does not exist in this process"),
        ({3: "prepared"}, ringfence.GroupError, "3 is no process group"),
        ({"ranks:0,x": "prepared"}, ringfence.GroupError, "'ranks:0,x' does not exist"),
        ({"world": "prepared", "0": "reference"}, ringfence.GroupError, r"one group is given as \['world', '0'\]"),
        ({"0": "prepraed"}, ringfence.OptionsError, "'prepraed', which is none of"),
        ({"0": None}, ringfence.OptionsError, "None, which is none of"),
        ("prepared", ringfence.ArgumentError, r"no mapping from groups .* \{'world': 'prepared'\}"),
    ):
        with pytest.raises(kind, match=message):
            fused(wrong)
    with pytest.warns(ringfence.NotFusedWarning, match=r"names \['1'\], .* sites over \['world'\] are the reference's"):
        assert fused({other: "prepared"}) == ["reference"]
    assert fused({other: "prepared", "world": "prepared"}) == ["prepared"], "a group may have no site in a graph"
    graph = aot_graph(by_torchs_name, *given())
    with pytest.raises(ringfence.OptionsError, match="groups is empty"):
        ringfence.find(graph, groups=[])
    (candidate,) = ringfence.find(graph, groups=["wrold", other])
    assert candidate.site.decline is not None and "only ['1', 'wrold']" in candidate.site.decline.message
    backend = ringfence.Backend(piece_compiler="eager", groups=["wrold", other])
    with torch.no_grad():
        torch.compile(by_torchs_name, backend=backend, fullgraph=True)(*given())
    (note, *_) = backend.reports[0].notes
    assert "names ['wrold', '1'], and" in note and note.endswith("; ['wrold'] are no groups of this process"), note


def test_without_process_groups_names_are_names() -> None:
    graph = aot_graph(by_torchs_name, *given())
    dist.destroy_process_group()
    try:
        assert ringfence.find(graph, groups=["0"])[0].fuses and not ringfence.find(graph, groups=["world"])[0].fuses
        with pytest.raises(ringfence.GroupError, match="no process group is initialised"):
            ringfence.fuse(graph, ringfence.find(graph), collectives={"world": "prepared"})
        ringfence.fuse(graph, ringfence.find(graph), collectives={"0": "prepared"})
        assert carriers(graph) == ["prepared"]
    finally:
        start_fake_group()
