"""The control blocks word by word, as the kernels leave them after each call."""

from __future__ import annotations

from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol import mnnvl, trtllm
from ringfence.runtime.protocol.calls import Call, changed, program

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT


def test_the_nine_words_of_mnnvl() -> None:
    """Four ranks, H=8192, bf16. By hand: a token is 16384 bytes; one-shot writes 4 rows a token."""
    calls = [Call(0, ONE, 16), Call(1, TWO, 10), Call(2, ONE, 1), Call(3, TWO, 4)]
    words = mnnvl.control_words(calls, world_size=4, hidden=8192, element_size=2, buffer_bytes=1 << 24)
    assert [w.words for w in words] == [
        (0, 2, 1 << 24, 0, 0, 0, 0, 0, 0),
        (1, 0, 1 << 24, 1, 16 * 4 * 16384, 0, 0, 0, 0),
        (2, 1, 1 << 24, 2, 12 * 16384, 10 * 16384, 0, 0, 0),
        (0, 2, 1 << 24, 1, 4 * 16384, 0, 0, 0, 0),
        (1, 0, 1 << 24, 2, 4 * 16384, 4 * 16384, 0, 0, 0),
    ]


def test_the_nine_words_do_not_depend_on_what_the_host_baked_in() -> None:
    calls = program([3, 1, 2])
    baked = changed(calls, 0, 1, 2, epoch=7)
    arguments = {"world_size": 2, "hidden": 64, "element_size": 4, "buffer_bytes": 4096}
    assert mnnvl.control_words(calls, **arguments) == mnnvl.control_words(baked, **arguments)


def test_the_five_words_of_trtllm() -> None:
    """Two barriers move the sync flag by two; the size to clear is in elements, of one-shot alone."""
    calls = [Call(0, ONE, 16), Call(1, TWO, 10), Call(2, TWO, 10), Call(3, ONE, 1), Call(4, ONE, 2)]
    words = trtllm.control_words(calls, world_size=4, hidden=8192, comm_size=1 << 24)
    assert [w.words for w in words] == [
        (0, 0, 0, 1 << 24, 0),
        (0, 0, 1, 1 << 24, 16 * 4 * 8192),
        (0, 2, 1, 1 << 24, 16 * 4 * 8192),
        (0, 1, 1, 1 << 24, 16 * 4 * 8192),
        (0, 1, 2, 1 << 24, 4 * 8192),
        (0, 1, 0, 1 << 24, 2 * 4 * 8192),
    ]
