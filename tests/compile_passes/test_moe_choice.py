"""Which MoE sites are rewritten: what a trial may say, what options leave alone, and what the ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from moe_graphs import E, Experts, H, K, Layer, given
from torch import Tensor
from torch.fx import GraphModule

import ringfence
from ringfence.compile_passes.moe_rewrite import dispatch_experts
from ringfence.compile_passes.moe_sites import MoeSite, find_moe
from ringfence.compile_passes.moe_verify import verify_experts
from ringfence.compile_passes.op_calls import op_names
from ringfence.moe_agree import dispatch_where_agreed
from ringfence.options import Options
from ringfence.runtime.groups import Group
from support import aot_graph, start_fake_group

CPU = torch.device("cpu")
GROUPS = {"0": Group("0", "fake", 2, 0)}


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    start_fake_group(2)
    yield
    dist.destroy_process_group()


def site_of(layer: Any, **options: Any) -> MoeSite:
    gm = aot_graph(layer, *given(6, 0))
    (site,) = dispatch_experts(gm, GROUPS, CPU, rewrite=True, **options)
    assert site.rewritten == any("moe_dispatch" in str(n.target) for n in gm.graph.nodes)
    return site


def layer_of(kind: type[Experts]) -> Layer:
    return Layer(experts=kind("batched", 0, 2, torch.bfloat16))


# -- trials ------------------------------------------------------------------------------------


class FirstFour(Experts):
    """Experts take four tokens at most: at the six rows of the trial, few as they are for this rank, nobody sees it."""

    def mask(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().mask(ids, weights)
        hit = (ids < self.num_experts).any(1, keepdim=True)
        return ids, weights * (hit.cumsum(0) <= 12)


def test_a_trial_accepts_nothing_that_reading_declines() -> None:
    for options in ({}, {"verify": True}):
        site = site_of(layer_of(FirstFour), **options)
        assert site.decline is not None and site.decline.reason == "experts_not_row_wise", site
        assert "aten::any" in site.message and "verify" not in site.message


@torch.library.custom_op("moechoice::centred", mutates_args=())
def centred(x: Tensor, ids: Tensor, first: int, count: int) -> Tensor:
    return (x - x.mean(0)) * ((ids >= first) & (ids < first + count)).any(1, keepdim=True)


@centred.register_fake
def _(x: Tensor, ids: Tensor, first: int, count: int) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("listed", [True, False])
def test_few_rows_and_many_experts_are_compared_on_every_rank(listed: bool) -> None:
    """One token for each of eight ranks, which asks for one of 64 experts: at random, most ranks have nothing to do."""
    dist.destroy_process_group()
    start_fake_group(8)
    router = torch.randn(64, H)

    def layer(x: Tensor, rank: int) -> Tensor:
        _, ids = (x @ router.t()).topk(1)
        x, ids = (funcol.all_gather_tensor(t, 0, dist.group.WORLD) for t in (x, ids))
        if listed:
            y = torch.ops.moechoice.centred(x, ids, 8 * rank, 8)
        else:
            y = (x - x.mean(0)) * ((ids >= 8 * rank) & (ids < 8 * rank + 8))
        return funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD)

    for rank in range(8):
        gm = aot_graph(lambda x, r=rank: layer(x, r), torch.randn(1, H))
        names = ["moechoice::centred"] if listed else []
        groups = {"0": Group("0", "fake", 8, rank)}
        (site,) = dispatch_experts(gm, groups, CPU, rewrite=True, verify=True, experts_ops=names)
        assert site.decline is not None, f"rank {rank}"
        assert site.decline.reason == ("verify_failed" if listed else "experts_not_row_wise"), (rank, site.message)
        assert not listed or "with other rows beside it" in site.message


def test_a_trial_that_compared_nothing_says_so() -> None:
    def nothing(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.moechoice.centred(x, ids, 0, 0)  # type: ignore[no-any-return]

    gm = aot_graph(Layer(experts=nothing), *given(6, 0))
    (candidate,) = find_moe(gm, GROUPS, experts_ops=["moechoice::centred"])
    assert candidate.match is not None and verify_experts(candidate.match, CPU) is None
    idle = replace(candidate.match, group=Group("0", "fake", E + 1, E))  # which leaves its last rank no expert
    assert len(idle.mine) == 0 and "nothing was compared" in str(verify_experts(idle, CPU))


def test_more_ranks_than_experts() -> None:
    gm = aot_graph(Layer("batched"), *given(6, 0))
    (candidate,) = find_moe(gm, {"0": Group("0", "fake", E + 1, 0)})
    assert candidate.site.decline is not None and candidate.site.decline.reason == "group_kind"
    assert "more ranks than there are experts" in candidate.site.message


# -- reading -----------------------------------------------------------------------------------


class Sorted(Experts):
    """Sorted by local number, each row by its expert's matrix; elsewhere's choices weigh nothing."""

    def counted(self, numbers: Tensor) -> Tensor:
        return numbers

    def offsets(self, counts: Tensor) -> Tensor:
        return counts.cumsum(0).int()

    def way_back(self, order: Tensor) -> Tensor:
        return torch.argsort(order)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        here = torch.div(ids, self.num_experts, rounding_mode="floor") == self.rank
        local = (ids % self.num_experts).view(-1)
        numbers, order = torch.sort(local)
        n = self.num_experts
        counts = torch.histc(self.counted(numbers).float(), bins=n, min=0, max=n - 1)
        rows = torch._grouped_mm(x[order // K], self.gate_up_proj.transpose(1, 2), self.offsets(counts))
        rows = torch._grouped_mm(self._apply_gate(rows), self.down_proj.transpose(1, 2), self.offsets(counts))
        back = rows[self.way_back(order)].view(-1, K, H)
        return (back * weights.masked_fill(~here, 0.0)[..., None]).sum(1)


class Unreturned(Sorted):
    """What is added up for a token are rows that lie side by side in the sort, whosever they are."""

    def way_back(self, order: Tensor) -> Tensor:
        return torch.sort(order)[0]


class Backwards(Sorted):
    """Groups as long as those of the other end: rows meet another expert's matrix, by what stands beside them."""

    def counted(self, numbers: Tensor) -> Tensor:
        return (self.num_experts - 1) - numbers


class Shifted(Sorted):
    def counted(self, numbers: Tensor) -> Tensor:
        return torch.where(numbers == 0, 1, numbers)


class Rounded(Sorted):
    """Counts above 256 have no number of their own."""

    def offsets(self, counts: Tensor) -> Tensor:
        return counts.bfloat16().cumsum(0).int()


class Wrapped(Sorted):
    def offsets(self, counts: Tensor) -> Tensor:
        return counts.cumsum(0).to(torch.int8).int()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Sorted, None),
        (Unreturned, "takes rows by their place"),
        (Backwards, "counts something else than what the choices are sorted by"),
        (Shifted, "counts something else than what the choices are sorted by"),
        (Rounded, "dtype that does not hold them"),
        (Wrapped, "dtype that does not hold them"),
    ],
)
def test_a_grouped_product_goes_by_what_its_rows_are_sorted_by(kind: type[Experts], says: str | None) -> None:
    site = site_of(layer_of(kind))
    assert (says is None) == site.rewritten, site.message
    assert says is None or says in site.message, site.message


class Mixed(Experts):
    """The weights of a token's choices are mixed: none follows from its own choice any more."""

    def mask(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().mask(ids, weights)
        return ids, weights @ torch.ones(K, K, dtype=weights.dtype)


def test_a_product_that_mixes_choices_says_nothing_of_each() -> None:
    site = site_of(layer_of(Mixed))
    assert site.decline is not None and "nothing shows that" in site.message, site.message


# -- ranks -------------------------------------------------------------------------------------


class Peer:
    """A channel to rank 7, which says of its sites what ``changed`` makes of this rank's."""

    ranks = (3, 7)

    def __init__(self, changed: Callable[[Any], Any]) -> None:
        self.changed, self.topics = changed, list[str]()

    def exchange(self, topic: str, value: Any) -> list[Any]:
        self.topics.append(topic)
        return [value, self.changed(value)]


def rewritten_with(changed: Callable[[Any], Any], **options: Any) -> tuple[list[MoeSite], GraphModule]:
    layers = [Layer("batched"), Layer("batched")]
    gm = aot_graph(lambda x, lean, live: layers[1](layers[0](x, lean, live), lean, live), *given(6, 0))
    channels: Any = {"0": (peer := Peer(changed))}
    sites = dispatch_where_agreed(gm, GROUPS, channels, CPU, Options(moe_dispatch=True, **options))
    assert peer.topics == ["experts to dispatch"]
    assert sum("moe_dispatch" in op_names(n)[0] for n in gm.graph.nodes) == sum(site.rewritten for site in sites)
    return sites, gm


#: By place of the reduce-scatter among the collectives: three gathers stand before each.
FIRST, SECOND = 3, 7


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda said: said | {SECOND: "the experts are not shown to"}, "rank 7 leaves it as it is: the experts are"),
        (lambda said: {FIRST: said[FIRST]}, "rank 7 has no such site"),
        (lambda said: {FIRST: said[FIRST], SECOND + 1: said[SECOND]}, "rank 7 has no such site"),
        (lambda said: said | {SECOND: ((5, 4), *said[SECOND][1:])}, "rank 7 gathers in another order"),
        (lambda said: said | {SECOND: (*said[SECOND][:2], E + 1, 2)}, "another number of experts"),
    ],
)
def test_a_site_is_rewritten_where_all_ranks_do_so(changed: Callable[[Any], Any], says: str) -> None:
    (one, two), gm = rewritten_with(changed)
    assert one.rewritten and two.decline is not None
    assert two.decline.reason == "declined_on_another_rank" and says in two.message, two.message
    assert sum("all_gather" in op_names(n)[0] for n in gm.graph.nodes) == 3, "the second stays as it was"


def test_ranks_that_see_the_same_rewrite_all() -> None:
    sites, _ = rewritten_with(dict)
    assert [site.rewritten for site in sites] == [True, True]


def test_a_rank_that_declines_says_so_to_the_others() -> None:
    heard: list[Any] = []
    gm = aot_graph(layer_of(Mixed), *given(6, 0))
    channels: Any = {"0": Peer(lambda said: heard.append(said) or said)}
    (site,) = dispatch_where_agreed(gm, GROUPS, channels, CPU, Options(moe_dispatch=True))
    assert heard == [{FIRST: site.message}] and not site.rewritten


def test_a_rank_without_sites_comes_to_the_exchange_too() -> None:
    gm = aot_graph(lambda x: funcol.all_reduce(x, "sum", dist.group.WORLD) + 1, torch.randn(6, H))
    channels: Any = {"0": (peer := Peer(lambda said: {FIRST: ((0, 2), 1, E, 2)}))}
    assert dispatch_where_agreed(gm, GROUPS, channels, CPU, Options(moe_dispatch=True)) == []
    assert peer.topics == ["experts to dispatch"]
    off: Any = {"0": (silent := Peer(dict))}
    dispatch_where_agreed(gm, GROUPS, off, CPU, Options())
    assert silent.topics == [], "without the option nothing is exchanged"


# -- options, through the backend --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"groups": ["0"]}, None, ""),
        ({"groups": ["other"]}, "other_group", "is over group 'world'"),
        ({"skip_sites": ["moe_graphs.py:*"]}, "switched_off", "skip_sites: 'moe_graphs.py:*'"),
        ({"skip_sites": ["elsewhere.py:*"]}, None, ""),
        ({"split_ops": ["_c10d_functional::reduce_scatter_tensor"]}, "switched_off", "split_ops names"),
        ({"split_ops": ["_c10d_functional::all_gather_into_tensor.default"]}, "switched_off", "split_ops names"),
        ({"split_ops": ["aten::topk"]}, None, ""),
    ],
)
def test_options_that_leave_all_reduces_alone_hold_for_experts(
    options: dict[str, Sequence[str]], code: str | None, says: str
) -> None:
    ringfence.register_group("other", dist.new_group([0]))
    backend = ringfence.Backend(moe_dispatch=True, piece_compiler="eager", **options)
    with torch.no_grad():
        torch.compile(Layer("batched"), backend=backend, fullgraph=True)(*given(6, 0))
    (report,) = backend.reports
    (site,) = report.moe_sites
    assert (str(site.decline.reason) if site.decline else None) == code, site
    assert says in site.message
    idle = [note for note in report.notes if "skip_sites names" in note]
    assert len(idle) == ("elsewhere.py:*" in options.get("skip_sites", ())), report.notes
    assert not any("option groups" in note for note in report.notes if "groups" in options and code is None)
