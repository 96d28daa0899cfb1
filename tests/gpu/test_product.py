"""FlashInfer's kernels through the product: two ranks on two GPUs, compiled, captured, replayed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from support import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, {GPUS} here"),
]
H = 1024
DTYPE = torch.bfloat16
COLLECTIVES = ("mnnvl", "trtllm", "ringfence")
GROUP = "0"


class Model(nn.Module):
    """First layer without a residual, then two with one, and an all-reduce that nothing is fused with."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.RMSNorm(H, eps=1e-5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linears[0](x)
        dist.all_reduce(y)
        residual, x = x, self.norms[0](y)
        for linear, norm in zip(self.linears[1:], self.norms[1:], strict=True):
            y = F.silu(linear(x))
            dist.all_reduce(y)
            residual = residual + y
            x = norm(residual)
        y = torch.sigmoid(x)
        dist.all_reduce(y)
        return y * 2


def make_model(rank: int) -> Model:
    torch.manual_seed(rank)
    model = Model().to("cuda", DTYPE)
    torch.manual_seed(7)
    for norm in model.norms:
        nn.init.normal_(norm.weight, 1.0, 0.3)
    return model


def error(actual: Tensor, reference: Tensor) -> float:
    rms = reference.square().mean(-1, keepdim=True).sqrt()
    return float(((actual.float() - reference).abs() / (reference.abs() + rms)).max())


def serve(rank: int, options: dict[str, Any], steps: int = 18) -> dict[str, Any]:
    """Steps of mixed sizes; the same numbers on every rank. Worst error against eager, and the report."""
    import ringfence
    from ringfence.runtime.collectives.workspace import workspaces_of

    model = make_model(rank)
    backend = ringfence.Backend(**{"capture_sizes": [4, 8, 64], **options})
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    generator = torch.Generator("cuda").manual_seed(3)
    exact = make_model(rank).float()
    ours = theirs = 0.0
    with torch.no_grad():
        for step in range(steps):
            x = torch.randn([(4, 8, 64, 8, 3, 4)[step % 6], H], generator=generator, device="cuda").to(DTYPE)
            right = exact(x.float())
            ours, theirs = max(ours, error(compiled(x), right)), max(theirs, error(model(x), right))
    report = backend.reports[-1].to_dict()
    workspaces = workspaces_of(GROUP)
    tests = [t for w in workspaces.open for t in w.tested.values()]
    return {
        "errors": (ours, theirs),
        "report": report,
        "text": str(backend.reports[-1]),
        "words": workspaces.control_words(),
        "open": [(str(w.collective), w.transport, w.capacity) for w in workspaces.open],
        "tested": [(t.eager, t.captured, t.calls) for t in tests],
    }


def check(result: dict[str, Any], collective: str, decision: str = "IN_GRAPH") -> None:
    report = result["report"]
    assert report["collective"] == collective, result["text"]
    assert [s["fused"] for s in report["sites"]] == [True, True, True, False]
    assert report["graphs"] == "cuda"
    decisions = {v["decision"] for v in report["verdicts"] if v["op"].startswith("ringfence")}
    assert decisions == {decision}, result["text"]
    ours, eager = result["errors"]
    assert ours <= 1.5 * eager < 0.1  # of the same roundings, in another order


@pytest.mark.parametrize("collective", [*COLLECTIVES, "auto"])
def test_two_ranks_serve_mixed_sizes(collective: str) -> None:
    results = run_ranks(2, serve, {"collective": collective}, backend="nccl", timeout=150)
    chosen = "ringfence" if collective == "auto" else collective
    for result in results:
        check(result, chosen)
        ((name, transport, _),) = result["open"]
        assert (name, transport) == (chosen, "peer")
        assert result["tested"] and all((e, c) == (None, None) and n > 3 for e, c, n in result["tested"])
        if collective == "auto":
            assert result["report"]["candidates"] == [
                "mnnvl/multicast: multicast is turned off (NCCL_NVLS_ENABLE=0 on rank 0)",
                "ringfence/peer: chosen",
            ]
        plain = [v for v in result["report"]["verdicts"] if v["op"] == "ringfence::all_reduce"]
        assert len(plain) == 1
    assert results[0]["words"] == results[1]["words"]


@pytest.mark.skipif(GPUS < 4, reason=f"needs four CUDA devices, {GPUS} here")
@pytest.mark.parametrize("collective", ["trtllm", "ringfence", "auto"])
def test_four_ranks_serve_mixed_sizes(collective: str) -> None:
    results = run_ranks(4, serve, {"collective": collective}, backend="nccl", timeout=150)
    for result in results:
        check(result, "ringfence" if collective == "auto" else collective)
        if collective == "auto":
            assert result["report"]["candidates"] == [
                "mnnvl/multicast: multicast is turned off (NCCL_NVLS_ENABLE=0 on rank 0)",
                "ringfence/peer: chosen",
            ]
        assert result["words"] == results[0]["words"]


def demotions(rank: int) -> dict[str, Any]:
    """What becomes of a kernel that is wrong on one rank, that cannot be captured there, or has no memory."""
    from ringfence.runtime.collectives import ringfence as own
    from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of

    results = {}

    def wrong(self: Any, x: Tensor, *rest: Any) -> None:
        original(self, x, *rest)
        if rank == 1:
            rest[-1][0, 0] += 1

    def host_sync(self: Any, x: Tensor, *rest: Any) -> None:
        if rank == 1 and torch.cuda.is_current_stream_capturing():
            x.sum().item()
        original(self, x, *rest)

    def no_memory(*_: Any) -> Any:
        if rank == 1:
            raise MemoryError("no memory left on this rank")
        return peer(*_)

    def start_over() -> None:
        torch._dynamo.reset()
        close_workspaces(GROUP)
        workspaces_of(GROUP).failed.clear()

    original, peer = own.RingfenceKernels.run, own.create
    for name, target, attribute, fault in (
        ("wrong", own.RingfenceKernels, "run", wrong),
        ("host sync", own.RingfenceKernels, "run", host_sync),
        ("no memory", own, "create", no_memory),
    ):
        with mock.patch.object(target, attribute, fault):
            results[name] = serve(rank, {"collective": "auto", "piece_compiler": "eager"}, steps=6)
        start_over()
    with mock.patch.object(own, "create", no_memory):
        try:
            serve(rank, {"collective": "ringfence", "piece_compiler": "eager"}, steps=1)
        except Exception as error:
            results["forced"] = f"{type(error.__cause__ or error).__name__}: {error}"
    torch._dynamo.reset()
    try:
        serve(rank, {"collective": "mnnvl", "transport": "multicast"}, steps=1)
    except Exception as error:
        results["multicast"] = str(error)
    return results


def test_a_collective_that_fails_on_one_rank_is_passed_over_on_all() -> None:
    for result in run_ranks(2, demotions, backend="nccl", timeout=240):
        check(result["wrong"], "mnnvl")
        assert "self-test failed: rank 1: eager, payload ordinary" in result["wrong"]["text"]
        check(result["host sync"], "ringfence", decision="SPLIT")
        assert "self-test failed: rank 1: capture raised" in result["host sync"]["text"]
        check(result["no memory"], "mnnvl")
        assert "rank 1: MemoryError: no memory left on this rank" in result["no memory"]["text"]
        assert "collective='ringfence' cannot be had here" in result["forced"]
        assert "no memory left on this rank" in result["forced"]
        assert "multicast is turned off" in result["multicast"]


def closed(rank: int) -> str:
    import ringfence
    from ringfence.runtime.collectives.workspace import close_workspaces
    from ringfence.runtime.errors import WorkspaceReplacedError

    model = make_model(rank)
    compiled = torch.compile(model, backend=ringfence.Backend(capture_sizes=[4], piece_compiler="eager"))
    x = torch.randn(4, H, device="cuda", dtype=DTYPE)
    with torch.no_grad():
        compiled(x)
        compiled(x)
        close_workspaces(GROUP)
        try:
            compiled(x)
        except WorkspaceReplacedError:
            torch._dynamo.reset()
            served = torch.compile(model, backend=ringfence.Backend(piece_compiler="eager"))(x)
            off = error(served, model(x).float())
            return "served again" if off < 0.05 else f"off by {off}"
    return "not refused"


def test_a_graph_over_a_closed_workspace_is_refused() -> None:
    assert run_ranks(2, closed, backend="nccl", timeout=120) == ["served again"] * 2


def bits(rank: int) -> dict[str, bool]:
    """Is row 0 of a call the same, bit by bit, whatever the token count, eager or replayed, run after run?"""
    from ringfence.runtime.channel import open_channel
    from ringfence.runtime.collectives import ops
    from ringfence.runtime.collectives.ready import Wanted, prepare
    from ringfence.runtime.groups import describe_group

    hidden = 8192
    device = torch.device("cuda", rank)
    group = describe_group(GROUP, device)
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(512, hidden, generator=generator, device="cuda").to(DTYPE)
    generator.manual_seed(9)
    residual = torch.randn(512, hidden, generator=generator, device="cuda").to(DTYPE)
    weight = torch.randn(hidden, generator=generator, device="cuda").to(DTYPE)
    seen = {}
    for collective in (*(COLLECTIVES if group.size == 2 else ("trtllm",)), "reference"):
        if collective != "reference":
            prepare(open_channel(group.name, seconds=60), group, device, Wanted(collective, "auto", hidden, DTYPE))
        rows: dict[str, list[Tensor]] = {"norm": [], "sum": []}
        for tokens in (1, 2, 3, 16, 64, 100, 128, 256, 512, 1):
            out = ops.all_reduce_add_rms_norm(x[:tokens], residual[:tokens], weight, 1e-6, 0.0, GROUP, collective)
            for name, value in zip(rows, out, strict=True):
                rows[name].append(value[:1].clone())
        seen |= {f"{collective} {name}": all(torch.equal(r, kept[0]) for r in kept) for name, kept in rows.items()}
    return seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_which_collectives_return_the_same_bits_whatever_the_token_count(ranks: int) -> None:
    """What the size table's column ``bitwise`` rests on."""
    from ringfence.runtime.collectives.links import Topology
    from ringfence.runtime.collectives.size_table import TABLE, find_row
    from ringfence.runtime.hazards.situation import Collective

    if ranks > GPUS:
        pytest.skip(f"needs {ranks} CUDA devices, {GPUS} here")
    first, *others = run_ranks(ranks, bits, backend="nccl", timeout=120)
    assert all(first == other for other in others)
    print(f"the same bits on {ranks} ranks:", first)
    for collective in COLLECTIVES if ranks == 2 else ("trtllm",):
        row = find_row(TABLE, Collective(collective), "peer", (9, 0), ranks, Topology.NVSWITCH)
        assert row is not None
        if torch.cuda.get_device_capability() == row.capability and row.bitwise:
            assert first[f"{collective} norm"] and first[f"{collective} sum"]


CALLS = 100_000
SIZES = (1, 16, 128)
PER_GRAPH = 25


def soak(rank: int, collective: str) -> dict[str, Any]:
    """Calls in graphs and between them, three sizes, every one compared on the device with what it should give."""
    from ringfence.runtime.channel import open_channel
    from ringfence.runtime.collectives import ops
    from ringfence.runtime.collectives.ready import Wanted, prepare
    from ringfence.runtime.groups import describe_group

    hidden = 2048
    device = torch.device("cuda", rank)
    channel = open_channel(GROUP, seconds=60)
    wanted = Wanted(collective, "auto", hidden, DTYPE, sizes=SIZES)
    ready = prepare(channel, describe_group(GROUP, device), device, wanted)
    assert ready.workspace is not None
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    weight = torch.rand(hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(5)).to(DTYPE)

    def call(x: Tensor, residual: Tensor, right: tuple[Tensor, Tensor]) -> None:
        norm, out = ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, 0.0, GROUP, collective)
        wrong.add_(((norm != right[0]).any() | (out != right[1]).any()).long())

    def inputs(tokens: int, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        generator = torch.Generator("cuda")
        parts = []
        for r in range(2):
            part = torch.randn(tokens, hidden, generator=generator.manual_seed(10 * seed + r), device="cuda").to(DTYPE)
            part.view(torch.int32)[:, ::7] = -(2**31) + 0x50005  # negative subnormals
            part.view(torch.int32)[:, 1::7] = -(2**31)
            parts.append(part)
        residual = torch.randn(tokens, hidden, generator=generator.manual_seed(seed), device="cuda").to(DTYPE)
        right = ops.all_reduce_add_rms_norm(parts[rank], residual, weight, 1e-6, 0.0, GROUP, collective)
        total = parts[0].float() + parts[1].float() + residual.float()
        assert error(right[1], total) < 2.0**-5
        return parts[rank], residual, right

    sets = {n: [inputs(n, 100 * n + k) for k in range(3)] for n in SIZES}
    graphs = {}
    for n in SIZES:
        call(*sets[n][0])
        torch.cuda.synchronize()
        dist.barrier()
        graphs[n] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[n], capture_error_mode="thread_local"):
            for i in range(PER_GRAPH):
                call(*sets[n][i % 3])
    done, turn = 0, 0
    order = torch.Generator().manual_seed(17)  # the same on both ranks
    while done < CALLS:
        n = SIZES[int(torch.randint(3, (), generator=order))]
        if turn % 3 == 0:
            for i in range(8):
                call(*sets[SIZES[(turn + i) % 3]][i % 3])
            done += 8
        graphs[n].replay()
        done += PER_GRAPH
        turn += 1
    finished = torch.cuda.Event()
    finished.record()
    finished.synchronize()
    # A check that cannot fail would not notice this either.
    before = int(wrong)
    x, residual, (norm, out) = sets[1][0]
    call(x, residual, (norm, out + 1))
    return {
        "calls": done,
        "wrong": before,
        "noticed": int(wrong) - before,
        "words": ready.workspace.kernels.control_words(),
    }


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_100k_calls_eager_and_replayed(collective: str) -> None:
    first, second = run_ranks(2, soak, collective, backend="nccl", timeout=150)
    assert first == second
    assert first["calls"] >= CALLS and first["wrong"] == 0 and first["noticed"] == 1
