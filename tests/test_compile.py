"""ringfence.compile: a model compiled in place, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backend_model import H, Model, rows
from prompt_ranks import prompts, watched_by_one
from torch import Tensor, nn

import ringfence
from ringfence.runtime.errors import CapturesWastedWarning, ModelError, OptionsError
from ringfence.runtime.replay.stats import Stats
from support import run_ranks

SIMULATED = {"piece_compiler": "eager", "graphs": "simulated"}


@pytest.mark.usefixtures("fake_group")
def test_compile_does_what_has_to_be_known_and_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    expected = copy.deepcopy(model)
    model.layers[0].norm.register_full_backward_hook(lambda *_: None)  # breaks the graph
    assert ringfence.compile(model, capture_sizes=[4], fullgraph=True, **SIMULATED) is model
    for _ in range(3):  # with gradients on, and parameters that require them
        x = rows(4)
        actual = model(x)
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected(x))
    (report,) = model.ringfence.reports
    ringfence.assert_fused(report, count=2)
    assert not model.training
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "ringfence: Model.forward is compiled in place: calls run without gradients; evaluation mode; "
        "backward hooks of 1 modules removed; captures 4 tokens"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"capture_sizes": [1]}, "captures nothing, because cpu has no CUDA graphs (graphs='simulated' shows it)"),
        ({"capture_sizes": [1], "graphs": "simulated"}, "captures 1 token"),
        ({"capture_sizes": range(1, 10), "graphs": "simulated"}, "captures 9 counts, 1 to 9 tokens"),
    ],
)
def test_the_line_says_what_is_captured_here(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], says: str
) -> None:
    ringfence.compile(nn.Linear(2, 2), **options)
    assert capsys.readouterr().err.splitlines()[0].endswith(f"; {says}")


class Wrong(nn.Module):
    pass


class Fine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def compiled_by_torch() -> nn.Module:
    model = Fine()
    model.compile()
    return model


def forward_compiled_by_torch() -> nn.Module:
    model = Fine()
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: 3, "int is no torch.nn.Module"),
        (lambda: None, "NoneType is no torch.nn.Module"),
        (lambda: torch.relu, "is no torch.nn.Module.*torch.compile"),
        (lambda: Fine, "Fine is a class"),
        (Wrong, "Wrong has no forward"),
        (lambda: nn.ModuleList([Fine()]), "ModuleList has no forward"),
        (lambda: torch.compile(Fine()), "wrapped by torch.compile already.*_orig_mod"),
        (compiled_by_torch, "compiled already"),
        (forward_compiled_by_torch, "compiled already"),
        (lambda: ringfence.compile(Fine()), "compiled by ringfence already.*Backend"),
        (lambda: torch.jit.script(Fine()), "TorchScript"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' of Linear is on the meta device"),
    ],
)
def test_what_cannot_be_compiled_in_place_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ringfence.compile(make())


@pytest.mark.parametrize("options", [{"capture_size": [1]}, {"mode": "reduce-overhead"}, {"backend": "inductor"}])
def test_an_unknown_option_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = Fine()
    with pytest.raises(OptionsError, match=f"unknown option '{next(iter(options))}'"):
        ringfence.compile(model, **options)
    assert "forward" not in vars(model) and not hasattr(model, "ringfence") and model.training


def test_a_compiled_model_is_neither_copied_nor_saved() -> None:
    model = ringfence.compile(Fine())
    with pytest.raises(ModelError, match="copy it, then compile"):
        copy.deepcopy(model)
    with pytest.raises(ModelError, match="save it, then compile"):
        pickle.dumps(model)


@pytest.mark.usefixtures("fake_group")
def test_models_of_one_class_do_not_count_against_each_others_recompilations() -> None:
    """Dynamo keeps what it compiled by code object, and gives up at eight."""
    for _ in range(10):
        model = ringfence.compile(nn.Sequential(nn.Linear(H, H)), piece_compiler="eager")
        model(rows(4))
        assert len(model.ringfence.reports) == 1


def test_a_backend_is_one_object_whoever_copies_it() -> None:
    backend = ringfence.Backend()
    assert copy.deepcopy({"backend": backend})["backend"] is backend is copy.copy(backend)


def test_a_backend_that_was_given_and_never_called_says_what_to_type() -> None:
    model, backend = Fine(), ringfence.Backend(piece_compiler="eager")
    with pytest.warns(UserWarning, match=re.escape("ringfence.compile(model, ...)")) as caught:
        torch.compile(model, backend=backend)
        backend.close()
        backend.close()
    assert len(caught) == 1
    used = ringfence.Backend(piece_compiler="eager")
    torch.compile(model, backend=used)(torch.zeros(2))
    used.close()
    ringfence.Backend().close()  # nobody gave it to torch.compile
    assert len(caught) == 1


class Counter:
    """As transformers' sliding cache: counts on the host."""

    def __init__(self) -> None:
        self.count = 3


@pytest.mark.usefixtures("fake_group")
def test_a_number_that_only_the_caller_reads_is_no_size_of_the_call() -> None:
    model = Model()

    def serve(x: Tensor, counter: Counter) -> Tensor:
        counter.count += x.shape[0]
        return model(x)

    backend = ringfence.Backend(capture_sizes=[4], **SIMULATED)
    compiled = torch.compile(serve, backend=backend)
    counter = Counter()
    with torch.no_grad():
        for step in range(1, 9):
            x = rows(4)
            torch.testing.assert_close(compiled(x, counter), model(x))
            assert counter.count == 3 + 4 * step
    steps = [step["how"] for step in backend.supervisor.journal.to_dict("")["steps"]][-8:]
    assert steps == ["capture", "capture", *["replay"] * 6]  # of the first count, and of any


class Layer:
    """Of a static cache, as transformers has them."""

    is_compileable, is_initialized = True, False


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, x: Tensor, position: int = 0, past_key_values: Any = None) -> Tensor:
        for layer in past_key_values.layers:
            layer.is_initialized = True
        out: Tensor = self.model(x)
        return out


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("by_place", [True, False])
def test_a_call_that_allocates_a_cache_is_eager_and_no_step_however_the_cache_is_given(by_place: bool) -> None:
    model = ringfence.compile(Caching(), capture_sizes=[4], **SIMULATED)
    cache = SimpleNamespace(layers=[Layer()])
    x = rows(4)

    def call() -> Tensor:
        out: Tensor = model(x, 0, cache) if by_place else model(x, past_key_values=cache)
        return out

    journal = model.ringfence.supervisor.journal
    before = len(journal.to_dict("")["steps"])
    expected = call()
    assert not model.ringfence.reports and len(journal.to_dict("")["steps"]) == before
    torch.testing.assert_close(call(), expected)
    assert len(model.ringfence.reports) == 1


@pytest.mark.usefixtures("fake_group")
def test_a_marked_cache_is_another_one_in_each_request() -> None:
    """As generate() makes them: a parameter that moves so often would be taken for one that moves by design."""

    def serve(x: Tensor, cache: Tensor) -> Tensor:
        cache[:4] += x
        return cache.sum(0) + x

    backend = ringfence.Backend(capture_sizes=[4], **SIMULATED)
    compiled = torch.compile(serve, backend=backend)
    kept = []
    with torch.no_grad():
        for _ in range(12):
            cache = torch.randn(16, H)
            torch._dynamo.mark_static_address(cache)
            kept.append(cache)  # so that no address comes back
            for _ in range(3):
                x, before = rows(4), cache.clone()
                torch.testing.assert_close(compiled(x, cache), serve(x, before))
                torch.testing.assert_close(cache, before)
    steps = [step["how"] for step in backend.supervisor.journal.to_dict("")["steps"]][-36:]
    assert steps == ["capture", "replay", "replay"] * 12
    assert not any("mark_static_address" in note for note in backend.reports[0].notes)


@pytest.mark.usefixtures("fake_group")
def test_stats_say_what_became_of_the_calls() -> None:
    model = ringfence.compile(Model(), capture_sizes=[4], dynamic=True, **SIMULATED)
    backend = model.ringfence
    assert backend.stats == Stats() and str(backend) == repr(backend)
    for n in (4, 6, 4, 4, 6):
        model(rows(n))
    stats = backend.stats
    assert (stats.captures, stats.replays, stats.never_replayed, stats.recompilations) == (1, 2, 0, 0)
    assert stats.uncaptured == {"not a token count of capture_sizes": 2} and stats.bytes_held > 0
    (graph,) = stats.graphs
    assert re.fullmatch(r"x \[s\d+, 16\]", graph.serves) and graph.name.endswith("/0")
    assert f"serves {graph.serves}" in str(backend.reports[0]).splitlines()[1]
    assert str(backend) == (
        f"{backend!r}: 1 graph (0 recompilations), 1 capture, 2 replays, 2 uncaptured, "
        f"{stats.bytes_held / 2**20:.1f} MiB held\n"
        f"  {graph.name} serves {graph.serves}: 1 capture, 2 replays; 2 uncaptured (not a token count of capture_sizes)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.captures = 3  # type: ignore[misc]


@pytest.mark.usefixtures("fake_group")
def test_captures_of_a_cache_that_grows_are_told_once_and_are_no_capture_in_the_headline() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
            cache = torch.cat([cache, x])
            return self.model(x) + cache.sum(0), cache

    model = ringfence.compile(Growing(), capture_sizes=[4], dynamic=True, **SIMULATED)
    cache = rows(3)
    with pytest.warns(
        CapturesWastedWarning, match=r"no capture of 4 tokens.*'l_cache.shape\[0\]' is.*static"
    ) as caught:
        for step in range(12):
            _, cache = model(rows(4), cache)
            assert len(caught) == (step >= 2)  # when it has grown twice by as much
    stats = model.ringfence.stats
    assert (stats.captures, stats.replays, stats.never_replayed) == (8, 0, 8)
    assert stats.uncaptured == {"too many sizes besides the token count": 4}
    (report,) = model.ringfence.reports
    assert "capture" not in report.summary and "no replays: sizes change in every call" in report.summary
    assert "8 of the captures never replayed" in str(model.ringfence)
    with torch.no_grad():
        model(rows(4), rows(3))  # as the first one: a second request may find them
    assert "capture: simulated" in model.ringfence.reports[0].summary and model.ringfence.stats.never_replayed == 7


@pytest.mark.usefixtures("fake_group")
def test_sizes_that_are_captured_ahead_are_no_cache_that_grows() -> None:
    """As a server warms up: each length once, then again."""
    model = Model()
    backend = ringfence.Backend(capture_sizes=[4], **SIMULATED)
    compiled = torch.compile(lambda x, cache: model(x) + cache.sum(0), backend=backend, dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", CapturesWastedWarning)
        for n in (20, 40, 60, 20, 40, 60):
            compiled(rows(4), rows(n))
    assert (backend.stats.captures, backend.stats.replays) == (3, 3)


class GrowingCache:
    """As transformers' DynamicCache."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.values = rows(3)


@pytest.mark.usefixtures("fake_group")
def test_a_cache_that_is_known_to_grow_is_told_in_its_first_call_and_once() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
            past_key_values.values = torch.cat([past_key_values.values, x])
            out: Tensor = self.model(x) + past_key_values.values.sum(0)
            return out

    def warned(calls: int, **options: Any) -> list[int]:
        model = ringfence.compile(Growing(), dynamic=True, **SIMULATED, **options)
        cache, found = GrowingCache(), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CapturesWastedWarning)
            for _ in range(calls):
                model(rows(4), past_key_values=cache)
                found.append(sum(w.category is CapturesWastedWarning for w in caught))
        text = next((str(w.message) for w in caught if w.category is CapturesWastedWarning), None)
        assert text is None or ("a GrowingCache grows" in text and "cache_implementation='static'" in text)
        return found

    assert warned(12, capture_sizes=[4]) == [1] * 12
    assert warned(3) == [0] * 3


@pytest.mark.usefixtures("fake_group")
def test_a_cap_that_is_reached_by_sizes_that_come_again_is_told_without_calling_captures_wasted() -> None:
    model = Model()

    def serve(x: Tensor, cache: Tensor) -> Tensor:
        return model(x) + cache.sum(0)

    backend = ringfence.Backend(capture_sizes=[4], **SIMULATED)
    compiled = torch.compile(serve, backend=backend, dynamic=True)
    caches = [rows(n) for n in range(5, 16)]
    with torch.no_grad(), pytest.warns(CapturesWastedWarning, match=r"not every capture.*more values than are kept"):
        for cache in caches:
            for _ in range(2):
                compiled(rows(4), cache)
    assert (backend.stats.captures, backend.stats.replays) == (8, 8)
    for report in backend.reports:
        assert report.wasted is None
    assert "capture: simulated" in backend.reports[0].summary


@pytest.mark.slow
def test_an_eager_prompt_is_watched_among_the_ranks_that_share_the_model(tmp_path: Path) -> None:
    first, second = run_ranks(2, prompts, str(tmp_path))
    assert first["steps"] == second["steps"] == [([8], "uncaptured")] * 2
    assert second["said"].startswith(
        "rank 1 did not come to call 1 of group 'world' (step 1 of sizes (8,), piece 0 'prompt'"
    )


@pytest.mark.slow
def test_one_rank_alone_may_ask_for_a_journal_of_prompts_and_not_for_a_watch(tmp_path: Path) -> None:
    found = run_ranks(2, watched_by_one, str(tmp_path))
    assert [one["steps"] for one in found] == [[([8], "uncaptured")] * 2] * 2
    assert all("on_hang differs: rank 0: report; rank 1: None" in one["said"] for one in found)
