"""The adapter to FlashInfer, over modules that are made for the test: what is asked of them, and what reaches them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import kernels as contract
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.collectives.flashinfer import ChannelBackend, FlashInfer
from ringfence.runtime.collectives.kernels import WRAPPING_BUFFER, KernelMemory, Launched
from ringfence.runtime.errors import WorkspaceError
from ringfence.runtime.hazards.situation import Strategy
from support import run_threaded

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
NORM, SUM = Epilogue(True, RmsNorm(1e-5, 1.0)), Epilogue()

# -- the channel that handles travel over


def test_a_channel_is_a_comm_backend() -> None:
    store = dist.HashStore()

    def body(rank: int) -> list[Any]:
        backend = ChannelBackend(Channel(store, rank, 3, seconds=120))
        return [
            (backend.Get_rank(), backend.Get_size()),
            backend.allgather(f"handle {rank}"),
            backend.bcast(f"from {rank}", 2),
            backend.bcast(rank, root=0),
            backend.barrier(),
        ]

    handles = ("handle 0", "handle 1", "handle 2")
    assert run_threaded(3, body) == [[(rank, 3), handles, "from 2", 0, None] for rank in range(3)]


def test_a_workspace_of_part_of_a_group_is_refused() -> None:
    with pytest.raises(WorkspaceError, match="split the group"):
        ChannelBackend(Channel(dist.HashStore(), 0, 1)).Split(0, 0)


# -- what reaches the kernels


class Calls:
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.calls.append((arguments, named))


def tensors() -> list[torch.Tensor]:
    return [torch.zeros(4, 256) for _ in range(5)]


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.tensor
    monkeypatch.setattr(contract, "device_words", lambda pointer, words: torch.zeros(min(words, 9), dtype=torch.int32))
    monkeypatch.setattr(torch, "tensor", lambda data, dtype, device: real(data, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Allreduce(ModuleType):
    """``flashinfer.comm.allreduce``, with a workspace that says what it was asked for."""

    AllReduceFusionPattern = SimpleNamespace(kAllReduce=0, kARResidualRMSNorm=1)

    def __init__(self, confidential: bool = False) -> None:
        super().__init__("flashinfer.comm.allreduce")
        self.allreduce_fusion = Calls()
        self.asked = Calls()
        self.destroyed = 0
        self.is_confidential_compute = lambda: confidential

    def create_allreduce_fusion_workspace(self, **named: Any) -> Any:
        self.asked(**named)
        return SimpleNamespace(
            metadata={"control_flag_ptr": 64, "lamport_comm_size": 4096},
            ipc_handles=[[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]],
            destroy=lambda: setattr(self, "destroyed", self.destroyed + 1),
            buffer_size_bytes=4096,
            mc_ptr=1,
            uc_ptrs_dev=2,
            uc_ptr_local=3,
            buffer_flags=torch.zeros(9, dtype=torch.int32),
        )


def flashinfer(api: Allreduce, version: str = "0.6.18", **modules: Any) -> tuple[FlashInfer, Calls, Calls]:
    """The package, the released handles and the MNNVL kernel."""
    released, launch = Calls(), Calls()
    built = SimpleNamespace(trtllm_mnnvl_allreduce_fusion=launch)
    found = {
        "allreduce": api,
        "trtllm_ar": SimpleNamespace(trtllm_destroy_ipc_workspace_for_all_reduce_fusion=released),
        "trtllm_mnnvl_ar": SimpleNamespace(get_trtllm_mnnvl_comm_module=lambda: built),
        **modules,
    }
    return FlashInfer(version, {f"flashinfer.comm.{k}": m for k, m in found.items()}), released, launch


def one_rank() -> Channel:
    return Channel(dist.HashStore(), 0, 1, seconds=1)


def of_size(size: int) -> Channel:
    """A channel that nobody is asked over."""
    channel = Channel(dist.HashStore(), 0, size, seconds=0.1)
    channel.barrier = lambda topic: None  # type: ignore[method-assign]
    return channel


def test_what_a_trtllm_workspace_is_asked_for(no_device: None) -> None:
    api, channel, group = Allreduce(), of_size(4), object()
    trtllm.create(flashinfer(api)[0], channel, group, 64, 4096, torch.bfloat16)  # type: ignore[arg-type]
    ((_, asked),) = api.asked.calls
    backend = asked.pop("comm_backend")
    assert isinstance(backend, ChannelBackend) and backend._channel is channel
    assert asked == {
        "backend": "trtllm",
        "world_size": 4,
        "rank": 0,
        "max_token_num": 64,
        "hidden_dim": 4096,
        "dtype": torch.bfloat16,
        "group": group,
    }


@pytest.mark.parametrize(
    ("version", "ranks", "dtype", "tokens"),
    [
        ("0.6.18.post1", 2, torch.float32, 128),
        ("0.7.1", 2, torch.float32, 128),
        ("0.7.2.post1", 2, torch.float32, 64),
        ("0.6.18", 4, torch.float32, 64),
        ("0.6.18", 2, torch.float16, 64),
    ],
)
def test_two_shot_in_float32_has_room(
    no_device: None, version: str, ranks: int, dtype: torch.dtype, tokens: int
) -> None:
    api = Allreduce()
    trtllm.create(flashinfer(api, version)[0], of_size(ranks), None, 64, 4096, dtype)  # type: ignore[arg-type]
    ((_, asked),) = api.asked.calls
    assert asked["max_token_num"] == tokens
    element = 2 if version < "0.7.2" else dtype.itemsize
    assert ranks * asked["max_token_num"] * element >= 2 * 64 * dtype.itemsize, "two-shot writes this much"


def test_confidential_computing_would_go_through_torch_symmetric_memory(no_device: None) -> None:
    api = Allreduce(confidential=True)
    with pytest.raises(WorkspaceError, match="makes a multicast object"):
        trtllm.create(flashinfer(api)[0], of_size(2), None, 64, 4096, torch.bfloat16)  # type: ignore[arg-type]
    assert not api.asked.calls


@pytest.mark.parametrize("strategy", [ONE, TWO])
def test_what_reaches_trtllm(no_device: None, strategy: Strategy) -> None:
    api = Allreduce()
    kernels = trtllm.create(flashinfer(api)[0], one_rank(), None, 64, 256, torch.float32)  # type: ignore[arg-type]
    x, residual, norm, out, _ = tensors()
    weight = torch.ones(256)
    kernels.run(x, NORM, strategy, (residual, weight), norm, out)
    kernels.run(x, SUM, strategy, None, None, out)
    (fused, named), (plain, plain_named) = api.allreduce_fusion.calls
    assert fused[0] is x and fused[2] == 1 and plain[0] is x and plain[2] == 0 and len(fused) == len(plain) == 3
    assert fused[1] is plain[1] and fused[1].metadata["control_flag_ptr"] == 64
    for given in (named, plain_named):
        assert given.pop("launch_with_pdl") is False
        assert given.pop("trigger_completion_at_end") is True
        assert given.pop("fp32_acc") is True
        assert given.pop("use_oneshot") is (strategy is ONE)
    expected = {
        "output": norm,
        "residual_out": out,
        "norm_out": norm,
        "residual_in": residual,
        "rms_gamma": weight,
        "rms_eps": 1e-5,
        "weight_bias": 1.0,
    }
    assert named.keys() == expected.keys() and all(named[key] is value for key, value in expected.items())
    assert plain_named.keys() == {"output"} and plain_named["output"] is out


def test_a_closed_trtllm_workspace_gives_its_memory_back_and_serves_nothing(no_device: None) -> None:
    api = Allreduce()
    package, released, _ = flashinfer(api)
    kernels = trtllm.create(package, one_rank(), None, 64, 256, torch.float32)  # type: ignore[arg-type]
    assert kernels.memory.buffer_bytes == 4096 and kernels.control_words() == (0,) * 5
    kernels.close()
    kernels.close()
    assert api.destroyed == 1 and [given[0][0] for (given, _) in released.calls] == [[10, 11, 12, 13]]
    x, residual, norm, out, weight = tensors()
    with pytest.raises(WorkspaceError, match="closed"):
        kernels.run(x, NORM, ONE, (residual, weight), norm, out)
    with pytest.raises(WorkspaceError, match="closed"):
        kernels.run(x, SUM, ONE, None, None, out)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_a_probe_finds_the_memory_of_trtllm(no_device: None, rank: int, dtype: torch.dtype) -> None:
    channel = of_size(4)
    channel.rank = rank
    kernels = trtllm.create(flashinfer(Allreduce())[0], channel, None, 64, 256, dtype)  # type: ignore[arg-type]
    assert kernels.memory == KernelMemory(
        trtllm.LAYOUT,
        rank,
        4,
        words=64,
        lamport=30 + rank,
        buffer_bytes=4096,
        element=dtype.itemsize,
        keeps_own=True,
        flags=20 + rank,
    )
    x, residual, norm, out = (torch.zeros(4, 256, dtype=dtype) for _ in range(4))
    kernels.run(x, NORM, ONE, (residual, torch.ones(256)), norm, out)
    kernels.run(x[:3], SUM, TWO, None, None, out)
    row = 256 * dtype.itemsize
    assert kernels.memory.calls == {Launched(ONE, 4, row), Launched(TWO, 3, row)}


@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_probe_finds_the_memory_of_mnnvl(no_device: None, rank: int) -> None:
    Memory.asked = Calls()
    package, *_ = flashinfer(Allreduce(), mnnvl=SimpleNamespace(SymmDeviceMemory=Memory))
    channel = of_size(2)
    channel.rank = rank
    peer = mnnvl.create_peer(package, channel, None, 33, 264, torch.float16)
    words = peer._pointers[3]  # type: ignore[attr-defined]
    size = peer.memory.buffer_bytes
    assert words.tolist() == [0, 2, size, *[0] * 6]
    assert peer.memory == KernelMemory(
        mnnvl.LAYOUT,
        rank,
        2,
        words=words.data_ptr(),
        lamport=1000 + rank,
        buffer_bytes=size,
        element=4,
        keeps_own=False,
    )
    multicast = mnnvl.create_multicast(package, channel, None, 64, 4096, torch.bfloat16)
    assert (multicast.memory.lamport, multicast.memory.buffer_bytes, multicast.memory.keeps_own) == (3, 4096, True)
    x, residual, norm, out = (torch.zeros(4, 256, dtype=torch.float16) for _ in range(4))
    multicast.run(x, NORM, TWO, (residual, torch.ones(256)), norm, out)
    multicast.run(x[:3], SUM, ONE, None, None, out)
    assert multicast.memory.calls == {Launched(TWO, 4, 512), Launched(ONE, 3, 512)}


class Memory:
    """``SymmDeviceMemory``: rank r's part is at 1000 + r."""

    asked = Calls()

    def __init__(self, **named: Any) -> None:
        Memory.asked.calls.append(((), named))

    def get_buffer_ptrs_host(self) -> list[int]:
        return [1000, 1001]

    def get_buffer_ptrs_dev(self) -> int:
        return 77


@pytest.mark.parametrize("rank", [0, 1])
def test_mnnvl_of_two_ranks_stores_to_the_peer(no_device: None, rank: int) -> None:
    Memory.asked = Calls()
    package, _, launch = flashinfer(Allreduce(), mnnvl=SimpleNamespace(SymmDeviceMemory=Memory))
    channel = of_size(2)
    channel.rank = rank
    kernels = mnnvl.create_peer(package, channel, None, 33, 264, torch.float16)
    ((_, asked),) = Memory.asked.calls
    assert isinstance(asked.pop("comm_backend_for_handle_transfer"), ChannelBackend)
    size = 2 * 33 * 264 * 2
    size += -size % 32
    assert asked == {
        "buf_size": 3 * size,
        "group_size": 2,
        "group_rank": rank,
        "device_idx": 0,
        "enable_multicast": False,
        "allocate_signal_pads": False,
    }
    assert kernels.memory.buffer_bytes == size and kernels.strategies == (ONE,)
    assert kernels.control_words() == (0, 2, size, 0, 0, 0, 0, 0, 0)
    x, residual, norm, out, weight = tensors()
    kernels.run(x, NORM, ONE, (residual, weight), norm, out)
    kernels.run(x, SUM, ONE, None, None, out)
    (fused, none), (plain, none_either) = launch.calls
    assert none == none_either == {}
    for given in (fused, plain):
        assert given[0] is x and given[1:4] == (1001 - rank, 77, 1000 + rank), "the peer, the table, this rank"
        assert given[5:7] == (2, rank)
        assert given[8:10] == (True, True), "PDL for a small message, one-shot"
    assert fused[7] is True and plain[7] is False, "with a norm, and without"
    assert all(a is b for a, b in zip(fused[10:], (norm, out, residual, weight, 1e-5, 1.0), strict=True))
    assert plain[10] is out and plain[11:] == (None,) * 5
    for tokens, pdl in ((64, True), (65, False)):  # up to 1 MiB
        kernels.run(torch.empty(tokens, 8192, dtype=torch.bfloat16), SUM, ONE, None, None, out)
        assert launch.calls[-1][0][8] is pdl
    kernels.close()
    with pytest.raises(WorkspaceError, match="closed"):
        kernels.run(x, SUM, ONE, None, None, out)


def test_mnnvl_over_multicast_uses_the_pointers_of_its_workspace(no_device: None) -> None:
    api = Allreduce()
    package, _, launch = flashinfer(api)
    kernels = mnnvl.create_multicast(package, of_size(4), None, 64, 4096, torch.bfloat16)
    ((_, asked),) = api.asked.calls
    assert asked["backend"] == "mnnvl" and asked["force_oneshot_support"] is True and asked["world_size"] == 4
    assert isinstance(asked["comm_backend"], ChannelBackend) and "group" not in asked
    x, residual, norm, out, weight = tensors()
    kernels.run(x, NORM, TWO, (residual, weight), norm, out)
    ((given, _),) = launch.calls
    assert given[1:4] == (1, 2, 3) and given[5:10] == (4, 0, True, False, False)
    kernels.close()
    assert api.destroyed == 1


@pytest.mark.parametrize(("tokens", "pdl"), [(1, True), (1024, True), (1025, False)])
def test_mnnvl_is_launched_early_for_small_messages_alone(no_device: None, tokens: int, pdl: bool) -> None:
    package, _, launch = flashinfer(Allreduce(), mnnvl=SimpleNamespace(SymmDeviceMemory=Memory))
    kernels = mnnvl.create_peer(package, of_size(2), None, 2048, 256, torch.float32)
    x, residual, norm, out = (torch.zeros(tokens, 256) for _ in range(4))
    kernels.run(x, NORM, ONE, (residual, torch.ones(256)), norm, out)
    kernels.run(x, SUM, ONE, None, None, out)
    assert [given[8] for given, _ in launch.calls] == [pdl, pdl]


def test_lamport_buffers_of_an_odd_size_are_refused(no_device: None) -> None:
    api = Allreduce()
    create = api.create_allreduce_fusion_workspace
    api.create_allreduce_fusion_workspace = lambda **n: SimpleNamespace(  # type: ignore[method-assign]
        **vars(create(**n)) | {"buffer_size_bytes": 4096 + 16}
    )
    with pytest.raises(WorkspaceError, match=r"4112 bytes .hazard M7"):
        mnnvl.create_multicast(flashinfer(api)[0], of_size(4), None, 64, 4096, torch.bfloat16)


def test_four_ranks_have_no_single_peer() -> None:
    Memory.asked = Calls()
    package, *_ = flashinfer(Allreduce(), mnnvl=SimpleNamespace(SymmDeviceMemory=Memory))
    with pytest.raises(WorkspaceError, match="serves two ranks, not 4"):
        mnnvl.create_peer(package, of_size(4), None, 64, 4096, torch.bfloat16)
    assert not Memory.asked.calls


@pytest.mark.parametrize("make", [trtllm.create, mnnvl.create_peer, mnnvl.create_multicast])
def test_no_memory_is_asked_for_where_the_buffer_is_too_large(no_device: None, make: Callable[..., Any]) -> None:
    Memory.asked, api = Calls(), Allreduce()
    package, *_ = flashinfer(api, mnnvl=SimpleNamespace(SymmDeviceMemory=Memory))
    tokens = WRAPPING_BUFFER // (2 * 4096 * 2)
    with pytest.raises(WorkspaceError, match="1 GiB or more"):
        make(package, of_size(2), None, tokens, 4096, torch.bfloat16)
    assert not api.asked.calls and not Memory.asked.calls
    make(package, of_size(2), None, tokens - 1, 4096, torch.bfloat16)


def test_the_adapter_implements_what_it_declares() -> None:
    for kernels in (trtllm.Trtllm, mnnvl.Mnnvl):
        for name in ("run", "control_words", "close"):
            declared = inspect.signature(getattr(contract.Kernels, name)).parameters
            assert list(inspect.signature(getattr(kernels, name)).parameters) == list(declared)
