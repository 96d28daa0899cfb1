"""All-reduce ops of an engine, through the backend: the only collectives of their graphs, over groups of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import ringfence
from ringfence.cli import main
from ringfence.runtime.errors import OptionsError
from support import run_ranks

H = 16

#: What the ops call their groups, as vLLM does.
GROUPS: dict[str, dist.ProcessGroup] = {}


@torch.library.custom_op("engine_test::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group_name: str) -> Tensor:
    y = x.clone()
    dist.all_reduce(y, group=GROUPS[group_name])
    return y


@torch.library.custom_op("engine_test::all_reduce_", mutates_args=("x",))
def all_reduce_(x: Tensor, group_name: str) -> None:
    dist.all_reduce(x, group=GROUPS[group_name])


@torch.library.custom_op("engine_test::total", mutates_args=())
def total(x: Tensor) -> Tensor:
    return all_reduce(x, "tp:0")


for op in (all_reduce, total):
    op.register_fake(lambda x, *_: torch.empty_like(x))


def norm(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    r = r + x
    return F.rms_norm(r, (H,), None, 1e-6), r


def functional(group: str, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    return norm(torch.ops.engine_test.all_reduce(x * 2, group), r)


def in_place(group: str, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    torch.ops.engine_test.all_reduce_(y, group)
    return norm(y, r)


def without_argument(group: str, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    return norm(torch.ops.engine_test.total(x * 2), r)


def declined(group: str, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    torch.ops.engine_test.all_reduce_(y, group)
    return torch.ops.engine_test.all_reduce(x.sin(), group).relu(), y.relu() + r


def two_groups(group: str, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    x, r = functional(group, x, r)
    return norm(torch.ops.engine_test.all_reduce(x, "solo"), r)


MODELS = {f.__name__: f for f in (functional, in_place, without_argument, declined, two_groups)}
ALL = ["engine_test::all_reduce", "engine_test::all_reduce_"]


def _ranks_run(rank: int) -> dict[tuple[str, str, bool], tuple[str, float, list[str]]]:
    """By model, form of the option and capture: the summary, the largest difference from eager, the rules."""
    torch.set_grad_enabled(False)
    solo = [dist.new_group([i]) for i in range(2)][rank]  # its name is another one on each rank
    world = dist.group.WORLD
    assert world is not None
    GROUPS.update({"tp:0": world, "tp:9": world, "solo": solo, world.group_name: world, solo.group_name: solo})
    by_name = {"tp:0": world.group_name, "solo": solo.group_name}
    forms: dict[str, tuple[str, Any]] = {
        "names": (world.group_name, ALL),
        "with overloads": (world.group_name, [f"{name}.default" for name in ALL]),
        "mapped": ("tp:0", dict.fromkeys([*ALL, "engine_test::total"], world.group_name)),
        "mapped by name": ("tp:0", dict.fromkeys(ALL, by_name)),
        "registered": ("tp:9", ALL),
    }
    ringfence.register_group("tp:9", world)
    runs = [("functional", "names"), ("in_place", "names"), ("functional", "with overloads"), ("in_place", "mapped")]
    runs += [("without_argument", "mapped"), ("declined", "names"), ("two_groups", "mapped by name")]
    runs += [("two_groups", "registered")]  # "solo" is known by now
    found = {}
    for model, form in runs:
        group, ops = forms[form]
        for capture in (False, True):
            torch._dynamo.reset()
            backend = ringfence.Backend(
                piece_compiler="eager",
                capture_sizes=[4] if capture else [],
                graphs="simulated",
                all_reduce_ops=ops,
                agree_seconds=180,
            )
            compiled = torch.compile(MODELS[model], backend=backend, fullgraph=True)
            worst, before = 0.0, Counter(backend.supervisor.journal.position().submitted)
            for _ in range(3):
                x, r = torch.randn(4, H), torch.randn(4, H)
                pairs = zip(compiled(group, x, r), MODELS[model](group, x, r), strict=True)
                worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
            (report,) = backend.reports
            counted = Counter(backend.supervisor.journal.position().submitted) - before  # it is the process's
            rules = [v.rule for v in report.verdicts] + [str(sorted(counted.values()))]
            found[model, form, capture] = report.summary, worst, rules
    return found


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str, bool], tuple[str, float, list[str]]]:
    first, second = run_ranks(2, _ranks_run)
    assert {k: v[0] for k, v in first.items()} == {k: v[0] for k, v in second.items()}
    return {k: (v[0], max(v[1], second[k][1]), v[2]) for k, v in first.items()}


def test_it_sums_over_its_own_group(runs: Any) -> None:
    for (model, form, capture), (summary, worst, rules) in runs.items():
        expected = {"two_groups": "2 of 2", "declined": "0 of 2"}.get(model, "1 of 1")
        assert summary.startswith(f"{expected} all-reduces fused"), (model, form, capture, summary)
        assert worst <= 1e-5, (model, form, capture, worst)
        assert set(rules[:-1]) == {"host_collective" if capture else "no_capture"}, (model, form, capture, rules)


def test_its_calls_are_counted_in_the_journal(runs: Any) -> None:
    assert runs["functional", "names", False][2][-1] == "[3]"
    assert runs["declined", "names", True][2][-1] == "[6]"
    assert runs["two_groups", "mapped by name", False][2][-1] == "[3, 3]"


# -- what the option does not tell


def refusal(model: Callable[..., Any], group: str, ops: object) -> str:
    backend = ringfence.Backend(piece_compiler="eager", all_reduce_ops=ops)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as error, torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(group, torch.randn(4, H), torch.randn(4, H))
    assert isinstance(error.value.inner_exception, OptionsError)
    return str(error.value.inner_exception)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("model", ["functional", "in_place", "declined"])
def test_a_name_that_is_no_process_group(model: str) -> None:
    said = refusal(MODELS[model], "tp:0", ALL)
    assert "'tp:0'" in said and "all_reduce_ops={'engine_test::all_reduce" in said, said
    assert "'gone'" in refusal(MODELS[model], "tp:0", dict.fromkeys(ALL, "gone"))


@pytest.mark.usefixtures("fake_group")
def test_one_mapping_for_two_groups() -> None:
    said = refusal(two_groups, "tp:0", dict.fromkeys(ALL, "0"))
    assert "calls it with 'solo', another with 'tp:0'" in said and "{'solo': group.group_name" in said, said
    dist.new_group([0, 1])
    assert "calls it with '1'" in refusal(functional, "1", dict.fromkeys(ALL, "0")), "a real group, and another one"


@pytest.mark.parametrize("value", [{"a::b": {}}, {"a::b": {"tp:0": None}}, {"a::b": 3}, {"a::b": ["0"]}])
def test_a_mapping_that_names_no_groups(value: object) -> None:
    with pytest.raises(OptionsError, match=r"does not map op names to groups .*group_name"):
        ringfence.Backend(all_reduce_ops=value)


def test_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some_engine.py").write_text(
        "import torch, torch.nn.functional as F\n"
        "@torch.library.custom_op('engine_test::ar', mutates_args=())\n"
        "def ar(x: torch.Tensor, group_name: str) -> torch.Tensor:\n    return x.clone()\n"
        "ar.register_fake(lambda x, group_name: torch.empty_like(x))\n"
        "def make():\n"
        "    f = lambda x: F.rms_norm(torch.ops.engine_test.ar(x * 2, 'tp:0') + x, (16,))\n"
        "    return f, (torch.randn(4, 16),)\n"
    )
    for ops, code in ((["engine_test::ar"], 2), ({"engine_test::ar": "0"}, 0)):
        options = ("--option", f"all_reduce_ops={ops}", "--option", "capture_sizes=[4]")
        assert main(["explain", "some_engine:make", "--tp", "2", *options]) == code
        said = capsys.readouterr()
        assert ("1 of 1 all-reduces fused" in said.out) if code == 0 else ("tp_group.group_name" in said.err), said
