"""What the start-up self-test sees, on two threads whose kernels meet at a barrier."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from self_tested import ONE, RANKS, SHAPES, TOKENS, TWO, Fault, H, Kernels, off_by, on_ranks, outcome, workspace
from torch import Tensor

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import mnnvl
from ringfence.runtime.collectives import self_test as module
from ringfence.runtime.collectives.kernels import KernelCall
from ringfence.runtime.collectives.payloads import PAYLOADS
from ringfence.runtime.collectives.self_test import self_test
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.collectives.tested import EVERY_OPERANDS, SelfTest
from ringfence.runtime.errors import GroupFailureError, HangError, SelfTestHungError, WorkspaceError
from ringfence.runtime.hazards.situation import Collective, Strategy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_that_are_right(dtype: torch.dtype) -> None:
    result, calls = outcome(dtype=dtype)
    assert result == SelfTest(None, None, SHAPES)
    once = [(1, ONE), (4, ONE), (4, TWO), (8, ONE), (8, TWO), (4, ONE), (4, TWO), (1, ONE)]
    assert calls == once * len(PAYLOADS), "sizes up and down, strategies in turn, for each kind of payload"


@pytest.mark.parametrize("wrong", [None, (False, True), (True, False), (False, False)])
def test_all_operands_that_sites_have_are_tried_where_the_kernels_do_without_the_others(wrong: Any) -> None:
    def body(kernels: Kernels, channel: Channel) -> Any:
        def fault(call: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
            if kernels.operands[call] == wrong:
                norm[0] *= 2

        kernels.fault = fault
        served = workspace(kernels)
        tried = EVERY_OPERANDS if wrong is None else (wrong,)
        padded = self_test(served, channel, H, torch.bfloat16, TOKENS, capture=False, operands=tried)
        assert set(kernels.operands) == {(True, True)}, "FlashInfer's kernels are given zeros and ones"
        kernels.calls.clear()
        kernels.operands.clear()
        served.implementation = dataclasses.replace(served.implementation, takes=lambda epilogue: True)
        own = self_test(served, channel, H, torch.bfloat16, TOKENS, capture=False, operands=tried)
        assert set(kernels.operands) == {(True, True), *tried}
        return padded, own

    for padded, own in on_ranks(body, {}):
        assert padded == SelfTest(None, None, SHAPES)
        assert own.calls == SHAPES + 2 * (3 if wrong is None else 1), "the fewest tokens of each strategy"
        assert (own.eager is None) == (wrong is None)
        for name, has in zip(("residual", "weight"), wrong or (), strict=False):
            assert (f"without {name}" in str(own.eager)) == (not has)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_sum_alone_and_each_kernel_that_is_served_are_tried(wrong: bool) -> None:
    """One-shot serves up to 3 tokens, so its kernel from 4 on is not; two-shot is worth it alone up to 8."""
    row = SizeRow(Collective.TRTLLM, "peer", (9, 0), RANKS, 3 * H * 2, 1 << 20, 8 * H * 2, "a test")

    def body(kernels: Kernels, channel: Channel) -> Any:
        served = workspace(kernels, row)
        served.implementation = dataclasses.replace(
            served.implementation, changes_at=(2, 4, 8, 16), takes=lambda epilogue: True
        )
        kernels.fault_alone = wrong and channel.rank == 1
        tried, operands = (1, 2, 4, 8, 16), ((False, True),)
        result = self_test(served, channel, H, torch.bfloat16, tried, capture=False, operands=operands, alone=True)
        bare = [call for call, each in zip(kernels.calls, kernels.operands, strict=True) if each == operands[0]]
        return result.eager, kernels.alone, bare

    (said, alone, bare), other = on_ranks(body, {})
    assert other == (said, alone, bare)
    assert set(alone) == {(1, ONE), (2, ONE), (4, TWO), (8, TWO)}
    assert set(bare) == {*alone, (16, TWO)} and len(bare) == 5 * len(PAYLOADS)
    assert said is None if not wrong else "sum of 1 x 256 torch.bfloat16 one-shot alone is off by" in str(said)


def test_only_what_the_workspace_serves_is_called() -> None:
    def body(kernels: Kernels, channel: Channel) -> Any:
        row = SizeRow(Collective.TRTLLM, "peer", (9, 0), RANKS, 1024, 2048, 0, "a test")
        small = workspace(kernels, row)
        return self_test(small, channel, H, torch.bfloat16, (4, 1, 5, 100), capture=False).calls, kernels.calls[:4]

    assert on_ranks(body, {}) == [(4, [(1, ONE), (4, ONE), (4, TWO), (1, ONE)])] * RANKS


def test_kernels_of_one_strategy() -> None:
    result, calls = outcome(strategies=(ONE,))
    assert result == SelfTest(None, None, 5) and {s for _, s in calls} == {ONE}


def test_a_call_that_writes_nothing() -> None:
    def body(kernels: Kernels, channel: Channel) -> Any:
        def lazy(*arguments: Any) -> None:
            kernels.calls.append((0, ONE))
            if len(kernels.calls) <= SHAPES:  # right for the first payload
                kernels.calls.pop()
                usual(*arguments)

        usual = kernels.run
        kernels.run = lazy  # type: ignore[method-assign]
        return self_test(workspace(kernels), channel, H, torch.bfloat16, TOKENS, capture=False).eager

    for said in on_ranks(body, {}):
        assert "payload subnormal word: norm of 1 x 256 torch.bfloat16 one-shot is wrong: row 0 is not finite" in said


def test_a_large_call_is_sent_what_the_protocol_could_stumble_over_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ARITHMETIC_UP_TO", 4 * H * 2)
    _, calls = outcome()
    assert calls.count((8, ONE)) == 3 and calls.count((4, ONE)) == 2 * len(PAYLOADS)


def test_calls_that_no_kernel_serves_are_no_test_that_passes() -> None:
    def body(kernels: Kernels, channel: Channel) -> Any:
        mine = dataclasses.replace(workspace(kernels), implementation=mnnvl.PEER)
        result = self_test(mine, channel, H, torch.float16, TOKENS, capture=False)
        return result.eager, result.calls, kernels.calls

    said = f"no call of {H} torch.float16 is served"
    assert on_ranks(body, {}) == [(said, 0, [])] * RANKS


def test_a_strategy_that_is_wrong() -> None:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        if strategy is TWO:
            norm.neg_()

    result, _ = outcome({0: fault})
    assert result.eager is not None and "norm of 4 x 256 torch.bfloat16 two-shot" in result.eager


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_failure_on_one_rank_leaves_no_other_waiting(rank: int) -> None:
    """The rank that fails makes all its calls: an early return would leave the others in theirs."""
    result, calls = outcome({rank: off_by(9.0, "norm", at=0)})
    assert result.eager is not None and result.eager.startswith(f"rank {rank}: eager, payload ordinary")
    assert len(calls) == len(PAYLOADS) * SHAPES


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_a_call_that_raises_is_a_failure_of_its_rank(ranks: list[int]) -> None:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        if number == 1:
            raise ValueError("no kernel image")

    result, calls = outcome(dict.fromkeys(ranks, fault))
    assert result.eager == "; ".join(
        f"rank {rank}: eager, payload ordinary: a call raised ValueError: no kernel image" for rank in ranks
    )
    assert len(calls) == len(PAYLOADS) * SHAPES


def test_a_kernel_that_gives_up_waiting_fails_on_every_rank_and_in_time() -> None:
    """Its waits are short while it is tried, whatever others say meanwhile, and as long as was said last after that."""

    def body(kernels: Kernels, channel: Channel) -> Any:
        served, waits = workspace(kernels), []
        served.wait_for(30.0)

        def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
            served.wait_for(1800.0)
            waits.append(kernels.seconds)
            norm.fill_(torch.nan)

        def check() -> None:
            raise HangError("rank 0 waited in vain for the part of rank 1", (1,))

        if channel.rank == 0:
            kernels.fault, kernels.check = fault, check  # type: ignore[method-assign]
        result = self_test(served, channel, H, torch.bfloat16, TOKENS, capture=False)
        return result.eager, max(waits, default=1.0), kernels.seconds

    (said, most, after), other = on_ranks(body, {})
    assert said == "rank 0: eager, payload ordinary: rank 0 waited in vain for the part of rank 1"
    assert 2 * most < module._SECONDS, "also a sum, for which a kernel waits twice as long"
    assert after == 1800.0 and other == (said, 1.0, 30.0)


@pytest.mark.parametrize("gives_up", [True, False])
def test_kernels_that_gave_up_in_a_replay_do_not_serve_eagerly_either(
    gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(kernels: Kernels, channel: Channel) -> Any:
        def check() -> None:
            raise HangError("in vain", (0,))

        def captured(*_: object) -> tuple[str, bytes]:
            if gives_up and channel.rank == 1:
                kernels.check = check  # type: ignore[method-assign]
            return "not finite", b""

        here.captured = captured
        return module._result([trial(kernels, channel)], workspace(kernels), channel, capture=True)

    def trial(kernels: Kernels, channel: Channel) -> module._Trial:
        return module._Trial(workspace(kernels), KernelCall(1, H, torch.bfloat16, RANKS, ONE), channel.rank)

    here = threading.local()
    monkeypatch.setattr(module, "_captured", lambda *given: here.captured(*given))
    replays = "rank 0: not finite; rank 1: not finite"
    assert on_ranks(body, {}) == [SelfTest("rank 1: captured: in vain" if gives_up else None, replays, 1)] * RANKS


def test_what_one_rank_cannot_compile_is_launched_by_nobody() -> None:
    def body(kernels: Kernels, channel: Channel) -> Any:
        def load(given: Any, calls: Any) -> None:
            assert given is kernels and len(calls) == SHAPES
            if channel.rank == 1:
                raise WorkspaceError("a kernel cannot be compiled")

        served = workspace(kernels)
        served.implementation = dataclasses.replace(served.implementation, load=load)
        return self_test(served, channel, H, torch.bfloat16, TOKENS, capture=False).eager, kernels.calls

    assert on_ranks(body, {}) == [("rank 1: a kernel cannot be compiled", [])] * RANKS


# -- captured


class Graph:
    """A capture on the CPU: calls are recorded, and run by ``replay``."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call()

    def reset(self) -> None:
        self.calls.clear()


def captured(
    monkeypatch: pytest.MonkeyPatch, faults: dict[int, Fault] | None = None, **trouble: Callable[[Kernels], None]
) -> tuple[str | None, list[int]]:
    """What is said of the capture, on every rank, and how often each rank replayed."""
    here = threading.local()

    @contextlib.contextmanager
    def capture(graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "another thread may use the device meanwhile"
        here.graph, here.kernels.recorded = graph, graph.calls
        trouble.get("inside", lambda kernels: None)(here.kernels)
        yield
        here.kernels.recorded = None

    def body(kernels: Kernels, channel: Channel) -> Any:
        here.kernels = kernels
        one = workspace(kernels)
        shapes = [KernelCall(n, H, torch.bfloat16, RANKS, ONE) for n in TOKENS]
        calls = [module._Trial(one, shape, channel.rank) for shape in shapes]
        why, digest = module._captured(calls, one, channel)
        return module._voted(channel, "self-test, captured", why, digest), here.graph.replays

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    results = on_ranks(body, faults or {})
    (said,) = {why for why, _ in results}
    return said, [replays for _, replays in results]


def test_a_capture_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert captured(monkeypatch) == (None, [2, 2])


def test_a_replay_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    said, replays = captured(monkeypatch, {1: off_by(9.0, "norm", at=len(TOKENS))})
    assert (
        said is not None
        and said.startswith("rank 1: replay 2, payload subnormal word: norm of 1 x")
        and replays == [2, 2]
    )


def test_replays_that_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        out.view(torch.int16)[0, 0] ^= 1

    assert captured(monkeypatch, {0: fault}) == ("the ranks hold different bits", [2, 2])


def on_rank(wanted: int, action: Callable[[Kernels], None]) -> Callable[[Kernels], None]:
    return lambda kernels: action(kernels) if kernels.rank == wanted else None


def test_a_capture_that_changes_the_control_words_is_not_replayed_by_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    said, replays = captured(monkeypatch, inside=on_rank(1, lambda kernels: setattr(kernels, "words", (1, 0))))
    assert said == "rank 1: the capture changed the control words from (0, 0) to (1, 0)" and replays == [0, 0]


def test_a_capture_that_fails_on_one_rank_is_not_replayed_by_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kernels: Kernels) -> None:
        raise RuntimeError("operation not permitted")

    said, replays = captured(monkeypatch, inside=on_rank(0, fail))
    assert said == "rank 0: capture raised RuntimeError: operation not permitted" and replays == [0, 0]


# -- kernels that do not come back


class Event:
    polls = 0

    def record(self) -> None: ...

    def query(self) -> bool:
        Event.polls += 1
        return Event.polls > 3


def test_a_kernel_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "polls", 0)
    channel = Channel(dist.HashStore(), 0, 2)
    waits: list[str] = []

    @contextlib.contextmanager
    def waiting(topic: str) -> Iterator[None]:
        waits.append(topic)
        yield

    channel.waiting = waiting
    module.wait_for_device(torch.device("cuda", 0), channel)
    assert Event.polls == 4 and waits == ["self-test: the device"]
    monkeypatch.setattr(Event, "query", lambda self: False)
    monkeypatch.setattr(module, "_SECONDS", 0.05)
    with pytest.raises(SelfTestHungError, match=r"within 0.05 s .* start with collective='reference'"):
        module.wait_for_device(torch.device("cuda", 0), channel)

    def interrupt() -> None:
        raise GroupFailureError("rank 1 is gone", (1,))

    channel.interrupt = interrupt
    monkeypatch.setattr(module, "_SECONDS", 60.0)
    with pytest.raises(GroupFailureError, match="rank 1 is gone"):
        module.wait_for_device(torch.device("cuda", 0), channel)
