"""Python floats of a model: constants where a fused site takes them in, and inputs that may change where none does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend_model import H, rows
from torch import Tensor, nn
from torch.fx import GraphModule

import ringfence
from ringfence.runtime.errors import ChangingFloatWarning
from support import TOLERANCE, relative_error

c10d = torch.ops._c10d_functional

CALLS = 6
CAPTURED = {"capture_sizes": [4], "graphs": "simulated", "on_capture_failure": "raise"}


def functional_sum(x: Tensor) -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", "0"))


def behind(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    return F.rms_norm(functional_sum(x) + r, (H,)) * f + g


def in_front(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    return F.rms_norm(functional_sum(x * f) + r / (g + f), (H,))


def soft_cap(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    return torch.tanh(F.rms_norm(functional_sum(x) + r, (H,)) / f) * f


def no_site(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    return torch.where(x > g, x * f, r - f)


def epsilon(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    y = functional_sum(x) + r
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + f) * g


def epsilon_of_two(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    y = functional_sum(x) + r
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + f * g)


def factor(x: Tensor, r: Tensor, f: float, g: float) -> Tensor:
    return F.rms_norm(functional_sum(x) * f + r, (H,)) - g


def call_with_other_floats(compiled: Callable[..., Tensor], fn: Callable[..., Tensor], changes: str) -> None:
    """Each time: what ``changes`` names. All are equal to the eager model."""
    for i in range(CALLS):
        f = 0.3 + 0.17 * i * ("f" in changes)
        g = 1.7 - 0.13 * i * ("g" in changes)
        x, r = rows(4), rows(4).abs()
        with torch.no_grad():
            assert relative_error(compiled(x, r, f, g), fn(x, r, f, g)) <= 16 * TOLERANCE[torch.float32], (i, f, g)


def runs(fn: Callable[..., Tensor], changes: str, **options: Any) -> ringfence.Backend:
    backend = ringfence.Backend(piece_compiler="eager", **options)
    call_with_other_floats(torch.compile(fn, backend=backend, fullgraph=True), fn, changes)
    return backend


@functools.cache
def graphs_of_torch(fn: Callable[..., Tensor], changes: str) -> int:
    """How many a backend gets that asks nothing of Dynamo: two, or with torch 2.11 one per value of some floats."""
    graphs = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
        graphs.append(gm)  # it may have asked Dynamo to trace anew
        return run

    torch._dynamo.reset()
    call_with_other_floats(torch.compile(fn, backend=backend, fullgraph=True), fn, changes)
    torch._dynamo.reset()
    return len(graphs)


@pytest.mark.parametrize("options", [{}, CAPTURED], ids=["", "captured"])
@pytest.mark.parametrize("changes", ["f", "fg"])
@pytest.mark.parametrize("fn", [behind, in_front, soft_cap, no_site])
@pytest.mark.usefixtures("fake_group")
def test_float_that_no_site_takes_in_may_change(fn: Callable[..., Tensor], changes: str, options: Any) -> None:
    """The first graph has them as constants, as with any backend; the second serves all others, where torch lets it."""
    graphs = graphs_of_torch(fn, changes)
    backend = runs(fn, changes, **options)
    assert len(backend.reports) == graphs
    for report in backend.reports:
        ringfence.assert_fused(report, count=0 if fn is no_site else 1)
    assert not options or backend.stats.replays == CALLS - graphs


@pytest.mark.parametrize("fn", [epsilon, epsilon_of_two, factor])
@pytest.mark.usefixtures("fake_group")
def test_float_that_a_site_takes_in_is_a_constant(fn: Callable[..., Tensor]) -> None:
    """Which is said once, when it has had three values; with torch 2.11 a product of two is torch's own constant."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = runs(fn, "f", **CAPTURED)
    said = [str(w.message) for w in caught if w.category is ChangingFloatWarning]
    assert len(said) == (fn is not epsilon_of_two or graphs_of_torch(fn, "f") < CALLS)
    assert all("float 'f'" in text and "skip_sites" in text for text in said)
    assert len(backend.reports) == CALLS
    for report in backend.reports:
        ringfence.assert_fused(report, count=1)


@pytest.mark.parametrize("fn", [epsilon, factor])
@pytest.mark.usefixtures("fake_group")
def test_only_that_float_is_a_constant(fn: Callable[..., Tensor]) -> None:
    graphs = graphs_of_torch(fn, "g")
    backend = runs(fn, "g", **CAPTURED)
    assert len(backend.reports) == graphs
    for report in backend.reports:
        ringfence.assert_fused(report, count=1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(H, H) / 4), 1e-3

    def forward(self, x: Tensor, r: Tensor, g: float) -> Tensor:
        return epsilon(x @ self.weight, r, self.eps, g)


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
@pytest.mark.usefixtures("fake_group")
def test_all_floats_dynamic_from_the_start(piece_compiler: str) -> None:
    """``dynamic=True``: epsilon comes as an input too, and is a constant before anything is compiled."""
    backend = ringfence.Backend(piece_compiler=piece_compiler)
    model = Scaled().bfloat16()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for i in range(3):
        x, r = rows(4 + i).bfloat16(), rows(4 + i).bfloat16()
        with torch.no_grad():
            summed = (x @ model.weight).double() + r.double()
            expected = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + 1e-3) * (1 + i / 7)
            assert relative_error(compiled(x, r, 1 + i / 7), expected) <= 16 * TOLERANCE[torch.bfloat16]
    (report,) = backend.reports
    ringfence.assert_fused(report, count=1)
    assert report.sites[0].eps == 1e-3


@pytest.mark.usefixtures("fake_group")
def test_captured_float_is_a_constant_until_it_changes() -> None:
    """An op that reads a number of the caller's stands between pieces on a GPU: not for one that never changes."""
    backend = ringfence.Backend(piece_compiler="eager", **CAPTURED)
    model = Scaled()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for i, g in enumerate((0.3, 0.3, 0.7, 0.9, 0.7, 1.1)):
        x, r = rows(4), rows(4)
        with torch.no_grad():
            assert relative_error(compiled(x, r, g), model(x, r, g)) <= 16 * TOLERANCE[torch.float32]
        assert len(backend.reports) == (1 if i < 2 else 2)
    constant, changing = backend.reports
    assert constant.serves.count("[]") == 0 and changing.serves.count("[]") == 1
    ringfence.assert_fused(changing, count=1)
    assert backend.stats.replays == 4


@pytest.mark.usefixtures("fake_group")
def test_where_experts_are_dispatched_every_float_is_a_constant_and_told() -> None:
    with pytest.warns(ChangingFloatWarning, match="float 'f'.*moe_dispatch=True"):
        assert len(runs(behind, "f", moe_dispatch=True).reports) == CALLS


@pytest.mark.parametrize("options", [{"fuse": False}, {"skip_sites": ["test_float_inputs.py:*"]}])
@pytest.mark.usefixtures("fake_group")
def test_float_of_a_site_that_is_not_fused_may_change(options: Any) -> None:
    """Which is what the warning advises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangingFloatWarning)
        assert len(runs(factor, "f", **options).reports) == graphs_of_torch(factor, "f") < CALLS


@pytest.mark.usefixtures("fake_group")
def test_norms_that_share_their_code_and_differ_in_epsilon_are_not_warned_of() -> None:
    backend = ringfence.Backend(piece_compiler="eager")
    compiled = torch.compile(epsilon, backend=backend, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ChangingFloatWarning)
        for eps in (1e-5, 1e-6, 1e-3) * 2:
            compiled(rows(4), rows(4), eps, 1.5)
    assert len(backend.reports) == 3
