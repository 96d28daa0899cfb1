"""Two ranks of FlashInfer's MoE all-to-all on ONE GPU, through the adapter: a rank is a stream over one allocation.

The kernels cannot tell: they are given addresses. One host thread serves both ranks, so nothing may wait for the
device, be loaded or be allocated between their launches: kernels of a single rank, which wait for nobody, run first on
each stream, and the allocator of each is filled. :func:`run` is called in a child (:mod:`.children`).
"""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpu import emulate
from gpu.children import progress
from gpu.probes import asked
from ringfence.runtime.collectives import flashinfer, moe_one_sided
from ringfence.runtime.collectives import probe as module
from ringfence.runtime.collectives.moe_one_sided import MoeSizes, OneSided
from ringfence.runtime.collectives.moe_ready import needed
from ringfence.runtime.collectives.moe_reference import owner_of

RANKS, CAPACITY, TOP_K, EXPERTS, H = 2, 16, 8, 64, 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sizes_for(dtype: torch.dtype) -> MoeSizes:
    return needed(H * dtype.itemsize + 4 * TOP_K + 4, TOP_K, H * dtype.itemsize, CAPACITY)


class Channel:
    """Between ranks of one thread, who have nothing to say."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def barrier(self, topic: str) -> None:
        torch.cuda.synchronize()


def kernels_of(ranks: int, sizes: MoeSizes) -> list[OneSided]:
    """The adapter's kernels of each rank, over one allocation of torch's."""
    real = flashinfer.installed()
    real.moe()
    held: list[Tensor] = []

    def allocate(**given: Any) -> Any:
        stride = -(-given["buf_size"] // (1 << 16)) * (1 << 16)
        if not held:
            held.append(torch.full((ranks * stride,), 255, dtype=torch.uint8, device="cuda"))
        base = held[0].data_ptr()
        return SimpleNamespace(
            get_buffer_ptrs_host=lambda: [base + r * stride for r in range(ranks)],
            get_allocation_size=lambda: stride,
            held=held,
        )

    modules: dict[str, Any] = {**real.modules, "flashinfer.comm.mnnvl": SimpleNamespace(SymmDeviceMemory=allocate)}
    package = flashinfer.FlashInfer(real.version, modules)
    return [moe_one_sided.create(package, Channel(r, ranks), sizes) for r in range(ranks)]  # type: ignore[arg-type]


class Pair:
    """Dispatch, experts and combine of each rank, with its inputs and its result."""

    def __init__(self, kernels: list[OneSided], tokens: tuple[int, ...], dtype: torch.dtype, ids: torch.dtype) -> None:
        self.kernels, self.tokens = kernels, tokens
        self.x = [torch.zeros(n, H, dtype=dtype, device="cuda") for n in tokens]
        self.ids = [torch.zeros(n, TOP_K, dtype=ids, device="cuda") for n in tokens]
        self.weights = [torch.zeros(n, TOP_K, device="cuda") for n in tokens]
        self.numbers = [torch.arange(n, dtype=torch.int32, device="cuda")[:, None].contiguous() for n in tokens]
        self.out = [torch.zeros(n, H, dtype=dtype, device="cuda") for n in tokens]

    def fill(self, seed: int, routing: str) -> None:
        for rank in range(len(self.tokens)):
            g = torch.Generator("cuda").manual_seed(100 * seed + rank)
            self.x[rank].normal_(generator=g)
            scores = torch.rand(self.tokens[rank], EXPERTS, generator=g, device="cuda")
            if routing == "one rank":
                scores[:, EXPERTS // 2 :] -= 2
            if routing == "hot":
                scores[:, 3] += 2
            values, ids = scores.topk(TOP_K, dim=-1)
            self.ids[rank].copy_(ids)
            self.weights[rank].copy_(values.softmax(-1))
            self.out[rank].fill_(float("nan"))

    def launch(self, rank: int, lean: bool | None = None) -> None:
        """On the current stream. lean: nothing but the library's kernels; if not said, on every other rank."""
        kernels = self.kernels[rank]
        payloads = [self.numbers[rank], self.x[rank], self.weights[rank]]
        lean = rank % 2 == 1 if lean is None else lean
        empty = None if lean else -1
        (_, rows, weights), ids, counts = kernels.dispatch(
            payloads, self.ids[rank], CAPACITY, EXPERTS, empty, known=lean
        )
        if not lean:
            kernels.combine(experts(rank, len(self.tokens), rows, ids, weights), self.out[rank])
            return
        slots = torch.arange(CAPACITY, device="cuda") < counts[:, None]
        ids = torch.where(slots.view(-1, 1), ids, -1)
        buffer = kernels.combine_rows(rows.shape[0], rows.shape[1], rows.dtype)
        buffer.copy_(experts(rank, len(self.tokens), rows, ids, weights))
        kernels.combine(buffer, self.out[rank])

    def wrong(self) -> list[str]:
        """Ranks whose result is not, bit by bit, what the experts make of their tokens."""
        found, ranks = [], len(self.tokens)
        for rank, (x, ids, weights) in enumerate(zip(self.x, self.ids, self.weights, strict=True)):
            owners, total = owner_of(ids.long(), EXPERTS, ranks), torch.zeros(x.shape, device="cuda")
            for other in range(ranks):
                goes = (owners == other).any(1, keepdim=True)
                total += torch.where(goes, experts(other, ranks, x, ids, weights).float(), 0.0)
            if not torch.equal(self.out[rank], total.to(x.dtype)):
                off = (self.out[rank].float() - total).abs().max() if x.numel() else 0.0
                found.append(f"rank {rank} of {self.tokens} {x.dtype} is off by {float(off):.3g}")
        return found


def experts(rank: int, ranks: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What one rank's experts make of rows, each by itself: one op after the other, the same for any batch."""
    total = torch.zeros(x.shape[0], device=x.device)
    for k in range(ids.shape[1]):
        mine = owner_of(ids[:, k].long(), EXPERTS, ranks) == rank
        total = total + torch.where(mine, weights[:, k] * (0.5 + ids[:, k].float() / 64), 0.0)
    return torch.where(total[:, None] != 0, x.float() * total[:, None], 0.0).to(x.dtype)


def run(item: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "returned", **globals()[f"do_{item['what']}"](item)}


def warm() -> None:
    """Kernels loaded and memory in each stream's allocator, by a rank that waits for nobody: to load one may wait."""
    for dtype in DTYPES:
        alone = kernels_of(1, sizes_for(dtype))
        for ids in (torch.int32, torch.int64):
            pair = Pair(alone, (CAPACITY,), dtype, ids)
            pair.fill(1, "uniform")
            for stream, lean in itertools.product(emulate.streams(), (False, True)):
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    pair.launch(0, lean)
                torch.cuda.synchronize()
            assert not pair.wrong(), pair.wrong()
    for stream in emulate.streams():
        with torch.cuda.stream(stream):
            blocks = [torch.empty(1 << s, dtype=torch.uint8, device="cuda") for s in range(9, 24) for _ in range(8)]
    del blocks
    torch.cuda.synchronize()


def both(pair: Pair) -> bool:
    """Launch both ranks; whether both come back."""
    torch.cuda.synchronize()
    for rank, stream in enumerate(emulate.streams()):
        with torch.cuda.stream(stream):
            pair.launch(rank)
    return all(emulate.returned(10))


def do_eager(item: dict[str, Any]) -> dict[str, Any]:
    """All dtypes, token counts and routings; the first item of a child."""
    torch.cuda.set_device(0)
    warm()
    progress(at="warm")
    wrong, done, sizes = [], 0, {}
    for dtype in DTYPES:
        kernels = kernels_of(RANKS, sizes_for(dtype))
        sizes[str(dtype)] = [kernels[0].nbytes, kernels[0].combine_at]
        for i, tokens in enumerate(((16, 16), (16, 0), (3, 16), (0, 0), (1, 1))):
            for routing in ("uniform", "hot", "one rank"):
                pair = Pair(kernels, tokens, dtype, (torch.int32, torch.int64)[i % 2])
                pair.fill(10 + done, routing)
                if not both(pair):
                    return {
                        "kind": "never returned",
                        "stuck": True,
                        "at": f"{tokens} {dtype} {routing}",
                        "wrong": wrong,
                    }
                wrong += [f"{routing}: {what}" for what in pair.wrong()]
                done += 1
                progress(at=f"{done} cases", wrong=wrong)
    return {"wrong": wrong, "cases": done, "sizes": sizes}


def do_replayed(item: dict[str, Any]) -> dict[str, Any]:
    """A graph of each rank, replayed side by side with new values and routing."""
    kernels = kernels_of(RANKS, sizes_for(torch.bfloat16))
    wrong, replays = [], 0
    for tokens in ((16, 16), (5, 0), (16, 7)):
        pair = Pair(kernels, tokens, torch.bfloat16, torch.int64)
        pair.fill(3, "uniform")
        if not both(pair):
            return {"kind": "never returned", "stuck": True, "at": f"eager {tokens}"}
        before = [k.control_words() for k in kernels]
        graphs = [torch.cuda.CUDAGraph() for _ in range(RANKS)]
        for rank, graph in enumerate(graphs):
            with torch.cuda.graph(graph, stream=emulate.streams()[rank], capture_error_mode="thread_local"):
                pair.launch(rank)
        if before != [k.control_words() for k in kernels]:
            wrong.append(f"the capture of {tokens} advanced the flags")
        for turn in range(item["replays"]):
            pair.fill(1000 + turn, ("uniform", "hot", "one rank")[turn % 3])
            torch.cuda.synchronize()
            for rank, stream in enumerate(emulate.streams()):
                with torch.cuda.stream(stream):
                    graphs[rank].replay()
            if not all(emulate.returned(10)):
                return {"kind": "never returned", "stuck": True, "at": f"replay {turn} of {tokens}", "wrong": wrong}
            wrong += [f"replay {turn}: {what}" for what in pair.wrong()]
            replays += 1
    return {"wrong": wrong[:5], "replays": replays, "words": [k.control_words() for k in kernels]}


def do_late(item: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 does not come, then comes; what rank 0's flags say to a thread beside it. ``half``: of the pair."""
    kernels = kernels_of(RANKS, sizes_for(torch.bfloat16))
    pair = Pair(kernels, (CAPACITY, CAPACITY), torch.bfloat16, torch.int32)
    pair.fill(5, "uniform")
    if not both(pair):
        return {"kind": "never returned", "stuck": True}
    found = SimpleNamespace(open=(), moe=[SimpleNamespace(kernels=k, closed=False) for k in kernels[:1]])
    module.workspaces_of = lambda name: found  # type: ignore[assignment]
    module.ranks_of = lambda name: (4, 5)  # type: ignore[assignment]
    probe = module.GroupProbe("emulated", module.CudaReader(torch.device("cuda", 0)))
    said = {"idle": asked(probe)[0]}
    first, second = emulate.streams()
    rows: list[Any] = []

    def half(rank: int, of: str) -> None:
        k = kernels[rank]
        if of == "dispatch":
            rows.append(k.dispatch([pair.x[rank], pair.weights[rank]], pair.ids[rank], CAPACITY, EXPERTS, -1))
        else:
            (x, weights), ids, _ = rows[rank]
            k.combine(experts(rank, RANKS, x, ids, weights), pair.out[rank])

    for of in ("dispatch", "combine"):
        with torch.cuda.stream(first):
            half(0, of)
        time.sleep(0.2)
        said[of], seconds = asked(probe)
        said[f"{of} seconds"] = seconds
        with torch.cuda.stream(second):
            half(1, of)
        if not all(emulate.returned(10)):
            return {"kind": "never returned", "stuck": True, "said": said}
    return {"said": said, "wrong": pair.wrong()}
