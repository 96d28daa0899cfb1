"""The backend: what is refused, and what is not captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backend_model import H, Model, cause, rows
from torch import Tensor

import ringfence
from ringfence.runtime.errors import (
    CaptureFailedWarning,
    GroupError,
    InputError,
    NotFusedWarning,
    OptionsError,
)
from ringfence.runtime.replay.capture import SimulatedGraphs
from support import TOLERANCE, relative_error


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("fake_group")
def test_grad_mode_falls_back_with_one_warning() -> None:
    model, x = Model(), rows(3)
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated")
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(model, backend=backend)
        out = compiled(x)
        compiled(rows(5))  # of another size: another graph
        out.sum().backward()
    assert relative_error(out.detach(), model(x)) <= 8 * TOLERANCE[torch.float32]
    assert model.layers[0].up.weight.grad is not None
    ours = [w for w in caught if "ringfence" in str(w.message)]
    assert len(ours) == 1 and "torch.no_grad()" in str(ours[0].message) and ours[0].category is NotFusedWarning
    assert len(backend.reports) == 2 and all("torch.no_grad()" in report.notes[0] for report in backend.reports)
    for report in backend.reports:  # nothing is known of what was not looked at
        why = "not looked at, because grad mode is on and an input or parameter requires grad"
        assert report.summary == why and str(report).startswith(f"ringfence: {why}\n")
        assert report.to_dict()["passed_over"] == report.passed_over != ""


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
