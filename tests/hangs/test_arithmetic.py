"""Faults that are plain arithmetic: the address, the alignment and the reduction as the kernels compute them."""

from __future__ import annotations

import ctypes
import math

import pytest

from ringfence.runtime.collectives.kernels import STAGE_ALIGNMENT, WRAPPING_BUFFER

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
    assert clear_offset(2, WRAPPING_BUFFER) < 0 <= clear_offset(2, WRAPPING_BUFFER - 1)


def test_m7_half_of_a_buffer_may_be_misaligned() -> None:
    """A third of an allocation, rounded down, is a buffer; its half is where the second stage begins."""
    thirds = [pages * (2 << 20) // 3 for pages in range(1, 7)]
    rounded_to_16 = [third // 16 * 16 // 2 for third in thirds]
    rounded_to_32 = [third // STAGE_ALIGNMENT * STAGE_ALIGNMENT // 2 for third in thirds]  # since 0.6.18rc2
    assert any(stage % 16 == 8 for stage in rounded_to_16)
    assert all(stage % 16 == 0 for stage in rounded_to_32)


@pytest.mark.parametrize(("hidden", "threads", "wrong"), [(2880, 180, True), (4096, 128, False), (8192, 256, False)])
def test_m13_rounding_warps_down_scales_the_norm(hidden: int, threads: int, wrong: bool) -> None:
    """A block's sum of squares leaves out the last warp when 32 does not divide its threads."""
    blocks = hidden // 8 // threads  # 16 bytes, 8 elements, per thread

    def mean_square(warps: int) -> float:
        return blocks * min(warps * 32, threads) * 8 / hidden  # of a row of ones

    assert mean_square(math.ceil(threads / 32)) == 1
    scale = 1 / math.sqrt(mean_square(threads // 32))
    assert scale == pytest.approx(1.0607 if wrong else 1, abs=1e-4)
