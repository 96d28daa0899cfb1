"""Two ranks: other local work, engines' ops, sums that are scaled and added, collectives that nobody waits for."""

from __future__ import annotations

from typing import Any

import pytest
from cases.rank_fusions import BIASES, NORM_OPS, SUMS
from cases.rank_work import LOCAL_WORK
from cases.ranks import run_all

from support import run_ranks

pytestmark = pytest.mark.xdist_group("two ranks")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """One pair of processes for all programs."""
    return run_ranks(2, run_all)


def found(ranks: list[dict[str, Any]], program: str, name: str) -> list[Any]:
    """What each rank found; the program's own error where it raised."""
    for result in ranks:
        assert isinstance(result[program], dict), result[program]
    return [result[program][name] for result in ranks]


@pytest.mark.parametrize("captured", ["", " captured"])
@pytest.mark.parametrize("model", LOCAL_WORK)
def test_ranks_may_do_other_local_work(ranks: list[dict[str, Any]], model: type, captured: str) -> None:
    for seen in found(ranks, "local_work", model.__name__ + captured):
        assert "error" not in seen, seen
        assert seen["off"] < 1e-5
        assert seen["sites"] == ["fused"]


@pytest.mark.parametrize("how", ["torch's name", "torch's name, captured", "mapped", "without a group", "in place"])
def test_an_engines_own_all_reduce_is_fused(ranks: list[dict[str, Any]], how: str) -> None:
    for seen in found(ranks, "engine_op", how):
        assert "error" not in seen, seen
        assert seen["off"] < 1e-5
        assert seen["sites"] == ["fused"]


def test_a_group_name_that_torch_does_not_know_is_to_be_mapped(ranks: list[dict[str, Any]]) -> None:
    for seen in found(ranks, "engine_op", "unknown name"):
        assert "all_reduce_ops={'casering::all_reduce':" in seen["error"], seen
        assert "pp:0" in seen["error"]


def test_an_all_reduce_that_is_not_listed_is_named(ranks: list[dict[str, Any]]) -> None:
    for seen in found(ranks, "engine_op", "not listed"):
        assert seen["off"] < 1e-5
        assert any("casering::all_reduce" in note and "all_reduce_ops" in note for note in seen["notes"]), seen


@pytest.mark.parametrize("model", SUMS)
def test_scaled_and_added_sums(ranks: list[dict[str, Any]], model: type) -> None:
    """Fused where the kernels' rounding is allowed, left alone under strict, right in both."""
    for seen in found(ranks, "sums", f"{model.__name__} kernel"):
        assert seen["off"] < 1e-5
        assert "fused" in seen["sites"], seen
    for seen in found(ranks, "sums", f"{model.__name__} strict"):
        assert seen["off"] < 1e-5
        if model.__name__ not in ("OneAllReduce", "LeftToRight"):  # whose last sum needs no other rounding
            assert "fused" not in seen["sites"], seen
    for seen in found(ranks, "sums", f"{model.__name__} bfloat16"):
        ours, eager = seen["exact"]
        assert ours <= 1.5 * eager < 0.1


@pytest.mark.parametrize("model", BIASES)
def test_bias_behind_the_all_reduce(ranks: list[dict[str, Any]], model: type) -> None:
    for numerics in ("kernel", "strict"):
        for seen in found(ranks, "sums", f"{model.__name__} {numerics}"):
            assert seen["off"] < 1e-5
            (site,), (message,) = seen["sites"], seen["messages"]
            if model.__name__ == "BiasBeforeLayerNorm":
                assert site == "layer_norm", message
            elif model.__name__ == "BiasOfResidual":
                assert site == "fused", message
            elif site != "fused":
                assert "bias" in message, (site, message)
    for seen in found(ranks, "sums", f"{model.__name__} bfloat16"):
        ours, eager = seen["exact"]
        assert ours <= 1.5 * eager < 0.1


@pytest.mark.parametrize("model", NORM_OPS)
def test_engines_norm_ops_are_fused(ranks: list[dict[str, Any]], model: type) -> None:
    for seen in found(ranks, "norm_ops", model.__name__):
        assert seen["off"] < 1e-5
        assert seen["sites"] == ["fused"], seen


@pytest.mark.parametrize("scale", ["adaLN", "gate", "vector", "whole"])
def test_a_weightless_norm_may_be_modulated(ranks: list[dict[str, Any]], scale: str) -> None:
    for seen in found(ranks, "modulated", scale):
        assert seen["off"] < 1e-5
        assert seen["sites"] == ["fused"], seen


def test_weights_that_are_no_parameters(ranks: list[dict[str, Any]]) -> None:
    for how in ("static", "dynamic", "counters"):
        for seen in found(ranks, "plain_weights", how):
            assert seen["off"] < 1e-5
            if how == "static":
                assert seen["sites"] == ["fused"]
            elif how == "dynamic":
                assert seen["sites"] == ["fused"] or "mark_dynamic" in seen["messages"][0], seen
            else:
                assert seen["sites"] == ["activation_dtype"], seen


@pytest.mark.parametrize("kind", ["NormFirst", "SumLast"])
def test_layers_compiled_one_by_one_say_why_half_is_not_fused(ranks: list[dict[str, Any]], kind: str) -> None:
    for seen in found(ranks, "layers_one_by_one", kind):
        assert seen["off"] < 1e-5
        for first, last in seen["sites"]:
            assert first == "fused"
            assert last == "escapes_graph"
        assert all("whole model" in message for message in seen["messages"]), seen["messages"]


def test_a_graph_without_an_all_reduce_says_what_it_has(ranks: list[dict[str, Any]]) -> None:
    for seen in found(ranks, "no_all_reduce_in_the_graph", "SequenceParallel"):
        assert seen["off"] < 1e-5
        assert any("reduce_scatter" in note for note in seen["notes"]), seen
        assert "NotFusedError" in seen["error"]
    for seen in found(ranks, "no_all_reduce_in_the_graph", "Autograd"):
        assert seen["off"] < 1e-5
        assert seen["reports"] >= 1
        assert "NotFusedError" in seen["error"]


@pytest.mark.parametrize("captured", ["", " captured"])
@pytest.mark.parametrize("name", ["result", "argument", "functional", "late", "rows", "columns"])
def test_collectives_that_nobody_waits_for(ranks: list[dict[str, Any]], name: str, captured: str) -> None:
    for seen in found(ranks, "unwaited", name + captured):
        assert max(seen) < 1e-5, seen
