"""Engines' all-reduces and norms by their own names and schemas, through the backend; their groups by alias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.norm_ops import KNOWN, NormOp, check_row, installed_ops, read_schema
from ringfence.compile_passes.report import CompileReport
from ringfence.runtime.errors import GroupError, NotSavableError, OptionsError
from ringfence.runtime.groups import group_exists, register_group, resolve_group
from support import TOLERANCE, aot_graph, relative_error, start_fake_group

H = 16
Sum = Callable[[Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("engines")


@pytest.fixture
def tp(fake_group: None) -> dist.ProcessGroup:
    """An engine's group, which torch numbers."""
    group = dist.new_group([0, 1])
    assert group.group_name == "1"
    return group


def vllm(x: Tensor) -> Tensor:
    return engine_ops.op("vllm::all_reduce")(x * 2, "tp:0")


def sglang(x: Tensor) -> Tensor:
    return engine_ops.op("sglang::outplace_all_reduce")(x * 2, "tp:0", "auto")


def sglang_in_place(x: Tensor) -> Tensor:
    y = x * 2
    engine_ops.op("sglang::inplace_all_reduce")(y, "tp:0")
    return y


def trtllm(x: Tensor, op: int = 0, **tensors: Tensor) -> Tensor:
    given = [tensors.get(n) for n in ("residual", "norm_weight", "scale", "bias")]
    workspace = torch.zeros(8, dtype=torch.int64)
    return engine_ops.op("trtllm::allreduce")(x * 2, *given, workspace, [0, 1], 3, op, 1e-6, True)[0]


def auto_deploy(x: Tensor) -> Tensor:
    return engine_ops.op("auto_deploy::trtllm_dist_all_reduce")(x * 2, "AUTO")


LISTED = [engine_ops.name_of(schema) for schema in engine_ops.ALL_REDUCES]


def rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return F.rms_norm(h, (H,), w, 1e-6), h


def run(
    model: Callable[..., Any], *args: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[CompileReport, GraphModule]:
    """The report and the fused graph, whose results are compared with eager's."""
    given = args or tuple(torch.randn(shape).to(dtype) for shape in ((4, H), (4, H), (H,)))
    graphs: dict[str, GraphModule] = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("ringfence.backend.dump_graph", lambda stage, gm: graphs.__setitem__(stage, gm))
        backend = ringfence.Backend(piece_compiler="eager", **options)
        torch._dynamo.reset()
        ours = torch.compile(model, backend=backend, fullgraph=True)(*(a.clone() for a in given))
        wanted = model(*(a.clone() for a in given))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert relative_error(mine, theirs.double()) <= 2 * TOLERANCE[dtype]
    (report,) = backend.reports
    return report, graphs["fused"]


def fused_once(report: CompileReport) -> bool:
    (site,) = report.sites
    return site.fused


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


# -- norms


@pytest.mark.parametrize("schema", engine_ops.NORMS, ids=engine_ops.name_of)
def test_each_norm_is_fused(schema: str, tp: dist.ProcessGroup) -> None:
    name, more = engine_ops.name_of(schema), ([True] if "pdl" in schema else [])
    norm: Any = engine_ops.op(name)
    register_group("tp:0", tp)

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, r = vllm(x), r.clone()
        if "b!" in schema:
            norm(x, r, w, 1e-5, *more)
            return x, r
        if "(Tensor, Tensor)" in schema:
            return norm(x, r, w, 1e-5)  # type: ignore[no-any-return]
        h = x + r
        if "a!" in schema:
            out = torch.empty_like(h)
            norm(out, h, w, 1e-5, *more)
            return out, h
        return norm(h, w, 1e-5), h

    for dtype in (torch.float32, torch.bfloat16):
        report, graph = run(model, dtype=dtype, all_reduce_ops=LISTED)
        assert fused_once(report) and report.sites[0].eps == 1e-5, str(report)
        bias = float("gemma" in name)
        assert (
            f", 1e-05, {bias}, 'tp:0', 'reference')" in graph.code and f"ops.{name.split('::')[0]}." not in graph.code
        )


def test_known_norms_fit_the_schemas_that_are_installed() -> None:
    rows = installed_ops()
    assert {engine_ops.name_of(schema) for schema in engine_ops.NORMS} == rows.keys() == KNOWN.keys()
    for name, row in rows.items():
        assert isinstance(row, NormOp), row
        first = engine_ops.op(name).overloads()[0]
        assert check_row(row, getattr(engine_ops.op(name), first)._schema) is None
    schema = torch._C.parse_schema(engine_ops.MAYBE_IN_PLACE)
    donated = read_schema(schema)
    assert isinstance(donated, NormOp) and donated.donated and check_row(donated, schema) is None, donated
    library = torch.library.Library("forms_test", "FRAGMENT")
    library.define("weight_first(Tensor x, Tensor weight, Tensor residual, float eps) -> (Tensor, Tensor)")
    assert "in another order than (x, [residual], weight)" in str(installed_ops(["forms_test::weight_first"]))
    assert "takes 1 floats" not in (said := str(installed_ops(["trtllm::allreduce"]))) and "another form" in said, said


#: An op with both overloads of vLLM's; torch cannot forget one that has several, so it is none of ``engines``.
GIVEN = torch.library.Library("forms_test", "FRAGMENT")
_ARGUMENTS = engine_ops.MAYBE_IN_PLACE.partition("maybe_inplace")[2]
for name, arguments in (("", _ARGUMENTS.replace("(a0!)", "").replace("(a1!)", "")), (".maybe_inplace", _ARGUMENTS)):
    GIVEN.define(f"given{name}{arguments}")


def _given(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *_: Any) -> tuple[Tensor, Tensor]:
    return engine_ops.rms(x + residual, weight, eps), x + residual


def _given_away(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The arguments hold rubbish afterwards, which vLLM allows."""
    results = _given(x, residual, *others)
    x.fill_(torch.nan)
    residual.fill_(torch.nan)
    return results


GIVEN.impl("given", _given, "CPU")
GIVEN.impl("given.maybe_inplace", _given_away, "CPU")
for name in ("given", "given.maybe_inplace"):
    GIVEN.impl(name, lambda x, *_: (torch.empty_like(x), torch.empty_like(x)), "Meta")


def test_a_norm_that_is_given_its_arguments(tp: dist.ProcessGroup) -> None:
    """An overload of its own, beside the functional one; a call whose arguments are read again is another thing."""
    register_group("tp:0", tp)
    norm: Any = torch.ops.forms_test.given
    options: dict[str, Any] = {"all_reduce_ops": LISTED, "norm_ops": ["forms_test::given"]}

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, r = norm(vllm(x), r * 2, w, 1e-5)
        return norm.maybe_inplace(vllm(x), r, w, 1e-5)  # type: ignore[no-any-return]

    for dtype in (torch.float32, torch.bfloat16):
        report, graph = run(model, dtype=dtype, **options)
        assert [site.fused for site in report.sites] == [True, True], str(report)
        assert "forms_test" not in graph.code

    def read_again(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        r = r * 2
        return *norm.maybe_inplace(vllm(x), r, w, 1e-5), r.nan_to_num()

    report, _ = run(read_again, **options)
    assert not fused_once(report) and "returns more than the norm and the sum" in report.sites[0].message


def test_a_graph_that_writes_is_told_so(tp: dist.ProcessGroup) -> None:
    """As find is given one by hand."""
    graph = torch.fx.Graph()
    x, r, w = map(graph.placeholder, "xrw")
    with FakeTensorMode():
        for node, shape in ((x, (4, H)), (r, (4, H)), (w, (H,))):
            node.meta["val"] = torch.empty(shape)
        total = graph.call_function(engine_ops.op("vllm::all_reduce").default, (x, "1"))
        total.meta["val"] = torch.empty(4, H)
    graph.call_function(engine_ops.op("_C::fused_add_rms_norm").default, (total, r, w, 1e-6)).meta["val"] = None
    graph.output((total, r))
    (found,) = ringfence.find(GraphModule({}, graph), all_reduce_ops=["vllm::all_reduce"])
    assert found.site.decline is not None and "hand on a functional graph" in found.site.message, found.site


@torch.library.custom_op("forms_test::sum_and_norm", mutates_args=())
def sum_and_norm(eps: float, gain: Tensor, skip: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden + skip, engine_ops.rms(hidden + skip, gain, eps)


@sum_and_norm.register_fake
def _(eps: float, gain: Tensor, skip: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden)


def test_a_users_norm_is_data(tp: dist.ProcessGroup) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.forms_test.sum_and_norm(1e-5, w, r, vllm(x))  # type: ignore[no-any-return]

    options: dict[str, Any] = {"all_reduce_ops": LISTED, "group_names": {"tp:0": "1"}}
    name = "forms_test::sum_and_norm"
    report, _ = run(model, **options)
    assert not fused_once(report)
    roles = {"x": "hidden", "weight": "gain", "eps": "eps", "residual": "skip", "sum_first": True}
    for row in (ringfence.NormOp(**roles), roles):
        for key in (name, f"{name}.default"):
            report, _ = run(model, norm_ops={key: row}, **options)
            assert fused_once(report), str(report)
    for wrong, message in (
        ({**roles, "x": "input"}, "x='input' is no argument"),
        ({**roles, "out": "hidden"}, "writes nothing, and is said to write"),
        ({**roles, "residual": None}, "returns 2 values, and is said to return 1"),
        ({**roles, "in_place": True}, "writes nothing"),
        ({"x": "hidden"}, "it needs"),
        ({**roles, "residual": "hidden"}, "said to be two of x='hidden'"),
        ({**roles, "weight": 3}, "whose roles are names of arguments"),
        ({**roles, "weight_bias": "one"}, "whose weight_bias is such a number"),
        (float("nan"), "does not map op names to what is added"),
    ):
        with pytest.raises((BackendCompilerFailed, OptionsError), match=message):
            run(model, norm_ops={name: wrong}, **options)


def test_rows_that_find_is_given_are_checked_and_hide_no_other(tp: dist.ProcessGroup) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        r, x = torch.ops.forms_test.sum_and_norm(1e-5, w, r, vllm(x))
        return engine_ops.op("vllm_ir::fused_add_rms_norm")(vllm(x), r, w, 1e-5)  # type: ignore[no-any-return]

    register_group("tp:0", tp)
    gm = aot_graph(model, *(torch.randn(s) for s in ((4, H), (4, H), (H,))))
    name = "forms_test::sum_and_norm"
    row = ringfence.NormOp("hidden", "gain", "eps", residual="skip", sum_first=True)
    for given, fused in (({name: row}, [True, True]), ({name: "not this one"}, [False, True])):
        found = ringfence.find(gm, all_reduce_ops=["vllm::all_reduce"], norm_ops=given)
        assert [c.site.fused for c in found] == fused, [c.site.message for c in found]
    assert "not this one" in found[0].site.message
    wrong = ringfence.AllReduceOp("payload")
    for options, message in (
        ({"norm_ops": {name: ringfence.NormOp("input", "gain", "eps")}}, "x='input' is no argument"),
        ({"all_reduce_ops": {"vllm::all_reduce": wrong}}, "input names 'payload', which is no argument"),
    ):
        with pytest.raises(OptionsError, match=message):
            ringfence.find(gm, **options)


@torch.library.custom_op("forms_test::weightless", mutates_args=())
def weightless(x: Tensor, eps: float) -> Tensor:
    return engine_ops.rms(x, None, eps)


@weightless.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def test_a_users_norm_may_have_no_weight(tp: dist.ProcessGroup) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = vllm(x) + r
        return torch.ops.forms_test.weightless(h, 1e-5), h

    row = ringfence.NormOp("x", None, "eps")
    report, graph = run(model, norm_ops={"forms_test::weightless": row}, all_reduce_ops={"vllm::all_reduce": tp})
    assert fused_once(report) and ", None, 1e-05, 0.0, 'tp:0'" in graph.code, graph.code


def test_vllms_embedding_ends_with_a_view_of_its_own_dtype(tp: dist.ProcessGroup) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(vllm(x).view(torch.float32), r, w)

    report, _ = run(model, all_reduce_ops={"vllm::all_reduce": "1"})
    assert fused_once(report), str(report)

    def other_bits(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(vllm(x).view(torch.bfloat16).view(4, 2, H)[:, 0].float(), r, w)

    report, _ = run(other_bits, torch.ones(4, H), torch.ones(4, H), torch.ones(H), all_reduce_ops=LISTED)
    assert not fused_once(report)


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
