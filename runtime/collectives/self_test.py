"""Start-up self-test: does a new workspace do here what it should, run eagerly and replayed?

The inputs of every rank are drawn from seeds, so each rank knows the right sum without any
communication. What is run: sizes up and down, strategies in turn, ordinary numbers, negative
subnormals and -0.0 in every word; then the same calls captured in one graph, which is replayed
twice on other inputs. What is checked: the numbers, that all ranks hold the same bits, and that
the capture left the protocol's control words alone. The ranks vote, so all use a collective
in the same way or none does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..channel import Channel, failures_text
from ..errors import SelfTestHungError
from ..hazards.situation import Strategy
from . import reference
from .workspace import SelfTest, Workspace

#: Largest |out - reference| / (|reference| + rms of the row): the sum over the ranks, its sum with the
#: residual and the norm are rounded once each, and the reference is computed in float32.
_BOUND = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-14}
_SECONDS = 20.0
_PATTERNS = ("ordinary", "subnormal", "negative zero")


@dataclass(frozen=True)
class _Shape:
    tokens: int
    hidden: int
    dtype: torch.dtype
    strategy: Strategy


class _Call:
    """Buffers of one fused call, filled anew for each run."""

    def __init__(self, workspace: Workspace, shape: _Shape, rank: int) -> None:
        self._workspace, self._shape, self._rank = workspace, shape, rank
        size = (shape.tokens, shape.hidden)
        self.x, self.residual, self.norm, self.out = (
            torch.empty(size, dtype=shape.dtype, device=workspace.device) for _ in range(4)
        )
        self.weight = torch.empty(shape.hidden, dtype=shape.dtype, device=workspace.device)

    def fill(self, seed: int, pattern: str) -> None:
        """New inputs, poisoned outputs."""
        device, ranks = self._workspace.device, range(self._workspace.world_size)
        self._inputs = [_draw(self._shape, seed, rank, pattern, device) for rank in ranks]
        self.x.copy_(self._inputs[self._rank])
        generator = torch.Generator(device).manual_seed(seed)
        self.residual.normal_(generator=generator)
        self.weight.normal_(1.0, 0.3, generator=generator)
        self.norm.fill_(float("nan"))
        self.out.fill_(float("nan"))

    def run(self) -> None:
        kernels, strategy = self._workspace.kernels, self._shape.strategy
        kernels.fused(self.x, self.residual, self.weight, 1e-6, 0.0, strategy, self.norm, self.out)

    def failure(self) -> str | None:
        """What is wrong with the outputs."""
        total = torch.stack([x.float() for x in self._inputs]).sum(0) + self.residual.float()
        right = reference.rms_norm(total, self.weight.float(), 1e-6, 0.0)
        for name, out, expected in (("norm", self.norm, right), ("sum", self.out, total)):
            error = _error(out, expected)
            if not error <= _BOUND[self._shape.dtype]:
                s = self._shape
                return f"{name} of {s.tokens} x {s.hidden} {s.dtype} {s.strategy} is off by {error:.2g}"
        return None

    def digest(self) -> bytes:
        """Two sums of the outputs' words, one of them by position: summed on the device, in integers."""
        words = torch.stack([t.view(torch.int32).flatten() for t in (self.norm, self.out)]).long()
        place = torch.arange(words.shape[1], device=words.device)
        return repr((words.sum(1).tolist(), (words * place).sum(1).tolist())).encode()


def self_test(
    workspace: Workspace, channel: Channel, hidden: int, dtype: torch.dtype, tokens: Sequence[int], *, capture: bool
) -> SelfTest:
    """Test a workspace with calls of these token counts. Every rank must call.

    Raises :class:`SelfTestHungError` where a kernel does not come back: it spins on the device
    until the process ends, and nothing can be done here any more.
    """
    wanted = sorted({n for n in tokens if workspace.strategy(n, hidden, dtype) is not None})
    shapes = [
        _Shape(n, hidden, dtype, strategy)
        for n in [*wanted, *reversed(wanted[:-1])]
        for strategy in workspace.kernels.strategies
        if strategy is Strategy.ONE_SHOT or n > workspace.world_size
    ]
    made, failures = channel.attempt(
        "self-test: memory", lambda: [_Call(workspace, shape, channel.rank) for shape in shapes]
    )
    if made is None or failures:
        return SelfTest(failures_text(failures), None, 0)
    calls = made
    eager, digest = _eager(calls, workspace.device, channel)
    failure = _voted(channel, "self-test, eager", eager, digest)
    captured = None
    if failure is None and capture and calls and workspace.device.type == "cuda":
        trouble, digest = _captured(calls, workspace, channel)
        captured = _voted(channel, "self-test, captured", trouble, digest)
    return SelfTest(failure, captured, len(calls))


def _eager(calls: Sequence[_Call], device: torch.device, channel: Channel) -> tuple[str | None, bytes]:
    """The first failure. The rest is run all the same: the other ranks wait for this one's part."""
    failures: list[str] = []
    digest = hashlib.sha256()
    for turn, pattern in enumerate(_PATTERNS):
        if unfilled := _fill(calls, 1000 * turn, pattern, channel):
            return unfilled, digest.digest()
        for call in calls:
            try:
                call.run()
            except Exception as error:
                failures.append(f"eager, payload {pattern}: a call raised {type(error).__name__}: {error}")
        _wait(device, channel)
        failures += _check(calls, f"eager, payload {pattern}", digest)
    return next(iter(failures), None), digest.digest()


def _captured(calls: Sequence[_Call], workspace: Workspace, channel: Channel) -> tuple[str | None, bytes]:
    """The same of a graph of all calls, and its replays on other inputs."""
    digest = hashlib.sha256()
    channel.barrier("self-test: before the capture")
    before = workspace.kernels.control_words()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call.run()
        failure = None
    except Exception as error:
        failure = f"capture raised {type(error).__name__}: {error}"
    after = workspace.kernels.control_words()
    if failure is None and before != after:
        failure = f"the capture changed the control words from {before} to {after}"
    if any(channel.exchange("self-test: captured", failure)):
        return failure, digest.digest()  # no rank replays what another could not capture
    failures: list[str] = []
    for turn, pattern in enumerate(_PATTERNS[:2]):
        if unfilled := _fill(calls, 5000 + 1000 * turn, pattern, channel):
            return unfilled, digest.digest()
        graph.replay()
        _wait(workspace.device, channel)
        failures += _check(calls, f"replay {turn + 1}, payload {pattern}", digest)
    graph.reset()
    return next(iter(failures), None), digest.digest()


def _fill(calls: Sequence[_Call], seed: int, pattern: str, channel: Channel) -> str | None:
    """New inputs on every rank, before any rank launches: one that has no memory left would be waited for in vain."""

    def fill() -> None:
        for i, call in enumerate(calls):
            call.fill(seed + i, pattern)

    return failures_text(channel.attempt("self-test: inputs", fill)[1]) or None


def _check(calls: Sequence[_Call], when: str, digest: Any) -> list[str]:
    failures = []
    for call in calls:
        try:
            digest.update(call.digest())
            failure = call.failure()
        except Exception as error:  # the vote follows, and every rank must come to it
            failure = f"{type(error).__name__}: {error}"
        if failure:
            failures.append(f"{when}: {failure}")
    return failures


def _voted(channel: Channel, topic: str, failure: str | None, digest: bytes) -> str | None:
    answers = channel.exchange(topic, (failure, digest))
    if failures := tuple((rank, why) for rank, (why, _) in zip(channel.ranks, answers, strict=True) if why):
        return failures_text(failures)
    return None if len({d for _, d in answers}) == 1 else "the ranks hold different bits"


def _wait(device: torch.device, channel: Channel) -> None:
    """Wait for the device, and with it for the other ranks, but not for ever."""
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + _SECONDS
    with channel.waiting("self-test: the device"):
        while not done.query():
            if time.monotonic() > deadline:
                raise SelfTestHungError(
                    f"a fused collective did not come back within {_SECONDS:g} s in the start-up self-test; it spins "
                    "on the device until this process ends. End all ranks, and start with collective='reference'"
                )
            channel.interrupt()
            time.sleep(0.0005)


def _draw(shape: _Shape, seed: int, rank: int, pattern: str, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed * 97 + rank)
    x = torch.randn(shape.tokens, shape.hidden, generator=generator, device=device).to(shape.dtype)
    if pattern == "ordinary":
        return x
    words = x.view(torch.int32)
    bits = {"subnormal": -(2**31) + 0x50005, "negative zero": -(2**31)}[pattern]
    words[:, ::2] = bits  # every other word: a row of nothing else has no norm to speak of
    return x


def _error(out: Tensor, right: Tensor) -> float:
    rms = right.square().mean(-1, keepdim=True).sqrt()
    error = (out.float() - right).abs() / (right.abs() + rms)
    return float(torch.nan_to_num(error, nan=float("inf")).max())
