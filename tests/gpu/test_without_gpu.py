"""What the GPU tests rest on, without a GPU: the runner of children, the payloads, the predictions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gpu import emulate
from gpu.cases import flush, with_payload
from gpu.children import ENVIRONMENT, run_child
from gpu.probes import written
from ringfence.runtime.watch.culprit import Finding
from ringfence.runtime.watch.folder import Origin
from ringfence.runtime.watch.journal import Journal
from ringfence.runtime.watch.report import Report


def kinds(*items: str, timeout: float = 60) -> list[str]:
    outcomes = run_child("gpu.fakes:answer", [{"do": item} for item in items], timeout)
    return [outcome["kind"] for outcome in outcomes]


def test_a_child_that_never_returns_is_killed() -> None:
    started = time.monotonic()
    assert kinds("return", "sleep", "return", timeout=5) == ["returned", "never returned", "not run"]
    assert time.monotonic() - started < 30


def test_of_a_killed_item_it_is_known_how_far_it_was() -> None:
    (outcome,) = run_child("gpu.fakes:answer", [{"do": "sleep"}], timeout=3)
    assert outcome["kind"] == "never returned" and outcome["round"] == 2


@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_child_that_dies_has_crashed(how: str) -> None:
    assert kinds("return", how, "return") == ["returned", "crashed", "not run"]


def test_a_stuck_item_ends_its_child() -> None:
    assert kinds("get stuck", "return") == ["returned", "not run"]


def test_children_may_not_use_multicast() -> None:
    assert ENVIRONMENT["NCCL_NVLS_ENABLE"] == "0"
    assert ENVIRONMENT["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert ENVIRONMENT["NVSHMEM_DISABLE_NVLS"] == "1"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert emulate.missing("0.6.13", "mnnvl") == "no CUDA device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(emulate.importlib.util, "find_spec", lambda name: None)
    assert "apache-tvm-ffi" in (emulate.missing("0.6.13", "mnnvl") or "")
    monkeypatch.setattr(emulate.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("RINGFENCE_KERNELS", raising=False)
    assert "RINGFENCE_KERNELS is not set" in (emulate.missing("0.6.13", "mnnvl") or "")
    monkeypatch.setenv("RINGFENCE_KERNELS", str(tmp_path))
    assert "--modules trtllm_comm" in (emulate.missing("0.6.18.post1", "trtllm") or "")
    (tmp_path / "0.6.13").mkdir()
    (tmp_path / "0.6.13" / "trtllm_mnnvl_comm.so").touch()
    assert emulate.missing("0.6.13", "mnnvl") is None


def looks_absent(x: torch.Tensor) -> bool:
    """FlashInfer before 0.6.12: some word is -0.0 when subnormals are flushed."""
    words = x.contiguous().view(torch.int32)
    return bool(((words < 0) & ((words >> 23) & 0xFF == 0)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_payloads_that_say_so_look_absent(dtype: torch.dtype) -> None:
    x = emulate.ordinary(torch.Generator().manual_seed(1), 2, 16, 1024).to(dtype)
    assert not looks_absent(with_payload(x.clone(), "ordinary", only_word=True))
    assert looks_absent(with_payload(x.clone(), "subnormal word", only_word=True))
    assert not looks_absent(with_payload(x.clone(), "subnormal word", only_word=False))
    assert looks_absent(with_payload(x.half(), "small activations", only_word=True))


@pytest.mark.parametrize("payload", ["subnormal word", "small activations"])
def test_what_was_cleaned_does_not_look_absent(payload: str) -> None:
    x = emulate.ordinary(torch.Generator().manual_seed(1), 2, 16, 1024).half()
    x = with_payload(x, payload, only_word=True)
    cleaned = flush(torch.float16)(x)
    assert looks_absent(x) and not looks_absent(cleaned)
    assert float((cleaned.float() - x.float()).abs().max()) < 2**-17


def test_a_journal_that_only_began_holds_no_probes_yet(tmp_path: Path) -> None:
    journals, paths = [Journal(rank) for rank in range(2)], [tmp_path / f"journal-rank{rank}.json" for rank in range(2)]
    assert written(paths) is None
    for journal in journals:
        journal.begin_file(tmp_path, Origin(str(journal.rank)))
    assert [path.exists() for path in paths] == [True, True] and written(paths) is None
    hang = Report("hang", 0, Finding((1,), (0,), "rank 1 did not come"))
    journals[0].dump(tmp_path, "hang", report=hang, probes={"words": [0]})
    journals[1].dump(tmp_path, "hang", report=hang, probes={})
    assert written(paths) is None, "the probes of a rank are written after the rest"
    journals[1].dump(tmp_path, "hang", report=hang, probes={"words": [1]})
    found = written(paths)
    assert found is not None and [value["probes"] for value in found] == [{"words": [0]}, {"words": [1]}]
