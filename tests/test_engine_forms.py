"""Engines' all-reduces and norms by their own names and schemas, through the backend; their groups by alias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from engine_forms import LISTED, H, auto_deploy, fused_once, rms_norm, run, sglang, sglang_in_place, trtllm, vllm
from engine_forms import tp as tp
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import ringfence
from ringfence.runtime.errors import GroupError, NotSavableError, OptionsError
from ringfence.runtime.groups import group_exists, register_group, resolve_group
from support import relative_error, start_fake_group

Sum = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.usefixtures("engines")


# -- all-reduces


@pytest.mark.parametrize(
    ("all_reduce", "group"),
    [(vllm, "tp:0"), (sglang, "tp:0"), (sglang_in_place, "tp:0"), (trtllm, "ranks:0,1"), (auto_deploy, "world")],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_each_all_reduce_is_fused_and_keeps_its_engines_name(
    all_reduce: Sum, group: str, tp: dist.ProcessGroup
) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(all_reduce(x), r, w)

    ways: list[dict[str, Any]] = [{"all_reduce_ops": LISTED, "group_names": {"tp:0": tp}}]
    if group == "tp:0":
        ways.append({"all_reduce_ops": {name: {"tp:0": "1"} for name in LISTED}})
        ways.append({"all_reduce_ops": dict.fromkeys(LISTED, "1")})
    for options in ways:
        report, graph = run(model, **options)
        assert fused_once(report) and report.sites[0].group == group, str(report)
        assert f"'{group}', 'reference'" in graph.code and "'1'" not in graph.code, graph.code
        assert "allreduce" not in graph.code and "auto_functionalized" not in graph.code, "nothing is reduced twice"
        json = report.to_dict()["options"]
        assert json["group_names"] in ({}, {"tp:0": "1"}), json


def test_a_registered_name_needs_no_option_and_one_op_serves_several_groups(tp: dist.ProcessGroup) -> None:
    ring: Any = engine_ops.op("vllm::all_reduce")
    ringfence.register_group("tp:0", tp)
    ringfence.register_group("ep:0", dist.new_group([0, 1]))

    def both(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, r = rms_norm(ring(x.sin(), "tp:0"), r, w)
        return rms_norm(ring(x.cos(), "ep:0"), r, w)

    report, graph = run(both, all_reduce_ops=["vllm::all_reduce"])
    assert [(s.group, s.fused) for s in report.sites] == [("tp:0", True), ("ep:0", True)]
    assert list(dict.fromkeys(c.group for c in report.collectives)) == ["tp:0", "ep:0"]
    assert graph.code.count("'tp:0'") == graph.code.count("'ep:0'") == 1
    only, _ = run(both, all_reduce_ops=["vllm::all_reduce"], groups=["1"])  # torch's name of tp:0
    assert [s.fused for s in only.sites] == [True, False] and not any("option groups" in n for n in only.notes)
    other, _ = run(both, all_reduce_ops=["vllm::all_reduce"], groups=["0"])
    assert any("option groups names ['0']" in n for n in other.notes)


def test_one_group_for_all_calls_holds_for_all_graphs_of_a_backend(tp: dist.ProcessGroup) -> None:
    """Each graph alone calls the op with one name; together they are two groups."""
    ring: Any = engine_ops.op("vllm::all_reduce")
    backend = ringfence.Backend(piece_compiler="eager", all_reduce_ops={"vllm::all_reduce": "1"})
    given = [torch.randn(s) for s in ((4, H), (4, H), (H,))]
    with torch.no_grad():
        compile = lambda name: torch.compile(  # noqa: E731
            lambda x, r, w: rms_norm(ring(x, name), r, w), backend=backend, fullgraph=True
        )
        compile("tp:0")(*given)
        with pytest.raises(BackendCompilerFailed, match=r"calls it with 'ep:0', another with 'tp:0'"):
            compile("ep:0")(*given)


def test_what_trtllm_asks_for_besides_a_sum_is_declined(tp: dist.ProcessGroup) -> None:
    for more, said in (({"op": 2}, "op=2"), ({"bias": torch.ones(H)}, "bias too")):

        def model(x: Tensor, r: Tensor, w: Tensor, more: Any = more) -> tuple[Tensor, Tensor]:
            return rms_norm(trtllm(x, **more), r, w)

        report, _ = run(model, all_reduce_ops=LISTED)
        (site,) = report.sites
        assert not site.fused and said in site.message, site.message


@torch.library.custom_op("forms_test::odd_all_reduce", mutates_args=())
def odd_all_reduce(stuff: Tensor, payload: Tensor, team: list[int], mode: str) -> list[Tensor]:
    return [payload + 0 * stuff.sum()]


@odd_all_reduce.register_fake
def _(stuff: Tensor, payload: Tensor, team: list[int], mode: str) -> list[Tensor]:
    return [torch.empty_like(payload)]


def odd(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(torch.ops.forms_test.odd_all_reduce(w, x * 2, [0, 1], "fast")[0], r, w)


def test_a_user_says_which_argument_is_what(tp: dist.ProcessGroup) -> None:
    name = "forms_test::odd_all_reduce"
    report, _ = run(odd, all_reduce_ops={name: "1"})
    assert not fused_once(report) and "payload too" in report.sites[0].message
    said = ringfence.AllReduceOp("payload", group="team", ignored=("stuff",))
    for row in (said, {"input": "payload", "group": "team", "ignored": ["stuff"]}):
        report, _ = run(odd, all_reduce_ops={name: row})
        assert fused_once(report) and report.sites[0].group == "ranks:0,1", str(report)
    assert report.to_dict()["options"]["all_reduce_ops"][name]["ignored"] == ["stuff"]
    report, _ = run(odd, all_reduce_ops={name: ringfence.AllReduceOp("payload", ignored=("stuff",), over=tp)})
    assert fused_once(report) and report.sites[0].group == "1", "a process group in place of its name"
    for wrong, message in (
        (ringfence.AllReduceOp("payload", group="crew"), "group names 'crew', which is no argument"),
        (ringfence.AllReduceOp("mode"), "input='mode' is str"),
        ({"input": "payload", "groups": "team"}, "it needs \\['input'\\]"),
        (ringfence.AllReduceOp(0), "whose fields are names of arguments"),  # type: ignore[arg-type]
        (ringfence.AllReduceOp("payload", over=0), "whose fields are names"),  # type: ignore[arg-type]
        (ringfence.AllReduceOp("payload", ignored="stuff"), "whose fields are names"),  # type: ignore[arg-type]
    ):
        with pytest.raises((BackendCompilerFailed, OptionsError), match=message):
            run(odd, all_reduce_ops={name: wrong})


def test_a_strategy_is_no_group_whatever_groups_are_called(tp: dist.ProcessGroup) -> None:
    """AutoDeploy's op takes no group; a mapping of its strategies to groups says nothing, and is not passed over."""
    register_group("AUTO", tp)
    name = "auto_deploy::trtllm_dist_all_reduce"

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(auto_deploy(x), r, w)

    for said, group in (({name}, "world"), ({name: tp}, "1"), ({name: {"AUTO": tp}}, None)):
        report, _ = run(model, all_reduce_ops=said)
        assert report.sites[0].group == group, str(report)
    assert not fused_once(report) and "names no process group; say which one" in report.sites[0].message

    def mine(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(torch.ops.forms_test.how_all_reduce(x * 2, "AUTO"), r, w)

    report, _ = run(mine, all_reduce_ops=["forms_test::how_all_reduce"])
    assert not fused_once(report) and "names no process group" in report.sites[0].message


@torch.library.custom_op("forms_test::how_all_reduce", mutates_args=())
def how_all_reduce(x: Tensor, strategy: str) -> Tensor:
    return x.clone()


how_all_reduce.register_fake(lambda x, strategy: torch.empty_like(x))


# -- names of groups


def test_names_that_are_no_groups(tp: dist.ProcessGroup) -> None:
    register_group("tp:0", tp)
    register_group("tp:0", "1")
    other = dist.new_group([0, 1])
    for name, group, message in (
        ("tp:0", other, r"'tp:0' stands for the group of ranks \[0, 1\] \(torch calls it '1'\) already"),
        ("0", tp, "'0' stands for"),
        ("", tp, "registered by a name"),
        (None, tp, "registered by a name"),
        ("ep:0", "nope", "'nope' is no process group"),
        ("ep:0", dist.GroupMember.NON_GROUP_MEMBER, "a rank outside registers nothing"),
    ):
        with pytest.raises(GroupError, match=message):
            register_group(name, group)  # type: ignore[arg-type]
    with pytest.raises(GroupError, match=r"no process group has these.*new_group\(\[0\]\)"):
        resolve_group("ranks:0")
    with pytest.raises(GroupError, match=r"register_group\('ep:0', process_group\)"):
        resolve_group("ep:0")
    for options, message in (
        ({"group_names": {"tp:0": 3}}, "does not map an engine's names"),
        ({"group_names": ["tp:0"]}, "does not map"),
        ({"group_names": {"": tp}}, "does not map"),
    ):
        with pytest.raises(OptionsError, match=message):
            ringfence.Backend(**options)
    with pytest.raises(BackendCompilerFailed, match=r"group_names: 'tp:0' stands for"):
        run(rms_norm, group_names={"tp:0": other})


def test_a_name_ends_with_its_group(tp: dist.ProcessGroup) -> None:
    register_group("tp:0", tp)
    dist.destroy_process_group(tp)
    assert not group_exists("tp:0")
    other = dist.new_group([0, 1])
    register_group("tp:0", other)
    assert resolve_group("tp:0") is other


def test_a_graph_of_another_process_runs_over_the_group_that_has_the_name_here(tp: dist.ProcessGroup) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, r = rms_norm(trtllm(x), r, w)
        return rms_norm(vllm(x), r, w)

    register_group("tp:0", tp)
    report, graph = run(model, all_reduce_ops=LISTED)
    assert [s.group for s in report.sites] == ["ranks:0,1", "tp:0"] and all(s.fused for s in report.sites)
    code, given = graph.code, [torch.randn(s) for s in ((4, H), (4, H), (H,))]
    assert not {"'0'", "'1'"} & set(code.replace(",", " ").replace(")", " ").split()), code
    placed = {n.name: a for n, a in zip(graph.graph.find_nodes(op="placeholder"), given, strict=True)}
    dist.destroy_process_group()
    start_fake_group(2)  # which the fixture destroys
    with pytest.raises(GroupError, match=r"register_group\('tp:0', process_group\)"):
        graph(*placed.values())
    register_group("tp:0", dist.new_group([0, 1]))
    assert len(graph(*placed.values())) == 2


# -- torch's aot_compile


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "in grad mode"])
def test_aot_compile_gets_something_that_says_it_cannot_be_saved(tmp_path: Any, grad: bool) -> None:
    weight = torch.randn(H, requires_grad=grad)
    backend = ringfence.Backend(piece_compiler="eager")
    for given in (backend, "ringfence"):
        with torch.set_grad_enabled(grad):
            options = {"options": {"piece_compiler": "eager"}} if given == "ringfence" else {}
            compiled = torch.compile(
                lambda x: F.rms_norm(x * 2, (H,), weight, 1e-6), backend=given, fullgraph=True, **options
            )
            x = torch.randn(4, H)
            saved = compiled.aot_compile(((x,), {}))
            assert relative_error(saved(x), F.rms_norm(x * 2, (H,), weight, 1e-6).double()) <= 1e-6
        with pytest.raises(NotSavableError, match="Compile it in each process"):
            saved.save_compiled_function(str(tmp_path / "model"))
    assert len(backend.reports) == 1
