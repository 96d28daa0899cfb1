"""Ranks that do other local work: served where their collectives are the same, and named where they are not."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfence
from ringfence.runtime.errors import GroupFailureError, PoisonedError, RankLeftError
from support import run_ranks

H = 16


class Model(nn.Module):
    """Row-parallel layers; what a rank does more than others is in :meth:`local`."""

    def __init__(self, rank: int, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.rank = rank
        self.w = nn.ParameterList(nn.Parameter(torch.randn(H, H) / 4) for _ in range(layers + rank))
        self.b = nn.Parameter(torch.randn(H))
        self.norm = nn.RMSNorm(H, eps=1e-6)

    def local(self, x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def forward(self, x: Tensor, r: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        for w in self.w[:2]:
            y = self.local(x, r, w)
            dist.all_reduce(y)
            r = r + y
            x = self.norm(r)
        return x, r


class Local(Model):
    """A bias and the residual on rank 0 only, more experts on rank 1, an output that rank 0 alone returns."""

    def local(self, x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w, self.b if self.rank == 0 else None) + (r if self.rank == 0 else 0)
        return y + sum((F.silu(x @ e) for e in self.w), torch.zeros(()))

    def forward(self, x: Tensor, r: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        x, r = super().forward(x, r)
        return (x, r, x @ self.w[0].t()) if self.rank == 0 else (x, r)


class Islands(Model):
    """Rank 1 has islands around its collectives. Rank 0 reads a sum itself, so that site is declined: a peer meets
    the same all-reduce."""

    def local(self, x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return (x.sinh() @ w).sinh() * 0.1 if self.rank == 1 else x @ w

    def forward(self, x: Tensor, r: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        x, r = super().forward(x, r)
        y = x @ self.w[0]
        dist.all_reduce(y)
        z = y.relu() if self.rank == 0 else x
        return self.norm(y + r), z


class OwnSizes(Model):
    """A tensor of each rank's own, of another length in each step; rank 1 reads it before anything else."""

    def local(self, x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def forward(self, x: Tensor, r: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        if self.rank == 1:
            x = own[0].sum(0) + x
        x, r = super().forward(x, r)
        return x, r, own[0] * 2


MODELS: Sequence[type[Model]] = (Local, Islands, OwnSizes)


def _inputs(rank: int, model: type[Model]) -> Iterator[tuple[Tensor, ...]]:
    torch.manual_seed(7)
    for step, n in enumerate((4, 5, 4, 4, 3, 5, 4)):
        shared = torch.randn(n, H), torch.randn(n, H)
        # Their lengths come back on rank 0 and not on rank 1, which captures where rank 0 replays.
        own = torch.randn(7 + step * rank, H)
        yield (*shared, own) if model is OwnSizes else shared


def _differences(rank: int) -> dict[str, tuple[float, str]]:
    torch.set_grad_enabled(False)
    found = {}
    for model in MODELS:
        for sizes in ((), (4, 5)):
            torch._dynamo.reset()
            backend = ringfence.Backend(
                piece_compiler="eager",
                capture_sizes=sizes,
                graphs="simulated",
                split_ops=["aten::sinh"],
                agree_seconds=180,
                check_every_step=bool(sizes) == (model is OwnSizes),
            )
            ours = model(rank)
            compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
            worst = 0.0
            for inputs in _inputs(rank, model):
                expected, actual = ours(*inputs), compiled(*inputs)
                worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)))
            (report,) = backend.reports
            found[f"{model.__name__}{list(sizes)}"] = worst, report.summary
    return found


@pytest.mark.slow
def test_other_local_work_is_served_fused_and_right() -> None:
    ranks = run_ranks(2, _differences)
    for rank, found in enumerate(ranks):
        assert len(found) == 2 * len(MODELS)
        for name, (worst, summary) in found.items():
            assert worst <= 1e-4, (rank, name, worst)
            fused = {"Islands": "2 of 3" if rank == 0 else "3 of 3"}.get(name.split("[")[0], "2 of 2")
            assert summary.startswith(f"{fused} all-reduces fused"), (rank, name, summary)


# -- what does matter


def _extra_call(rank: int, x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    if rank == 1:
        y = y.sin()
        dist.all_reduce(y)  # the extra one
    return y + x


def _other_amount(rank: int, x: Tensor) -> Tensor:
    y = torch.cat([x, x]) if rank == 1 else x * 2
    dist.all_reduce(y)
    return y[: x.shape[0]]


def _other_op(rank: int, x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y, op=dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM)
    return y + x


def _other_option(rank: int, x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    return y


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "extra call": (
        _extra_call,
        r"call 1 differs: rank 0: nothing; rank 1: sum over 2 ranks .* \(.*uneven_ranks.py:\d+",
    ),
    "other amount": (
        _other_amount,
        r"call 0 differs: rank 0: sum over 2 ranks \(group 0\) of n0\*n1 float32 \(.*uneven_ranks.py:\d+.*\); "
        r"rank 1: .* of 2\*n0\*n1 float32 \(.*uneven_ranks.py:\d+",
    ),
    "other op": (_other_op, r"call 0 differs: rank 0: sum over .*; rank 1: max over "),
    "other option": (_other_option, r"option capture_sizes differs: rank 0: \[\]; rank 1: \[4\]"),
}


def _refusals(rank: int) -> dict[str, str]:
    torch.set_grad_enabled(False)
    said = {}
    for name, (model, _) in REFUSED.items():
        torch._dynamo.reset()
        sizes = [4] if name == "other option" and rank == 1 else []
        backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180, capture_sizes=sizes)
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(rank, torch.randn(4, H))
        except Exception as error:
            inner = getattr(error, "inner_exception", error)
            said[name] = f"{type(inner).__name__}: {inner}"
    return said


def test_other_collectives_are_refused_and_the_first_is_named() -> None:
    for said in run_ranks(2, _refusals):
        for name, (_, pattern) in REFUSED.items():
            assert said[name].startswith("RankMismatch"), (name, said)
            assert re.search(pattern, said[name]), (name, said[name])


# -- a call that is an error on one rank alone


WRONG: dict[str, Callable[[nn.Module], object]] = {
    "an argument is missing": lambda model: model(torch.randn(4, H)),
    "no tensor": lambda model: model("x", torch.randn(4, H)),
    "another hidden size": lambda model: model(torch.randn(4, H + 1), torch.randn(4, H)),
    "rows that do not fit": lambda model: model(torch.randn(4, H), torch.randn(5, H)),
}


def _called_wrongly(rank: int) -> dict[str, str]:
    """Errors of Dynamo, and of Python before it: no graph is called."""
    model, eager = Model(0), Model(0)
    ringfence.compile(
        model, fullgraph=True, dynamic=True, piece_compiler="eager", agree_seconds=300, check_every_step=True
    )
    said, compared = {}, []
    torch.set_grad_enabled(False)
    for step, (name, wrong) in enumerate(WRONG.items()):
        torch.manual_seed(step)
        inputs = torch.randn(step + 2, H), torch.randn(step + 2, H)
        compared += [(a - b).abs().max() for a, b in zip(model(*inputs), eager(*inputs), strict=True)]
        began = time.monotonic()
        try:
            wrong(model) if rank == 1 else model(*inputs)
        except RankLeftError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = type(error).__name__
        assert time.monotonic() - began < 60
    model(*inputs)
    assert max(compared) <= 1e-4
    return said


def test_a_call_that_is_an_error_on_one_rank_is_given_up_by_all_where_steps_are_compared() -> None:
    wrong, told = run_ranks(2, _called_wrongly)[::-1]
    for name in WRONG:
        assert told[name].startswith(f"rank 1 was called wrongly, and its step did not begin: {wrong[name]}: "), told
        assert "what all ranks are called with must be the same" in told[name]
    assert wrong["an argument is missing"] == "TypeError"


def _dies(rank: int) -> str:
    """What ends a process is told too, whoever compiled the model."""
    torch.set_grad_enabled(False)
    backend = ringfence.Backend(piece_compiler="eager", agree_seconds=300, check_every_step=True)
    compiled = torch.compile(Model(0), backend=backend, fullgraph=True, dynamic=True)
    inputs = torch.randn(4, H), torch.randn(4, H)
    compiled(*inputs)
    try:
        compiled(inputs[0]) if rank == 1 else compiled(*inputs)
    except TypeError as error:
        sys.excepthook(type(error), error, None)  # as the interpreter does, which then ends
        return "died"
    except GroupFailureError as error:
        assert error.ranks == (1,)
        try:
            compiled(*inputs)
        except PoisonedError:
            return str(error)
    return "nobody told"


def test_a_rank_that_dies_of_its_call_is_named_where_steps_are_compared() -> None:
    told, died = run_ranks(2, _dies)
    assert died == "died"
    assert re.search(r"^rank 1 failed in its own code, after step 0 .*: TypeError: .*'r'", told), told


def _watches(rank: int, folder: str) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfence").addHandler(handler)
    for on_hang in (None, None, "report"):
        ringfence.watch(None, journal_dir=folder, on_hang=on_hang, agree_seconds=300).close()
    return [line for line in said if "nobody watches" in line]


def test_journals_that_no_hang_will_write_are_told_once(tmp_path: Path) -> None:
    first, second = run_ranks(2, _watches, str(tmp_path))
    assert second == [] and len(first) == 1 and "journal_dir=" in first[0] and "give on_hang on all ranks" in first[0]
