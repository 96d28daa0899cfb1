"""What a call must look like, so that one of FlashInfer's kernels serves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringfence.runtime.collectives import kernels as contract
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives.kernels import WRAPPING_BUFFER, Implementation, KernelCall
from ringfence.runtime.errors import WorkspaceError
from ringfence.runtime.hazards.situation import Strategy

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
TRTLLM, MNNVL = trtllm.IMPLEMENTATION, mnnvl.PEER


def call(**other: Any) -> KernelCall:
    return KernelCall(
        **{"tokens": 16, "hidden": 4096, "dtype": torch.bfloat16, "world_size": 2, "strategy": ONE} | other
    )


#: Calls that break a requirement and no other one before it, and their neighbours that are served.
EDGES: dict[str, tuple[Implementation, dict[str, Any], dict[str, Any]]] = {
    "dtype": (MNNVL, {"dtype": torch.float64, "hidden": 64}, {"dtype": torch.float32}),
    "world_size": (TRTLLM, {"world_size": 3}, {"world_size": 16}),
    "hidden": (MNNVL, {"hidden": 4100}, {"hidden": 4096}),
    "cluster": (MNNVL, {"hidden": 65536 + 256}, {"hidden": 65536}),
    "warp": (TRTLLM, {"hidden": 4096 + 8}, {"hidden": 4096 + 256}),
    "float16_square": (MNNVL, {"dtype": torch.float16}, {"dtype": torch.float16, "strategy": TWO}),
    "two_shot_tokens": (TRTLLM, {"strategy": TWO, "tokens": 2}, {"strategy": TWO, "tokens": 3}),
}


REQUIREMENTS = {r.id: r for one in (TRTLLM, MNNVL) for r in one.requirements}


def test_every_requirement_has_its_edge() -> None:
    assert set(REQUIREMENTS) == set(EDGES)
    assert mnnvl.MULTICAST.requirements == mnnvl.PEER.requirements


@pytest.mark.parametrize("id", EDGES)
def test_a_call_at_the_edge_of_a_requirement(id: str) -> None:
    one, broken, fine = EDGES[id]
    assert one.unmet(call(**broken)) is REQUIREMENTS[id]
    assert one.unmet(call(**fine)) is None
    if id != "hidden":  # a whole warp is a multiple of 16 bytes too
        assert [r.id for r in one.requirements if not r.met(call(**broken))] == [id]


def test_requirements_of_one_alone() -> None:
    assert MNNVL.unmet(call(world_size=3)) is None
    assert MNNVL.unmet(call(strategy=TWO, tokens=1)) is None
    assert TRTLLM.unmet(call(strategy=ONE, tokens=1)) is None
    assert TRTLLM.unmet(call(dtype=torch.float16)) is None


def test_a_lamport_buffer_of_a_gibibyte_is_refused() -> None:
    contract.check_buffer(WRAPPING_BUFFER - 32)
    with pytest.raises(WorkspaceError, match=r"1073741824 bytes .* lower max_tokens"):
        contract.check_buffer(WRAPPING_BUFFER)
