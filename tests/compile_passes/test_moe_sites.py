"""Gather, experts and reduce-scatter become dispatch, experts and combine: where that is exact."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_graphs
import pytest
import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from moe_graphs import E, Experts, H, K, Layer
from moe_sites import collectives, message, reason, sites_of
from torch import Tensor

from ringfence.runtime.groups import Group

pytestmark = pytest.mark.usefixtures("fake_group")


class Summed(Experts):
    """One expert after the other, added to what there is at the start."""

    start: Any = staticmethod(torch.zeros_like)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = self.start(x)
        for e in range(self.num_experts):
            asked = torch.where(ids == self.rank * self.num_experts + e, weights, 0.0).sum(-1, keepdim=True)
            y = y + asked * F.silu(x * (e + 2))
        return y


@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize(
    ("start", "rewritten"),
    [
        (torch.zeros_like, True),
        (lambda x: torch.zeros(x.shape, dtype=x.dtype), True),
        (torch.ones_like, False),
        (lambda x: torch.full(x.shape, 0.5, dtype=x.dtype), False),
        (lambda x: x, False),
    ],
    ids=["zeros", "zeros of a shape", "ones", "a half", "the token"],
)
def test_a_sum_over_experts_begins_with_zeros(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[Tensor], Tensor], rewritten: bool, inductor: bool
) -> None:
    """Whatever Inductor's decompositions make of them. From anything else, tokens of no expert here get something."""
    monkeypatch.setattr(Summed, "start", staticmethod(start))
    found = reason(Layer(experts=Summed("batched", 0, 2, torch.bfloat16)), inductor=inductor)
    assert found == (None if rewritten else "experts_not_row_wise")


@pytest.mark.parametrize("form", moe_graphs.FORMS)
@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize("dynamic", [(), ((0, 0), (2, 0))], ids=["static", "dynamic"])
def test_hugging_faces_forms(form: str, inductor: bool, dynamic: tuple[tuple[int, int], ...]) -> None:
    (site,), gm = sites_of(Layer(form), inductor=inductor, dynamic=dynamic)
    assert site.rewritten and (site.payloads, site.num_experts, site.hidden_size) == (2, E, H)
    assert collectives(gm) == ["moe_dispatch", "moe_combine"]
    path, _, line = str(site.source).rpartition(":")
    assert Path(path) == Path(moe_graphs.__file__), site.source
    assert "reduce_scatter_tensor" in Path(path).read_text().splitlines()[int(line) - 1], "the user's own line"
    (dispatch,) = [n for n in gm.graph.nodes if "moe_dispatch" in str(n.target)]
    assert dispatch.args[3:] == (E, E // 2, "0", "reference"), "an empty row asks for the other rank's first expert"
    rows = [u for n in dispatch.users for u in n.users if u.target is operator.getitem]
    assert all(list(r.meta["val"].shape)[1] in (H, K) for r in rows)


class Twice(Layer):
    """Its rows are waited for a second time, by whoever reads them second."""

    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        ids, weights = self.route(x, lean, live)
        pending = torch.ops._c10d_functional.all_gather_into_tensor(x, 2, "0")
        rows = (funcol.all_gather_tensor(t, 0, self.group) for t in (ids, weights))
        y = self.experts(torch.ops._c10d_functional.wait_tensor(pending), *rows)
        y = y + 0 * torch.ops._c10d_functional.wait_tensor(pending)
        return x + funcol.reduce_scatter_tensor(y, "sum", 0, self.group)


def test_a_second_wait_hides_no_reader_of_the_gathered_rows() -> None:
    (site,), gm = sites_of(Twice())
    assert site.decline is not None and "moe_dispatch" not in collectives(gm)
    assert collectives(gm).count("wait_tensor") == 4


def test_each_rank_has_its_own_block() -> None:
    (site,), gm = sites_of(Layer(rank=1), groups={"0": Group("0", "fake", 2, 1)})
    assert site.rewritten
    (dispatch,) = [n for n in gm.graph.nodes if "moe_dispatch" in str(n.target)]
    assert dispatch.args[4] == 0


class Padded(Layer):
    """The engine gives the choices of padding an expert of its own."""

    def route(self, x: Tensor, lean: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x, lean, live)
        ids = torch.where(live > 0, ids, torch.zeros_like(ids)).int()
        return ids, weights


class BoundsMask(Experts):
    def mask(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        low = self.rank * self.num_experts
        here = (ids >= low) & (ids < low + self.num_experts)
        return torch.where(here, ids - low, self.num_experts), weights * here


class Biased(Experts):
    has_bias = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        n = self.num_experts
        self.gate_up_proj_bias = torch.nn.Parameter(torch.randn(n, 2 * moe_graphs.I).bfloat16())
        self.down_proj_bias = torch.nn.Parameter(torch.randn(n, H).bfloat16())


class Dense(Experts):
    """Every expert looks at every token, and the mask picks: a loop over this rank's experts."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, weights = self.mask(ids, weights)
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            up = self._apply_gate(x @ self.gate_up_proj[expert].t())
            down = (up @ self.down_proj[expert].t())[:, None]
            out = out + (down * torch.where(ids == expert, weights, 0.0)[..., None]).sum(1)
        return out


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Padded(),
        lambda: Layer(experts=BoundsMask("grouped", 0, 2, torch.bfloat16)),
        lambda: Layer(experts=BoundsMask("batched", 0, 2, torch.bfloat16)),
        lambda: Layer(experts=Biased("batched", 0, 2, torch.bfloat16)),
        lambda: Layer(experts=Dense("batched", 0, 2, torch.bfloat16)),
    ],
)
def test_masks_are_known_by_what_they_do(layer: Callable[[], Layer]) -> None:
    assert reason(layer()) is None, message(layer())


# -- kernels of an engine ---------------------------------------------------------------------


@torch.library.custom_op("moetest::experts", mutates_args=())
def opaque(x: Tensor, ids: Tensor, weights: Tensor, first: int, count: int) -> Tensor:
    here = (ids >= first) & (ids < first + count)
    return x * torch.where(here, weights * (ids + 1), 0.0).sum(1, keepdim=True).to(x.dtype)


@opaque.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, first: int, count: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moetest::mixing", mutates_args=())
def mixing(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return x - x.mean(0) + 0 * weights.sum().to(x.dtype) + 0 * ids.sum().to(x.dtype)


@mixing.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(x)


def kernel(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return opaque(x, ids, weights, 0, E // 2)


def kernel_by_choice(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = kernel(x.repeat_interleave(K, 0), ids.view(-1, 1), weights.view(-1, 1))
    return rows.view(-1, K, H).sum(1)


def wrong_kernel(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return opaque(x, ids, weights, 1, E // 2)


def test_an_opaque_kernel_is_believed_where_it_is_listed_and_refused_where_a_trial_shows_otherwise() -> None:
    layer, listed = Layer(experts=kernel), {"experts_ops": ["moetest::experts"]}
    assert reason(layer) == reason(layer, verify=True) == "experts_not_row_wise"
    assert "moetest::experts" in message(layer)
    assert reason(layer, **listed) is reason(layer, verify=True, **listed) is None
    assert reason(Layer(experts=wrong_kernel), **listed) is None
    assert reason(Layer(experts=wrong_kernel), verify=True, **listed) == "verify_failed"
    assert reason(Layer(experts=mixing), verify=True, experts_ops=["moetest::mixing"]) == "verify_failed"
    by_choice = Layer(experts=kernel_by_choice)
    assert reason(by_choice, experts_ops=["moetest::experts"]) == "experts_not_row_wise"
    assert "a row for each token" in message(by_choice, experts_ops=["moetest::experts"])
