"""MoE dispatch and combine by FlashInfer's kernels: two emulated ranks on one GPU, and two ranks on two GPUs.

    RINGFENCE_KERNELS=kernels python -m pytest tests/gpu/test_moe.py -rs -s

Kernels: ``tests/gpu/build_kernels.py 0.6.18.post1 --into kernels --modules mnnvl_moe_alltoall --install``. The
integrator's to run; ``tests/runtime/test_moe_pairs.py`` shows the same logic over a library in Python.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gpu import emulate
from gpu.children import run_child
from gpu.moe_layer import Layer, given
from support import run_ranks

RELEASE = "0.6.18.post1"
GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(emulate.missing(RELEASE, "moe") is not None, reason=str(emulate.missing(RELEASE, "moe"))),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, {GPUS} here")

# -- two emulated ranks on one GPU --------------------------------------------------------------

ITEMS: dict[str, dict[str, Any]] = {
    "eager": {"what": "eager"},
    "replayed": {"what": "replayed", "replays": 60},
    "late": {"what": "late"},
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    found = dict(zip(ITEMS, run_child("gpu.moe_emulated:run", list(ITEMS.values()), timeout=60), strict=True))
    print(f"\none GPU: {found}")
    return found


def outcome_of(outcomes: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert outcomes[name]["kind"] == "returned", outcomes[name]
    return outcomes[name]


def test_one_gpu_every_dtype_count_and_routing_bit_by_bit(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcome_of(outcomes, "eager")
    assert found["wrong"] == [] and found["cases"] == 45


def test_one_gpu_replays_with_changing_routing(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcome_of(outcomes, "replayed")
    assert found["wrong"] == [] and found["replays"] == 180
    assert found["words"] == [[2 * (180 + 3)]] * 2, "two calls of each pair, eager and replayed"


def test_one_gpu_a_late_rank_is_read_off_the_flags(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcome_of(outcomes, "late")
    said = found["said"]
    assert found["wrong"] == []
    assert said["idle"][0]["silent"] == [] and "all have come to combine 1" in said["idle"][0]["says"]
    for half in ("dispatch", "combine"):
        (entry,) = said[half]
        assert entry["silent"] == [5] and entry["says"] == f"{half} 2 waits: rank 5 has not come to it", said
        assert said[f"{half} seconds"] < 0.5


# -- two ranks on two GPUs ----------------------------------------------------------------------


def pairs(rank: int) -> dict[str, Any]:
    """The functions: eager and in graphs of somebody else, bit by bit against the reference over NCCL."""
    import ringfence
    from ringfence.runtime.collectives import moe

    torch.set_grad_enabled(False)
    began = time.monotonic()
    found: dict[str, Any] = {"wrong": []}
    made = ringfence.moe.prepare(capacity=1024, top_k=8, hidden=4096, dtype=torch.bfloat16, payload_bytes=8192 + 96)
    found |= {"made": str(made), "collective": made.collective, "seconds": {"prepare": time.monotonic() - began}}
    experts = 64

    def case(seed: int, tokens: int, capacity: int, k: int, ids_of: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        g = torch.Generator("cuda").manual_seed(1000 * seed + rank)
        x = torch.randn(tokens, 4096, generator=g, device="cuda").to(dtype)
        values, ids = torch.rand(tokens, experts, generator=g, device="cuda").topk(k, dim=-1)
        return x, ids.to(ids_of), values, capacity

    def layer(x: Tensor, ids: Tensor, weights: Tensor, capacity: int, collective: str) -> Tensor:
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        if collective == "reference":
            (rows, w), got, route, _ = moe.dispatched([x, weights], ids, capacity, experts, -1, name, collective)
        else:
            lean: dict[str, Any] = {"empty_id": None, "known_ids": True} if collective == "lean" else {}
            sent = ringfence.moe.dispatch([x, weights], ids, capacity=capacity, num_experts=experts, **lean)
            (rows, w), got, route, counts = sent
            if lean:
                first = torch.arange(capacity, device="cuda") < counts[:, None]
                got = torch.where(first.view(-1, 1), got, -1)
        half = experts // 2
        mine = (got >= 0) & (got // half == rank)
        scale = torch.where(mine, w * (1 + got.float() / 64), 0.0)
        total = scale[:, 0]
        for i in range(1, got.shape[1]):
            total = total + scale[:, i]
        partial = torch.where(mine.any(1, keepdim=True), rows.float() * total[:, None], float("nan")).to(x.dtype)
        if collective == "reference":
            return moe.combined(partial, route, name, collective)
        if lean:
            partial = ringfence.moe.combine_buffer(sent, 4096, x.dtype).copy_(partial)
        return ringfence.moe.combine(partial, route)

    def compare(what: str, result: Tensor, *args: Any) -> None:
        want = layer(*args, "reference")
        if not torch.equal(result, want):
            rows = int((result != want).any(1).sum())
            found["wrong"].append(
                f"{what}: {rows} of {want.shape[0]} rows, {result[:1, :4].tolist()} {want[:1, :4].tolist()}"
            )

    for seed, (counts, capacity, k, ids_of) in enumerate(
        [
            ((1, 1), 1, 8, torch.int64),
            ((16, 16), 16, 8, torch.int32),
            ((16, 0), 16, 8, torch.int64),
            ((0, 7), 16, 3, torch.int32),
            ((0, 0), 1, 8, torch.int32),
            ((128, 41), 128, 8, torch.int64),
            ((1024, 1024), 1024, 8, torch.int32),
            ((1030, 1030), 1030, 8, torch.int32),  # beyond the workspace: the reference's
        ]
    ):
        args = case(seed, counts[rank], capacity, k, ids_of, (torch.bfloat16, torch.float16)[seed % 2])
        compare(f"eager {counts} of {capacity}", layer(*args, "prepared"), *args)
        compare(f"eager {counts} of {capacity}, lean", layer(*args, "lean"), *args)
    x, ids, _, capacity = case(30, 16, 16, 8, torch.int32, torch.bfloat16)
    blocks = x.float().view(16, 32, 128)
    scale = blocks.abs().amax(2) / 448
    quantised = (blocks / scale[..., None]).to(torch.float8_e4m3fn).view(16, 4096)
    sent = ringfence.moe.dispatch([quantised, scale], ids, capacity=capacity, num_experts=experts)
    rows = (sent.payloads[0].float().view(-1, 32, 128) * sent.payloads[1][..., None]).view(-1, 4096).bfloat16()
    result = ringfence.moe.combine(rows, sent.route)
    owners = torch.zeros(16, 2, device="cuda").scatter_(1, ids.long() // (experts // 2), 1.0).sum(1, keepdim=True)
    want = (quantised.float().view(16, 32, 128) * scale[..., None]).view(16, 4096).bfloat16().float() * owners
    if sent.payloads[0].dtype != torch.float8_e4m3fn or not torch.equal(result.float(), want):
        found["wrong"].append(f"float8 with scales: {int((result.float() != want).any(1).sum())} of 16 rows")
    found["seconds"]["eager"] = time.monotonic() - began
    found["replays"] = 0
    sizes = (((16, 16), 16), ((128, 0), 128), ((3, 64), 64))
    for (counts, capacity), way in itertools.product(sizes, ("prepared", "lean")):
        args = case(50, counts[rank], capacity, 8, torch.int64, torch.bfloat16)
        layer(*args, way)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = layer(*args, way)
        for turn in range(25):
            new = case(60 + turn, counts[rank], capacity, 8, torch.int64, torch.bfloat16)
            for to, value in zip(args[:3], new[:3], strict=True):
                to.copy_(value)
            if turn % 7 == rank:
                time.sleep(0.003)
            graph.replay()
            compare(f"replay {turn} of {counts}, {way}", out, *args)
            found["replays"] += 1
    found["wrong"] = found["wrong"][:4]
    found["seconds"]["replayed"] = time.monotonic() - began
    found["calls"] = ringfence_words()
    ringfence.close_workspaces("world")
    return found


def ringfence_words() -> list[Any]:
    from ringfence.runtime.collectives.workspace import workspaces_of

    return [w.kernels.control_words() for w in workspaces_of(dist.group.WORLD.group_name).moe]  # type: ignore[union-attr]


@two_gpus
def test_the_functions_on_two_gpus_against_the_reference() -> None:
    first, second = run_ranks(2, pairs, backend="nccl", timeout=80)
    print(f"\ntwo GPUs: {first}\n{second}")
    for found in (first, second):
        assert found["collective"] == "moe_all_to_all", found["made"]
        assert found["wrong"] == [] and found["replays"] == 150
    assert first["calls"] == second["calls"] and len(first["calls"]) == 1


def compiled(rank: int) -> dict[str, Any]:
    """A layer with experts through the backend: rewritten, by the kernels, captured; and ranks that do not agree."""
    import ringfence

    torch.set_grad_enabled(False)
    began, found = time.monotonic(), dict[str, Any]()
    layer = Layer(rank, 2).to("cuda")
    for compiler in ("eager", "inductor"):
        torch._dynamo.reset()
        backend = ringfence.Backend(
            moe_dispatch=True, moe_collective="moe_all_to_all", piece_compiler=compiler, capture_sizes=[6, 64]
        )
        call = torch.compile(layer, backend=backend, fullgraph=True)
        distance = 0.0
        for step in range(24):
            tokens = (6, 64, 6)[step % 3]
            args = given(tokens, 10 * step + rank)
            if step % 4 == 1:
                args[1][-2:] = 100.0  # everything to the last experts
            if step % 4 == 2 and rank:
                args[2].zero_()  # nothing but padding
            result, eager = call(*args), layer(*args)
            distance = max(distance, float((result.float() - eager.float()).norm() / eager.float().norm()))
        report = backend.reports[0].to_dict()
        sites = [site["reason"] for site in report["moe_sites"]]
        verdicts = {v["op"]: v["decision"] for v in report["verdicts"] if "moe" in v["op"]}
        found[compiler] = {
            "distance": distance,
            "declines": sites,
            "verdicts": verdicts,
            "graphs": report["graphs"],
        }
        found[compiler]["notes"] = report["notes"]
    found["seconds"] = time.monotonic() - began
    found["words"] = ringfence_words()

    def capacity_of_its_own(x: Tensor, ids: Tensor) -> Tensor:
        sent = ringfence.moe.dispatch([x], ids, capacity=8 + rank, num_experts=4)
        return ringfence.moe.combine(sent.payloads[0], sent.route)

    torch._dynamo.reset()
    before = ringfence_words()
    backend = ringfence.Backend(moe_collective="moe_all_to_all", capture_sizes=[4], agree_seconds=180)
    x, ids = torch.randn(4, 32, device="cuda"), torch.zeros(4, 2, dtype=torch.int32, device="cuda")
    try:
        torch.compile(capacity_of_its_own, backend=backend, fullgraph=True)(x, ids)
        found["mismatch"] = "not raised"
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        found["mismatch"] = f"{type(inner).__name__}: {inner}"
    found["untouched"] = before == ringfence_words()
    return found


@two_gpus
def test_a_layer_through_the_backend_on_two_gpus() -> None:
    results = run_ranks(2, compiled, backend="nccl", timeout=100)
    print(f"\ncompiled: {results}")
    for found in results:
        for compiler in ("eager", "inductor"):
            one = found[compiler]
            assert one["declines"] == [None] and one["graphs"] == "cuda", one
            assert set(one["verdicts"].values()) == {"IN_GRAPH"} and len(one["verdicts"]) == 2, one
            assert one["distance"] < 2.0**-6, one
            assert any("carried out by moe_all_to_all" in note for note in one["notes"]), one["notes"]
        assert found["mismatch"].startswith("RankMismatch") and "capacity" in found["mismatch"], found["mismatch"]
        assert found["untouched"]
        assert found["words"] == results[0]["words"] and found["words"]


def late(rank: int) -> dict[str, Any]:
    """Rank 1 comes two seconds late to a dispatch; rank 0 asks its flags meanwhile."""
    import threading

    import ringfence
    from ringfence.runtime.collectives.probe import make_probe

    torch.set_grad_enabled(False)
    ringfence.moe.prepare(capacity=16, top_k=2, hidden=256, dtype=torch.bfloat16)
    probe = make_probe("world", torch.device("cuda", rank))
    x, ids = torch.randn(16, 256, device="cuda").bfloat16(), torch.zeros(16, 2, dtype=torch.int32, device="cuda")
    ids[:, 1] = 3

    def pair() -> None:
        sent = ringfence.moe.dispatch([x], ids, capacity=16, num_experts=4)
        ringfence.moe.combine(sent.payloads[0] * 2, sent.route)

    pair()
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    if rank:
        time.sleep(1.5)
    pair()
    said: list[Any] = []
    if not rank:
        time.sleep(0.5)
        asking = threading.Thread(target=lambda: said.append(probe()), daemon=True)
        asking.start()
        asking.join(5)
    torch.cuda.synchronize()
    return {"said": said}


@two_gpus
def test_a_late_rank_is_named_on_two_gpus() -> None:
    first, _ = run_ranks(2, late, backend="nccl", timeout=60)
    print(f"\nlate: {first}")
    ((entry,),) = first["said"]
    assert entry["silent"] == [1] and "waits: rank 1 has not come to it" in entry["says"], first
