"""Start-up self-test: does a new workspace do here what it should, run eagerly and replayed?

The inputs of every rank are drawn from seeds, so each rank knows the right sum without any
communication. What is run: sizes up and down, strategies in turn, with each of the payloads; then
the same calls captured in one graph, which is replayed twice on other inputs. What is checked: the
numbers, that no row is lost, that all ranks hold the same bits, and that the capture left the
protocol's control words alone. The ranks vote, so all use a collective in the same way or none does.
"""

from __future__ import annotations

import bisect
import hashlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..channel import Channel
from ..errors import HangError, SelfTestHungError
from ..hazards.situation import Strategy
from ..spelling import failures_text
from . import reference
from .epilogue import Epilogue, RmsNorm
from .kernels import KernelCall
from .payloads import PAYLOADS, PROTOCOL, RANGES, draw
from .tested import Operands, SelfTest
from .workspace import Workspace

#: Largest |out - reference| / (|reference| + rms of the row): the sum over the ranks, its sum with the
#: residual and the norm are rounded once each.
_BOUND = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-14}
#: What the reference is computed in.
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
#: Bytes of the largest call that is sent what is about arithmetic: a row's does not depend on the number of rows.
_ARITHMETIC_UP_TO = 1 << 20
#: What is run. Without a norm a call differs in nothing that could be lost.
_EPS = 1e-6
_EPILOGUE = Epilogue(residual=True, norm=RmsNorm(_EPS))
#: How long the device is waited for, and how long a kernel waits for a peer's part; for a sum, twice as long.
_SECONDS = 20.0
_WAIT_SECONDS = _SECONDS / 3


class _Trial:
    """Buffers of one fused call, filled anew for each run."""

    def __init__(self, workspace: Workspace, call: KernelCall, rank: int, epilogue: Epilogue = _EPILOGUE) -> None:
        self._workspace, self.call, self._rank, self._epilogue = workspace, call, rank, epilogue
        self._weighted = epilogue.norm is not None and epilogue.norm.has_weight
        size = (call.tokens, call.hidden)
        self.x, self.residual, self.norm, self.out = (
            torch.empty(size, dtype=call.dtype, device=workspace.device) for _ in range(4)
        )
        self.weight = torch.empty(call.hidden, dtype=call.dtype, device=workspace.device)
        self._total = torch.empty(size, dtype=_WIDE[call.dtype], device=workspace.device)

    def fill(self, seed: int, payload: str) -> None:
        """New inputs, poisoned outputs."""
        inputs, residual = draw(self.call, payload, seed, self._workspace.device)
        self.x.copy_(inputs[self._rank])
        self.residual.copy_(residual)
        self._total.copy_(residual if self._epilogue.residual else torch.zeros_like(residual))
        for x in inputs:
            self._total += x
        generator = torch.Generator(self._workspace.device).manual_seed(seed)
        self.weight.normal_(1.0, 0.3, generator=generator)
        self.norm.fill_(float("nan"))
        self.out.fill_(float("nan"))

    def run(self) -> None:
        run, strategy = self._workspace.kernels.run, self.call.strategy
        if self._epilogue.norm is None:
            run(self.x, self._epilogue, strategy, None, None, self.out)
            return
        operands = (self.residual if self._epilogue.residual else None, self.weight if self._weighted else None)
        run(self.x, self._epilogue, strategy, operands, self.norm, self.out)

    def failure(self) -> str | None:
        """What is wrong with the outputs."""
        call, total = self.call, self._total
        weight = self.weight.to(total.dtype) if self._weighted else torch.ones_like(self.weight, dtype=total.dtype)
        norm, _ = reference.apply(Epilogue(norm=RmsNorm(_EPS)), total, None, weight)
        lost = RANGES[call.dtype].lost * (call.world_size + 1)
        stretched = lost * torch.rsqrt(total.square().mean(-1, keepdim=True) + _EPS) * weight.abs().max()
        alone = self._epilogue.norm is None
        for name, out, right, floor in (
            ("norm", self.norm, norm, stretched + RANGES[call.dtype].lost),
            ("sum", self.out, total, torch.full_like(stretched, lost)),
        )[alone:]:
            if trouble := _trouble(out.to(total.dtype), right, floor, _BOUND[call.dtype]):
                return f"{name} of {call.tokens} x {call.hidden} {call.dtype} {call.strategy}{self._form} {trouble}"
        return None

    @property
    def _form(self) -> str:
        """What the call goes without."""
        if self._epilogue.norm is None:
            return " alone"
        without = {"residual": self._epilogue.residual, "weight": self._weighted}
        return "".join(f" without {name}" for name, has in without.items() if not has)

    def digest(self) -> bytes:
        """Two sums of the outputs' words, one of them by position: summed on the device, in integers."""
        words = torch.stack([t.view(torch.int32).flatten() for t in (self.norm, self.out)]).long()
        place = torch.arange(words.shape[1], device=words.device)
        return repr((words.sum(1).tolist(), (words * place).sum(1).tolist())).encode()


def _trouble(out: Tensor, right: Tensor, floor: Tensor, bound: float) -> str | None:
    """What is wrong with ``out``. floor: ``[tokens, 1]``, of an error that counts for nothing; the rest of it is
    measured by the element and the rms of its row."""
    largest = right.abs().amax(-1)
    for rows, what in (
        (~out.isfinite().all(-1), "is not finite"),
        ((out == 0).all(-1) & (largest > floor[:, 0]), "is lost: all of it is 0"),
    ):
        if bool(rows.any()):
            row = int(rows.to(torch.uint8).argmax())
            return f"is wrong: row {row} {what}, and the largest of the reference is {float(largest[row]):.4g}"
    unit = largest[:, None].clamp(min=torch.finfo(right.dtype).smallest_normal)  # squares of tiny ones would vanish
    rms = unit * (right / unit).square().mean(-1, keepdim=True).sqrt()
    error = ((out - right).abs() - floor).clamp(min=0) / (right.abs() + rms + floor)
    worst = float(error.max())
    return None if worst <= bound else f"is off by {worst:.2g}"


def self_test(
    workspace: Workspace,
    channel: Channel,
    hidden: int,
    dtype: torch.dtype,
    tokens: Sequence[int],
    *,
    capture: bool,
    operands: Sequence[Operands] = (),
    alone: bool = False,
) -> SelfTest:
    """Test a workspace with calls of these token counts. Every rank must call.

    operands: of the sites. Those that the kernels carry out otherwise than a call with residual and weight are
    tried too, with the fewest tokens of each strategy, and of each of its kernels that is served.
    alone: an all-reduce that nothing follows is tried too, where the size table says that it is worth it.

    A kernel whose waits have an end gives up in good time, and that is a failure like others. Raises
    :class:`SelfTestHungError` where one does not come back: it spins on the device until the process ends, and nothing
    can be done here any more.
    """
    wanted = sorted({n for n in tokens if workspace.planned(n, hidden, dtype) is not None})
    if not wanted:
        return SelfTest(f"no call of {hidden} {dtype} is served", None, 0)
    asked = [
        KernelCall(n, hidden, dtype, workspace.world_size, strategy)
        for n in [*wanted, *reversed(wanted[:-1])]
        for strategy in workspace.kernels.strategies
        if strategy is Strategy.ONE_SHOT or n > workspace.world_size
    ]
    asked = [c for c in asked if workspace.implementation.unmet(c) is None and workspace.kernels.holds(c)]
    fewest = _fewest(workspace, asked)
    others = [Epilogue(residual, RmsNorm(_EPS, has_weight=weight)) for residual, weight in operands]
    pairs = [(call, _EPILOGUE) for call in asked]
    pairs += [
        (call, other)
        for other in others
        if other != _EPILOGUE and workspace.implementation.takes(other)
        for call in fewest
    ]
    pairs += [(call, Epilogue()) for call in fewest if alone and call.size <= workspace.row.all_reduce]

    def make() -> list[_Trial]:
        workspace.implementation.load(workspace.kernels, pairs)
        return [_Trial(workspace, call, channel.rank, epilogue) for call, epilogue in pairs]

    made, failures = channel.attempt("self-test: kernels and memory", make)
    if made is None or failures:
        return SelfTest(failures_text(failures), None, 0)
    with workspace.waits_at_most(_WAIT_SECONDS):
        return _result(made, workspace, channel, capture=capture and workspace.device.type == "cuda")


def _fewest(workspace: Workspace, asked: Sequence[KernelCall]) -> list[KernelCall]:
    """The calls of the fewest tokens of each strategy, and of each of its kernels that some served call takes."""
    changes = (1, *workspace.implementation.changes_at, sys.maxsize)
    found: dict[tuple[Strategy, int], KernelCall] = {}
    for call in sorted(asked, key=lambda call: call.tokens):
        kernel = bisect.bisect_right(changes, call.tokens) - 1
        by_one_shot = workspace.row.one_shot // (call.hidden * call.dtype.itemsize)  # the most tokens
        least, most = changes[kernel], changes[kernel + 1] - 1
        served = least <= by_one_shot if call.strategy is Strategy.ONE_SHOT else most > by_one_shot
        if served or not any(strategy is call.strategy for strategy, _ in found):
            found.setdefault((call.strategy, kernel), call)
    return list(found.values())


def _result(calls: Sequence[_Trial], workspace: Workspace, channel: Channel, *, capture: bool) -> SelfTest:
    eager, digest = _eager(calls, workspace, channel)
    failure = _voted(channel, "self-test, eager", eager, digest)
    captured = None
    if failure is None and capture and calls:
        trouble, digest = _captured(calls, workspace, channel)
        captured = _voted(channel, "self-test, captured", trouble, digest)
        if captured is not None:  # kernels that have given up serve nothing more, captured or not
            failure = _voted(channel, "self-test: waits", next(iter(_given_up(workspace, "captured")), None), b"")
    return SelfTest(failure, captured, len(calls))


def _given_up(workspace: Workspace, when: str) -> list[str]:
    """What kernels say whose wait for a peer has ended without success."""
    try:
        workspace.kernels.check()
    except HangError as error:
        return [f"{when}: {error}"]
    return []


def _eager(calls: Sequence[_Trial], workspace: Workspace, channel: Channel) -> tuple[str | None, bytes]:
    """The first failure. The rest is run all the same: the other ranks wait for this one's part."""
    failures: list[str] = []
    digest = hashlib.sha256()
    for turn, payload in enumerate(PAYLOADS):
        sent = [c for c in calls if payload in PROTOCOL or c.call.size <= _ARITHMETIC_UP_TO]
        if unfilled := _fill(sent, 1000 * turn, payload, channel):
            return unfilled, digest.digest()
        for call in sent:
            try:
                call.run()
            except Exception as error:
                failures.append(f"eager, payload {payload}: a call raised {type(error).__name__}: {error}")
        wait_for_device(workspace.device, channel)
        failures += _given_up(workspace, f"eager, payload {payload}")
        failures += _check(sent, f"eager, payload {payload}", digest)
    return next(iter(failures), None), digest.digest()


def _captured(calls: Sequence[_Trial], workspace: Workspace, channel: Channel) -> tuple[str | None, bytes]:
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
    for turn, payload in enumerate(PROTOCOL[:2]):
        if unfilled := _fill(calls, 5000 + 1000 * turn, payload, channel):
            return unfilled, digest.digest()
        graph.replay()
        wait_for_device(workspace.device, channel)
        failures += _given_up(workspace, f"replay {turn + 1}")
        failures += _check(calls, f"replay {turn + 1}, payload {payload}", digest)
    graph.reset()
    return next(iter(failures), None), digest.digest()


def _fill(calls: Sequence[_Trial], seed: int, payload: str, channel: Channel) -> str | None:
    """New inputs on every rank, before any rank launches: one that has no memory left would be waited for in vain."""

    def fill() -> None:
        for i, call in enumerate(calls):
            call.fill(seed + i, payload)

    return failures_text(channel.attempt("self-test: inputs", fill)[1]) or None


def _check(calls: Sequence[_Trial], when: str, digest: Any) -> list[str]:
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


def wait_for_device(device: torch.device, channel: Channel) -> None:
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
                    "on the device until this process ends. End all ranks, and start with collective='reference'; "
                    "where peer memory is at fault, NCCL hangs too: NCCL_P2P_DISABLE=1 (hazard M51)"
                )
            channel.interrupt()
            time.sleep(0.0005)
