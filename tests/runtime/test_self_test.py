"""What the start-up self-test sees, on two threads whose kernels meet at a barrier."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import memory, one_shot_norm
from torch import Tensor

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import mnnvl, reference, trtllm
from ringfence.runtime.collectives import self_test as module
from ringfence.runtime.collectives.epilogue import Epilogue
from ringfence.runtime.collectives.kernels import KernelCall, KernelMemory
from ringfence.runtime.collectives.payloads import PAYLOADS, RANGES, draw
from ringfence.runtime.collectives.self_test import self_test
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.collectives.tested import EVERY_OPERANDS, SelfTest
from ringfence.runtime.collectives.workspace import Workspace
from ringfence.runtime.errors import GroupFailureError, HangError, SelfTestHungError, WorkspaceError
from ringfence.runtime.hazards.situation import Collective, Strategy

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
H, RANKS = 256, 2
TOKENS = (1, 4, 8)
#: 1 by one-shot, 4 and 8 by both, and down again: 4 and 1.
SHAPES = 1 + 2 + 2 + 2 + 1
ROW = SizeRow(Collective.TRTLLM, "peer", (9, 0), RANKS, 1 << 20, 1 << 20, 0, "a test")


class Meeting:
    """Where the ranks bring their inputs. Who waits for a rank that does not come gets an error in its place."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=15)
        self.inputs: list[Tensor | None] = [None] * RANKS

    def total(self, rank: int, x: Tensor) -> Tensor:
        self.inputs[rank] = x.clone()
        self.barrier.wait()
        total = torch.stack([t.float() for t in self.inputs if t is not None]).sum(0)
        self.barrier.wait()
        return total


Fault = Callable[[int, Strategy, Tensor, Tensor, Tensor], None]


@dataclass
class Kernels:
    """Of one rank. ``fault`` is given the number of the call, and what was read and written."""

    meeting: Meeting
    rank: int
    fault: Fault | None = None
    strategies: tuple[Strategy, ...] = (ONE, TWO)
    memory: KernelMemory = field(default_factory=memory)
    words: tuple[int, ...] = (0, 0)
    calls: list[tuple[int, Strategy]] = field(default_factory=list)
    operands: list[tuple[bool, bool]] = field(default_factory=list)
    recorded: list[Callable[[], None]] | None = None
    seconds: float = 0.0
    alone: list[tuple[int, Strategy]] = field(default_factory=list)
    fault_alone: bool = False

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        if epilogue.norm is None:
            assert operands is None and norm is None and self.recorded is None
            self.alone.append((x.shape[0], strategy))
            out.copy_(self.meeting.total(self.rank, x))
            if self.fault_alone:
                out[0, 0] += 1
            return
        assert operands is not None and norm is not None

        def run() -> None:
            residual, weight = (t.float() if t is not None else None for t in operands)
            self.calls.append((x.shape[0], strategy))
            self.operands.append((residual is not None, weight is not None))
            normed, total = reference.apply(epilogue, self.meeting.total(self.rank, x), residual, weight)
            out.copy_(total)
            norm.copy_(normed)
            if self.fault is not None:
                self.fault(len(self.calls) - 1, strategy, x, norm, out)

        if self.recorded is None:
            run()
        else:
            self.recorded.append(run)

    def holds(self, call: KernelCall) -> bool:
        return True

    def wait_for(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self) -> None:
        pass

    def control_words(self) -> tuple[int, ...]:
        return self.words

    def close(self) -> None:
        raise AssertionError("not the self-test's to close")


def workspace(kernels: Kernels, row: SizeRow = ROW) -> Workspace:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return Workspace(trtllm.IMPLEMENTATION, row, kernels, torch.device("cpu"), RANKS, 1 << 20, dtypes)


def on_ranks(body: Callable[[Kernels, Channel], Any], faults: dict[int, Fault], **other: Any) -> list[Any]:
    """Run on threads; no rank may be left waiting for another."""
    meeting, store = Meeting(), dist.HashStore()

    def run(rank: int) -> Any:
        channel = Channel(store, rank, RANKS, seconds=120)
        result = body(Kernels(meeting, rank, faults.get(rank), **other), channel)
        channel.barrier("and the channel goes on")
        return result

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(run, range(RANKS)))


def outcome(
    faults: dict[int, Fault] | None = None, dtype: torch.dtype = torch.bfloat16, **other: Any
) -> tuple[SelfTest, list[tuple[int, Strategy]]]:
    """The result, which is the same on all ranks, and the calls, which are too."""

    def body(kernels: Kernels, channel: Channel) -> Any:
        return self_test(workspace(kernels), channel, H, dtype, TOKENS, capture=False), kernels.calls

    (first, calls), *others = on_ranks(body, faults or {}, **other)
    assert all(o == (first, calls) for o in others)
    return first, calls


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


def off_by(amount: float, which: str, at: int | None = None) -> Fault:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        if at is None or number == at:
            target = norm if which == "norm" else out
            target[-1, -1] += amount

    return fault


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("which", ["norm", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_wrong_element_of_one_call(dtype: torch.dtype, which: str, rank: int) -> None:
    result, calls = outcome({rank: off_by(0.5, which, at=SHAPES)}, dtype)
    assert result.eager is not None and result.captured is None
    assert result.eager.startswith(
        f"rank {rank}: eager, payload subnormal word: {which} of 1 x {H} {dtype} one-shot is off by"
    )
    assert len(calls) == len(PAYLOADS) * SHAPES


@pytest.mark.parametrize("which", [0, 1])
def test_an_element_that_is_not_written(which: int) -> None:
    """Outputs are poisoned before each run, so what an earlier run wrote does not count."""

    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        (norm, out)[which][0, 0] = float("nan")

    result, _ = outcome({1: fault})
    assert result.eager is not None and "is wrong: row 0 is not finite, and the largest" in result.eager


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


WORDS = {"subnormal word": -(2**31) + 0x50005, "negative zero": -(2**31)}


@pytest.mark.parametrize("pattern", WORDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kernel_that_stumbles_over_a_payload(pattern: str, dtype: torch.dtype) -> None:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        if bool((x.view(torch.int32) == WORDS[pattern]).any()):
            out[0, 0] = 0

    result, _ = outcome(dict.fromkeys(range(RANKS), fault), dtype)
    assert result.eager is not None and f"rank 0: eager, payload {pattern}: sum of" in result.eager
    assert "; rank 1: " in result.eager


# -- payloads, and what each is for

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 16])
def test_a_payload_has_a_finite_sum_and_norm_and_is_the_same_on_every_rank(
    dtype: torch.dtype, payload: str, ranks: int
) -> None:
    call = KernelCall(8, 512, dtype, ranks, ONE)
    inputs, residual = draw(call, payload, 7, torch.device("cpu"))
    again, _ = draw(call, payload, 7, torch.device("cpu"))
    assert len(inputs) == ranks and all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))
    assert all(x.shape == (8, 512) and x.dtype == dtype for x in (*inputs, residual))
    total = torch.stack([x.double() for x in (*inputs, residual)]).sum(0)
    assert total.to(dtype).isfinite().all() and inputs[0].double().ne(inputs[1].double()).any()
    assert total.float().square().sum(-1).isfinite().all(), "a norm in float32"
    largest, smallest = total.abs().max(), torch.finfo(dtype).smallest_normal
    nonzero = torch.stack([x.double().abs() for x in inputs])
    if payload == "large":
        assert largest > RANGES[dtype].large / 4
    elif payload == "tiny":
        assert ((nonzero > 0) & (nonzero < smallest)).any(-1).all(), "each row has subnormals"
        assert (nonzero >= smallest).any(-1).all(), "and more"
    elif payload == "zero rows":
        assert total[::2].eq(0).all() and total[1::2].ne(0).any(-1).all()
    elif payload == "hot element":
        hot = total.abs().amax(-1)
        assert hot[2] > 0.9 * RANGES[dtype].hot[2] and (hot > 250).all()
        assert (total.abs() > 100).sum(-1).eq(1).all()


def rounds_squares(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
    if strategy is ONE:
        weight = norm.float() * torch.rsqrt(norm.float() * 0 + 1)  # the real one is not given: its ratio is
        right = out.float() * torch.rsqrt(out.float().square().mean(-1, keepdim=True) + 1e-6)
        weight = torch.where(right == 0, 0, weight / right)
        norm.copy_(one_shot_norm(out, weight, 1e-6, 0.0))


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_squares_in_float16_lose_rows_and_pass_on_no_rank(ranks: list[int]) -> None:
    """The mnnvl one-shot kernel's formula (M49): ordinary numbers do not show it."""
    result, _ = outcome(dict.fromkeys(ranks, rounds_squares), torch.float16)
    assert result.eager is not None
    for rank in ranks:
        assert (
            f"rank {rank}: eager, payload large: norm of 1 x {H} torch.float16 one-shot is wrong: row 0 is lost: "
            in (result.eager)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_squares_in_other_dtypes_lose_precision_alone(dtype: torch.dtype) -> None:
    assert outcome(dict.fromkeys(range(RANKS), rounds_squares), dtype)[0].eager is None


@pytest.mark.parametrize("element", [300.0, 5000.0, 60000.0])
def test_one_hot_element_shows_it_too(element: float) -> None:
    trial = module._Trial(workspace(Kernels(Meeting(), 0)), KernelCall(4, H, torch.float16, RANKS, ONE), 0)
    trial.fill(3, "hot element")
    assert trial.residual.abs().max() == 60000 and trial.residual[0].abs().max() == 300
    total = torch.randn(4, H).half()
    total[2, 5] = element
    trial._total.copy_(total)
    trial.out.copy_(total)
    trial.norm.copy_(reference.rms_norm(total, trial.weight, 1e-6, 0.0))
    assert trial.failure() is None
    trial.norm.copy_(one_shot_norm(total, trial.weight, 1e-6, 0.0))
    assert trial.failure() is not None and "norm of 4 x 256 torch.float16 one-shot is wrong: row 2 is lost" in str(
        trial.failure()
    )


def flushes(border: float) -> Fault:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        lost = out.float().abs() < border
        out[lost] = 0
        norm[lost] = 0

    return fault


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_device_flushes_is_no_fault_and_what_it_need_not_is(dtype: torch.dtype) -> None:
    """Subnormals of float32 and bfloat16 may go, in float32 arithmetic; those of float16 are its small activations."""
    result = outcome(dict.fromkeys(range(RANKS), flushes(torch.finfo(dtype).smallest_normal)), dtype)[0].eager
    assert (result is not None and "payload tiny: " in result) if dtype == torch.float16 else result is None
    more = outcome({1: flushes(2.0 ** (RANGES[dtype].tiny[1] - 2))}, dtype)[0].eager
    assert more is not None and more.startswith("rank 1: eager, payload tiny: ")


def test_a_row_of_zeros_has_a_norm_of_zeros() -> None:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        rows = (out == 0).all(-1)
        norm[rows] = float("nan")  # 0 * rsqrt(0), where epsilon is left out

    said = outcome({0: fault})[0].eager
    assert (
        said is not None and "payload zero rows: norm of 1 x 256 torch.bfloat16 one-shot is wrong: row 0 is not" in said
    )


def test_a_sum_that_overflows_is_not_finite() -> None:
    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        out[out.float().abs() > 32768] = float("inf")

    said = outcome({0: fault}, torch.float16)[0].eager
    assert (
        said is not None and "payload large: sum of" in said and "is not finite, and the largest of the refer" in said
    )


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


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("at", [0, len(PAYLOADS) * SHAPES - 1])
def test_ranks_that_hold_different_bits(which: int, at: int) -> None:
    """Each is right within the rounding, and a model over them would drift apart."""

    def fault(number: int, strategy: Strategy, x: Tensor, norm: Tensor, out: Tensor) -> None:
        if number == at:
            (norm, out)[which].view(torch.int16)[-1, -1] ^= 1

    assert outcome({1: fault})[0].eager == "the ranks hold different bits"
    assert outcome(dict.fromkeys(range(RANKS), fault))[0].eager is None, "the same bits on both"


def test_the_same_bits_in_another_order_are_different_bits() -> None:
    one = module._Trial(workspace(Kernels(Meeting(), 0)), KernelCall(4, H, torch.bfloat16, RANKS, ONE), 0)
    for out in (one.norm, one.out):
        out.view(torch.int32).copy_(torch.arange(4 * H // 2).view(4, -1))
    before = one.digest()
    for out in (one.norm, one.out):
        words = out.view(torch.int32).flatten()
        words[[3, 400]] = words[[400, 3]]
        assert one.digest() != before
        words[[3, 400]] = words[[400, 3]]
        assert one.digest() == before


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
