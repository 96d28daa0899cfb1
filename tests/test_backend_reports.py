"""The backend: what is switched off, and what the report says."""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backend_model import H, Model, rows
from test_backend_refusals import functional_all_reduce, functional_sum, refusal
from torch import Tensor, nn

import ringfence
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.reasons import Reason
from ringfence.compile_passes.report import GroupCollective
from ringfence.runtime.errors import NotFusedError, OptionsError
from support import TOLERANCE, relative_error


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


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
        (["backend_model.py:{line}"], [False, False, False]),
        (["backend_model.py:*"], [False, False, False]),
        (["backend.py:*", "layer", "ayers.0"], [True, True, True]),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_sites_are_switched_off_by_name(patterns: list[str], fused: list[bool]) -> None:
    line = Path(str(inspect.getsourcefile(Model))).read_text().split("\n").index("        dist.all_reduce(y)") + 1
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
    assert "capture: simulated, 3 tokens\n" in table and "serves fused sites" not in table
    assert "op_between" in table and "backend_model.py" in table and "SPLIT" in table


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
        ({"groups": ["0", "absent"]}, r"option groups names \['absent'\], and the graph's sites are over \['world'\]"),
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
        "deterministic=True, max_tokens=8, verify=True"
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
    assert isinstance(error.value, AssertionError) and Path(__file__).name in str(error.value)
    with pytest.raises(NotFusedError):
        ringfence.assert_fused(backend.reports[0])
    ringfence.assert_fused(backend.reports[0], count=0)
    ringfence.assert_fused(backend.reports[0], count=0, collective="kernels")
    with pytest.raises(TypeError, match="CompileReport"):
        ringfence.assert_fused(backend)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake_group")
def test_assert_fused_tells_what_runs_on_the_reference() -> None:
    backend = ringfence.Backend(piece_compiler="eager")
    with torch.no_grad():
        torch.compile(Model(), backend=backend)(rows(3))
    report = backend.reports[0]
    assert len(report.fused) == len(report.sites) > 1
    for by in (None, "reference"):
        ringfence.assert_fused(report, collective=by)
    for by in ("kernels", "ringfence"):
        with pytest.raises(NotFusedError, match=f"^0 all-reduces were fused by {by}, .*") as error:
            ringfence.assert_fused(report, collective=by)
        assert str(error.value).count("carried out by reference") == len(report.fused)
    served = replace(report, collectives=(GroupCollective(str(report.fused[0].group), "ringfence"),))
    for by in (None, "kernels", "ringfence"):
        ringfence.assert_fused(served, collective=by)
    for by in ("reference", "trtllm"):
        with pytest.raises(NotFusedError, match="carried out by ringfence"):
            ringfence.assert_fused(served, collective=by)
    refuse = Verdict("node", "op", Decision.REFUSE, "rule", "why", "source", site=report.fused[0].index)
    with pytest.raises(NotFusedError, match="carried out by reference"):
        ringfence.assert_fused(replace(served, verdicts=(*served.verdicts, refuse)), collective="kernels")
    with pytest.raises(OptionsError, match="collective='nccl' is none of kernels, mnnvl, reference, ringfence, trtllm"):
        ringfence.assert_fused(report, collective="nccl")


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
