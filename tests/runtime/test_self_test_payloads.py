"""The payloads of the self-test, and the wrong arithmetic that each of them is there to find."""

from __future__ import annotations

import pytest
import torch
from fake_flashinfer import one_shot_norm
from self_tested import ONE, RANKS, SHAPES, Fault, H, Kernels, Meeting, off_by, outcome, workspace
from torch import Tensor

from ringfence.runtime.collectives import reference
from ringfence.runtime.collectives import self_test as module
from ringfence.runtime.collectives.kernels import KernelCall
from ringfence.runtime.collectives.payloads import PAYLOADS, RANGES, draw
from ringfence.runtime.hazards.situation import Strategy


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
