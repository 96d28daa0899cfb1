"""The probe beside a kernel that spins: on one GPU with emulated ranks, on two through the product and its watchdog."""

from __future__ import annotations

import datetime
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpu import emulate
from gpu.children import run_child
from gpu.probes import HIDDEN, RELEASE, ROW, TOKENS, WARM_UP, asked, written
from gpu.test_product import DTYPE, GROUP, H, make_model
from support import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, {GPUS} here")
COLLECTIVES = ("mnnvl", "trtllm")


# -- one GPU


def emulated(collective: str, tokens: tuple[int, int], two_shot: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole outcome, and what the probe says of rank 0 in the hang."""
    if reason := emulate.missing(RELEASE, collective):
        pytest.skip(reason)
    item = {"collective": collective, "two_shot": two_shot, "tokens": tokens}
    (outcome,) = run_child("gpu.probes:run", [item], timeout=90)
    assert "value" in outcome, outcome
    print(json.dumps(outcome, indent=1))
    assert outcome["seconds"] < 1
    ((idle,), (value,)) = outcome["idle"], outcome["value"]
    assert idle["says"] == "no call of this rank waits in it" and idle["silent"] == []
    return outcome, value


def words_of(collective: str, size: int, *, one_shots: int, two_shots: int) -> dict[str, int]:
    """After warm-up calls alone, without the arrivals of the call that hangs."""
    if collective == "trtllm":
        clear = one_shots * WARM_UP * emulate.RANKS * HIDDEN
        words = {"two_shot_flag": 2 * two_shots % 3, "buffer": one_shots, "buffer_bytes": size}
        return words | {"clear_elements": clear}
    clear = WARM_UP * emulate.RANKS * ROW
    stages = {f"clear_bytes_{stage}": 0 for stage in (1, 2, 3)}
    return {"buffer": 1, "dirty_buffer": 0, "buffer_bytes": size, "dirty_stages": 1, "clear_bytes_0": clear} | stages


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_shot_whose_peer_never_calls(collective: str) -> None:
    outcome, value = emulated(collective, (TOKENS, 0))
    assert outcome["returned"] == [False, True]
    assert value["silent"] == [1] and value["says"] == "a call waits: nothing has arrived from rank 1"
    words = dict(value["words"])
    assert words.pop("arrived_blocks") > 0
    assert words == words_of(collective, outcome["size"], one_shots=1, two_shots=0)
    (reading,) = value["readings"]
    assert reading["row_bytes"] == ROW and reading["from"]["1"]["rows"] == 0
    assert reading["tokens"] == (TOKENS if collective == "trtllm" else None)
    assert value["read_bytes"] == value["used_bytes"] == TOKENS * emulate.RANKS * ROW and "late" not in value


def test_one_shot_whose_peer_sends_less() -> None:
    outcome, value = emulated("mnnvl", (TOKENS, 3))
    assert outcome["returned"] == [False, True]
    assert value["silent"] == [] and value["says"] == "a call waits: the first 3 tokens of rank 1 have arrived"
    part = value["readings"][0]["from"]["1"]
    assert part == {"rows": 3, "up_to": 3, "first_sentinel_word": (3 * emulate.RANKS + 1) * ROW // 4}


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_rank_that_does_not_call_sees_what_the_other_sent(collective: str) -> None:
    outcome, value = emulated(collective, (0, TOKENS))
    assert outcome["returned"] == [True, False]
    assert value["says"] == "no call of this rank waits in it; what rank 1 sent for the next one is here"
    assert value["silent"] == [] and value["words"]["arrived_blocks"] == 0


def test_two_shot_whose_peer_never_calls() -> None:
    outcome, value = emulated("trtllm", (TOKENS, 0), two_shot=True)
    assert outcome["returned"] == [False, True]
    assert value["barriers"] == {"0": [1], "1": [0]} and value["silent"] == [1]
    assert value["says"] == "a two-shot call waits: rank 1 has not come to its first barrier"
    words = dict(value["words"])
    assert words.pop("arrived_blocks") > 0
    assert words == words_of("trtllm", outcome["size"], one_shots=0, two_shots=1)


def test_a_capture_of_another_thread_is_left_alone() -> None:
    (outcome,) = run_child("gpu.probes:capture", [{}], timeout=60)
    assert outcome.get("sum") == 16, outcome
    assert outcome["value"][0]["says"] == "no call of this rank waits in it" and outcome["seconds"] < 1
    assert outcome["value"][0]["read_bytes"] == 1 << 20


# -- two GPUs


def _until_probed(rank: int) -> None:
    """Rank 1 stays alive until rank 0 has looked."""
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    if rank == 0:
        store.set("probed", "1")
    else:
        store.wait(["probed"], datetime.timedelta(seconds=60))


def hang(rank: int, collective: str, replayed: bool) -> Any:
    """Rank 0 calls, eagerly or in a replay, and rank 1 does not."""
    from ringfence.runtime.channel import open_channel
    from ringfence.runtime.collectives import ops
    from ringfence.runtime.collectives.probe import make_probe
    from ringfence.runtime.collectives.ready import Wanted, prepare
    from ringfence.runtime.groups import describe_group

    device, hidden, tokens = torch.device("cuda", rank), 8192, 4
    probe = make_probe(GROUP, device)
    wanted = Wanted(collective, "auto", hidden, DTYPE, sizes=(tokens,))
    ready = prepare(open_channel(GROUP, seconds=60), describe_group(GROUP, device), device, wanted)
    assert ready.workspace is not None
    x, residual = (torch.randn(tokens, hidden, device="cuda").to(DTYPE) for _ in range(2))
    weight = torch.ones(hidden, device="cuda", dtype=DTYPE)

    def call() -> Any:
        return ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, 0.0, GROUP, collective)

    call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = call()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    before = ready.workspace.kernels.control_words()
    idle, _ = asked(probe)  # type: ignore[arg-type]
    if rank == 1:
        _until_probed(rank)
        return None
    if replayed:
        graph.replay()
    else:
        kept = call()
    time.sleep(0.5)
    threading.Thread(target=torch.cuda.synchronize, daemon=True).start()
    value, seconds = asked(probe)  # type: ignore[arg-type]
    _until_probed(rank)
    del kept
    return {"idle": idle, "value": value, "seconds": seconds, "before": before}


@two_gpus
@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_product_whose_peer_never_calls(collective: str, replayed: bool) -> None:
    result, _ = run_ranks(2, hang, collective, replayed, backend="nccl", timeout=150)
    print(json.dumps(result, indent=1))
    ((idle,), (value,)) = result["idle"], result["value"]
    assert idle["says"] == "no call of this rank waits in it"
    assert result["seconds"] < 1 and "late" not in value
    assert value["silent"] == [1] and value["says"] == "a call waits: nothing has arrived from rank 1"
    arrived = [*value["words"]].index("arrived_blocks")
    words = [*value["words"].values()]
    assert words[arrived] > 0
    assert words[:arrived] + words[arrived + 1 :] == [w for i, w in enumerate(result["before"]) if i != arrived]
    if collective == "trtllm":
        assert [r["tokens"] for r in value["readings"]] == [4]


def watched(rank: int, collective: str, folder: str) -> Any:
    """A step that rank 1 leaves out, under a watchdog that only reports."""
    import ringfence
    from ringfence.runtime.watch import summary
    from ringfence.runtime.watch.journals import merge, read_folder

    backend = ringfence.Backend(
        capture_sizes=[4], collective=collective, on_hang="report", step_seconds=2, journal_dir=folder
    )
    compiled = torch.compile(make_model(rank), backend=backend, fullgraph=True, dynamic=True)
    x = torch.randn(4, H, device="cuda").to(DTYPE)
    with torch.no_grad():
        for _ in range(4):
            compiled(x)
            torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        if rank == 1:
            _until_probed(rank)
            return None
        compiled(x)
    threading.Thread(target=torch.cuda.synchronize, daemon=True).start()
    paths = [Path(folder) / f"journal-rank{r}.json" for r in range(2)]
    until = time.monotonic() + 30
    while (values := written(paths)) is None and time.monotonic() < until:
        time.sleep(0.1)
    assert values is not None, [path.read_text()[:200] for path in paths if path.exists()]
    merged = merge(read_folder(Path(folder)))
    _until_probed(rank)
    return {"probes": [v["probes"] for v in values], "text": summary.text(merged, width=200), "json": merged.to_dict()}


@two_gpus
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_journals_of_a_hang_hold_what_the_probes_saw(tmp_path: Path, collective: str) -> None:
    result, _ = run_ranks(2, watched, collective, str(tmp_path), backend="nccl", timeout=200)
    print(result["text"])
    name = "workspaces of group 'world'"
    waits, absent = (probes[name][0] for probes in result["probes"])
    assert waits["says"] == "a call waits: nothing has arrived from rank 1" and waits["silent"] == [1]
    assert absent["says"] == "no call of this rank waits in it; what rank 0 sent for the next one is here"
    assert result["json"]["ranks"] == [1] and result["json"]["nothing_from"] == {"1": [0]}
    assert "nothing of rank 1 has arrived in the memory of rank 0, which waits for it" in result["text"]
