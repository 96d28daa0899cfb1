"""Faults that are plain arithmetic: the address, the alignment and the reduction as the kernels compute them."""

from __future__ import annotations

import ctypes
import math

import pytest

GIB = 1 << 30


def clear_offset(index: int, comm_size: int) -> int:
    """As the trtllm kernels compute it: both factors are int."""
    return ctypes.c_int32(index * comm_size).value


@pytest.mark.parametrize("index", [0, 1, 2])
def test_m6_clear_offset_wraps_beyond_one_gib(index: int) -> None:
    largest = (1 << 31) - (1 << 21)  # the cap of FlashInfer's workspace, 2 MiB below 2 GiB
    fits = GIB - (1 << 21)
    assert clear_offset(index, fits) == index * fits
    assert (clear_offset(index, largest) == index * largest) == (index < 2)
    assert clear_offset(2, largest) == -4 * (1 << 20)  # memory before the buffer
    assert clear_offset(2, GIB) < 0  # one GiB is too much already


@pytest.mark.parametrize(("tokens", "hidden"), [(16384, 7168), (1, 8), (3, 2880)])
def test_m7_half_of_a_buffer_may_be_misaligned(tokens: int, hidden: int) -> None:
    """The second stage begins at half of the buffer, and is accessed 16 bytes at a time."""
    payload = tokens * hidden * 2
    worst = payload // 32 * 32 + 16  # a multiple of 16 that is none of 32
    assert worst // 2 % 16 == 8
    assert -(-worst // 32) * 32 // 2 % 16 == 0  # rounded up to 32 bytes, as since 0.6.18rc2


@pytest.mark.parametrize(("hidden", "threads", "wrong"), [(2880, 180, True), (4096, 128, False), (8192, 256, False)])
def test_m13_rounding_warps_down_scales_the_norm(hidden: int, threads: int, wrong: bool) -> None:
    """A block's sum of squares leaves out the last warp when 32 does not divide its threads."""
    blocks = hidden // 8 // threads  # 16 bytes, 8 elements, per thread

    def mean_square(warps: int) -> float:
        return blocks * min(warps * 32, threads) * 8 / hidden  # of a row of ones

    assert mean_square(math.ceil(threads / 32)) == 1
    scale = 1 / math.sqrt(mean_square(threads // 32))
    assert scale == pytest.approx(1.0607 if wrong else 1, abs=1e-4)
