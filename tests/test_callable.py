"""The fused op as a function: eager, traced, prepared, in captures; and the watch around an engine's steps."""

from __future__ import annotations

import json
import warnings
from typing import Any

import callable_ranks
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._subclasses import FakeTensorMode

import ringfence
from ringfence.runtime.collectives.prepared import Prepared
from ringfence.runtime.collectives.workspace import workspaces_of
from ringfence.runtime.errors import (
    ArgumentError,
    CaptureError,
    CollectiveUnavailableError,
    GradModeError,
    GroupError,
    InputError,
    OptionsError,
    PoisonedError,
    WorkspaceError,
)
from ringfence.runtime.replay.capture import SimulatedGraphs
from support import TOLERANCE, run_ranks

H = 256
pytestmark = pytest.mark.xdist_group("callable")  # its ranks run once


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two ranks did, one thing after the other."""
    return run_ranks(2, callable_ranks.one_after_the_other)


def test_numbers_eager_and_traced_by_anybody(ranks: list[dict[str, Any]]) -> None:
    for worst in (done["eager_and_traced"] for done in ranks):
        assert worst.keys() == {
            "add", "alias", "strided", "bare", "gemma", "sum", "eager", "aot_eager", "inductor"
        }  # fmt: skip
        assert max(worst.values()) <= 1.0, worst


def test_in_a_graph_that_ringfence_compiles_it_is_a_site(ranks: list[dict[str, Any]]) -> None:
    for found in (done["in_ringfences_graphs"] for done in ranks):
        for way, (worst, sites, verdicts) in found.items():
            assert worst <= 4 * TOLERANCE[torch.float32], way
            assert {str(site[4]).rpartition("/")[2].partition(":")[0] for site in sites} == {"callable_ranks.py"}
            assert [site[:3] for site in sites] == [
                ("all_reduce_add_rms_norm", "world", True),  # found
                (None, "world", False),
                ("all_reduce_add_rms_norm", "world", True),  # called
                ("all_reduce_rms_norm", "world", True),
            ]
            assert [sites[i][3] for i in (0, 2, 3)] == pytest.approx([1e-6, 1e-5, 1e-6])
            assert {rule for _, rule, _ in verdicts} == {"host_collective" if way == "captured" else "no_capture"}
            assert len(verdicts) == 4, "each is judged"


def test_prepared_ahead_it_is_carried_out_by_kernels(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(done["prepared"] for done in ranks):
        made = found["prepared"]
        assert isinstance(made, Prepared) and found["stored"]
        assert (made.group, made.collective, made.hidden, made.dtype, made.max_tokens) == (
            "world", "mnnvl", H, "bfloat16", 8
        )  # fmt: skip
        assert made.largest == 8 * H * 2 and made.captured and made.capture.startswith("device_epoch"), made
        assert any("chosen" in why for why in made.why), made.why
        assert "mnnvl, up to 8 tokens of 256 bfloat16" in found["text"] and ": captured (" in found["text"]
        assert found["error"] <= TOLERANCE[torch.bfloat16]
        assert found["calls"] == [("mnnvl/peer", "one-shot", (3, H)), ("mnnvl/peer", "all_reduce", (3, H))], (
            "too large a call and another dtype go to the reference"
        )
        worst, kernels, collective = found["traced"]
        assert worst <= TOLERANCE[torch.bfloat16] and collective == "mnnvl" and kernels == ["mnnvl/peer"], rank
        poisoned, error, _ = found["captured"]
        assert poisoned and error <= TOLERANCE[torch.bfloat16]
        assert found["again"] == (1, "mnnvl"), "the workspace that is there is used"
        assert found["constants"] == ["ones", "zeros"], "they could not be made in a capture"
        assert found["needs none"] == [{}], "kernels of our own read what a call has"
        assert found["patience"] == 1800, "an engine's first call may wait for a rank that still compiles"
        assert found["closed"] == ({}, 0) and found["after"] == []


def test_ranks_that_prepare_different_things_hear_of_it(ranks: list[dict[str, Any]]) -> None:
    for said in (done["disagreeing"] for done in ranks):
        assert len(said) == 2
        assert "max_tokens differs: rank 0: 8; rank 1: 9" in said[0]
        assert "hidden differs: rank 0: 256; rank 1: 257" in said[1]


# -- bad input


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, H).to(dtype), torch.randn(3, H).to(dtype), torch.rand(H).to(dtype)


@pytest.mark.usefixtures("fake_group")
def test_operands_that_do_not_fit() -> None:
    x, r, w = given()
    cases: list[tuple[tuple[Any, ...], str]] = [
        (
            (x.double(), r, w),
            r"the input must be \[\.\.\., hidden\] of torch\.float16, .* but it is torch\.float64 \[3, 256\]",
        ),
        ((x.long(), r, w), "the input must be .* but it is torch.int64"),
        (([1.0], r, w), r"the input must be .* but it is \[1\.0\]"),
        ((x[0, 0], None, None), r"the input must be .* but it is torch\.float32 \[\]"),
        ((x, r[:1], w), r"residual must be torch\.float32 \[3, 256\] on cpu, .* but it is torch\.float32 \[1, 256\]"),
        ((x, r.bfloat16(), w), "residual must be torch.float32 .* but it is torch.bfloat16"),
        ((x, r, w[:1]), r"weight must be torch\.float32 \[256\] on cpu, .* but it is torch\.float32 \[1\]"),
        ((x, r, w.half()), "weight must be torch.float32 .* but it is torch.float16"),
        ((x[:0], r[:0], w), "the input must not be empty, but it is"),
        ((x, [1.0], w), r"residual must be torch\.float32 .* but it is \[1\.0\]"),
        ((x, r, 1.0), "weight must be .* but it is 1.0"),
        ((x.to_sparse(), r, w), r"but it is torch\.float32 \[3, 256\] \(torch\.sparse_coo\)"),
        ((x, r, w, None), "eps must be a finite number, but it is None"),
        ((x, r, w, torch.tensor(1e-6)), r"eps must be a number, but it is a tensor: pass float\(eps\)"),
        ((x, r, w, "1e-6"), "eps must be a finite number, but it is '1e-6'"),
        ((x, r, w, float("nan")), "eps must be a finite number, but it is nan"),
        ((x, r, w, -1e-6), "eps must not be negative, .* but it is -1e-06"),
    ]
    for operands, message in cases:
        with pytest.raises(InputError, match=message):
            ringfence.all_reduce_add_rms_norm(*operands)
    with pytest.raises(InputError, match=r"the input must be .* but it is torch.int32"):
        ringfence.all_reduce(x.int())
    with pytest.raises(InputError, match="weight_bias must be a finite number, but it is True"):
        ringfence.all_reduce_add_rms_norm(x, r, w, weight_bias=True)
    with pytest.raises(GradModeError, match="no backward"):
        ringfence.all_reduce_add_rms_norm(x, r, w.requires_grad_())
    with torch.no_grad():
        assert ringfence.all_reduce_add_rms_norm(x, r, w)[1].shape == x.shape


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("backend", ["aot_eager", "ringfence"])
def test_operands_that_do_not_fit_are_told_where_it_is_compiled(backend: str) -> None:
    """By ringfence's own backend when it compiles: what it compiles looks at no operands any more."""
    x, r, w = given()
    for operands, message in (
        ((x, r[:1], w), "residual must be torch.float32 .*, as the input is, but it is torch.float32"),
        ((x, r.bfloat16(), w), "residual must be .* but it is torch.bfloat16"),
        ((x.double(), r.double(), w.double()), "the input must be .* but it is torch.float64"),
        (
            (x, r, w[:1]),
            r"weight must be torch\.float32 .*, beside an input of torch\.float32 \[3, 256\] on cpu, but it is",
        ),
        ((x, r, w, float("nan")), "eps must be .* but it is nan"),
        ((x, r, w, torch.tensor(1e-6)), r"eps must be a number, but it is a tensor.*pass float\(eps\)"),
        ((x[0, 0], None, None), "the input must be .* but it is torch.float32"),
    ):
        torch._dynamo.reset()
        backends = {"ringfence": ringfence.Backend(piece_compiler="eager")}
        call = torch.compile(ringfence.all_reduce_add_rms_norm, backend=backends.get(backend, backend), fullgraph=True)
        wrapped = (BackendCompilerFailed, Unsupported)  # by torch, the second where Dynamo itself meets it
        with torch.no_grad(), pytest.raises((InputError, *wrapped), match=message) as raised:
            call(*operands)
        assert isinstance(getattr(raised.value, "inner_exception", raised.value), InputError | Unsupported)


def test_groups_that_are_not_there() -> None:
    x, r, w = given()
    with pytest.raises(GroupError, match=r"no process group is initialised: call torch\.distributed\.init"):
        ringfence.all_reduce_add_rms_norm(x, r, w)
    with pytest.raises(GroupError, match="no process group is initialised"):
        ringfence.prepare(None, H, torch.float32, 8)
    with pytest.raises(GroupError, match="-100 is no process group"):
        ringfence.all_reduce(x, group=dist.GroupMember.NON_GROUP_MEMBER)


@pytest.mark.usefixtures("fake_group")
def test_bad_arguments_of_prepare() -> None:
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((None, 0, torch.bfloat16, 8), {}, "hidden=0"),
        ((None, H, torch.float64, 8), {}, "dtype=torch.float64 is none of"),
        ((None, H, torch.bfloat16, 0), {}, "max_tokens=0"),
        ((None, H, torch.bfloat16, None), {}, "max_tokens=None"),
        ((None, H, torch.bfloat16, 8), {"collective": "fast"}, "collective='fast' is not one of"),
        ((None, H, torch.bfloat16, 8), {"on_hazard": "clean"}, "on_hazard='clean' rewrites a graph"),
        ((None, H, torch.bfloat16, 8), {"agree_seconds": -1}, "agree_seconds=-1"),
        ((None, H, torch.bfloat16, 8), {"device": "gpu:0"}, "device='gpu:0' is no device of torch's"),
        ((None, H, torch.bfloat16, 8), {"device": 1.5}, "device=1.5 is no device"),
        ((None, H, torch.bfloat16, 8), {"device": "cuda:9"}, r"device='cuda:9', and this process sees \d CUDA devices"),
    ]
    for args, options, message in cases:
        with pytest.raises(OptionsError, match=message):
            ringfence.prepare(*args, **options)
    with pytest.raises(CollectiveUnavailableError, match=r"collective='mnnvl' cannot be had over group 'world'"):
        ringfence.prepare(None, H, torch.bfloat16, 8, collective="mnnvl")
    with pytest.raises(GroupError, match="'nope'"):
        ringfence.prepare("nope", H, torch.bfloat16, 8)
    with pytest.raises(WorkspaceError, match="inside a capture"):
        SimulatedGraphs().capture(lambda: [ringfence.prepare(None, H, torch.bfloat16, 8)], ())


@pytest.mark.usefixtures("fake_group")
def test_a_group_whose_collectives_the_host_runs_is_not_captured_in_silence() -> None:
    made = ringfence.prepare(None, H, torch.float32, 8)
    assert (made.collective, made.captured, made.nbytes, made.largest) == ("reference", False, 0, 0)
    assert made.capture.startswith("host_collective") and "the tensors are on cpu" in "".join(made.why)
    for close in (False, True):
        if close:  # as where nothing was prepared
            ringfence.close_workspaces("world")
        with pytest.raises(CaptureError, match=r"inside a capture that must not hold it: .* on the host over fake"):
            SimulatedGraphs().capture(lambda *g: ringfence.all_reduce_add_rms_norm(*g), given())
        with pytest.raises(CaptureError, match="must not hold it"):
            SimulatedGraphs().capture(lambda x: [ringfence.all_reduce(x)], given()[:1])


def _exchanged(x: Tensor) -> Tensor:
    sent = ringfence.moe.dispatch([x], torch.zeros(3, 2, dtype=torch.int64), capacity=3, num_experts=4)
    return ringfence.moe.combine(sent.payloads[0] * 2, sent.route)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "ringfence"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_would_be_differentiated_is_told_where_it_is_compiled(backend: str) -> None:
    """By AOT when it compiles; torch's eager backend compiles no backward, and meets it when there is to be one."""
    x, r, w = given()
    calls: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda *g: ringfence.all_reduce_add_rms_norm(*g)[0], (x, r, w.clone().requires_grad_())),
        (lambda x, w: ringfence.all_reduce_add_rms_norm(x, None, w)[0], (x, w.clone().requires_grad_())),
        (ringfence.all_reduce, (x.clone().requires_grad_(),)),
        (_exchanged, (x.clone().requires_grad_(),)),
    ]
    for call, operands in calls:
        torch._dynamo.reset()
        backends = {"ringfence": ringfence.Backend(piece_compiler="eager")}
        compiled = torch.compile(call, backend=backends.get(backend, backend), fullgraph=True)
        with pytest.raises((GradModeError, BackendCompilerFailed), match=r"under torch\.inference_mode\(\)") as raised:
            compiled(*operands).sum().backward()
        assert isinstance(getattr(raised.value, "inner_exception", raised.value), GradModeError)
        if backend != "inductor":
            with torch.inference_mode():
                assert compiled(*operands).shape == x.shape


@pytest.mark.usefixtures("fake_group")
def test_who_traces_sees_one_op() -> None:
    """By make_fx, and with fake tensors, as engines do that trace by themselves."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return *ringfence.all_reduce_add_rms_norm(x, r, w), ringfence.all_reduce(x), *_bare(x)

    def _bare(x: Tensor) -> tuple[Tensor, Tensor]:
        return ringfence.all_reduce_add_rms_norm(x, None, None)

    with torch.no_grad():
        gm = make_fx(call, tracing_mode="fake")(*given())
        names = [str(n.target) for n in gm.graph.nodes if "ringfence" in str(n.target)]
        called = ("all_reduce_add_rms_norm", "all_reduce", "all_reduce_rms_norm")
        assert names == [f"ringfence.{name}.default" for name in called]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in given()]
        assert [o.shape for o in call(*fake)] == [fake[0].shape] * 5


@pytest.mark.usefixtures("fake_group")
def test_after_a_failure_nothing_is_called() -> None:
    workspaces_of("world").invalidate("rank 1 died")
    with pytest.raises(PoisonedError, match=r"rank 1 died; call ringfence\.prepare on every rank"):
        ringfence.all_reduce_add_rms_norm(*given())
    ringfence.prepare(None, H, torch.float32, 8)
    x = given()[0]
    assert torch.equal(ringfence.all_reduce(x), x), "the fake group adds nothing, and the call is made"


# -- the watch


def test_steps_of_an_engine_are_written_down_and_a_failure_is_told(tmp_path: Any) -> None:
    first, second = run_ranks(2, callable_ranks.watched, str(tmp_path))
    told_of_what_was_wrong(first["wrong"], second["wrong"])
    told_of_the_step(first["steps"], second["steps"])
    for found in (first, second):
        assert "agree on the options of the watch: check_every_step differs: rank 0: False" in found["unlike"]
        position = found["before"]
        # One step before them: the call that was wrong on one rank left nobody out of step.
        assert (position.step, position.sizes, position.phase) == (4, (4,), "idle")
        calls = {name: count for name, count in position.submitted.items() if count}
        assert calls == {"world": 5} and position.completed == position.submitted, "a step counts as one call"
    assert "rank 1" in first["heard"] and "ValueError: out of pages" in first["heard"], first
    assert second["heard"] == "out of pages"
    journal = json.loads((tmp_path / "journal-rank1.json").read_text())
    assert [p["name"] for p in journal["programs"]] == ["decode", "decode", "prefill"]
    assert "out of pages" in journal["reason"]


def told_of_what_was_wrong(right: dict[str, tuple[str, float]], wrong: dict[str, tuple[str, float]]) -> None:
    """Both ranks raise at once: the one that was called wrongly what was wrong, the other whose call and the same."""
    disagree = "RankMismatch: the ranks do not agree on the options of the watch: step_seconds differs"
    assert right["disagree"][0].startswith(disagree) and wrong["disagree"][0].startswith(disagree)
    assert right["by another name"][0] == wrong["by another name"][0] == ""
    for way, kind, message in (
        ("never met", "OptionsError", "on_hang='shout' is not one of"),
        ("hidden", "OptionsError", "hidden=0 is not a positive integer"),
        ("device", "OptionsError", "device='gpu' is no device of torch's"),
        ("agree_seconds", "OptionsError", "agree_seconds='long' is not a positive number"),
        ("top_k", "OptionsError", "top_k=0 is not a positive integer"),
        ("option", "OptionsError", "watch takes no capture_sizes"),
        ("op", "OptionsError", "split_ops holds 'nope::op'"),
        ("group_names", "OptionsError", "group_names: 'nope' is no process group"),
        ("later", "CollectiveUnavailableError", "collective='trtllm' cannot be had over group 'world'"),
    ):
        (heard, seconds), (own, own_seconds) = right[way], wrong[way]
        assert own.startswith(f"{kind}: ") and message in own, own
        assert heard.startswith("RankLeftError: rank 1 left: ") and message in heard, heard
        assert max(seconds, own_seconds) < 120, "before agree_seconds, which are 180"


def told_of_the_step(first: list[str], second: list[str]) -> None:
    differences = (
        "name differs: rank 0: decode; rank 1: prefill",
        "sizes differs: rank 0: sizes (4,)",
        "how it runs differs: rank 0: uncaptured; rank 1: replay",
        "tokens=-1 is negative",
    )
    for said, message in zip(first, differences, strict=True):
        assert message in said and said.startswith("Rank"), said
    assert first[:3] == second[:3] and second[3].startswith("ArgumentError: tokens=-1"), second


@pytest.mark.usefixtures("fake_group")
def test_a_step_that_nobody_enters_is_told() -> None:
    watch = ringfence.watch()
    with pytest.warns(RuntimeWarning, match=r"watch.step\('decode'\) was called without `with`") as caught:
        watch.step("decode", 4)
    assert caught[0].filename == __file__ and watch.journal.position().step == -1, "none has begun"
    step = watch.step("decode", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with step:
            pass
        del step
    assert watch.journal.position().step == 0


@pytest.mark.usefixtures("fake_group")
def test_bad_arguments_of_watch() -> None:
    with pytest.raises(OptionsError, match=r"watch takes no capture_sizes; its options are on_hang"):
        ringfence.watch(capture_sizes=[4])
    with pytest.raises(OptionsError, match="on_hang='shout'"):
        ringfence.watch(on_hang="shout")
    with pytest.raises(OptionsError, match="device='gpu' is no device"):
        ringfence.watch(device="gpu")
    with pytest.raises(GroupError, match="'nope'"):
        ringfence.watch("nope")
    watch = ringfence.watch()
    steps: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((None,), {}, "None is no name"),
        (("",), {}, "'' is no name"),
        (("decode", "4"), {}, "tokens='4' is no number"),
        (("decode", None), {}, "tokens=None"),
        (("decode", torch.tensor(4)), {}, "of a tensor pass its length"),
        (("decode", True), {}, "tokens=True"),
        (("decode", -1), {}, "tokens=-1 is negative"),
        (("decode", 4), {"replay": "yes"}, "replay='yes' is not a bool"),
    ]
    for args, options, message in steps:
        with pytest.raises(ArgumentError, match=message), watch.step(*args, **options):
            pytest.fail("the step began")
    with pytest.raises(KeyError), watch.step("decode", 4):
        raise KeyError("mine")
    with watch.step("decode", 4):
        pass
    assert watch.journal.position().step == 1
