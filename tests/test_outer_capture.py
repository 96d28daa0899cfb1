"""A compiled model inside a capture that somebody else makes, whole or in segments."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from segments import Segments
from torch import Tensor

import ringfence
from ringfence.compile_passes.find import find
from ringfence.compile_passes.fuse import fuse
from ringfence.compile_passes.judge import judge
from ringfence.compile_passes.outer import outer_capture
from ringfence.runtime.collectives import ops, reference
from ringfence.runtime.errors import CaptureError, OptionsError
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective, Situation
from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.replay.tape import Tape
from ringfence.runtime.seams import run_between
from ringfence.runtime.watch.supervision import Supervision
from support import TOLERANCE, aot_graph, assigned, relative_error

H = 16
CONTEXT = {"scale": 1.0}


@torch.library.custom_op("outer_test::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attention(x: Tensor) -> Tensor:
    """Reads what Python knows in this step, as vLLM's does."""
    return x * CONTEXT["scale"]


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.ops.outer_test.attention(x.sin()) + x
    return F.rms_norm(y, (H,), w, 1e-6), y


def plain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return F.rms_norm(x.sin(), (H,), w, 1e-6), x * 2


def summing(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone()
    dist.all_reduce(y)
    y = y + x
    return F.rms_norm(y, (H,), w, 1e-6), y


@contextlib.contextmanager
def engine(segments: Segments, name: str = "vllm") -> Iterator[None]:
    path, function = {
        "vllm": ("vllm.compilation.breakable_cudagraph", {"eager_break_during_capture": segments.eager}),
        "sglang": ("sglang.srt.runner.breakable_cuda_graph", {"eager_on_graph": lambda on: segments.eager}),
    }[name]
    module = types.ModuleType(path)
    module.__dict__.update(function)
    with mock.patch.dict(sys.modules, {name: types.ModuleType(name), path: module}):
        yield


def compiled(body: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], ringfence.Backend]:
    """Without Dynamo around it, which compiles anew below a dispatch mode, as the simulation is one."""
    backend, made = ringfence.Backend(piece_compiler="eager", **options), []

    def keep(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(backend(gm, inputs))
        return made[-1]

    with torch.no_grad():
        torch.compile(body, backend=keep, fullgraph=True)(torch.randn(4, H), torch.ones(H))
    return made[0], backend


def check_replays(replay: Callable[[], None], outputs: Any, x: Tensor, w: Tensor, body: Callable[..., Any]) -> None:
    for step in range(4):
        CONTEXT["scale"] = 1.0 + step
        x.copy_(torch.randn(4, H))
        w.copy_(torch.rand(H) + step)
        replay()
        for ours, wanted in zip(outputs, body(x, w), strict=True):
            assert relative_error(ours, wanted.double()) <= 2 * TOLERANCE[torch.float32], step
    CONTEXT["scale"] = 1.0


@pytest.mark.parametrize("options", [{}, {"outer_capture": True}], ids=["", "outer_capture"])
def test_a_capture_holds_what_it_may(options: dict[str, Any]) -> None:
    call, backend = compiled(plain, **options)
    x, w = torch.randn(4, H), torch.ones(H)
    with torch.no_grad():
        piece = SimulatedGraphs().capture(call, (x, w))
        assert piece.outputs[0].isnan().all()
        check_replays(piece.replay, piece.outputs, x, w, plain)
    assert len(backend.reports) == 1


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("options", [{}, {"outer_capture": True}], ids=["", "outer_capture"])
@pytest.mark.parametrize(("body", "why"), [(model, "Tag.cudagraph_unsafe"), (summing, "on the host over fake")])
def test_what_it_must_not_hold_is_refused_and_the_model_goes_on(
    body: Callable[..., Any], why: str, options: dict[str, Any]
) -> None:
    call, _ = compiled(body, **options)
    x, w = torch.randn(4, H), torch.ones(H)
    with torch.no_grad(), mock.patch.object(Supervision, "refuses") as told:  # the other ranks begin their step
        for i in range(2):
            with pytest.raises(CaptureError, match=f"inside a capture that must not hold it: .*{why}") as caught:
                SimulatedGraphs().capture(call, (x, w))
            assert told.call_count == i + 1 and str(told.call_args.args[0]) in str(caught.value)
            assert told.call_args.args[1] == ({"0"} if body is summing else set())
            for ours, wanted in zip(call(x, w), body(x, w), strict=True):
                assert relative_error(ours, wanted.double()) <= 2 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize("options", [{}, {"outer_capture": True}], ids=["", "outer_capture"])
@pytest.mark.parametrize("body", [model, summing])
def test_between_the_segments_of_an_engine_it_runs_eagerly(
    body: Callable[..., Any], options: dict[str, Any], name: str
) -> None:
    call, backend = compiled(body, **options)
    x, w, segments = torch.randn(4, H), torch.ones(H), Segments()
    with torch.no_grad(), engine(segments, name):
        outputs = segments.record(call, x, w)
        check_replays(segments.replay, outputs, x, w, body)
    islands = [p.island for p in backend.reports[0].pieces]
    assert any(islands) == ("outer_capture" in options)
    assert segments.breaks == (1 + sum(islands) if options else 1)
    recorded = sum(
        isinstance(getattr(a, "__self__", None), Tape) and bool(a.__self__.kernels) for a in segments.actions
    )
    assert recorded == islands.count(False) if options else recorded == 0


def test_a_capture_without_segments_is_known_from_one_with(fake_group: None) -> None:
    """Both engines' functions call what they are given as it is, where no capture of theirs runs."""
    call, _ = compiled(model)
    with torch.no_grad(), engine(Segments()):
        assert run_between(lambda: [1], (), torch.device("cpu")) == (1,), "no capture at all"
        with pytest.raises(CaptureError, match="must not hold it"):
            SimulatedGraphs().capture(call, (torch.randn(4, H), torch.ones(H)))


# -- the fused op by itself


def given() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, H), torch.randn(4, H), torch.rand(H)


@pytest.mark.usefixtures("fake_group")
def test_the_callable_runs_between_segments_too() -> None:
    x, r, w = given()
    segments = Segments()
    with torch.no_grad(), engine(segments):
        ringfence.prepare(None, H, torch.float32, 8)

        def call(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return ringfence.all_reduce_add_rms_norm(x.cos(), r, w)

        outputs = segments.record(call, x, w)
        check_replays(segments.replay, outputs, x, w, lambda x, w: reference.add_rms_norm(x.cos(), r, w, 1e-6, 0.0))
    assert segments.breaks == 1


@pytest.mark.usefixtures("fake_group")
def test_a_call_that_must_not_be_captured_goes_to_a_reference_that_may_be() -> None:
    """Over NCCL, which the simulation has not: its sum is replaced by one that can be recorded."""
    x, r, w = given()

    def call(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ops.normed(x, r, w, 1e-6, 0.0, "0", f"mnnvl{ops.NOT_CAPTURED}")  # the op is this, behind a dispatch

    with torch.no_grad(), pytest.raises(CaptureError, match="on the host over fake"):
        SimulatedGraphs().capture(call, (x, r, w))
    with (
        torch.no_grad(),
        mock.patch.object(reference, "all_reduce", lambda x, group: x * 2),
        mock.patch.object(ops, "describe_group", lambda name, device: Group(name, "nccl", 2, 0)),
    ):
        piece = SimulatedGraphs().capture(call, (x, r, w))
        check_replays(piece.replay, piece.outputs, x, w, lambda x, w: reference.add_rms_norm(x * 2, r, w, 1e-6, 0.0))


def sites(fake_group: None) -> Any:
    def layers(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            y = x.sin()
            dist.all_reduce(y)
            r = r + y
            x = F.rms_norm(r, (H,), w, 1e-6)
        return torch.ops.outer_test.attention(x), r

    gm = aot_graph(layers, *given())
    assert all(site.fused for site in fuse(gm, find(gm), collectives={"0": "mnnvl"}))
    return gm


@pytest.mark.parametrize("broken", [False, True], ids=["", "its self-test failed when captured"])
def test_the_judge_says_which_sites_go_to_the_reference(fake_group: None, broken: bool) -> None:
    gm = sites(fake_group)
    mnnvl = Situation(Collective.MNNVL, "0.7.0", world_size=2)
    for nccl, kept in ((Situation(Collective.NCCL, world_size=2), True), (None, False)):
        who = assigned({"0": "nccl"}, mnnvl, capture_failure="bits differ" if broken else None, nccl=nccl)
        before = {n.name: n.args for n in gm.graph.nodes}
        found = outer_capture(gm, who, judge(gm, who, capture=True))
        named = [n.args[-1] for n in gm.graph.nodes if n.target is ops.all_reduce_add_rms_norm]
        assert any("attention" in why for why in found.barred)
        if not broken:
            assert named == ["mnnvl", "mnnvl"] and not found.by_reference and len(found.barred) == 1
        elif kept:
            assert named == [f"mnnvl{ops.NOT_CAPTURED}"] * 2 and len(found.by_reference) == 2
            assert all("bits differ" in why for why in found.by_reference) and len(found.barred) == 1
        else:
            assert named == ["mnnvl", "mnnvl"] and len(found.barred) == 3
        for node in gm.graph.nodes:
            node.args = before[node.name]


def test_bad_options() -> None:
    with pytest.raises(OptionsError, match="outer_capture=True says that the caller captures"):
        ringfence.Backend(outer_capture=True, capture_sizes=[4])
    with pytest.raises(OptionsError, match="outer_capture='yes' is not a bool"):
        ringfence.Backend(outer_capture="yes")
