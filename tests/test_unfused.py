"""A model in which nothing is fused is compiled all the same, and that is said once, with what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import moe_graphs
import pytest
import torch
import torch.distributed as dist
from backend_model import H, Model, rows
from torch import Tensor, nn

import ringfence
from ringfence.runtime.errors import GroupError, NotFusedWarning
from support import start_fake_group

EAGER: dict[str, Any] = {"piece_compiler": "eager"}


def said(call: Callable[[], object], times: int = 3) -> list[list[str]]:
    """What each of some calls warns of."""
    found = []
    for _ in range(times):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found.append([str(w.message) for w in caught if w.category is NotFusedWarning])
    return found


def compiled(module: nn.Module, **options: Any) -> Callable[[], Tensor]:
    ringfence.compile(module, **EAGER, **options)
    return lambda: module(rows(4))


def given(module: Callable[[Tensor], Any], **options: Any) -> Callable[[], Any]:
    backend = ringfence.Backend(**EAGER, **options)
    model = torch.compile(module, backend=backend)

    def call() -> Any:
        with torch.no_grad():
            return model(rows(4))

    return call


def test_without_other_ranks_the_launcher_is_named() -> None:
    first, *rest = said(compiled(nn.Linear(H, H)))
    assert len(first) == 1 and rest == [[], []]
    assert "no graph has an all-reduce" in first[0] and "torchrun" in first[0] and "tp_plan='auto'" in first[0]


def test_a_model_without_a_process_group_is_told_so_in_its_report() -> None:
    model = ringfence.compile(nn.Linear(H, H), **EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotFusedWarning)
        model(rows(4))
    (note,) = (n for n in model.ringfence.reports[0].notes if "process group" in n)
    assert "init_process_group" in note and "torchrun" in note


def test_a_group_of_one_rank_is_told_to_have_nothing_to_reduce() -> None:
    start_fake_group(1)
    try:
        backend = ringfence.Backend(**EAGER)
        with torch.no_grad():
            torch.compile(Model(), backend=backend)(rows(4))
        alone = [n for n in backend.reports[0].notes if "nothing to reduce" in n]
        assert len(alone) == 1 and "group 'world' has one rank" in alone[0] and "torchrun" in alone[0]
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("fake_group")
def test_a_group_of_several_ranks_is_not() -> None:
    backend = ringfence.Backend(**EAGER)
    with torch.no_grad():
        torch.compile(Model(), backend=backend)(rows(4))
    assert not [n for n in backend.reports[0].notes if "nothing" in n]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_that_reduces_without_a_process_group_is_an_error_that_says_what_to_call(fullgraph: bool) -> None:
    """Dynamo's is an AssertionError, and torch's of the eager call does not say which processes are meant."""
    model = ringfence.compile(Model(), fullgraph=fullgraph, **EAGER)
    with pytest.raises(GroupError, match=r"init_process_group\(\), in each of the ranks that torchrun"):
        model(rows(4))


def test_of_a_backend_whose_model_could_not_be_traced_generate_is_not_told() -> None:
    backend = ringfence.Backend(**EAGER)
    with torch.no_grad(), pytest.raises(Exception, match="group cannot be None"):
        torch.compile(Model(), backend=backend, fullgraph=True)(rows(4))
    with pytest.warns(UserWarning, match="no graph ever came to it") as caught:
        backend._unused()
    assert "init_process_group" in str(caught[0].message) and "generate()" not in str(caught[0].message)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_were_started_and_made_no_group_are_not_alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    found = [text for texts in said(given(nn.Linear(H, H))) for text in texts]
    assert len(found) == (rank == 0)
    assert all("no graph has an all-reduce" in text and "alone" not in text and "Shard it" in text for text in found)


@pytest.mark.usefixtures("fake_group")
def test_in_a_second_call_where_the_first_may_have_more_graphs_to_come() -> None:
    first, second, third = said(given(nn.Linear(H, H)))
    assert (first, third) == ([], []) and len(second) == 1
    assert "Shard it before it is compiled" in second[0] and "torchrun" not in second[0]


class Broken(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(H, H), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        out: Tensor = self.last(y)
        return out


@pytest.mark.usefixtures("fake_group")
def test_nothing_is_said_where_a_later_graph_fuses_and_the_break_is_in_the_report() -> None:
    model = ringfence.compile(Broken(Model()), **EAGER)
    assert said(lambda: model(rows(4))) == [[], [], []]
    assert said(given(Broken(Model()))) == [[], [], []]
    first, last = model.ringfence.reports
    (broken,) = [note for note in first.notes if "Dynamo breaks it" in note]
    assert "graph_break()" in broken and "test_unfused.py:" in broken and "in forward" in broken
    assert last.fused and not any("Dynamo breaks it" in note for note in last.notes)


class Declined(nn.Module):
    """A LayerNorm behind each all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(x + torch.distributed._functional_collectives.all_reduce(x, "sum", "0"))
        return x


@pytest.mark.usefixtures("fake_group")
def test_all_reduces_of_which_none_is_fused_are_told_with_their_reason() -> None:
    first, *rest = said(compiled(Declined()))
    assert len(first) == 1 and rest == [[], []]
    assert "none of 2 all-reduces is fused (layer_norm 2 times): " in first[0] and "LayerNorm" in first[0]


class DeclinedBesideExperts(nn.Module):
    """The same, and experts whose exchange is a site of its own: nobody set ``moe_dispatch``."""

    def __init__(self) -> None:
        super().__init__()
        self.declined, self.experts = Declined(), moe_graphs.Layer("batched", 0, 2)

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return self.declined(x), self.experts(*given)


@pytest.mark.usefixtures("fake_group")
def test_experts_are_no_all_reduces_and_their_switch_is_another() -> None:
    model = ringfence.compile(DeclinedBesideExperts(), **EAGER)
    first, *rest = said(lambda: model(rows(4), *moe_graphs.given(4, 0)))
    (site,) = model.ringfence.reports[0].moe_sites
    assert site.decline is not None and site.decline.reason == "switched_off"
    assert len(first) == 1 and "none of 2 all-reduces is fused (layer_norm 2 times): " in first[0], first
    assert rest == [[], []]


class Scattered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.distributed._functional_collectives.reduce_scatter_tensor(x, "sum", 0, "0")


@pytest.mark.usefixtures("fake_group")
def test_what_a_graph_has_instead_is_told() -> None:
    (first,) = said(compiled(Scattered()), times=1)
    assert len(first) == 1 and "Sequence parallelism" in first[0]


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("module", [Model, Declined])
def test_who_switched_it_off_knows(module: type[nn.Module]) -> None:
    assert said(compiled(module(), fuse=False)) == [[], [], []]
    assert said(given(module(), fuse=False)) == [[], [], []]


@pytest.mark.usefixtures("fake_group")
def test_grad_mode_has_a_warning_of_its_own() -> None:
    backend = ringfence.Backend(**EAGER)
    model = torch.compile(Model(), backend=backend)
    first, *rest = said(lambda: model(rows(4).requires_grad_()))
    assert len(first) == 1 and "torch.no_grad()" in first[0] and rest == [[], []]
