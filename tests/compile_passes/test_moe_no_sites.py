"""Gather, experts and reduce-scatter that stay as they are, each with its reason."""

from __future__ import annotations

import re

import moe_graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from moe_graphs import Experts, K, Layer, given
from moe_sites import GROUPS, collectives, message, reason, sites_of
from torch import Tensor

import ringfence
from ringfence.runtime.groups import Group
from support import start_fake_group

pytestmark = pytest.mark.usefixtures("fake_group")


class AllTokens(Experts):
    """A row's value depends on the others: the experts' inputs are centred over the tokens."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True), ids, weights)


class ByPlace(Experts):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x * torch.arange(x.shape[0])[:, None].to(x.dtype), ids, weights)


class RoundRobin(Experts):
    """Expert e lies on rank e % R: a dispatch would take its tokens elsewhere."""

    def mask(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        elsewhere = ids % 2 != self.rank
        return torch.where(elsewhere, self.num_experts, ids // 2), weights.masked_fill(elsewhere, 0.0)


class Unmasked(Experts):
    """Adds something for every token, as a shared expert does."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights) + x


class Dropout(Experts):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(torch.nn.functional.dropout(x, 0.1, training=True), ids, weights)


class Reducing(Experts):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return funcol.all_reduce(super().forward(x, ids, weights), "sum", dist.group.WORLD)


def experts(kind: type[Experts], form: str = "batched") -> Layer:
    return Layer(experts=kind(form, 0, 2, torch.bfloat16))


@pytest.mark.parametrize("form", moe_graphs.FORMS)
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (AllTokens, "reduces over the rows"),
        (ByPlace, "reads another value of"),
        (RoundRobin, "expert 1 adds to the sum of rank 0|expert 4 adds"),
        (Unmasked, "nothing shows that"),
    ],
)
def test_experts_that_look_at_other_rows_are_left_alone(kind: type[Experts], form: str, says: str) -> None:
    layer = experts(kind, form)
    assert reason(layer) == "experts_not_row_wise"
    assert re.search(says, message(layer)), message(layer)
    assert reason(layer, verify=True) == "experts_not_row_wise", "a trial accepts nothing"


def test_random_experts_are_left_alone() -> None:
    assert reason(experts(Dropout)) == "experts_not_row_wise"
    assert "random" in message(experts(Dropout))


def test_a_collective_among_the_experts() -> None:
    assert reason(experts(Reducing)) == "collective_between"


class Shared(Layer):
    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        ids, weights = self.route(x, lean, live)
        rows = [funcol.all_gather_tensor(t, 0, self.group) for t in (x, ids, weights)]
        y = funcol.reduce_scatter_tensor(self.experts(*rows), "sum", 0, self.group)
        return x + y + rows[0].sum(0)


class Averaging(Layer):
    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        rows = [funcol.all_gather_tensor(t, 0, self.group) for t in (x, *self.route(x, lean, live))]
        return x + funcol.reduce_scatter_tensor(self.experts(*rows), "avg", 0, self.group)


class OwnIds(Layer):
    """Choices that nothing bounds."""

    def route(self, x: Tensor, lean: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        return (x[:, :K].float() * 3).long().abs(), x[:, K : 2 * K]


class OutOfRange(Layer):
    """Padding that no expert stands for."""

    def route(self, x: Tensor, lean: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x, lean, live)
        return ids.masked_fill(live == 0, -1), weights


class Wide(Layer):
    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        rows = [funcol.all_gather_tensor(t, 0, self.group) for t in (x, *self.route(x, lean, live))]
        y = self.experts(*rows).double()
        return x + funcol.reduce_scatter_tensor(y, "sum", 0, self.group).to(x.dtype)


class Deep(Layer):
    """What is gathered has another dimension."""

    def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        ids, weights = self.route(x, lean, live)
        rows = [funcol.all_gather_tensor(t, 0, self.group) for t in (x[:, None], ids, weights)]
        return x + funcol.reduce_scatter_tensor(self.experts(rows[0][:, 0], *rows[1:]), "sum", 0, self.group)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Shared, "value_used_elsewhere"),
        (Averaging, "reduce_op"),
        (OwnIds, "ids_not_known"),
        (OutOfRange, "ids_not_known"),
        (Wide, "activation_dtype"),
        (Deep, "gather_shape"),
    ],
)
def test_what_is_no_dispatch_is_declined_with_its_reason(kind: type[Layer], code: str) -> None:
    assert reason(kind("batched")) == code, message(kind("batched"))


def test_other_groups_and_lone_ranks() -> None:
    assert reason(Layer("batched"), groups={"0": Group("0", "fake", 1, 0)}) == "group_kind"
    other = dist.new_group([0])

    class Elsewhere(Layer):
        def forward(self, x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
            rows = [funcol.all_gather_tensor(t, 0, dist.group.WORLD) for t in (x, *self.route(x, lean, live))]
            return x + funcol.reduce_scatter_tensor(self.experts(*rows), "sum", 0, other)[: x.shape[0]]

    groups = {"0": GROUPS["0"], other.group_name: Group(other.group_name, "fake", 2, 0)}
    assert reason(Elsewhere("batched"), groups=groups) == "other_group"


def test_four_ranks_round_elsewhere_and_two_do_not() -> None:
    four = {"0": Group("0", "fake", 4, 0)}
    dist.destroy_process_group()
    start_fake_group(4)
    layer = Layer("batched", 0, 4)
    (site,), _ = sites_of(layer, groups=four)
    assert site.rewritten and "float32" in site.message
    assert reason(layer, groups=four, strict=True) == "rounding_differs"
    dist.destroy_process_group()
    start_fake_group(2)
    (site,), _ = sites_of(Layer("batched"), strict=True)
    assert site.rewritten and site.message == ""


def test_sequence_parallel_layers_without_experts_are_no_sites() -> None:
    def layer(x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        y = funcol.all_gather_tensor(x, 0, dist.group.WORLD).relu()
        return funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD)

    assert sites_of(layer)[0] == []


# -- splits on the host ------------------------------------------------------------------------


def test_splits_that_the_host_reads_are_reported() -> None:
    def layer(x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        counts = funcol.all_to_all_single(lean[:2].long() + 3, None, None, dist.group.WORLD)
        there, here = (lean[:2].long() + 3).tolist(), counts.tolist()
        for size in (*there, *here):
            torch._check(size >= 0)
        rows = funcol.all_to_all_single(x, here, there, dist.group.WORLD)
        return funcol.all_to_all_single(rows.relu(), there, here, dist.group.WORLD)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        (site,), gm = sites_of(layer)
    assert site.decline is not None and site.decline.reason == "host_splits"
    assert "ringfence.moe.dispatch" in site.message and collectives(gm).count("all_to_all_single") == 3


def test_equal_splits_are_no_sites() -> None:
    def layer(x: Tensor, lean: Tensor, live: Tensor) -> Tensor:
        rows = funcol.all_to_all_single(x, None, None, dist.group.WORLD)
        return funcol.all_to_all_single(rows.relu(), None, None, dist.group.WORLD)

    assert sites_of(layer)[0] == []


def test_the_option_is_off_and_the_report_says_so() -> None:
    backend = ringfence.Backend(piece_compiler="eager")
    with torch.no_grad():
        torch.compile(Layer("batched"), backend=backend, fullgraph=True)(*given(6, 0))
    (report,) = backend.reports
    (site,) = report.moe_sites
    assert site.decline is not None and site.decline.reason == "switched_off"
    assert "MoE site 0: moe_dispatch is not set" in str(report)
    assert report.to_dict()["moe_sites"][0]["reason"] == "switched_off"
