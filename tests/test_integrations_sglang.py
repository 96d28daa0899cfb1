"""ringfence in SGLang, over a stand-in: what is hooked, when nothing is, and what the hooked functions do.

``make engines`` runs the same in SGLang's own model classes.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sglang_ranks
import torch
import torch.distributed as dist
from fake_sglang import BACKENDS, FUSION, Coordinator, FakeSglang, HookType
from sglang_ranks import EPS, H, Lines, in_sglang
from torch import Tensor

from ringfence.integrations import sglang, targets
from ringfence.integrations.sglang_hooks import Adapter
from ringfence.runtime.collectives import reference
from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.watch.supervision import Asked
from ringfence.runtime.watch.supervisor import supervisor_for
from support import TOLERANCE, relative_error, run_python, run_ranks, start_fake_group

REPLAYS = {f"{path}.{name}.replay": HookType.AROUND for name, path in BACKENDS.items()}
FUNCTIONS = {
    f"{FUSION}.{name}": HookType.REPLACE
    for name in ("flashinfer_allreduce_residual_rmsnorm", "pre_initialize_workspaces")
}


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    with FakeSglang().loaded() as found:
        yield found


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    logger, handler = logging.getLogger("ringfence.integrations"), Lines()
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def register(asked: str | None, options: str | None = None) -> None:
    given = {"RINGFENCE": asked, "RINGFENCE_OPTIONS": options}
    with mock.patch.dict(os.environ, {name: value for name, value in given.items() if value is not None}):
        for name in (name for name, value in given.items() if value is None):
            os.environ.pop(name, None)
        sglang.register()


# -- what is hooked


@pytest.mark.parametrize(("asked", "options"), [(None, None), ("", ""), (" ", " "), ("0", "not read"), ("off", "{}")])
def test_nothing_happens_unless_it_is_asked_for(
    fake: FakeSglang, lines: list[str], asked: str | None, options: str | None
) -> None:
    register(asked, options)
    assert fake.hooks == [] and lines == []


def test_who_does_not_ask_pays_no_import() -> None:
    code = (
        "import sys, ringfence.integrations.sglang as s; s.register(); "
        "assert not {'torch', 'ringfence.callable'} & set(sys.modules)"
    )
    assert (done := run_python("-c", code)).returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("asked", "hooked"), [("fuse", REPLAYS | FUNCTIONS), ("1", REPLAYS | FUNCTIONS), ("guard", REPLAYS)]
)
def test_each_mode_hooks_what_it_needs(
    fake: FakeSglang, lines: list[str], asked: str, hooked: dict[str, HookType]
) -> None:
    register(asked)
    register(asked)  # once more is no more
    assert {target: kind for target, _, kind in fake.hooks} == hooked and len(fake.hooks) == len(hooked)
    assert lines == []


def test_the_functions_take_what_those_that_they_replace_take(fake: FakeSglang) -> None:
    for ours, theirs in (
        (Adapter.all_reduce_residual_rms_norm, "flashinfer_allreduce_residual_rmsnorm"),
        (Adapter.pre_initialize_workspaces, "pre_initialize_workspaces"),
    ):
        wanted = targets.parameters_of(fake.modules[FUSION].__dict__[theirs])
        assert targets.parameters_of(ours).removeprefix("self, ") == wanted
    assert list(inspect.signature(Adapter.replay).parameters)[1:3] == ["original", "backend"]


def _other(*args: Any) -> None:
    """Of other parameters than any target."""


@pytest.mark.parametrize("target", sglang.TARGETS["fuse"], ids=lambda t: t.path.rpartition(".")[2])
@pytest.mark.parametrize("how", ["moved", "missing", "no_module"])
def test_a_target_that_moved_is_one_warning_and_nothing_else(
    fake: FakeSglang, lines: list[str], target: targets.Target, how: str
) -> None:
    owner, _, name = target.path.rpartition(".")
    holder = targets.resolve(owner)
    if how == "moved":
        setattr(holder, name, _other)
        because = f"{target.path} takes (*args), not ({target.parameters})"
    elif how == "missing":
        delattr(holder, name)
        because = f"{target.path} cannot be had (AttributeError: "
    else:
        module = owner if owner in fake.modules else owner.rpartition(".")[0]
        del sys.modules[module]
        parent, _, last = module.rpartition(".")
        delattr(fake.modules[parent], last)
        because = f"{target.path} cannot be had ("
    register("fuse")
    assert fake.hooks == []
    (line,) = lines
    assert line.startswith("ringfence does nothing in SGLang ") and because in line and "0.5.23" in line, line


def test_guard_does_not_mind_what_it_does_not_use(fake: FakeSglang, lines: list[str]) -> None:
    fake.put(FUSION, flashinfer_allreduce_residual_rmsnorm=_other)
    register("guard")
    assert len(fake.hooks) == len(REPLAYS) and lines == []


@pytest.mark.parametrize(
    ("asked", "options", "why"),
    [
        (None, '{"on_hang": "abort"}', "RINGFENCE_OPTIONS is set and RINGFENCE is not"),
        ("pass", None, "RINGFENCE='pass' is none of 1, fuse, guard, nor 'off'"),
        ("fuse", "{", "RINGFENCE_OPTIONS is no JSON ("),
        ("fuse", '{"on_hang":\n', "RINGFENCE_OPTIONS is no JSON ("),
        ("fuse", "[1]", "RINGFENCE_OPTIONS holds [1], and is an object of options"),
        ("fuse", '{"capture_sizes": [4]}', "RINGFENCE_OPTIONS holds capture_sizes; with RINGFENCE=fuse it takes"),
        ("guard", '{"collective": "trtllm"}', "RINGFENCE_OPTIONS holds collective; with RINGFENCE=guard it takes"),
        ("fuse", '{"on_hang": "shout"}', "on_hang='shout'"),
        ("fuse", '{"on_hazard": "clean"}', "on_hazard='clean' rewrites a graph"),
        ("fuse", '{"step_seconds": -1}', "step_seconds=-1"),
    ],
)
def test_wrong_options_end_in_one_line(fake: FakeSglang, asked: str | None, options: str | None, why: str) -> None:
    with pytest.raises(SystemExit) as ended:
        register(asked, options)
    said = str(ended.value)
    assert said.startswith("ringfence: ") and why in said and "\n" not in said
    assert fake.hooks == []


def test_sglang_finds_it() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["sglang.srt.plugins"].values()
    assert EntryPoint("ringfence", entry, "sglang.srt.plugins").load() is sglang.register


# -- what the functions do


def layers(fake: FakeSglang, options: dict[str, Any]) -> list[str]:
    fake.tp = Coordinator(dist.group.WORLD, "tp:0", 2, 0)
    handler = in_sglang("fuse", options, fake)
    fake.modules[FUSION].__dict__["pre_initialize_workspaces"](8, H, torch.float32)
    return handler.lines


@pytest.mark.usefixtures("fake_group")
def test_what_is_not_served_is_left_to_sglang(fake: FakeSglang) -> None:
    first = layers(fake, {})[0]
    assert "in SGLang (of no known version) (not tried: 0.5.23 was), RINGFENCE=fuse: group 'tp:0': reference" in first
    assert "nothing is fused, all calls are SGLang's own all-reduce and norm" in first
    with torch.no_grad():
        fake.layer(torch.randn(3, H), torch.randn(3, H), torch.ones(H), EPS)
    assert fake.said == ["by itself"], "the reference is no faster than what SGLang has"


@pytest.mark.usefixtures("fake_group")
def test_in_a_capture_that_must_not_hold_it(fake: FakeSglang) -> None:
    """Between segments where SGLang captures in some; else SGLang's own, which its capture may hold."""
    layers(fake, {"collective": "reference"})
    x, r, w = torch.randn(3, H), torch.randn(3, H), torch.rand(H) + 0.5
    fused = fake.modules[FUSION].__dict__["flashinfer_allreduce_residual_rmsnorm"]

    def call(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        norm, total = fused(x.cos(), r, w, EPS)
        if norm is None:
            fake.said.append("by itself")
            return (x + 1.0,)
        return norm + 0.0, total + 0.0

    with torch.no_grad():
        SimulatedGraphs().capture(call, (x, r, w))
        assert fake.said == ["by itself"]
        outputs = fake.segments.record(call, x, r, w)
        assert fake.segments.breaks == 1 and fake.said == ["by itself"]
        for step in range(1, 3):
            x.copy_(torch.randn(3, H))
            r.copy_(torch.randn(3, H) * step)
            fake.segments.replay()
            wanted = reference.add_rms_norm(x.cos(), r, w, EPS, 0.0)
            for ours, theirs in zip(outputs, wanted, strict=True):
                assert relative_error(ours, theirs.double()) <= 2 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
def test_a_trace_and_an_empty_batch_are_sglangs(fake: FakeSglang) -> None:
    layers(fake, {"collective": "reference"})
    fused = fake.modules[FUSION].__dict__["flashinfer_allreduce_residual_rmsnorm"]
    x, r, w = torch.randn(3, H), torch.randn(3, H), torch.ones(H)
    with torch.no_grad():
        assert fused(x, r, w)[0] is not None
        assert fused(x[:0], r[:0], w) == (None, None)
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
            assert fused(x, r, w) == (None, None)
        assert fake.tp is not None
        fake.tp.world_size = 1
        assert fused(x, r, w) == (None, None)


def test_a_rank_by_itself_watches_nothing_and_a_new_engine_is_watched_anew(fake: FakeSglang) -> None:
    fake.tp = Coordinator(None, "tp:0", 1, 0)
    lines = in_sglang("guard", {}, fake).lines
    assert fake.replay("FullCudaGraphBackend", 4, lambda: 7) == 7 and lines == []
    for _ in range(2):
        start_fake_group(2)
        try:
            fake.tp = Coordinator(dist.group.WORLD, "tp:0", 2, 0)
            journal = supervisor_for(Asked({})).journal
            for number in (1, 2):
                assert fake.replay("BreakableCudaGraphBackend", 3, lambda: number) == number  # noqa: B023
                assert (journal.position().step, journal.position().sizes) == (number - 1, (3,))
        finally:
            dist.destroy_process_group()
    assert len(lines) == 2 and all("RINGFENCE=guard: SGLang's own kernels; replays are watched" in one for one in lines)


def test_two_ranks_are_served_watched_and_told(tmp_path: Path) -> None:
    ranks = run_ranks(2, sglang_ranks.serving, str(tmp_path))
    for rank, found in enumerate(ranks):
        assert found["prepared"].collective == "mnnvl" and found["prepared"].captured, found["prepared"]
        for name in ("served", "strided"):
            said, kernels, error = found[name]
            assert (said, kernels) == ([], ["mnnvl/peer"]) and error <= 1, (rank, name, found[name])
        for name, said in (("unprepared", []), ("large", []), ("float32", [])):
            assert found[name][:2] == (["by itself"], said), (rank, name, found[name])
            assert found[name][2] <= 1.5, (rank, name, found[name])
        assert found["mixed"] == ((None, None), (None, None))
        assert found["replayed"] == [
            "FullCudaGraphBackend 4",
            "FullCudaGraphBackend 4",
            "FullCudaGraphBackend 2",
            "BreakableCudaGraphBackend 7",
        ]
    first, *_ = ranks[0]["lines"]
    assert "group 'tp:0': mnnvl, up to 8 tokens of 256 bfloat16" in first and "; larger calls are SGLang's" in first
    assert first.endswith("replays are watched, on a hang: report")
    assert any("chosen" in line for line in ranks[0]["lines"][1:]) and ranks[1]["lines"] == []
    assert ranks[1]["heard"] == "ValueError: out of pages"
    assert "rank 1" in ranks[0]["heard"] and "ValueError: out of pages" in ranks[0]["heard"], ranks[0]["heard"]
    journal = json.loads((tmp_path / "journal-rank1.json").read_text())
    assert {p["name"] for p in journal["programs"]} == {"decode", "extend"} and "out of pages" in journal["reason"]
