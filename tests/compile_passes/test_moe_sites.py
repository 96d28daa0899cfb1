"""Gather, experts and reduce-scatter become dispatch, experts and combine: where that is exact, and nowhere else."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import moe_graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from moe_graphs import E, Experts, H, K, Layer, given
from torch import Tensor
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.moe_rewrite import dispatch_experts
from ringfence.compile_passes.moe_sites import MoeSite
from ringfence.compile_passes.op_calls import op_names
from ringfence.compile_passes.repeats import merge_repeats
from ringfence.compile_passes.waits import settle_waits
from ringfence.runtime.groups import Group
from support import aot_graph, start_fake_group

GROUPS = {"0": Group("0", "fake", 2, 0)}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    start_fake_group(2)
    yield
    dist.destroy_process_group()


def sites_of(layer: Any, *, tokens: int = 6, **options: Any) -> tuple[list[MoeSite], GraphModule]:
    traced = {"inductor": options.pop("inductor", False), "dynamic": options.pop("dynamic", ())}
    gm = aot_graph(layer, *given(tokens, 0), **traced)
    merge_repeats(gm)
    settle_waits(gm)  # as for a graph that is captured
    return dispatch_experts(gm, options.pop("groups", GROUPS), CPU, **{"rewrite": True, **options}), gm


def collectives(gm: GraphModule) -> list[str]:
    names = [op_names(n)[0] for n in gm.graph.nodes if n.op == "call_function"]
    return [n.split("::")[1] for n in names if n.split("::")[0] in ("_c10d_functional", "ringfence")]


def reason(layer: Any, **options: Any) -> str | None:
    (site,), gm = sites_of(layer, **options)
    assert ("moe_dispatch" in collectives(gm)) == site.rewritten
    return str(site.decline.reason) if site.decline else None


def message(layer: Any, **options: Any) -> str:
    (site,), _ = sites_of(layer, **options)
    return site.message


# -- what is rewritten -----------------------------------------------------------------------


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


# -- what is declined ------------------------------------------------------------------------


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
