"""Memory that ranks open of each other: all have it or none, and it is given back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_driver import FakeChannel, FakeDriver

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives.peer_memory import share
from ringfence.runtime.collectives.ringfence import RankMemory, buffer_bytes, create
from ringfence.runtime.collectives.workspace import Workspaces
from ringfence.runtime.errors import WorkspaceError


def test_memory_that_cannot_be_opened_is_given_back() -> None:
    driver = FakeDriver()
    driver.refuse = True
    with pytest.raises(WorkspaceError, match="cuIpcOpenMemHandle"):
        share(driver, FakeChannel(), 512)  # type: ignore[arg-type]
    assert driver.freed == [4096]


def test_a_rank_has_two_buffers_a_bound_and_an_empty_report(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, zeros = FakeDriver(), torch.zeros
    monkeypatch.setattr("ringfence.runtime.collectives.ringfence.Driver", lambda: driver)
    for name, value in (("current_device", 0), ("synchronize", None), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device=None, pin_memory=False: zeros(size, dtype=dtype))
    channel: Any = mock.Mock(wraps=FakeChannel(), rank=1, size=3, ranks=(4, 6, 9))
    made = create(channel, None, 8, 64, torch.float32)  # type: ignore[arg-type]
    memory = made.rank_memory
    assert driver.allocated == 2 * memory.buffer_bytes == 2 * buffer_bytes(3, 8, 256)
    assert (memory.rank, memory.inbox, memory.peers, memory.names) == (1, 4096, (8192, 8193), (4, 6, 9))
    assert int(memory.host[0]) == 30_000_000_000 and memory.lost() is None and made.control_words() == (0, 0, 0)
    made.close()
    assert driver.freed == [4096]


@pytest.mark.parametrize("fails", ["open", "handle", "make"])
def test_one_rank_that_fails_leaves_nothing_and_all_go_on(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the others have no workspace then, and the exchanges of the next collective are theirs alone."""
    store, here, drivers = dist.HashStore(), threading.local(), [FakeDriver(), FakeDriver()]
    words = torch.zeros(16, dtype=torch.int64)
    made = RankMemory(0, 0, 0, (), 512, words, words, words, words)

    def refuse(*_: object) -> Any:
        raise WorkspaceError("on this rank alone")

    def make(*given: Any) -> RankMemory:
        return refuse() if fails == "make" and given[1] == 1 else made

    if fails != "make":
        monkeypatch.setattr(drivers[1], fails, refuse)
    monkeypatch.setattr(RankMemory, "make", make)
    monkeypatch.setattr("ringfence.runtime.collectives.ringfence.Driver", lambda: here.driver)
    for name, value in (("current_device", 0), ("synchronize", None), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    def of_rank(rank: int) -> tuple[Any, Any]:
        here.driver, channel, workspaces = drivers[rank], Channel(store, rank, 2, seconds=120), Workspaces()

        def making() -> Any:
            return mock.Mock(kernels=create(channel, None, 8, 64, torch.float32))  # type: ignore[arg-type]

        def another() -> Any:
            return mock.Mock(kernels=channel.exchange("the next one's", rank))

        first = workspaces.create(channel, making, "ringfence", "peer")
        return first, workspaces.create(channel, another, "mnnvl", "peer").workspace.kernels

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(of_rank, range(2)))
    why = "its workspace could not be created (rank 1: on this rank alone)"
    assert found == [((None, why), [0, 1])] * 2
    for driver in drivers:
        assert driver.open_memory == [] and driver.freed == ([4096] if driver.allocated else [])
    assert drivers[0].allocated
