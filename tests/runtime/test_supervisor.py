"""One supervisor per process: several backends, the string form, models that take turns, other process groups."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ringfence
from ringfence.runtime.errors import OptionsError
from ringfence.runtime.watch.page import SETTLED_SECONDS
from ringfence.runtime.watch.recompile import CompiledGraph, graph_being_compiled
from ringfence.runtime.watch.supervision import Asked
from ringfence.runtime.watch.supervisor import Supervisor, supervisor_for
from support import run_ranks, start_fake_group

HIDDEN = 64


def target(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    dist.all_reduce(y)
    return F.rms_norm(y, (HIDDEN,), w, 1e-6)


def draft(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    y = F.rms_norm(y, (HIDDEN,), w, 1e-6)
    z = y + 1
    dist.all_reduce(z)
    return z


def broken(x: Tensor, w: Tensor) -> Tensor:
    """Three graphs."""
    x = target(x, w)
    torch._dynamo.graph_break()
    x = target(x, w)
    torch._dynamo.graph_break()
    return target(x, w)


def _threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("ringfence-"))


def _values() -> tuple[Tensor, Tensor]:
    return torch.randn(2, HIDDEN), torch.ones(HIDDEN)


# -- over two ranks ---------------------------------------------------------------------------


def _two_backends(rank: int, folder: str) -> dict[str, Any]:
    options: dict[str, Any] = {"on_hang": "report", "journal_dir": folder, "piece_compiler": "eager", "step_seconds": 5}
    first, second = ringfence.Backend(**options), ringfence.Backend(**options, check_every_step=True)
    a, b = torch.compile(target, backend=first), torch.compile(draft, backend=second)
    with torch.no_grad():
        for _ in range(3):
            a(*_values()), b(*_values())
    threads = _threads()
    assert first.supervisor is second.supervisor
    first.supervisor.journal.dump(folder, "target"), second.supervisor.journal.dump(folder, "draft")
    first.close()
    watched = second.supervisor.watchdog
    assert watched is not None
    after_one = len(_threads())
    with torch.no_grad():
        a(*_values()), b(*_values())
    position = second.supervisor.journal.position()
    second.close()
    until = time.monotonic() + 60
    while _threads() and time.monotonic() < until:
        time.sleep(0.05)
    return {"threads": threads, "after one": after_one, "after both": len(_threads()), "position": position}


def test_two_backends_share_a_journal_a_watchdog_and_the_counts(tmp_path: Path) -> None:
    for rank, seen in enumerate(run_ranks(2, _two_backends, str(tmp_path))):
        assert seen["threads"] == ["ringfence-talk", "ringfence-watch"]
        assert seen["after one"] == 2 and seen["after both"] == 0
        assert seen["position"].submitted == seen["position"].completed == {"0": 12}
        journal = json.loads((tmp_path / f"journal-rank{rank}.json").read_text())
        assert journal["reason"] == "draft" and journal["missed"] == 0
        assert [step["program"] for step in journal["steps"]] == [0, 1] * 3
        assert [step["calls_before"]["0"] for step in journal["steps"]] == [0, 1, 3, 4, 6, 7]
        assert [program["name"] for program in journal["programs"]] == ["target 0/0", "draft 1/0"]
        assert journal["position"]["graph"] == "draft 1/0"
    assert len(list(tmp_path.iterdir())) == 2


def _string_form(rank: int, folder: str) -> dict[str, Any]:
    options = {"on_hang": "report", "journal_dir": folder, "piece_compiler": "eager"}
    compiled = torch.compile(broken, backend="ringfence", options=options)
    with torch.no_grad():
        for _ in range(2):
            compiled(*_values())
    gc.collect()
    threads, supervisor = _threads(), supervisor_for(Asked())
    with pytest.raises(OptionsError, match="on_hang='abort', and another backend of this process has on_hang='report'"):
        ringfence.Backend(on_hang="abort")  # the graphs live on, so what they were compiled with does
    journal = supervisor.journal.to_dict()
    return {
        "threads": threads,
        "folder": supervisor.folder,
        "names": [p["name"].split()[0] for p in journal["programs"]],
        "calls": journal["position"]["submitted"],
    }


def test_the_string_form_is_equal_to_one_backend(tmp_path: Path) -> None:
    """It makes a backend for each graph, and drops it."""
    for seen in run_ranks(2, _string_form, str(tmp_path)):
        assert len(seen["names"]) == 3 and seen["folder"] == str(tmp_path)
        assert seen["threads"] == ["ringfence-talk", "ringfence-watch"]
        assert seen["calls"] == {"0": 6}


def _another_group(rank: int) -> list[dict[str, int]]:
    """Destroyed and initialised again: a supervisor of its own, that counts from 0."""
    seen = []
    for _ in range(2):
        torch._dynamo.reset()
        backend = ringfence.Backend(piece_compiler="eager", on_hang="raise")
        compiled = torch.compile(target, backend=backend)
        with torch.no_grad():
            compiled(*_values())
        seen.append(backend.supervisor.journal.position().submitted)
        until = time.monotonic() + 60
        while len(_threads()) > 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(_threads()) == 2, _threads()
        del backend, compiled
        dist.barrier()
        if len(seen) == 1:
            store = dist.distributed_c10d._get_default_store()
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    return seen


def test_another_process_group_has_another_supervisor() -> None:
    assert run_ranks(2, _another_group) == [[{"0": 1}] * 2] * 2


# -- one rank that compiles alone --------------------------------------------------------------


def counts(x: Tensor, load: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of this rank alone, and a sum of a size that all ranks share."""
    total = load + 1
    dist.all_reduce(total)
    return F.rms_norm(x, (HIDDEN,), w, 1e-6), total


def _specialises(rank: int, lone: int) -> tuple[list[float], str, str, float]:
    """The other rank comes late to a graph that both compile; then the lone one specialises on its single token."""
    compiled = torch.compile(counts, backend=ringfence.Backend(piece_compiler="eager"))
    sums = []
    for tokens in ((4, 2), (3, 4), (4, 1)):
        if tokens == (3, 4) and rank != lone:
            time.sleep(SETTLED_SECONDS + 1)
        began = time.monotonic()
        try:
            with torch.no_grad():
                x = torch.randn(tokens[rank if lone else 1 - rank], HIDDEN)
                sums.append(compiled(x, torch.full((8,), float(rank)), torch.ones(HIDDEN))[1].sum().item())
        except BaseException as error:
            inner = getattr(error, "inner_exception", error)
            took = time.monotonic() - began
            threading.Timer(3.0, os._exit, (0,)).start()  # the end of the process breaks the other one's collective
            return sums, type(inner).__name__, str(inner), took
    return sums, "", "", 0.0


@pytest.mark.parametrize("lone", [0, 1])  # rank 0 serves the store, which is gone then
def test_a_rank_that_compiles_alone_is_told_which_guard_made_it(lone: int) -> None:
    said = run_ranks(2, _specialises, lone)
    for sums, kind, text, took in said:
        assert sums == [8 * (0 + 1 + 1 + 1)] * 2
        assert kind == "RecompiledAloneError" and took < 100
        assert f"rank {lone} compiles counts 0/2 anew, because of a guard that failed: 2 <= x.size()[0]" in text
        assert f"(x is of shape [1, {HIDDEN}]); rank {1 - lone} does not, and waits for rank {lone} in call 2" in text
        assert "torch._dynamo.mark_unbacked(x, 0)" in text
    assert said[0][2] == said[1][2]


def _reasons(calls: list[Any]) -> list[CompiledGraph]:
    seen = []

    def keep(gm: Any, inputs: Any) -> Any:
        seen.append(graph_being_compiled())
        return gm

    def model(x: Tensor, scale: int, how: str) -> Tensor:
        return x * scale if how == "times" else x + scale

    compiled = torch.compile(model, backend=keep)
    for call in calls:
        compiled(*call)
    return seen


def test_which_guard_on_which_value() -> None:
    x, one = torch.randn(4, 8), torch.randn(1, 8)
    calls = [(torch.randn(2, 8), "times"), (x, "times"), (one, "times"), (one, "plus"), (one.double(), "plus")]
    first, shape, size, word, dtype = _reasons([(x, 2, how) for x, how in calls])
    assert first == CompiledGraph("model 0/0") and first.why == "compiles model 0/0 for the first time"
    assert shape.guard == "tensor 'x' size mismatch at index 0. expected 2, actual 4"
    assert size.guard.startswith("2 <= x.size()[0]") and size.guard.endswith("(x is of shape [1, 8])")
    assert word.guard.endswith("(how is 'plus')") and word.name == "model 0/3"
    assert dtype.guard == "tensor 'x' dtype mismatch. expected Float, actual Double"
    assert graph_being_compiled() == CompiledGraph() and "compiles a graph" in graph_being_compiled().why


# -- who asks for what ---------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ({"on_hang": "abort"}, {"on_hang": "raise"}, ["on_hang='raise'", "on_hang='abort'"]),
        ({"on_hang": "abort"}, {"on_hang": None}, ["on_hang=None", "on_hang='abort'"]),
        ({"step_seconds": 2}, {"step_seconds": 60.0}, ["step_seconds=60.0", "step_seconds=2"]),
        ({"warm_up_seconds": 100}, {"warm_up_seconds": 200}, ["warm_up_seconds=200", "warm_up_seconds=100"]),
    ],
)
def test_backends_that_ask_for_different_things_of_the_process(
    one: dict[str, Any], other: dict[str, Any], names: list[str]
) -> None:
    first = ringfence.Backend(**one)
    with pytest.raises(OptionsError, match=r"close\(\)") as caught:
        ringfence.Backend(**other)
    assert all(name in str(caught.value) for name in names)
    first.close()
    second = ringfence.Backend(**other)
    assert second.supervisor is first.supervisor
    del first, second
    ringfence.Backend(**one)  # nobody holds the other any more


@pytest.mark.usefixtures("fake_group")
def test_folders_differ_too(tmp_path: Path) -> None:
    first = ringfence.Backend(journal_dir=tmp_path / "a")
    with pytest.raises(OptionsError, match=r"journal_dir='.*/b', and another backend of this process has .*/a'"):
        ringfence.Backend(journal_dir=tmp_path / "b")
    same = ringfence.Backend(journal_dir=str(tmp_path / "a"), check_every_step=True, agree_seconds=3)
    assert same.supervisor is first.supervisor and first.supervisor.folder == str(tmp_path / "a")


@pytest.mark.usefixtures("fake_group")
def test_what_is_left_out_follows_the_process(tmp_path: Path) -> None:
    plain = ringfence.Backend()
    assert plain.supervisor.folder is None
    watched = ringfence.Backend(journal_dir=tmp_path, step_seconds=3)
    assert plain.supervisor.folder == str(tmp_path) and plain.supervisor.deadlines.steady == 3
    watched.close()
    assert plain.supervisor.folder is None


def test_a_supervisor_is_that_of_the_process_group() -> None:
    backend = ringfence.Backend()
    alone = backend.supervisor
    assert ringfence.Backend().supervisor is alone
    start_fake_group(2)
    try:
        grouped = backend.supervisor
        assert grouped is not alone and ringfence.Backend().supervisor is grouped
    finally:
        dist.destroy_process_group()
    assert backend.supervisor is alone


@pytest.mark.usefixtures("fake_group")
def test_after_a_failure_another_backend_starts_anew_and_the_old_one_does_not() -> None:
    old = ringfence.Backend()
    before = old.supervisor
    before.health.poison("rank 1 failed", (1,))
    assert old.supervisor is before
    new = ringfence.Backend()
    assert new.supervisor is not before and new.supervisor.health.poisoned is None
    assert before.health.poisoned == "rank 1 failed"


def test_counts_go_on_where_the_ranks_agree_that_they_are() -> None:
    supervisor = Supervisor()
    supervisor.journal.name_group("0", (0, 1))
    supervisor.journal.count_from("0", 7)
    supervisor.journal.count_from("0", 3)
    assert supervisor.journal.position().submitted == {"0": 7}


def test_the_watch_ends_with_the_last_that_asks_for_it() -> None:
    """Closed, or dropped with all that was compiled."""
    supervisor = Supervisor()
    one, other, plain = Asked({"on_hang": "report"}), Asked({"on_hang": "report"}), Asked()
    for asked in (one, other, plain):
        supervisor.join(asked)
    closed: list[str] = []
    supervisor.close = lambda: closed.append("closed")  # type: ignore[method-assign]
    supervisor.leave(one)
    assert not closed
    del asked, other
    gc.collect()
    assert closed
