"""ringfence.compile: a model compiled in place, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from backend_model import H, Model, rows
from torch import Tensor, nn

import ringfence
from ringfence.runtime.errors import ModelError, OptionsError

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
