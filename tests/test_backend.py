"""torch.compile with the backend: reports, capture, split ops, fallbacks and wrong input."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import ringfence
from ringfence.compile_passes.reasons import Reason
from ringfence.runtime.errors import (
    CaptureFailedWarning,
    GroupError,
    InputError,
    MovedInputWarning,
    NotFusedError,
    OptionsError,
    RingfenceError,
)
from ringfence.runtime.replay.capture import SimulatedGraphs
from support import TOLERANCE, relative_error, run_python, run_threaded

H = 16


class Layer(nn.Module):
    """A column-parallel and a row-parallel linear, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, H, bias=False), nn.Linear(H, H, bias=False)
        self.norm = nn.RMSNorm(H, eps=1e-5)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(F.silu(self.up(x)))
        dist.all_reduce(y)
        residual = residual + y
        return self.norm(residual), residual


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


def cause(error: BaseException) -> BaseException:
    """What ringfence raised, below what torch.compile wraps around errors of a backend."""
    assert isinstance(error, BackendCompilerFailed)
    assert isinstance(error.inner_exception, RingfenceError)
    return error.inner_exception


def rows(n: int) -> Tensor:
    return torch.randn(n, H)


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


# -- the job -------------------------------------------------------------------------


@pytest.mark.parametrize("capture_sizes", [(), (3, 5)])
@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
@pytest.mark.usefixtures("fake_group")
def test_compiled_model_equals_eager(piece_compiler: str, capture_sizes: tuple[int, ...]) -> None:
    model = Model()
    backend = ringfence.Backend(
        piece_compiler=piece_compiler, capture_sizes=capture_sizes, graphs="simulated", verify=True
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 4, 5, 3, 5, 3, 7):
        x = rows(n)
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    ringfence.assert_fused(report, count=2)
    assert len([p for p in report.pieces if p.island]) == (2 if capture_sizes else 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_numbers_are_right_across_threaded_ranks(world_size: int) -> None:
    torch.manual_seed(0)
    shards = [Model() for _ in range(world_size)]
    for shard in shards[1:]:  # the norms are replicated, the linears are shards
        for ours, first in zip(shard.layers, shards[0].layers, strict=True):
            ours.norm.load_state_dict(first.norm.state_dict())
    batches = [rows(n) for n in (2, 3, 2, 5)]

    def expected(x: Tensor) -> Tensor:
        residual = x = x.double()
        for i in range(2):
            layers = [s.layers[i] for s in shards]
            partial = [F.silu(x @ m.up.weight.double().t()) @ m.down.weight.double().t() for m in layers]
            residual = residual + sum(partial)
            x = F.rms_norm(residual, (H,), layers[0].norm.weight.double(), 1e-5)
        return x

    def body(rank: int) -> list[Tensor]:
        with torch.no_grad():
            backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[2, 5], graphs="simulated")
            compiled = torch.compile(shards[rank], backend=backend, fullgraph=True, dynamic=True)
            outputs = [compiled(x) for x in batches]
        ringfence.assert_fused(backend.reports[0], count=2)
        return outputs

    for outputs in run_threaded(world_size, body):
        for x, actual in zip(batches, outputs, strict=True):
            assert relative_error(actual, expected(x)) <= 1e-4


@pytest.mark.usefixtures("fake_group")
def test_entry_point_is_the_same_backend() -> None:
    reports: list[ringfence.CompileReport] = []
    model, x = Model(), rows(3)
    options = {"piece_compiler": "eager", "on_report": reports.append}
    compiled = torch.compile(model, backend="ringfence", options=options)
    assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    ringfence.assert_fused(reports[0], count=2)
    with pytest.raises(Exception, match="unknown option 'capture'"):
        torch.compile(Model(), backend="ringfence", options={"capture": [1]})(x)
    with pytest.raises(Exception, match="mode='max-autotune' has no meaning"):
        torch.compile(Model(), backend="ringfence", mode="max-autotune")(x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"mode": "reduce-overhead"},
            r"mode='reduce-overhead' has no meaning .*capture_sizes.*CompileConfig\(mode=None",
        ),
        ({"options": {"capture_sizes": [4]}}, r"ringfence.Backend\(capture_sizes=\[4\]\)"),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_mode_and_options_beside_a_backend_are_refused(given: dict[str, Any], said: str) -> None:
    compiled = torch.compile(Model(), backend=ringfence.Backend(piece_compiler="eager"), **given)
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(rows(3))
    assert isinstance(error.value.inner_exception, OptionsError) and re.search(said, str(error.value))
    torch._dynamo.reset()
    compiled = torch.compile(Model(), backend=ringfence.Backend(piece_compiler="eager"), mode="default")
    compiled(rows(3))


@pytest.mark.usefixtures("fake_group")
def test_layers_compiled_one_by_one_share_a_graph_but_no_captures() -> None:
    model = Model(layers=3)
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    reference = Model(layers=3)
    reference.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for _ in range(3):
        x = rows(4)
        assert relative_error(model(x), reference(x)) <= 8 * TOLERANCE[torch.float32]
    assert len(backend.reports) == 2  # the first layer is given one tensor twice, the others share a graph


@pytest.mark.usefixtures("fake_group")
def test_parameters_may_change_in_place_and_move() -> None:
    model = Model()
    compiled = torch.compile(
        model, backend=ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    )
    compiled(rows(4))
    weight = model.layers[0].norm.weight
    weight.copy_(torch.randn(H))
    x = rows(4)
    assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    for _ in range(2):
        weight.data = torch.randn(H)
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    with pytest.warns(MovedInputWarning, match=r"layers.*norm.*weight.*reshard_after_forward"):
        weight.data = torch.randn(H)
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]


def test_a_cache_that_is_an_argument_is_named_in_the_report() -> None:
    def serve(x: Tensor, cache: Tensor) -> Tensor:
        h = x * 2
        cache[:4] = h
        return cache.sum(0) + h

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    compiled = torch.compile(serve, backend=backend)
    caches = [torch.randn(1 << 16, H) for _ in range(2)]
    with torch.no_grad():
        for cache in (*caches, *caches):
            x, kept = rows(4), cache.clone()
            torch.testing.assert_close(compiled(x, cache), serve(x, kept))
            assert torch.equal(cache, kept)
    (note,) = [note for note in backend.reports[0].notes if "mark_static_address" in note]
    assert "cache" in note and "(4.0 MiB)" in note


@pytest.mark.usefixtures("fake_group")
def test_padding_serves_smaller_sizes_by_a_captured_one() -> None:
    model = Model()
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[8], graphs="simulated", pad_to_capture_size=True)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for n in (8, 3, 7, 5, 8, 2, 9):
        x = rows(n)
        actual = compiled(x)
        assert actual.shape == (n, H)
        assert relative_error(actual, model(x)) <= 8 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
def test_padding_is_refused_with_a_note_where_rows_are_unknown() -> None:
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[8], graphs="simulated", pad_to_capture_size=True)
    compiled = torch.compile(lambda x: torch.cat([x, x]), backend=backend, dynamic=True)
    x = rows(3)
    assert torch.equal(compiled(x), torch.cat([x, x]))
    assert any("not padded" in note for note in backend.reports[0].notes)


@pytest.mark.usefixtures("fake_group")
def test_caller_owns_outputs_unless_static() -> None:
    for static in (False, True):
        torch._dynamo.reset()
        backend = ringfence.Backend(
            piece_compiler="eager", capture_sizes=[4], graphs="simulated", static_outputs=static
        )
        model = Model()
        compiled = torch.compile(lambda x, model=model: model(x) * 2, backend=backend)  # ends in a captured piece
        compiled(rows(4))
        first = compiled(rows(4))
        kept = first.clone()
        compiled(rows(4))
        assert torch.equal(first, kept) is not static


# -- what is switched off ----------------------------------------------------------------


@pytest.mark.parametrize("capture_sizes", [(), (3,)])
@pytest.mark.usefixtures("fake_group")
def test_without_fusing_the_graph_is_still_split_and_captured(capture_sizes: tuple[int, ...]) -> None:
    model = Model()
    backend = ringfence.Backend(
        piece_compiler="eager", fuse=False, capture_sizes=capture_sizes, graphs="simulated", split_ops=["aten::silu"]
    )
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        x = rows(3)
        assert torch.allclose(compiled(x), model(x), rtol=1e-6, atol=1e-6)
    (report,) = backend.reports
    assert {s.decline.reason for s in report.sites if s.decline} == {Reason.SWITCHED_OFF} and not report.fused
    assert "switched off (fuse=False)" in str(report) and report.captured == capture_sizes
    islands = [op for p in report.pieces if p.island for op in p.ops]
    assert islands.count("aten::silu") == 2 and ("_c10d_functional::all_reduce" in islands) == bool(capture_sizes)
    assert report.notes == ()


@pytest.mark.parametrize(
    ("patterns", "fused"),
    [
        (["layers.0"], [False, True, True]),
        (["layers.?"], [False, False, False]),
        (["*.0", "layers.2"], [False, True, False]),
        (["test_backend.py:{line}"], [False, False, False]),
        (["test_backend.py:*"], [False, False, False]),
        (["backend.py:*", "layer", "ayers.0"], [True, True, True]),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_sites_are_switched_off_by_name(patterns: list[str], fused: list[bool]) -> None:
    line = Path(__file__).read_text().split("\n").index("        dist.all_reduce(y)") + 1
    model = Model(layers=3)
    backend = ringfence.Backend(piece_compiler="eager", skip_sites=[p.format(line=line) for p in patterns])
    x = rows(3)
    assert relative_error(torch.compile(model, backend=backend)(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    assert [s.fused for s in report.sites] == fused
    reasons = {s.decline.reason for s in report.declined if s.decline}
    assert reasons == ({Reason.SWITCHED_OFF} if False in fused else set())
    idle = [p for p in patterns if all(fused)]
    assert [all(p in note for p in idle) for note in report.notes] == ([True] if idle else [])


@pytest.mark.parametrize("group", ["0", "1"])
@pytest.mark.usefixtures("fake_group")
def test_sums_that_one_op_carries_out_are_switched_off_together(group: str) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional_all_reduce(x.sin())

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = nn.ModuleList([Half(), Half()])

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x + (self.halves[0](x) + self.halves[1](x * 2)), (H,), None, 1e-6)

    model, x = Both(), rows(3)
    backend = ringfence.Backend(piece_compiler="eager", skip_sites=[f"halves.{group}"])
    assert relative_error(torch.compile(model, backend=backend)(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    assert [s.decline.reason for s in report.sites if s.decline] == [Reason.SWITCHED_OFF] * 2
    torch._dynamo.reset()
    backend = ringfence.Backend(piece_compiler="eager")
    torch.compile(model, backend=backend)(x)
    assert all(s.fused for s in backend.reports[0].sites)


# -- split ops -------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
def test_split_ops_cut_the_graph_without_capture_too() -> None:
    model, x = Model(), rows(3)
    backend = ringfence.Backend(piece_compiler="eager", split_ops=["aten::silu"])
    compiled = torch.compile(model, backend=backend)
    assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    assert [p.ops for p in report.pieces if p.island] == [("aten::silu",), ("aten::silu",)]
    assert {v.rule for v in report.verdicts if v.op == "aten::silu"} == {"split_op"}


@pytest.mark.usefixtures("fake_group")
def test_split_op_that_is_not_registered_is_refused() -> None:
    compiled = torch.compile(Model(), backend=ringfence.Backend(split_ops=["aten::atention"]))
    with pytest.raises(Exception, match="aten::atention") as error:
        compiled(rows(3))
    assert isinstance(cause(error.value), OptionsError)


@pytest.mark.usefixtures("fake_group")
def test_split_op_that_was_decomposed_is_refused() -> None:
    """Only where the model calls it: one Backend compiles several graphs, and not each has every op."""

    def split_softmax(fn: Callable[[Tensor], Tensor], compiler: str) -> ringfence.Backend:
        torch._dynamo.reset()
        backend = ringfence.Backend(split_ops=["aten::_softmax"], piece_compiler=compiler)
        x = rows(3)
        assert torch.allclose(torch.compile(fn, backend=backend)(x), fn(x), atol=1e-6)
        return backend

    report = split_softmax(lambda x: torch.softmax(x * 2, -1), "eager").reports[0]
    assert [p.ops for p in report.pieces if p.island] == [("aten::_softmax",)] and len(report.notes) == 1
    report = split_softmax(lambda x: x * 2, "inductor").reports[0]
    assert report.notes[1] == "split_ops names aten::_softmax: no graph so far has such an op"
    with pytest.raises(BackendCompilerFailed) as error:
        split_softmax(lambda x: torch.softmax(x * 2, -1), "inductor")
    said = str(cause(error.value))
    assert isinstance(cause(error.value), OptionsError)
    assert re.search(r"split_ops names 'aten::_softmax'.*aten::amax.*piece_compiler='eager'", said), said


@pytest.mark.parametrize("name", ["aten::linear", "aten::softmax", "aten::softmax.int"])
@pytest.mark.usefixtures("fake_group")
def test_split_op_that_no_backend_ever_sees_is_refused(name: str) -> None:
    error = refusal(functional_sum, rows(3), split_ops=[name])
    assert isinstance(error, OptionsError) and f"split_ops holds '{name}', which torch replaces" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_an_op_that_another_graph_had_is_not_missed() -> None:
    def broken(x: Tensor) -> Tensor:
        x = F.silu(x * 2)
        torch._dynamo.graph_break()
        return x + 1

    backend = ringfence.Backend(piece_compiler="eager", split_ops=["aten::silu", "aten::sinh"])
    torch.compile(broken, backend=backend)(rows(3))
    notes = [[n for n in r.notes if n.startswith("split_ops")] for r in backend.reports]
    assert notes == [["split_ops names aten::sinh: no graph so far has such an op"]] * 2


@pytest.mark.usefixtures("fake_group")
def test_data_dependent_op_becomes_an_island() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        picked = x[x[:, 0] > 0]
        return torch.relu(picked).sum(0) + x.sum(0), picked

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[6], graphs="simulated")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend=backend, fullgraph=True)
        for _ in range(4):
            x = rows(6)
            for actual, expected in zip(compiled(x), run(x), strict=True):
                assert torch.allclose(actual, expected, atol=1e-6)
    assert "data_dependent" in {v.rule for v in backend.reports[0].verdicts}


# -- explain -----------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
def test_report_is_documented_json_and_a_table() -> None:
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated")

    def run(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return torch.relu(y) * 3

    model = Model(layers=1)
    torch.compile(lambda x: model(x) + run(x), backend=backend)(rows(3))
    report = backend.reports[0]
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    fused, declined = data["sites"]
    assert fused["kind"] == "all_reduce_add_rms_norm" and fused["fused"] and fused["reason"] is None
    assert (fused["group"], fused["dtype"], fused["hidden_size"], fused["has_residual"]) == ("0", "float32", H, True)
    assert fused["eps"] == pytest.approx(1e-5)
    assert not declined["fused"] and declined["reason"] == "op_between" and "relu" in declined["message"]
    file, line = declined["source"].rsplit(":", 1)
    with open(file) as source:
        assert "dist.all_reduce(y)" in source.read().splitlines()[int(line) - 1]
    assert data["options"]["capture_sizes"] == [3] and data["versions"]["torch"] == torch.__version__
    assert [p["index"] for p in data["pieces"]] == list(range(len(data["pieces"])))
    assert {v["decision"] for v in data["verdicts"]} == {"SPLIT"} and {v["site"] for v in data["verdicts"]} >= {0, None}
    assert (data["captured"], data["graphs"], data["fused_bytes"], data["judged_as"]) == ([3], "simulated", None, None)
    table = str(report)
    assert "capture: simulated, 3 tokens\n" in table and "serves" not in table
    assert "op_between" in table and "test_backend.py" in table and "SPLIT" in table


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((), "off"),
        ((1,), "simulated, 1 token"),
        ((1, 16), "simulated, 1, 16 tokens"),
        (range(1, 10), "simulated, 9 sizes from 1 to 9 tokens"),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_summary_says_which_sizes_are_captured(sizes: Sequence[int], said: str) -> None:
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=sizes, graphs="simulated")
    torch.compile(Model(layers=1), backend=backend, dynamic=True)(rows(3))
    assert backend.reports[0].summary.endswith(f"; capture: {said}")
    assert backend.reports[0].captured == tuple(sizes)


@pytest.mark.usefixtures("fake_group")
def test_nothing_is_captured_where_the_token_count_is_not_known() -> None:
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated")
    torch.compile(lambda x: x.sum(), backend=backend, dynamic=True)(torch.tensor(2.0))
    report = backend.reports[0]
    assert report.captured == () and report.summary.endswith("capture: off"), report.summary
    assert ["no all-reduce" in report.notes[0], "nothing is captured" in report.notes[1]] == [True, True]


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"groups": ["0", "absent"]}, r"option groups names \['absent'\], and the graph all-reduces over \['0'\]"),
        ({"groups": ["0"]}, None),
        (
            {"capture_sizes": [3], "graphs": "simulated", "pad_to_capture_size": True},
            "not padded: the graph has no single dynamic size",
        ),
        ({"capture_sizes": [3], "graphs": "simulated"}, None),
        ({"capture_sizes": [3]}, "nothing is captured: cpu has no CUDA graphs; graphs='simulated'"),
        ({"capture_sizes": [3], "graphs": "auto"}, "nothing is captured: cpu has no CUDA graphs"),
        ({"max_tokens": 8}, "max_tokens means nothing to the reference collective"),
        ({"max_tokens": 8, "fuse": False}, r"nothing is fused, so these options mean nothing here: max_tokens=8"),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_report_notes_where_an_option_came_to_nothing(options: dict[str, object], note: str | None) -> None:
    backend = ringfence.Backend(piece_compiler="eager", **options)
    torch.compile(Model(layers=1), backend=backend, dynamic=False)(rows(3))
    notes = backend.reports[0].notes
    assert len(notes) == (note is not None) and all(re.match(str(note), text) for text in notes), notes


@pytest.mark.usefixtures("fake_group")
def test_options_about_fused_sites_say_so_where_nothing_fuses() -> None:
    backend = ringfence.Backend(
        piece_compiler="eager", collective="mnnvl", transport="peer", deterministic=True, max_tokens=8, verify=True
    )
    torch.compile(lambda x: x.sum(), backend=backend, dynamic=True)(torch.tensor(2.0))
    assert backend.reports[0].notes[1] == (
        "nothing is fused, so these options mean nothing here: collective='mnnvl', transport='peer', "
        "deterministic=True, verify=True, max_tokens=8"
    )


@pytest.mark.parametrize("options", [{"collective": "trtllm"}, {"deterministic": True, "max_tokens": 8}])
@pytest.mark.usefixtures("fake_group")
def test_a_kernel_that_cannot_be_had_is_refused(options: dict[str, object]) -> None:
    error = refusal(functional_sum, rows(3), **options)
    assert isinstance(error, ringfence.CollectiveUnavailableError) and "the tensors are on cpu" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_numerics_and_groups_decide_what_is_fused() -> None:
    class Llama(nn.Module):  # rounds before the weight
        def forward(self, x: Tensor) -> Tensor:
            wide = functional_all_reduce(x * 2).float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    weight, x = torch.ones(H, dtype=torch.bfloat16), rows(3).bfloat16()
    said = {}
    for key, options in (("kernel", {}), ("strict", {"numerics": "strict"}), ("groups", {"groups": ["1"]})):
        torch._dynamo.reset()
        backend = ringfence.Backend(piece_compiler="eager", **options)
        torch.compile(Llama(), backend=backend)(x)
        (site,) = backend.reports[0].sites
        said[key] = str(site.decline.reason) if site.decline else [r.name for r in site.roundings]
    assert said == {"kernel": ["BEFORE_WEIGHT"], "strict": "rounding_differs", "groups": "other_group"}


@pytest.mark.usefixtures("fake_group")
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_reduce:FutureWarning")
def test_a_model_that_dynamo_skips_has_no_report_and_the_backend_says_why() -> None:
    import torch.distributed.nn.functional as in_autograd

    backend = ringfence.Backend(piece_compiler="eager")

    def run(x: Tensor) -> Tensor:
        return F.rms_norm(in_autograd.all_reduce(x) + x, (H,))

    with pytest.raises(IndexError, match="Call the compiled model first"):
        _ = backend.reports[0]
    with torch.no_grad():
        torch.compile(run, backend=backend)(rows(3))
    with pytest.raises(IndexError, match="Dynamo compiled nothing of it"):
        ringfence.assert_fused(backend.reports[0], count=1)
    assert backend.reports[:1] == []


@pytest.mark.usefixtures("fake_group")
def test_assert_fused_tells_why_not() -> None:
    backend = ringfence.Backend(piece_compiler="eager")

    def run(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return F.layer_norm(y + x, (H,))

    torch.compile(run, backend=backend)(rows(3))
    with pytest.raises(NotFusedError, match=r"layer_norm: .*LayerNorm") as error:
        ringfence.assert_fused(backend.reports[0], count=1)
    assert isinstance(error.value, AssertionError) and "test_backend.py" in str(error.value)
    with pytest.raises(NotFusedError):
        ringfence.assert_fused(backend.reports[0])
    ringfence.assert_fused(backend.reports[0], count=0)
    with pytest.raises(TypeError, match="CompileReport"):
        ringfence.assert_fused(backend)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake_group")
def test_summary_is_logged(caplog: object) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ringfence")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        torch.compile(Model(), backend=ringfence.Backend(piece_compiler="eager"))(rows(3))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert any("2 of 2 all-reduces fused" in r for r in records)


@pytest.mark.usefixtures("fake_group")
def test_stages_are_dumped_for_depyf(tmp_path: object) -> None:
    depyf = pytest.importorskip("depyf")
    model = Model(layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # depyf warns whenever it is used
        with depyf.prepare_debug(str(tmp_path)):
            torch.compile(
                model, backend=ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated")
            )(rows(3))
    files = {p.name for p in tmp_path.iterdir()}  # type: ignore[attr-defined]
    for stage, marker in (("captured", "wait_tensor"), ("fused", "all_reduce_add_rms_norm"), ("split", "submod_1")):
        (name,) = (f for f in files if f"ringfence.{stage}" in f)
        assert marker in (tmp_path / name).read_text()  # type: ignore[operator]


# -- what is refused -----------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
def test_grad_mode_falls_back_with_one_warning() -> None:
    model, x = Model(), rows(3)
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated")
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(model, backend=backend)
        out = compiled(x)
        compiled(x)
        out.sum().backward()
    assert relative_error(out.detach(), model(x)) <= 8 * TOLERANCE[torch.float32]
    assert model.layers[0].up.weight.grad is not None
    ours = [w for w in caught if "ringfence" in str(w.message)]
    assert len(ours) == 1 and "torch.no_grad()" in str(ours[0].message)
    assert "grad mode" in backend.reports[0].notes[0]


def functional_all_reduce(x: Tensor, group: str = "0") -> Tensor:
    summed: Tensor = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
    return summed


def functional_sum(x: Tensor, group: str = "0") -> Tensor:
    return F.rms_norm(functional_all_reduce(x * 2, group) + x, (H,), None, 1e-6)


def refusal(fn: Callable[[Tensor], Tensor], x: Tensor, **options: object) -> BaseException:
    backend = ringfence.Backend(piece_compiler="eager", **options)
    with pytest.raises(Exception) as error:
        torch.compile(fn, backend=backend)(x)
    assert backend.reports == [], "a refused graph left a report"
    return cause(error.value)


def test_no_process_group_is_refused() -> None:
    error = refusal(functional_sum, rows(3))
    assert isinstance(error, GroupError) and "init_process_group" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_unknown_group_is_refused_by_name() -> None:
    error = refusal(lambda x: functional_sum(x, "no_such_group"), rows(3))
    assert isinstance(error, GroupError) and "'no_such_group'" in str(error)


@pytest.mark.parametrize("option", ["split_ops", "all_reduce_ops"])
@pytest.mark.parametrize("name", ["aten::no_such_op", "no_such_library::op", "aten::mm.no_such_overload"])
@pytest.mark.usefixtures("fake_group")
def test_op_that_torch_does_not_know_is_refused(option: str, name: str) -> None:
    error = refusal(functional_sum, rows(3), **{option: [name]})
    assert isinstance(error, OptionsError) and f"{option} holds '{name}'" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_nothing_is_captured_on_the_cpu_unless_the_simulation_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: object) -> None:
        raise AssertionError("a simulated graph was captured")

    monkeypatch.setattr(SimulatedGraphs, "capture", capture)
    model, x = Model(layers=1), rows(3)
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[3])
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    report = backend.reports[0]
    assert (report.graphs, report.captured, len(report.pieces)) == (None, (), 1)
    assert report.summary.endswith("capture: off")
    torch._dynamo.reset()
    asked = ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated")
    with pytest.warns(CaptureFailedWarning, match="a simulated graph was captured"):
        torch.compile(model, backend=asked)(x)
    assert (asked.reports[0].graphs, asked.reports[0].captured) == ("simulated", (3,))


@pytest.mark.usefixtures("fake_group")
def test_cuda_graphs_of_cpu_inputs_are_refused() -> None:
    error = refusal(functional_sum, rows(3), graphs="cuda", capture_sizes=[3])
    assert isinstance(error, OptionsError) and "the inputs are on cpu" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_empty_cache_is_no_empty_batch() -> None:
    def with_cache(x: Tensor, cache: Tensor) -> Tensor:
        return torch.cat([cache, functional_sum(x)])

    x, cache = rows(3), rows(0)
    out = torch.compile(with_cache, backend=ringfence.Backend(piece_compiler="eager"))(x, cache)
    assert relative_error(out, with_cache(x, cache)) <= 8 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
def test_sizes_born_from_data_are_not_captured_and_the_report_says_so() -> None:
    def routed(x: Tensor, mask: Tensor) -> Tensor:
        return functional_sum(x[torch.nonzero(mask).squeeze(-1)])

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    x, mask = rows(8), torch.tensor([1, 0, 1, 0, 1, 1, 0, 0])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = torch.compile(routed, backend=backend, fullgraph=True)(x, mask)
    assert relative_error(out, routed(x, mask)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    assert report.graphs is not None or "token count cannot be read" in report.notes[0]


@pytest.mark.usefixtures("fake_group")
def test_several_dynamic_sizes_are_noted() -> None:
    def with_cache(x: Tensor, cache: Tensor) -> Tensor:
        return functional_sum(x) + cache.sum(0)

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    compiled = torch.compile(with_cache, backend=backend, fullgraph=True, dynamic=True)
    for length in range(5, 20):
        x, cache = rows(4), rows(length)
        assert relative_error(compiled(x, cache), with_cache(x, cache)) <= 8 * TOLERANCE[torch.float32]
    assert "2 sizes of the inputs are dynamic" in backend.reports[-1].notes[0]


@pytest.mark.parametrize("capture_sizes", [(), (4,)])
@pytest.mark.usefixtures("fake_group")
def test_control_flow_on_data_runs_between_pieces(capture_sizes: tuple[int, ...]) -> None:
    def branch(x: Tensor) -> Tensor:
        return functional_sum(torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,)))

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=capture_sizes, graphs="simulated")
    compiled = torch.compile(branch, backend=backend, fullgraph=True)
    for x in (rows(4).abs(), -rows(4).abs(), rows(4).abs()):
        assert relative_error(compiled(x), branch(x)) <= 8 * TOLERANCE[torch.float32]
    split = [v.op for v in backend.reports[0].verdicts if v.rule == "control_flow"]
    assert split == (["cond"] if capture_sizes else [])


@pytest.mark.usefixtures("fake_group")
def test_float_computed_from_a_size_stays_dynamic() -> None:
    def scaled(x: Tensor) -> Tensor:
        return functional_sum(x) * (1 / x.shape[0]) ** 0.5

    backend = ringfence.Backend(piece_compiler="eager")
    compiled = torch.compile(scaled, backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 5, 7):
        x = rows(n)
        assert relative_error(compiled(x), scaled(x)) <= 8 * TOLERANCE[torch.float32]
    assert len(backend.reports) == 1


@pytest.mark.usefixtures("fake_group")
def test_float_read_from_data_stays_data() -> None:
    def scaled(x: Tensor) -> Tensor:
        return functional_sum(x) * x.sum().item()

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(scaled, backend=backend, fullgraph=True)
        for _ in range(3):
            x = rows(4)
            assert relative_error(compiled(x), scaled(x)) <= 8 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
def test_empty_batch_is_refused() -> None:
    error = refusal(functional_sum, rows(0))
    assert isinstance(error, InputError) and "at least one token" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_inputs_on_two_devices_are_refused() -> None:
    backend = ringfence.Backend(piece_compiler="eager")
    with pytest.raises(Exception, match=r"several devices: \['cpu', 'meta'\]"):
        torch.compile(lambda x, y: (x + 1, y + 1), backend=backend)(rows(3), rows(3).to("meta"))


@pytest.mark.usefixtures("fake_group")
def test_graph_break_between_all_reduce_and_norm_is_explained() -> None:
    def run(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        torch._dynamo.graph_break()
        return F.rms_norm(y + x, (H,))

    backend = ringfence.Backend(piece_compiler="eager")
    torch.compile(run, backend=backend)(rows(3))
    (site,) = (s for r in backend.reports for s in r.sites)
    assert site.decline is not None and site.decline.reason == "escapes_graph" and "graph break" in site.message


@pytest.mark.usefixtures("fake_group")
def test_failed_capture_leaves_nothing_behind() -> None:
    calls = []

    @torch.library.custom_op("ringfence_test::fails_once", mutates_args=())
    def fails_once(x: Tensor) -> Tensor:
        calls.append(x.shape)
        if len(calls) == 2:  # the run before the capture went well
            raise RuntimeError("out of luck")
        return x + 1

    fails_once.register_fake(torch.empty_like)
    compiled = torch.compile(
        lambda x: torch.ops.ringfence_test.fails_once(x * 2) * 3,
        backend=ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated"),
    )
    x = rows(4)
    with pytest.warns(CaptureFailedWarning, match="out of luck"):
        assert torch.allclose(compiled(x), (x * 2 + 1) * 3)
    for _ in range(2):
        x = rows(4)
        assert torch.allclose(compiled(x), (x * 2 + 1) * 3)


# -- the package ---------------------------------------------------------------------------


def test_import_needs_only_torch_and_has_no_side_effects() -> None:
    program = """
import os, sys
before = dict(os.environ)
import torch
import torch.distributed as dist
loaded = set(sys.modules)
import ringfence
assert dict(os.environ) == before, "the environment changed"
assert not dist.is_initialized()
new = {m.split(".")[0] for m in set(sys.modules) - loaded}
for heavy in ("transformers", "flashinfer", "depyf", "tabulate", "accelerate"):
    assert heavy not in new, heavy
assert "torch._inductor.compile_fx" not in sys.modules
"""
    result = run_python("-W", "error", "-c", program)
    assert result.returncode == 0, result.stderr
