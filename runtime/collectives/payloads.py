"""Payloads: the numbers that a self-test sends, each kind with what a kernel could lose of it.

A kernel that is right on numbers of a normal distribution may still lose a row. A residual stream has elements of
thousands, whose squares float16 does not hold; activations fade into the subnormal range; padding is zeros; and a
receiver may take a word for the sentinel that says "not arrived".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import KernelCall

#: What a receiver could wait for in vain, and what a norm could lose; in the order in which they are sent.
PROTOCOL = ("ordinary", "subnormal word", "negative zero")
PAYLOADS = (*PROTOCOL, "large", "tiny", "zero rows", "hot element")

_WORDS = {"subnormal word": -(2**31) + 0x50005, "negative zero": -(2**31)}


@dataclass(frozen=True)
class Range:
    """How far the numbers of a dtype go in a row that has a norm.

    large: nothing is larger, nor is any sum. tiny: from the lowest to the highest power of two of the tiny ones, the
    lower ones subnormal. hot: the elements that stick out of their rows. lost: what a kernel may round away, or flush,
    of each number. The squares of a row of float32 or bfloat16 must be finite in float32: nobody has a norm beyond.
    """

    large: float
    tiny: tuple[int, int]
    hot: tuple[float, float, float]
    lost: float


RANGES = {
    torch.float16: Range(60000.0, (-23, -10), (300.0, 5000.0, 60000.0), 2.0**-24),
    torch.bfloat16: Range(2.0**50, (-132, -110), (300.0, 1e6, 1e18), 2.0**-126),
    torch.float32: Range(2.0**50, (-140, -110), (300.0, 1e6, 1e18), 2.0**-126),
}


def draw(call: KernelCall, payload: str, seed: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The inputs of all ranks, by rank, and the residual, which all share: ``[tokens, hidden]`` of the call's dtype.

    Every rank draws the same, so each knows the right sum without any communication. All sums are finite.
    """
    ranks = range(call.world_size)
    residual = _numbers(call, payload, seed * 97 + call.world_size, device, 0.5)
    inputs = [_numbers(call, payload, seed * 97 + rank, device, 0.5 / call.world_size) for rank in ranks]
    if payload in _WORDS:
        for x in inputs:  # every other word: a row of nothing else has no norm to speak of
            x.view(torch.int32)[:, ::2] = _WORDS[payload]
    elif payload == "zero rows":
        for x in (*inputs, residual):
            x[::2] = 0
    elif payload == "hot element":
        for token in range(call.tokens):  # in the residual, and in what one rank sends
            target = inputs[token % call.world_size] if token % 2 else residual
            target[token, (seed + 37 * token) % call.hidden] = RANGES[call.dtype].hot[token % 3] * (-1) ** (token // 3)
    return inputs, residual


def _numbers(call: KernelCall, payload: str, seed: int, device: torch.device, share: float) -> Tensor:
    """``share``: of the largest sum, that these may have."""
    generator = torch.Generator(device).manual_seed(seed)
    reach = RANGES[call.dtype]
    size = (call.tokens, call.hidden)
    numbers = torch.randn(size, generator=generator, device=device)
    if payload == "large":
        numbers = torch.rand(size, generator=generator, device=device) * numbers.sign() * (reach.large * share)
    elif payload == "tiny":
        low, high = reach.tiny
        powers = low + (high - low) * torch.rand(size, generator=generator, device=device, dtype=torch.float64)
        numbers = numbers.sign() * powers.exp2()
    return numbers.to(call.dtype)
