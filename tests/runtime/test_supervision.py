"""A runner among ranks: what they agree on before a capture, and what one failed capture means for all."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringfence.runtime.channel import open_channel
from ringfence.runtime.errors import (
    ArgumentError,
    CaptureFailedWarning,
    GradModeError,
    GroupFailureError,
    InputError,
    NestedCaptureError,
    PoisonedError,
    RankLeftError,
    RankMismatch,
    WorkspaceReplacedError,
)
from ringfence.runtime.groups import Group
from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.replay.program import Program, SizeRule, Step
from ringfence.runtime.replay.runner import PiecewiseRunner
from ringfence.runtime.watch.agree import GroupAgreement, PlanDigest
from ringfence.runtime.watch.position import Position
from ringfence.runtime.watch.supervision import Asked, Supervision
from ringfence.runtime.watch.supervisor import Supervisor
from support import run_threaded

SIZES = SizeRule(bindings=((0, 0),), tokens=lambda sizes: sizes[0])


class Graphs(SimulatedGraphs):
    """Captures that fail where they are told to."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.fail = fail

    def capture(self, call: Any, args: Sequence[Any]) -> Any:
        if self.fail:
            raise RuntimeError("no memory for the graph")
        return super().capture(call, args)


def of_rank(rank: int, asked: Asked) -> Supervisor:
    supervisor = Supervisor()
    supervisor.journal.rank = rank
    supervisor.join(asked)
    return supervisor


def runner(
    rank: int, *, fail: bool = False, folder: Path | None = None, asked: Asked | None = None, **options: Any
) -> PiecewiseRunner:
    """One piece that doubles; sizes 2 and 4 are captured."""
    step = Step("submod_0", lambda x: (x * 2,), (0,), (1,), False)
    program = Program((step,), ("x",), (1,), 2, (), frozenset())
    channel = open_channel(dist.group.WORLD.group_name, seconds=120)
    agreement = GroupAgreement([channel], PlanDigest((("plan", "the same"),)))
    asked = asked or Asked({"journal_dir": str(folder)} if folder is not None else {}, **options)
    supervision = Supervision(of_rank(rank, asked), agreement, asked)
    return PiecewiseRunner(program, SIZES, Graphs(fail), [2, 4], supervision=supervision)


def twos(n: int) -> Tensor:
    return torch.full((n, 3), 2.0)


def test_a_capture_that_fails_on_one_rank_is_dropped_on_all() -> None:
    def body(rank: int) -> Any:
        run = runner(rank, fail=rank == 1)
        values = [run(twos(4))[0].sum().item() for _ in range(2)]
        return values, run.captured_sizes

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = run_threaded(3, body)
    assert results == [([48.0, 48.0], [])] * 3
    texts = [str(w.message) for w in said if w.category is CaptureFailedWarning]
    assert len(texts) == 3 and all("rank 1: capture of 'submod_0' at sizes (4,) failed" in text for text in texts)


def test_or_it_is_an_error_on_all(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        run = runner(rank, fail=rank == 1, raise_on_capture=True, folder=tmp_path)
        with pytest.raises(GroupFailureError, match=r"rank 1: capture of 'submod_0'.*no memory for") as caught:
            run(twos(4))
        assert caught.value.ranks == (1,)
        with pytest.raises(PoisonedError, match="no memory for the graph"):
            run(twos(2))

    run_threaded(3, body)
    assert len(list(tmp_path.glob("journal-rank*.json"))) == 3


def test_ranks_that_would_capture_different_sizes_do_not() -> None:
    def body(rank: int) -> list[tuple[int, ...]]:
        run = runner(rank)
        run(twos(4))
        with pytest.raises(RankMismatch, match=r"rank 0: sizes \(2,\) of graph .*; rank 1: sizes \(4,\)"):
            run._supervision.before_capture((4,)) if rank else run(twos(2))
        return run.captured_sizes

    assert run_threaded(2, body) == [[(4,)], [(4,)]]


def test_a_call_that_is_an_error_before_its_step_is_where_the_others_can_see_it() -> None:
    """Whatever the error is; those of a step are told in it."""

    class Told(Supervisor):
        def refused(self, error: Exception, groups: Collection[str]) -> None:
            told.append((type(error), tuple(groups)))
            super().refused(error, groups)

    def fails(x: Tensor) -> tuple[Tensor]:
        if x.shape[0] == 7:
            raise ValueError("in a step")
        return (x * 2,)

    told: list[tuple[type[Exception], tuple[str, ...]]] = []
    graphs, supervisor, gone = SimulatedGraphs(), Told(), []
    program = Program((Step("submod_0", fails, (0,), (1,), False, calls=("tp",)),), ("x",), (1,), 2, (), frozenset())
    run = PiecewiseRunner(
        program,
        SIZES,
        graphs,
        [2],
        max_tokens=8,
        closed=lambda: bool(gone),
        journal=supervisor.journal,
        supervision=Supervision(supervisor, asked=Asked()),
    )
    for _ in range(2):
        run(twos(2))
    position = supervisor.journal.position
    calls: dict[type[Exception], Callable[[], object]] = {
        InputError: lambda: run(twos(9)),
        ArgumentError: lambda: run(twos(2), twos(2)),
        GradModeError: lambda: run(twos(2).requires_grad_()),
        NestedCaptureError: lambda: graphs.capture(run, [twos(2)]),
        WorkspaceReplacedError: lambda: (gone.append(1), run(twos(2))),
    }
    for count, (kind, call) in enumerate(calls.items(), 1):
        with pytest.raises(kind) as caught:
            call()
        assert told[-1] == (kind, ("tp",)) and len(told) == count
        assert position().refused == {"tp": count} and position().refusal.startswith(f"{kind.__name__}: ")
        assert position().refusal.endswith(" ".join(str(caught.value).split()))
    assert Position.from_dict(json.loads(json.dumps(position().to_dict()))) == replace(position(), still=ANY)
    run(twos(3))
    assert position().refused == {} and position().refusal == ""
    with pytest.raises(ValueError, match="in a step"):
        run(twos(7))
    assert len(told) == len(calls)


def test_a_step_beside_another_that_fails_is_no_call_that_was_refused() -> None:
    """It has made its calls, or some, though the journal counts it only; one that is refused there has made none."""

    class Told(Supervisor):
        def refused(self, error: Exception, groups: Collection[str]) -> None:
            told.append(type(error))

    def fails(x: Tensor) -> tuple[Tensor]:
        raise ValueError("in a step")

    def around(x: Tensor) -> tuple[Tensor]:
        with pytest.raises(ValueError, match="in a step"):
            inner(x)
        with pytest.raises(ArgumentError):
            inner(x, x)
        return (x * 2,)

    def of(body: Callable[[Tensor], tuple[Tensor]]) -> PiecewiseRunner:
        step = Step("submod_0", body, (0,), (1,), False, calls=("tp",))
        program = Program((step,), ("x",), (1,), 2, (), frozenset())
        supervision = Supervision(supervisor, asked=Asked())
        return PiecewiseRunner(program, SIZES, journal=supervisor.journal, supervision=supervision)

    told: list[type[Exception]] = []
    supervisor = Told()
    outer, inner = of(around), of(fails)
    (out,) = outer(twos(3))
    assert torch.equal(out, twos(3) * 2) and supervisor.journal.missed == 1
    assert told == [ArgumentError]


@pytest.mark.parametrize(
    ("mine", "others", "message"),
    [
        ({"on_hang": "abort"}, {}, "on_hang differs: rank 0: abort; rank 1: None"),
        ({"on_hang": "abort"}, {"on_hang": "raise"}, "on_hang differs: rank 0: abort; rank 1: raise"),
        ({"step_seconds": 5}, {}, "step_seconds differs: rank 0: 5; rank 1: 60"),
        ({"warm_up_seconds": 70.5}, {"warm_up_seconds": 80}, "warm_up_seconds differs: rank 0: 70.5; rank 1: 80"),
    ],
)
def test_what_ranks_must_have_alike_is_an_error_on_all(mine: Any, others: Any, message: str) -> None:
    """A rank that watches alone would take the others, which say nothing, for dead."""

    def body(rank: int) -> None:
        asked = Asked(others if rank else mine)
        supervisor = of_rank(rank, asked)
        channel = open_channel(dist.group.WORLD.group_name, seconds=120)
        with pytest.raises(RankMismatch, match=f"agree on the compiled graph: {message}"):
            supervisor.supervise({"tp": channel}, PlanDigest((("plan", "the same"),)))

    run_threaded(2, body)


def test_options_are_those_of_the_process_whichever_backend_gave_them() -> None:
    def body(rank: int) -> None:
        first = Asked({"step_seconds": 7, "journal_dir": f"/mnt/{rank}"})
        second = Asked({"step_seconds": 7.0} if rank else {})
        supervisor = of_rank(rank, first)
        supervisor.join(second)
        channel = open_channel(dist.group.WORLD.group_name, seconds=120)
        assert supervisor.supervise({"tp": channel}, PlanDigest(())).agreement is not None
        assert supervisor._told == set(), "where journals are is each host's affair"

    run_threaded(2, body)


def test_what_ranks_should_have_alike_is_told_once() -> None:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    def body(rank: int) -> None:
        asked = Asked({"journal_dir": "/mnt"} if rank else {}, agree_seconds=120 - rank)
        supervisor = of_rank(rank, asked)
        for _ in range(2):
            channel = open_channel(dist.group.WORLD.group_name, seconds=120)
            with supervisor.compiling(asked):
                supervisor.supervise({"tp": channel}, PlanDigest(()))

    said: list[str] = []
    lines, logger = Lines(), logging.getLogger("ringfence.runtime.watch.settings")
    logger.addHandler(lines)
    try:
        run_threaded(2, body)
    finally:
        logger.removeHandler(lines)
    assert len(said) == 2
    assert "agree_seconds differs (rank 0: 120; rank 1: 119)" in said[0] and "the shortest counts" in said[0]
    assert "journal_dir differs (rank 0: None; rank 1: given)" in said[1] and "on all ranks" in said[1]


def test_where_steps_are_compared_all_give_up_a_call_that_is_an_error_on_one_rank() -> None:
    """At once, and whoever was called wrongly waits for nobody. Then all are in step, and may call again."""

    def body(rank: int) -> None:
        run = runner(rank, every_step=True)
        for _ in range(2):
            with pytest.raises(ArgumentError):
                run()
        run(twos(3))  # all were called wrongly, and no step began
        for sizes in (3, 4):  # of which one is captured, so that the ranks ask each other before
            if rank == 1:
                with pytest.raises(ArgumentError):
                    run()
            else:
                with pytest.raises(RankLeftError, match=r"^rank 1 was called wrongly.*takes 1 .*may call again$"):
                    run(twos(sizes))
            began = time.monotonic()
            with pytest.raises(GradModeError):
                run(twos(3).requires_grad_())
            assert time.monotonic() - began < 60
            for _ in range(3):
                run(twos(sizes))
        assert run.captured_sizes == [(4,)]

    run_threaded(3, body)


def test_a_call_that_is_given_up_is_given_up_in_every_graph_of_the_backend() -> None:
    """Whoever was called wrongly need not know which of them the others come to."""

    def body(rank: int) -> None:
        one, other = (runner(rank, asked=asked) for asked in [Asked(every_step=True)] for _ in range(2))
        for run in (one, other, one):
            if rank:
                with pytest.raises(ArgumentError):
                    one()
            else:
                with pytest.raises(RankLeftError, match="rank 1 was called wrongly"):
                    run(twos(3))
            one(twos(3))
            other(twos(3))

    run_threaded(2, body)


def test_steps_are_compared_where_asked_for() -> None:
    def body(rank: int) -> None:
        run = runner(rank, every_step=True)
        run(twos(3))
        with pytest.raises(RankMismatch, match=r"their step 1: sizes differs: rank 0: sizes \(3,\); rank 1"):
            run(twos(5 if rank else 3))

    run_threaded(2, body)


def test_an_error_in_a_step_without_a_watchdog_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        asked = Asked({"journal_dir": str(folder)})
        supervision = Supervision(of_rank(0, asked), None, asked)
        supervision.failed(ValueError("mine"))
        supervision.check()
    assert (tmp_path / "journal-rank0.json").exists()


def test_a_rank_on_its_own_agrees_with_nobody_and_starts_no_thread() -> None:
    supervisor = Supervisor()
    supervisor.join(asked := Asked({"on_hang": "abort"}))
    groups = [Group("0", "fake", 2, 0), Group("1", "gloo", 1, 0)]
    channels = supervisor.open(groups, torch.device("cpu"))
    assert channels == {} and supervisor.supervise(channels, PlanDigest(())).supervisor is None
    assert supervisor.watchdog is None
    supervisor.leave(asked)
