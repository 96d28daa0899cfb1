"""The adapter of ringfence's own kernels, without a device: where it fits, its memory, its arguments and its errors."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_driver import FakeChannel, FakeDriver
from fake_flashinfer import FACTS

from ringfence.assign import wanted_by
from ringfence.options import Options
from ringfence.runtime.collectives import nvrtc
from ringfence.runtime.collectives.choice import choose
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.collectives.forms import GRANULE, Form, granules_of_token
from ringfence.runtime.collectives.kernels import KernelCall
from ringfence.runtime.collectives.links import Topology
from ringfence.runtime.collectives.lost import Lost
from ringfence.runtime.collectives.peer_memory import share
from ringfence.runtime.collectives.ringfence import (
    IMPLEMENTATION,
    MOST_BLOCKS,
    Functions,
    RankMemory,
    RingfenceKernels,
    blocks_of_token,
    buffer_bytes,
)
from ringfence.runtime.errors import CollectiveUnavailableError, HangError, PoisonedError, WorkspaceError
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.watch.supervision import Supervision
from ringfence.runtime.watch.supervisor import Supervisor

ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
FUSED = Epilogue(True, RmsNorm(1e-5, 1.0))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RingfenceKernels:
    monkeypatch.setattr(nvrtc, "cubin", lambda source, capability, folder: source.encode())
    monkeypatch.setattr("ringfence.runtime.collectives.ringfence.current_stream", lambda device: 77)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    begun, received = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    broken = torch.zeros(1, dtype=torch.int32)
    host = torch.zeros(16, dtype=torch.int64)
    memory = RankMemory(0, 1, 4096, (8192, 12288), 1 << 20, begun, received, broken, host)
    return RingfenceKernels(Functions(FakeDriver(), (9, 0)), memory)  # type: ignore[arg-type]


def launched(kernels: RingfenceKernels) -> list[Any]:
    return kernels._functions.driver.launched  # type: ignore[attr-defined]


def test_a_call_is_launched_with_everything_that_the_kernel_reads(kernels: RingfenceKernels) -> None:
    x = torch.zeros(80, 2048, dtype=torch.bfloat16)
    residual, norm, out = (torch.zeros_like(x) for _ in range(3))
    weight = torch.zeros(2048, dtype=torch.bfloat16)
    kernels.run(x, FUSED, ONE, (residual, weight), norm, out)
    ((blocks, threads, call, dependent),) = launched(kernels)
    assert (blocks, threads, dependent) == (80, 320, True)
    given = [call.input, call.residual, call.weight, call.norm, call.out]
    assert given == [t.data_ptr() for t in (x, residual, weight, norm, out)]
    assert (call.inbox, call.peers[0], call.peers[1], call.peers[2]) == (4096, 8192, 12288, 0)
    assert (call.tokens, call.rank, call.buffer_bytes) == (80, 1, 1 << 20)
    assert (call.begun, call.received) == tuple(
        t.data_ptr() for t in (kernels.rank_memory.begun, kernels.rank_memory.received)
    )
    assert (round(call.eps, 7), call.weight_bias) == (1e-5, 1.0)
    assert call.report - call.bound == 64
    kernels.run(x[:2], Epilogue(), TWO, None, None, out[:2])
    blocks, _, call, _ = launched(kernels)[1]
    assert (blocks, call.tokens, call.residual, call.weight, call.norm) == (8, 2, 0, 0, 0)
    older = RingfenceKernels(dataclasses.replace(kernels._functions, capability=(8, 0)), kernels.rank_memory)
    older.run(x[:2], Epilogue(norm=RmsNorm(1e-5)), ONE, (None, weight), norm[:2], out[:2])
    _, _, call, dependent = launched(kernels)[2]
    assert (call.residual, call.weight, round(call.eps, 7), dependent) == (0, weight.data_ptr(), 1e-5, False)


def test_a_grid_never_has_more_blocks_than_a_call_has_shares(kernels: RingfenceKernels) -> None:
    x = torch.zeros(1020, 64, dtype=torch.float32)
    assert f"constexpr u32 SHARES = {MOST_BLOCKS};" in kernels.form(x, Epilogue(), ONE).source
    kernels.run(x, Epilogue(), ONE, None, None, torch.zeros_like(x))
    assert launched(kernels)[0][0] == 1020 <= MOST_BLOCKS
    kernels.run(x, Epilogue(), ONE, None, None, torch.zeros_like(x), most_blocks=9, blocks=2)
    assert launched(kernels)[1][0] == 8


def test_before_clusters_a_token_has_one_block() -> None:
    assert [blocks_of_token(n, 16384, (9, 0)) for n in (1, 16, 17, 65)] == [4, 4, 2, 1]
    assert blocks_of_token(1, 480, (9, 0)) == 1 and blocks_of_token(1, 16384, (8, 0)) == 1


def test_the_warps_of_a_block_have_as_many_rounds_each() -> None:
    form = Form(ONE, torch.bfloat16, 2, 32000, True, True, True, blocks=2)  # 34 granules a block, and 31 warps at most
    assert (form.rounds, form.warps, form.threads) == (2, 17, 576)


@pytest.mark.parametrize(
    ("capability", "blocks", "epilogue", "why"),
    [
        ((8, 0), 2, FUSED, r"blocks=2: blocks share a norm from SM90 on, and this device is SM80; leave blocks out"),
        ((9, 0), 9, FUSED, "blocks=9: 1 to 8 blocks can share a token of a norm"),
        ((9, 0), 0, FUSED, "blocks=0: 1 to 8"),
        ((9, 0), -1, Epilogue(), "blocks=-1: 1 to 1024 blocks can share a token without a norm"),
        ((9, 0), 1025, Epilogue(), "blocks=1025: 1 to 1024"),  # more than a call has shares
    ],
)
def test_blocks_that_cannot_share_a_token_are_refused(
    kernels: RingfenceKernels, capability: tuple[int, int], blocks: int, epilogue: Epilogue, why: str
) -> None:
    kernels = RingfenceKernels(dataclasses.replace(kernels._functions, capability=capability), kernels.rank_memory)
    x = torch.zeros(2, 2048, dtype=torch.bfloat16)
    with pytest.raises(WorkspaceError, match=why):
        kernels.run(x, epilogue, ONE, (x, x[0]), torch.zeros_like(x), torch.zeros_like(x), blocks=blocks)
    assert launched(kernels) == []
    kernels.run(x, Epilogue(), ONE, None, None, torch.zeros_like(x), blocks=2)
    assert launched(kernels)[0][0] == 4


@pytest.mark.parametrize(
    "row", [(64, torch.float32), (2880, torch.float16), (4096, torch.bfloat16), (16384, torch.float32)]
)
@pytest.mark.parametrize("epilogue", [FUSED, Epilogue()])
def test_the_counts_at_which_the_kernel_changes_are_known_to_the_self_test(
    kernels: RingfenceKernels, row: tuple[int, torch.dtype], epilogue: Epilogue
) -> None:
    def form(tokens: int) -> Form:
        return kernels.form(torch.empty(tokens, row[0], dtype=row[1], device="meta"), epilogue, ONE)

    assert IMPLEMENTATION.changes_at == (17, 65, 129)
    tried = (1, *IMPLEMENTATION.changes_at)
    for tokens in range(1, 400):
        assert form(tokens) == form(max(n for n in tried if n <= tokens))
    if row[0] == 4096:
        assert len({form(n) for n in tried}) == 4


def test_a_report_becomes_an_error_that_names_the_ranks(kernels: RingfenceKernels) -> None:
    x = torch.zeros(2, 64, dtype=torch.float32)
    kernels.check()
    words = (ctypes.c_uint * 8).from_address(kernels.rank_memory.host.data_ptr() + 64)
    words[:] = [1, 5, 1, 7, 2, 1, 0b101, 0]
    with pytest.raises(
        HangError, match=r"rank 1 waited in vain for the part of ranks 0, 2 .*token 7.*NaN: start all ranks.*_wait_sec"
    ) as caught:
        kernels.run(x, Epilogue(), ONE, None, None, torch.zeros_like(x))
    assert caught.value.ranks == (0, 2) and launched(kernels) == []
    assert kernels.rank_memory.lost() == Lost((1 << 32) + 5, 7, 2, 1, (0, 2), False, False)
    named = dataclasses.replace(kernels.rank_memory, names=(4, 6, 9))
    assert "rank 6 waited in vain for the part of ranks 4, 9" in str(named.lost()) and named.lost().source == 9
    words[:] = [1, 5, 0, 7, 0, 1, 0b100, 2]
    assert "rank 1 heard from rank 0 that it had waited in vain for rank 2" in str(kernels.rank_memory.lost())
    words[4] = 2  # the one that was late tells what it was told
    assert "rank 1 heard from rank 2 that others had waited in vain for rank 2" in str(kernels.rank_memory.lost())


def test_a_step_does_not_begin_where_a_kernel_has_given_up(kernels: RingfenceKernels) -> None:
    """What was captured runs no line of the adapter, so the runner asks before each call."""
    supervisor, workspaces = Supervisor(), mock.Mock(check_kernels=kernels.check)
    supervisor.waits.add("0", workspaces, 5.0)
    supervision = Supervision(supervisor)
    supervision.check()
    words = (ctypes.c_uint * 8).from_address(kernels.rank_memory.host.data_ptr() + 64)
    words[:] = [1, 3, 0, 0, 0, 1, 1, 0]
    with pytest.raises(HangError, match="rank 1 waited in vain for the part of rank 0"):
        supervision.check()
    with pytest.raises(PoisonedError, match="rank 1 waited in vain for the part of rank 0") as caught:
        supervisor.check()
    assert caught.value.ranks == (0,)


def test_the_option_is_asked_of_the_kernels() -> None:
    for given, seconds in (({}, 30.0), ({"step_seconds": 10}, 5.0), ({"kernel_wait_seconds": 3.0}, 3.0)):
        assert wanted_by(Options.parse(given), 64, torch.bfloat16, ()).wait_seconds == seconds


def test_a_wait_is_as_long_as_was_said_last(kernels: RingfenceKernels) -> None:
    kernels.wait_for(2.5)
    assert int(kernels.rank_memory.host[0]) == 2_500_000_000


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_an_inbox_holds_what_its_workspace_is_made_for(world_size: int) -> None:
    for row_bytes in (2048, 5760, 16384):
        size = buffer_bytes(world_size, 64, row_bytes)
        for strategy in (ONE, TWO):
            assert 64 * granules_of_token(strategy, row_bytes, world_size) * GRANULE <= size
    assert buffer_bytes(8, 4096, 65536) < 4096 * granules_of_token(ONE, 65536, 8) * GRANULE, "two-shot's size"


def test_a_call_beyond_the_inbox_is_not_served(kernels: RingfenceKernels) -> None:
    call = KernelCall(16, 4096, torch.bfloat16, 3, ONE)
    assert kernels.holds(call) and not kernels.holds(dataclasses.replace(call, tokens=200))
    tiny = KernelCall(1000, 8, torch.bfloat16, 3, ONE)
    x = torch.zeros(200, 4096, dtype=torch.bfloat16)
    with pytest.raises(WorkspaceError, match=r"\[200, 4096\].*one-shot does not fit .*max_tokens"):
        kernels.run(x, Epilogue(), ONE, None, None, torch.zeros_like(x))
    assert launched(kernels) == []
    exact = dataclasses.replace(kernels.rank_memory, buffer_bytes=1000 * 2 * GRANULE)
    assert RingfenceKernels(kernels._functions, exact).holds(tiny)
    assert tiny.size < call.size and kernels.holds(tiny) is (1000 * 2 * GRANULE <= 1 << 20)


def test_memory_is_given_back_once_and_after_it_was_closed_everywhere(kernels: RingfenceKernels) -> None:
    driver = FakeDriver()
    inbox, peers, release = share(driver, FakeChannel(), 512)  # type: ignore[arg-type]
    assert inbox == 4096 and peers == (8192, 8193)
    closing = RingfenceKernels(kernels._functions, kernels.rank_memory, release)
    closing.load([(KernelCall(1, 64, torch.float32, 3, ONE), Epilogue())])
    closing.close()
    closing.close()
    assert driver.freed == [4096] and driver.open_memory == []
    assert len(kernels._functions.driver.unloaded) == 1  # type: ignore[attr-defined]
    with pytest.raises(WorkspaceError, match="closed; compile the model"):
        closing.run(torch.zeros(1, 64), Epilogue(), ONE, None, None, torch.zeros(1, 64))


@pytest.mark.parametrize(
    ("change", "ranks", "says"),
    [
        ({"capability": (7, 5)}, 2, "written for SM80, SM90, SM100, SM120, and these are SM75"),
        ({"peers": False}, 2, "cannot address the memory of another"),
        ({}, 9, "2 to 8 ranks, not 9"),
    ],
)
def test_where_it_does_not_fit_it_says_why(change: dict[str, Any], ranks: int, says: str) -> None:
    facts = [dataclasses.replace(FACTS, **change)] * ranks
    assert says in str(IMPLEMENTATION.fits(facts))


def test_it_is_passed_over_on_all_ranks_where_one_cannot_compile() -> None:
    without = dataclasses.replace(FACTS, rank=1, nvrtc_missing="NVRTC cannot be loaded; pip install nvidia-cuda-nvrtc")
    why = IMPLEMENTATION.fits([FACTS, without])
    assert why is not None and "rank 1 cannot: NVRTC cannot be loaded; pip install" in why
    assert choose([FACTS, without]).collective != "ringfence"


def test_calls_are_compiled_ahead_and_each_form_once(
    kernels: RingfenceKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nvrtc, "cubin", lambda source, *_: compiled.append(source) or source.encode())
    calls = [KernelCall(n, 2048, torch.bfloat16, 3, s) for n in (4, 8, 17) for s in (ONE, TWO)]
    IMPLEMENTATION.load(kernels, [(call, FUSED) for call in calls])
    assert len(compiled) == len(set(compiled)) == 4
    x, weight = torch.zeros(8, 2048, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.bfloat16)
    kernels.run(x, FUSED, ONE, (x, weight), torch.zeros_like(x), torch.zeros_like(x))
    assert len(compiled) == 4 and len(launched(kernels)) == 1


@pytest.mark.parametrize("topology", list(Topology))
def test_it_needs_nvlink_between_all_pairs(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.runtime.collectives.ringfence.topology_of", lambda ranks: topology)
    monkeypatch.setattr("ringfence.runtime.collectives.ringfence.linked", lambda ranks: topology.meaning)
    why = IMPLEMENTATION.fits([FACTS] * 2)
    if topology in (Topology.NVSWITCH, Topology.NVLINK):
        assert why is None
        assert choose([FACTS] * 2, wanted="ringfence").implementation is IMPLEMENTATION
    else:
        assert why is not None and topology.meaning in why
        with pytest.raises(CollectiveUnavailableError, match="NVLink alone"):
            choose([FACTS] * 2, wanted="ringfence")


def test_auto_takes_it_where_a_row_was_measured_and_needs_no_flashinfer() -> None:
    alone = dataclasses.replace(FACTS, flashinfer=None, flashinfer_missing="no")
    assert choose([alone] * 2).collective == "ringfence"
    assert choose([alone] * 4).collective == "ringfence"
    assert choose([alone] * 8).collective == "reference"


@pytest.mark.parametrize(
    ("call", "unmet"),
    [
        (KernelCall(1, 2048, torch.bfloat16, 2, ONE), None),
        (KernelCall(1, 2044, torch.bfloat16, 2, ONE), "row_bytes"),
        (KernelCall(1, 32768, torch.bfloat16, 2, ONE), None),
        (KernelCall(1, 32776, torch.bfloat16, 2, ONE), "row_bytes"),
        (KernelCall(1, 2048, torch.float64, 2, ONE), "dtype"),
        (KernelCall(1, 8, torch.bfloat16, 2, ONE), None),
        (KernelCall(1, 1680, torch.bfloat16, 8, TWO), "two_shot_row"),
        (KernelCall(1, 1688, torch.bfloat16, 8, TWO), None),
    ],
)
def test_what_a_call_must_look_like(call: KernelCall, unmet: str | None) -> None:
    found = IMPLEMENTATION.unmet(call)
    assert (found.id if found else None) == unmet
