"""Run FlashInfer's own Python over a driver and kernels that only write down how they were called.

Run as a program: two threads are two ranks, which make and use the adapter's kernels. What
happened is printed as JSON. There is no GPU and nothing is created on one; the import of
FlashInfer writes a cache below ``FLASHINFER_WORKSPACE_BASE``.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import itertools
import json
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import flashinfer as adapter
from ringfence.runtime.collectives import kernels as contract
from ringfence.runtime.collectives import mnnvl, trtllm
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.errors import RingfenceError

GRANULE = 2 << 20
TOKENS, HIDDEN = 8, 256

_real_tensor = torch.tensor
_rank = threading.local()


class Driver:
    """The CUDA driver as FlashInfer calls it. Structures and enumerations are the real ones."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._real = driver
        self._numbers = itertools.count(1)
        self.calls: list[tuple[int, str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return getattr(self._real, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((getattr(_rank, "number", -1), name))
            answers: dict[str, Any] = {
                "cuMemGetAllocationGranularity": GRANULE,
                "cuMulticastGetGranularity": GRANULE,
                "cuMemAddressReserve": 0x100 * GRANULE * next(self._numbers),
                "cuMemExportToShareableHandle": types.SimpleNamespace(data=b"handle"),
                "cuDeviceGetAttribute": 1,
                "cuCtxGetDevice": 0,
            }
            return (self._real.CUresult.CUDA_SUCCESS, answers.get(name, next(self._numbers)))

        return call


class Recorder:
    """A module of built kernels."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: self.calls.append((name, arguments, named))


def on_two_ranks(body: Callable[[Channel], Any]) -> list[Any]:
    store = dist.HashStore()

    def run(rank: int) -> Any:
        _rank.number = rank
        return body(Channel(dist.PrefixStore("test", store), rank, 2, seconds=120))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def use(kernels: contract.Kernels, dtype: torch.dtype = torch.bfloat16) -> dict[int, str]:
    """Call everything once; the names of the tensors, by address."""
    names = ("input", "residual", "norm", "out")
    tensors = {name: torch.zeros(TOKENS, HIDDEN, dtype=dtype) for name in names} | {
        "weight": torch.ones(HIDDEN, dtype=dtype)
    }
    x, residual, norm, out, weight = (tensors[n] for n in (*names, "weight"))
    for strategy in kernels.strategies:
        kernels.run(x, Epilogue(True, RmsNorm(1e-5, 1.0)), strategy, (residual, weight), norm, out)
        kernels.run(x, Epilogue(), strategy, None, None, out)
    kept.append(tensors)  # their addresses stay theirs
    return {t.data_ptr(): name for name, t in tensors.items()}


kept: list[Any] = []


def plain(value: Any, names: dict[int, str]) -> Any:
    if isinstance(value, torch.Tensor):
        return names.get(value.data_ptr(), "another tensor")
    return value if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__


def main() -> None:
    package = adapter.load()
    facts: dict[str, Any] = {"load": type(package).__name__, "said": getattr(package, "reason", "")}
    if isinstance(package, adapter.Unavailable):
        print(json.dumps(facts))
        return
    facts["version"] = package.version
    facts["moe"] = package.moe().__name__

    from flashinfer.comm import allreduce, trtllm_ar, trtllm_mnnvl_ar
    from flashinfer.comm import mnnvl as fi_mnnvl

    driver, raw, words = Driver(), Recorder(), torch.zeros(9, dtype=torch.int32)
    runtime = types.SimpleNamespace(
        cudaSetDevice=lambda index: (driver.CUresult.CUDA_SUCCESS,),
        cudaMalloc=lambda size: ctypes.c_void_p(0xF000),
        cudaMemset=lambda *_: None,
        cudaMemcpy=lambda *_: None,
    )
    built = types.SimpleNamespace(build_and_load=lambda: raw)
    torch_symmetric: list[int] = []
    on_cuda: list[tuple[int, int]] = []

    def device_words(pointer: int, count: int) -> torch.Tensor:
        on_cuda.append((pointer, count))
        return words[:5]

    def tensor(*arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return _real_tensor(*arguments, **options)

    sys.modules["cuda.bindings.runtime"] = runtime  # type: ignore[assignment]
    with (
        mock.patch("cuda.bindings.runtime", runtime),
        mock.patch.object(fi_mnnvl, "cuda", driver),
        mock.patch.object(fi_mnnvl, "is_mnnvl_fabric_supported", lambda index: True),
        mock.patch.object(fi_mnnvl, "alloc_and_copy_to_cuda", lambda pointers: 0xDE0 + _rank.number),
        mock.patch.object(trtllm_ar, "cudart", runtime),
        mock.patch.object(trtllm_ar, "trtllm_lamport_initialize", lambda *_: None),
        mock.patch.object(trtllm_ar, "get_trtllm_comm_module", lambda: raw),
        mock.patch.object(trtllm_ar, "_alloc_symm_buffer_bytes", lambda *_: torch_symmetric.append(1)),
        mock.patch.object(trtllm_mnnvl_ar, "gen_trtllm_mnnvl_comm_module", lambda: built),
        mock.patch.object(contract, "device_words", device_words),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        launch = trtllm_mnnvl_ar.get_trtllm_mnnvl_comm_module().trtllm_mnnvl_allreduce_fusion
        facts["mnnvl parameters"] = list(inspect.signature(launch).parameters)

        group = types.SimpleNamespace(group_name="0")
        made: dict[str, Callable[[Channel], contract.Kernels]] = {
            "trtllm": lambda c: trtllm.create(package, c, group, TOKENS, HIDDEN, torch.bfloat16),  # type: ignore[arg-type]
            "trtllm float32": lambda c: trtllm.create(package, c, group, TOKENS, HIDDEN, torch.float32),  # type: ignore[arg-type]
            "mnnvl peer": lambda c: mnnvl.create_peer(package, c, group, TOKENS, HIDDEN, torch.bfloat16),
            "mnnvl multicast": lambda c: mnnvl.create_multicast(package, c, group, TOKENS, HIDDEN, torch.bfloat16),
        }
        for name, make in made.items():
            driver.calls.clear()
            raw.calls.clear()
            on_cuda.clear()
            kernels = on_two_ranks(make)
            seen: dict[str, Any] = {
                "driver": sorted({call for _, call in driver.calls}),
                "allocations": sum(call == "cuMemCreate" for _, call in driver.calls),
                "buffer_bytes": [k.memory.buffer_bytes for k in kernels],
                "memory": [{n: v for n, v in vars(k.memory).items() if n != "layout"} | {"calls": []} for k in kernels],
                "control_words": [len(k.control_words()) for k in kernels],
                "words at": sorted(on_cuda),
                "kept": len(trtllm_ar._symm_workspace_refs),
            }
            dtype = torch.float32 if "float32" in name else torch.bfloat16
            _rank.number = 0
            names = use(kernels[0], dtype)
            seen["kernel calls"] = [
                [kernel, [plain(a, names) for a in arguments], {key: plain(a, names) for key, a in named.items()}]
                for kernel, arguments, named in raw.calls
            ]
            if name.startswith("mnnvl"):
                seen["pointers"] = [[int(p) for p in k._pointers[:3]] for k in kernels]  # type: ignore[attr-defined]
                memory = kernels[0]._memory  # type: ignore[attr-defined]
                memory = memory if name == "mnnvl peer" else memory.handle.mcast_device_memory
                seen["own memory"] = [int(p) for p in memory.get_buffer_ptrs_host()]
                seen["flags"] = kernels[0]._pointers[3].tolist()  # type: ignore[attr-defined]
                seen["multicast pointer"] = int(memory.get_multicast_ptr())
                del memory
            else:
                workspace = kernels[0]._workspace  # type: ignore[attr-defined]
                seen["two-shot bytes"] = workspace.metadata["buffer_size"]
                table = [k._workspace.workspace_tensor.tolist() for k in kernels]  # type: ignore[attr-defined]
                seen["handles"] = [[row[2 + rank], row[4 + rank]] for rank, row in enumerate(table)]
                del workspace
            driver.calls.clear()
            for k in kernels:
                k.close()
                k.close()
            gc.collect()
            seen["released"] = sum(call == "cuMemRelease" for _, call in driver.calls)
            seen["kept after close"] = len(trtllm_ar._symm_workspace_refs)
            try:
                use(kernels[0], dtype)
                seen["after close"] = "served"
            except RingfenceError as error:
                seen["after close"] = str(error)
            facts[name] = seen

        driver.calls.clear()
        with mock.patch.object(allreduce, "is_confidential_compute", lambda: True):
            try:
                made["trtllm"](Channel(dist.HashStore(), 0, 1, seconds=1))
                facts["confidential"] = "made"
            except RingfenceError as error:
                facts["confidential"] = str(error)
        facts["confidential allocations"] = len(torch_symmetric) + len(driver.calls)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
