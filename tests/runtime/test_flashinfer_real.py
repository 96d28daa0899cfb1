"""The contract with the real FlashInfer, whose Python side needs no GPU: over a driver that writes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringfence.runtime.collectives import flashinfer as adapter
from ringfence.runtime.collectives.flashinfer import SUPPORTED
from support import HARD_END, NO_MULTICAST


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real FlashInfer did over a driver that writes down (``read_flashinfer.py``)."""
    cache = tmp_path_factory.mktemp("flashinfer")
    environment = os.environ | NO_MULTICAST | {"FLASHINFER_WORKSPACE_BASE": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("FLASHINFER_CONFIDENTIAL_COMPUTE", None)
    program = Path(__file__).parent.parent / "read_flashinfer.py"
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=HARD_END, check=False
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert facts["load"] == "FlashInfer", f"{facts['said']} (`make` installs what this test reads)"
    return facts


#: What the kernel's wrapper calls the arguments that Mnnvl passes by position.
MNNVL_PARAMETERS = [
    *("input", "multicast_buffer_ptr", "buffer_ptrs_dev", "buffer_ptr_local", "buffer_flags_mnnvl", "nranks", "rank"),
    *("rmsnorm_fusion", "launch_with_pdl", "use_oneshot", "output", "residual_out", "residual_in", "gamma"),
    *("epsilon", "weight_bias"),
]
MADE = ["trtllm", "trtllm float32", "mnnvl peer", "mnnvl multicast"]
MULTICAST = {"cuMulticastCreate", "cuMulticastAddDevice", "cuMulticastBindMem"}


def test_the_real_package_is_a_release_that_was_read(real: dict[str, Any]) -> None:
    low, high = SUPPORTED
    assert adapter.in_range(real["version"], low, high)


def test_the_real_moe_all_to_all_is_as_it_was_read(real: dict[str, Any]) -> None:
    assert real["moe"] == adapter.MOE


def test_the_real_mnnvl_kernel_takes_its_arguments_in_this_order(real: dict[str, Any]) -> None:
    assert real["mnnvl parameters"][: len(MNNVL_PARAMETERS)] == MNNVL_PARAMETERS


@pytest.mark.parametrize("name", ["mnnvl peer", "mnnvl multicast"])
def test_what_reaches_the_real_mnnvl_kernel(real: dict[str, Any], name: str) -> None:
    seen, calls = real[name], real[name]["kernel calls"]
    own, peer = seen["own memory"]
    multicast = peer if name == "mnnvl peer" else seen["multicast pointer"]
    assert multicast
    assert [rank[0] for rank in seen["pointers"]][1] != multicast
    strategies = [True] if name == "mnnvl peer" else [True, False]
    assert len(calls) == 2 * len(strategies)
    for one_shot, fused, plain in zip(strategies, calls[::2], calls[1::2], strict=True):
        for kernel, given, named in (fused, plain):
            assert kernel == "trtllm_mnnvl_allreduce_fusion" and not named
            parameters = dict(zip(MNNVL_PARAMETERS, given, strict=False))
            assert parameters | {"buffer_ptrs_dev": 0} == {
                "input": "input",
                "multicast_buffer_ptr": multicast,
                "buffer_ptrs_dev": 0,
                "buffer_ptr_local": own,
                "buffer_flags_mnnvl": "another tensor",
                "nranks": 2,
                "rank": 0,
                "launch_with_pdl": one_shot,
                "use_oneshot": one_shot,
                **(
                    {
                        "rmsnorm_fusion": True,
                        "output": "norm",
                        "residual_out": "out",
                        "residual_in": "residual",
                        "gamma": "weight",
                        "epsilon": 1e-5,
                        "weight_bias": 1.0,
                    }
                    if given is fused[1]
                    else {
                        "rmsnorm_fusion": False,
                        "output": "out",
                        **dict.fromkeys(("residual_out", "residual_in", "gamma", "epsilon", "weight_bias")),
                    }
                ),
            }
            assert parameters["buffer_ptrs_dev"] == 0xDE0, "the table of rank 0"
    assert seen["flags"] == [0, 2, seen["buffer_bytes"][0], 0, 0, 0, 0, 0, 0]
    assert seen["control_words"] == [9, 9]
    for rank, memory in enumerate(seen["memory"]):
        assert (memory["rank"], memory["element"]) == (rank, 4)
        assert memory["lamport"] == seen["pointers"][rank][2]
    assert seen["memory"][0]["lamport"] == own


@pytest.mark.parametrize("name", ["trtllm", "trtllm float32"])
def test_what_reaches_the_real_trtllm_kernel(real: dict[str, Any], name: str) -> None:
    seen = real[name]
    calls = seen["kernel calls"]
    assert [named["use_oneshot"] for _, _, named in calls] == [True, True, False, False][
        : 4 if adapter.in_range(real["version"], "0.7.2", None) else 2
    ]
    for i, (kernel, given, named) in enumerate(calls):
        assert kernel == "trtllm_allreduce_fusion" and not given
        fixed = {
            "launch_with_pdl": False,
            "trigger_completion_at_end": True,
            "fp32_acc": True,
            "world_size": 2,
            "world_rank": 0,
            "token_num": 8,
            "hidden_dim": 256,
            "allreduce_in": "input",
        }
        fused = {
            "pattern_code": 1,
            "residual_in": "residual",
            "residual_out": "out",
            "norm_out": "norm",
            "rms_gamma": "weight",
            "rms_eps": 1e-5,
            "weight_bias": 1.0,
        }
        plain = {"pattern_code": 0, "allreduce_out": "out", "norm_out": None, "residual_out": None, "rms_gamma": None}
        expected = fixed | (plain if i % 2 else fused)
        assert {key: named[key] for key in expected} == expected
    assert seen["words at"] == [[0xF000, 5]] * 2 and seen["control_words"] == [5, 5]
    for rank, memory in enumerate(seen["memory"]):
        assert (memory["rank"], memory["words"]) == (rank, 0xF000)
        assert memory["element"] == (4 if "float32" in name else 2)
        assert [memory["flags"], memory["lamport"]] == seen["handles"][rank]


@pytest.mark.parametrize("name", MADE)
def test_the_real_package_makes_multicast_objects_for_mnnvl_over_multicast_alone(
    real: dict[str, Any], name: str
) -> None:
    assert real[name]["allocations"] == (6 if name.startswith("trtllm") else 2)
    made = MULTICAST & {*real[name]["driver"]}
    assert made == (MULTICAST if name == "mnnvl multicast" else set())
    others = {call for call in real[name]["driver"] if "Multicast" in call}
    assert name == "mnnvl multicast" or not others


@pytest.mark.parametrize("name", MADE)
def test_the_real_package_gives_the_memory_back_when_a_workspace_is_closed(real: dict[str, Any], name: str) -> None:
    seen = real[name]
    assert seen["kept"] == (2 if name.startswith("trtllm") else 0), "tables that destroy() leaves alone"
    assert seen["kept after close"] == 0
    # Each rank releases its own memory and what it imported of the other's.
    assert seen["released"] >= 2 * seen["allocations"]
    assert seen["after close"].startswith("this workspace was closed; compile the model")


def test_the_real_two_shot_in_float32_has_room(real: dict[str, Any]) -> None:
    assert real["trtllm"]["two-shot bytes"] == 2 * 8 * 256 * 2
    assert real["trtllm float32"]["two-shot bytes"] >= 2 * 8 * 256 * 4


def test_under_confidential_computing_the_real_package_allocates_nothing(real: dict[str, Any]) -> None:
    assert "multicast" in real["confidential"] and real["confidential allocations"] == 0
