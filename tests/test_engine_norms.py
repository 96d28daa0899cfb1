"""Engines' norms by their own names and schemas, and a user's own, through the backend."""

from __future__ import annotations

from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
from engine_forms import LISTED, H, fused_once, rms_norm, run, vllm
from engine_forms import tp as tp
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.norm_ops import KNOWN, NormOp, check_row, installed_ops, read_schema
from ringfence.runtime.errors import OptionsError
from ringfence.runtime.groups import register_group
from support import aot_graph

pytestmark = pytest.mark.usefixtures("engines")


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
