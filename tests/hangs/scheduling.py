"""What the tests of scheduling mechanisms share."""

from __future__ import annotations

from hangs.models.device import Devices, State
from ringfence.runtime.protocol.explore import ModelFailure, Result, explore

PAIR = (0, 1)


def assert_fails(devices: Devices, failure: ModelFailure, *words: str) -> Result[State]:
    """Some order fails in that way, and what is told of it has these words in this order."""
    result = explore(devices, limit=100_000)
    assert result.failure is failure, result
    told = "\n".join([f"rank {e.rank} {e.detail}" for e in result.trace] + list(result.waiting))
    at = 0
    for word in words:
        assert word in told[at:], told
        at = told.index(word, at) + len(word)
    return result


def assert_safe(devices: Devices) -> None:
    result = explore(devices, limit=100_000)
    assert result.safe, (result.failure, result.trace, result.waiting)
