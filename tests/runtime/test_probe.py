"""The probe over a device made for the test: host memory, and copies that are complete when the test says so."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import FakeFlashInfer, FakeKernels
from fake_flashinfer import memory as make_memory
from torch import Tensor
from watchdogs import Clock

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives import probe as module
from ringfence.runtime.collectives.kernels import KernelMemory, Launched
from ringfence.runtime.collectives.probe import GroupProbe, make_probe
from ringfence.runtime.collectives.size_table import SizeRow
from ringfence.runtime.collectives.workspace import Workspace, Workspaces, workspaces_of
from ringfence.runtime.hazards.situation import Collective, Strategy
from support import HostDevice, run_threaded

ONE = Strategy.ONE_SHOT
TRTLLM, MNNVL = Collective.TRTLLM, Collective.MNNVL
ROW = 1024


class Held:
    """A workspace of rank 0 of two in host memory."""

    def __init__(self, found: Workspaces, collective: Collective, tokens: int = 4) -> None:
        size = 8 * tokens * ROW
        self.words = torch.tensor(
            [1, 0, size, 1, 0, 0, 0, 0, 3] if collective is MNNVL else [3, 0, 1, size, 0], dtype=torch.int32
        )
        self.buffers = torch.full((3, size // 4), -(2**31), dtype=torch.int32)
        memory = make_memory(
            collective,
            words=self.words.data_ptr(),
            lamport=self.buffers.data_ptr(),
            buffer_bytes=size,
            element=4,
            keeps_own=collective is TRTLLM,
            calls={Launched(ONE, tokens, ROW)},
        )
        kernels = FakeKernels(FakeFlashInfer("tp"), "tp", (ONE,), str(collective))
        kernels.memory = memory
        kernels.kept = (self.words, self.buffers)  # type: ignore[attr-defined]
        row = SizeRow(collective, "peer", (9, 0), 2, size, size, 0, "a test")
        dtypes = (torch.float32,)
        one = mnnvl.PEER if collective is Collective.MNNVL else trtllm.IMPLEMENTATION
        self.workspace = Workspace(one, row, kernels, torch.device("cpu"), 2, size, dtypes)
        channel = Channel(dist.HashStore(), 0, 1, seconds=5)
        found.create(channel, lambda: self.workspace, collective, "peer")

    def rows(self, *rows: int) -> None:
        """Arrive in buffer 1, which the words name."""
        for row in rows:
            self.buffers[1, row * ROW // 4 : (row + 1) * ROW // 4] = 0


@pytest.fixture
def found(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Workspaces:
    made = Workspaces()
    monkeypatch.setattr(module, "workspaces_of", lambda name: made)
    monkeypatch.setattr(module, "ranks_of", lambda name: (2, 5))
    return made


def test_what_open_workspaces_hold(found: Workspaces) -> None:
    Held(found, MNNVL).rows(1, 3)
    Held(found, TRTLLM).rows(0, 1, 2, 3)
    device = HostDevice(slow=2)
    value = GroupProbe("tp", device)()
    assert json.loads(json.dumps(value)) == value
    first, second = value
    assert (first["collective"], first["transport"]) == ("mnnvl", "peer")
    assert first["words"] == {
        "buffer": 1,
        "dirty_buffer": 0,
        "buffer_bytes": 32 * ROW,
        "dirty_stages": 1,
        "clear_bytes_0": 0,
        "clear_bytes_1": 0,
        "clear_bytes_2": 0,
        "clear_bytes_3": 0,
        "arrived_blocks": 3,
    }
    assert first["says"] == "a call waits: the first 2 tokens of rank 5 have arrived"
    assert first["readings"][0]["from"]["5"] == {"rows": 2, "up_to": 2, "first_sentinel_word": 5 * ROW // 4}
    assert second["says"] == "a call waits: nothing has arrived from rank 5" and second["silent"] == [5]
    assert second["words"] == {
        "arrived_blocks": 3,
        "two_shot_flag": 0,
        "buffer": 1,
        "buffer_bytes": 32 * ROW,
        "clear_elements": 0,
    }
    assert first["read_bytes"] == first["used_bytes"] == 8 * ROW and "late" not in first
    assert device.copies == 2 * (1 + 4), "the words, and a buffer in pieces of the staging memory"


def test_a_device_that_never_answers(found: Workspaces, clock: Clock) -> None:
    Held(found, MNNVL), Held(found, TRTLLM)
    device = HostDevice(slow=None)
    probe = GroupProbe("tp", device, seconds=0.1)
    for _ in range(2):
        began = clock.monotonic()
        value = probe()
        assert clock.monotonic() - began < 0.3
        assert [v["says"] for v in value] == ["the device did not answer within 0.1 s"] * 2
    assert device.copies == 1, "nothing is begun while a copy may still write"
    device.slow = 0  # it was slow
    assert [v["says"] for v in probe()] == [
        "a call waits: nothing has arrived from rank 5",
        "a call of this rank runs in it, and what has arrived fits no shape that was launched",
    ]


def test_a_device_that_stops_in_the_middle(found: Workspaces) -> None:
    Held(found, MNNVL).rows(0, 1, 2, 3)
    device = HostDevice()
    complete = device.done

    def done() -> bool:
        return device.copies < 3 and complete()

    device.done = done  # type: ignore[method-assign]
    (value,) = GroupProbe("tp", device, seconds=0.1)()
    assert (value["read_bytes"], value["used_bytes"], value["late"]) == (2048, 8 * ROW, True)
    assert value["says"] == "a call waits: the first 1 tokens of rank 5 have arrived"


def test_what_is_read_has_a_limit(found: Workspaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 4096)
    Held(found, TRTLLM, tokens=4).rows(0, 1, 2, 3)
    (value,) = GroupProbe("tp", HostDevice())()
    assert (value["read_bytes"], value["used_bytes"]) == (4096, 8 * ROW)
    assert value["silent"] == [], "of rank 5 nothing was read"


def test_closed_and_broken_workspaces_are_texts(found: Workspaces, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, broken, fine = Held(found, MNNVL), Held(found, MNNVL), Held(found, MNNVL)
    closed.workspace.closed = True  # a moment before it leaves the list
    closed.workspace.kernels.memory = None  # type: ignore[assignment]
    object.__setattr__(broken.workspace.kernels.memory, "layout", None)
    fine.rows(1, 3, 5)
    said = [v["says"] for v in GroupProbe("tp", HostDevice())()]
    assert said[0] == "the workspace was closed" and said[1].startswith("AttributeError: 'NoneType' object has no")
    assert said[2] == "a call waits: the first 3 tokens of rank 5 have arrived"
    found.close()
    assert GroupProbe("tp", HostDevice())() == "no workspace is open"


def test_an_error_of_the_device_is_a_text(found: Workspaces) -> None:
    Held(found, MNNVL)

    class Broken(HostDevice):
        def copy(self, address: int, size: int) -> None:
            raise RuntimeError("cudaMemcpyAsync returned CUDA error 700")

    (value,) = GroupProbe("tp", Broken())()
    assert value["says"] == "RuntimeError: cudaMemcpyAsync returned CUDA error 700"


def test_words_that_point_nowhere_are_not_followed(found: Workspaces) -> None:
    held = Held(found, MNNVL)
    held.words[0] = 1 << 20
    device = HostDevice()
    (value,) = GroupProbe("tp", device)()
    assert value["says"].startswith("the word 'buffer' is 1048576") and device.copies == 1


def test_two_threads_do_not_share_the_staging_memory(found: Workspaces, clock: Clock) -> None:
    Held(found, MNNVL)
    probe = GroupProbe("tp", HostDevice(slow=None), seconds=0.3)
    seen: list[Any] = []
    threads = [clock.spawn(lambda s=s: (clock.sleep(s), seen.append(probe()))) for s in (0, 0.1, 0.1)]  # type: ignore[misc]
    for thread in threads:
        thread.join()
    assert len(seen) == 3 and seen.count("another probe of this group has not ended") == 2


def test_flags_are_read_where_there_are_any(found: Workspaces) -> None:
    held = Held(found, TRTLLM)
    flags: Tensor = torch.tensor([1, 0], dtype=torch.int32).repeat(256)
    old: KernelMemory = held.workspace.kernels.memory
    fields = {name: getattr(old, name) for name in old.__dataclass_fields__}
    held.workspace.kernels.memory = KernelMemory(**fields | {"flags": flags.data_ptr()})
    (value,) = GroupProbe("tp", HostDevice())()
    assert value["barriers"] == {"2": [1], "5": [0]} and value["silent"] == [5]


def test_without_a_cuda_runtime_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", gone)
    assert make_probe("tp", torch.device("cuda", 0))().startswith("the probe could not be made: OSError: libcudart.so.")


def test_workspaces_are_those_of_the_group_at_that_time() -> None:
    def body(rank: int) -> Any:
        name = dist.group.WORLD.group_name
        probe = GroupProbe(name, HostDevice())
        before = probe()
        Held(workspaces_of(name), MNNVL)
        return before, probe()[0]["silent"]

    assert run_threaded(2, body) == [("no workspace is open", [1])] * 2


# -- the calls of the CUDA runtime


class Runtime:
    """libcudart, written down. Addresses and sizes must not be cut to 32 bits."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            values = [getattr(a, "value", "a reference") for a in arguments]
            assert not any(isinstance(a, int) for a in arguments), "ctypes would pass 32 bits"
            if name.endswith("WithFlags"):
                arguments[0]._obj.value = 0x5000 if "Stream" in name else 0xE000
            self.calls.append((name, *values))
            return self.answers.get(name, 0)

        return call


def test_what_the_cuda_runtime_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, empty, pinned = Runtime(), torch.empty, []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())

    def unpinned(count: int, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        pinned.append(pin_memory)
        return empty(count, dtype=dtype)

    monkeypatch.setattr(torch, "empty", unpinned)
    device = module.CudaReader(torch.device("cuda", 3))
    assert pinned == [True] and device.staging.numel() * 4 == module.STAGING
    assert [c[0] for c in runtime.calls] == ["cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"]
    assert runtime.calls[0][2] == 1 and runtime.calls[1][2] == 2, "non-blocking; without timing"
    runtime.calls.clear()
    device.copy(0x7F00_0000_1000, 4096)
    assert runtime.calls == [
        ("cudaSetDevice", 3),
        ("cudaMemcpyAsync", device.staging.data_ptr(), 0x7F00_0000_1000, 4096, 2, 0x5000),
        ("cudaEventRecord", 0xE000, 0x5000),
    ]
    assert device.done()
    runtime.answers["cudaEventQuery"] = 600
    assert not device.done()
    runtime.answers["cudaEventQuery"] = 700
    with pytest.raises(RuntimeError, match="cudaEventQuery returned CUDA error 700"):
        device.done()
    del device
    assert [c[0] for c in runtime.calls[-2:]] == ["cudaEventDestroy", "cudaStreamDestroy"]
