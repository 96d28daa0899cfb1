"""What the ranks of test_callable.py do."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ringfence
from ringfence.runtime.collectives import reference
from ringfence.runtime.collectives.workspace import workspaces_of
from support import TOLERANCE, relative_error

H = 256


def drawn(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` is this rank's own, residual and weight are all ranks'."""
    mine, all_ranks = torch.Generator().manual_seed(7 + rank), torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=mine).to(dtype)
    return x, torch.randn(shape, generator=all_ranks).to(dtype), torch.rand(H, generator=all_ranks).to(dtype) + 0.5


def expected(
    shape: tuple[int, ...], dtype: torch.dtype, ranks: int, residual: bool, weight: bool, eps: float, bias: float
) -> tuple[Tensor, Tensor]:
    """In float64, but for the sum's one rounding to the dtype."""
    total = torch.stack([drawn(rank, shape, dtype)[0] for rank in range(ranks)]).double().sum(0)
    _, r, w = drawn(0, shape, dtype)
    total = (total.to(dtype) + r if residual else total.to(dtype)).double()
    norm = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return norm * (w.double() + bias if weight else 1.0), total


def eager_and_traced(rank: int) -> dict[str, float]:
    """The largest relative error, by way and dtype."""
    torch.set_grad_enabled(False)
    solo = [dist.new_group([i]) for i in range(2)][rank]
    ringfence.register_group("tp:0", dist.new_group([0, 1]))
    worst: dict[str, float] = {}

    def note(way: str, dtype: torch.dtype, ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        for mine, theirs in zip(ours, wanted, strict=True):
            assert mine.dtype == dtype and mine.is_contiguous()
            error = relative_error(mine, theirs) / TOLERANCE[dtype]
            worst[way] = max(worst.get(way, 0.0), error)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((3, H), (2, 2, H), (H,)):
            x, r, w = drawn(rank, shape, dtype)
            both = expected(shape, dtype, 2, True, True, 1e-5, 0.0)
            note("add", dtype, ringfence.all_reduce_add_rms_norm(x, r, w, 1e-5), both)
            note("alias", dtype, ringfence.all_reduce_add_rms_norm(x, r, w, 1e-5, group="tp:0"), both)
            strided = x.repeat_interleave(2, dim=0)[::2]
            assert not strided.is_contiguous()
            note("strided", dtype, ringfence.all_reduce_add_rms_norm(strided, r, w, 1e-5), both)
            bare = expected(shape, dtype, 2, False, False, 1e-6, 0.0)
            note("bare", dtype, ringfence.all_reduce_add_rms_norm(x, None, None), bare)
            gemma = expected(shape, dtype, 2, True, True, 1e-6, 1.0)
            note("gemma", dtype, ringfence.all_reduce_add_rms_norm(x, r, w, weight_bias=1.0), gemma)
            note("sum", dtype, (ringfence.all_reduce(x, group=dist.group.WORLD),), bare[1:])
            alone = ringfence.all_reduce(x, group=solo)
            assert torch.equal(alone, x) and alone.data_ptr() != x.data_ptr()
    x, r, w = drawn(rank, (3, H), torch.float32)
    both = expected((3, H), torch.float32, 2, True, True, 1e-6, 0.0)
    for name in ("eager", "aot_eager", "inductor"):
        traced = torch.compile(_model, backend=name, fullgraph=True)
        note(name, torch.float32, traced(x, r, w), (*both, both[0] * 2))
    return worst


def _model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norm, r = ringfence.all_reduce_add_rms_norm(x, r, w)
    return norm, r, ringfence.all_reduce(norm)


def _mixed(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    norm, r = ringfence.all_reduce_add_rms_norm(x, r, w, 1e-5)
    r = r + ringfence.all_reduce(norm.cos())
    norm = torch.nn.functional.rms_norm(r, (H,), w, 1e-6)
    return *ringfence.all_reduce_add_rms_norm(norm, None, w, weight_bias=1.0), ringfence.all_reduce(r).sin()


def in_ringfences_graphs(rank: int) -> dict[str, Any]:
    """Called by hand in a model that ringfence compiles: captured or not."""
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {}
    for captured in (False, True):
        torch._dynamo.reset()
        backend = ringfence.Backend(
            piece_compiler="eager", capture_sizes=[3] if captured else [], graphs="simulated", agree_seconds=180
        )
        compiled = torch.compile(_mixed, backend=backend, fullgraph=True)
        worst = 0.0
        for step in range(4):
            x, r, w = drawn(rank + 10 * step, (3, H), torch.float32)
            r, w = r + step, w + step
            pairs = zip(compiled(x, r, w), _mixed(x, r, w), strict=True)
            worst = max(worst, *(relative_error(a, b.double()) for a, b in pairs))
        (report,) = backend.reports
        sites = [(s.kind, s.group, s.fused, s.eps, s.source) for s in report.sites]
        found["captured" if captured else "plain"] = (worst, sites, [(v.op, v.rule, v.site) for v in report.verdicts])
    return found


def prepared(rank: int) -> dict[str, Any]:
    """With FlashInfer's kernels replaced by torch: chosen, made, tested, used where they serve, and captured."""
    from fake_flashinfer import FakeFlashInfer, installed

    from ringfence.runtime.replay.capture import SimulatedGraphs

    torch.set_grad_enabled(False)
    found: dict[str, Any] = {}
    with installed(FakeFlashInfer("0")) as package:
        made = ringfence.prepare(None, H, torch.bfloat16, 8, agree_seconds=180)
        found["prepared"], found["text"], found["patience"] = made, str(made), package.kernels[-1].seconds
        (workspace,) = workspaces_of("0").open
        found["constants"] = sorted(name for name, _ in workspace._constants)
        found["stored"] = workspaces_of("world") is workspaces_of("0")
        x, r, w = drawn(rank, (3, H), torch.bfloat16)
        both = expected((3, H), torch.bfloat16, 2, True, True, 1e-6, 0.0)
        package.calls.clear()
        ours = ringfence.all_reduce_add_rms_norm(x, r, w)
        found["error"] = max(relative_error(a, b) for a, b in zip(ours, both, strict=True))
        ringfence.all_reduce(x)
        big = drawn(rank, (9, H), torch.bfloat16)  # more than was prepared
        ringfence.all_reduce_add_rms_norm(*big)
        ringfence.all_reduce_add_rms_norm(x.float(), r.float(), w.float())  # another dtype
        found["calls"] = list(package.calls)
        found["traced"] = _through_a_backend(rank, package)

        # in somebody else's capture, over kernels that a simulation can record; all ranks hold the same x here
        x = drawn(5, (3, H), torch.bfloat16)[0]
        real, reference.all_reduce = reference.all_reduce, lambda x, group: x * 2
        try:
            static = x.clone()
            piece = SimulatedGraphs().capture(lambda s: ringfence.all_reduce_add_rms_norm(s, r, w), (static,))
            poisoned = all(bool(o.isnan().all()) for o in piece.outputs)
            errors = []
            for factor in (1.0, -3.0):
                static.copy_(x * factor)
                piece.replay()
                total = (static.double() * 2).to(torch.bfloat16) + r
                norm = reference.rms_norm(total.double(), w.double(), 1e-6, 0.0)
                errors.append(max(relative_error(a, b) for a, b in zip(piece.outputs, (norm, total), strict=True)))
        finally:
            reference.all_reduce = real
        found["captured"] = poisoned, max(errors), len(package.calls)
        again = ringfence.prepare("0", H, torch.bfloat16, 8, agree_seconds=180)
        found["again"] = len(package.kernels), again.collective
        ringfence.close_workspaces("world")
        found["closed"] = workspaces_of("0").prepared, len(workspaces_of("0").open)
        with installed(FakeFlashInfer("0", own=True)):
            ringfence.prepare(None, H, torch.bfloat16, 8, collective="ringfence", agree_seconds=180)
            found["needs none"] = [dict(w._constants) for w in workspaces_of("0").open]
            ringfence.close_workspaces("world")
        package.calls.clear()
        ringfence.all_reduce(x)
        found["after"] = list(package.calls)
    return found


def _through_a_backend(rank: int, package: Any) -> tuple[float, list[str], str]:
    """Traced, with the workspace that is there already."""
    package.calls.clear()
    backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180, max_tokens=8)
    x, r, w = drawn(rank, (3, H), torch.bfloat16)
    ours = torch.compile(_model, backend=backend, fullgraph=True)(x, r, w)
    both = expected((3, H), torch.bfloat16, 2, True, True, 1e-6, 0.0)
    worst = max(relative_error(a, b) for a, b in zip(ours, both, strict=False))
    return worst, sorted({name for name, *_ in package.calls}), backend.reports[0].collective


def disagreeing(rank: int) -> list[str]:
    """Ranks that ask for different things: each hears of it."""
    said = []
    for hidden, tokens in ((H, 8 + rank), (H + rank, 8)):
        try:
            ringfence.prepare(None, hidden, torch.bfloat16, tokens, agree_seconds=180)
        except ringfence.RankMismatch as error:
            said.append(str(error))
    return said


def wrong_on_rank_1(rank: int) -> dict[str, tuple[str, float]]:
    """Calls that all ranks make, and that one is given wrongly: what each rank hears, after how many seconds."""
    heard: dict[str, tuple[str, float]] = {}

    def both(way: str, call: Any, right: dict[str, Any], wrong: dict[str, Any]) -> None:
        start = time.monotonic()
        try:
            call(**(wrong if rank else right))
            heard[way] = "", 0.0
        except Exception as error:
            inner = getattr(error, "inner_exception", error)
            heard[way] = f"{type(inner).__name__}: {inner}", time.monotonic() - start
        call(**right)  # on both: they are in step

    def compiles(**options: Any) -> None:
        torch._dynamo.reset()
        backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180, **options)
        with torch.no_grad():
            torch.compile(_reduced, backend=backend, fullgraph=True)(torch.ones(3, H))

    def prepares(**given: Any) -> None:
        more = dict(hidden=H, dtype=torch.float32, max_tokens=8, agree_seconds=180) | given
        ringfence.prepare(more.pop("group", None), **more)

    def prepares_experts(**given: Any) -> None:
        more = dict(capacity=8, top_k=2, hidden=H, dtype=torch.float32, agree_seconds=180)
        ringfence.moe.prepare(None, **more | given)

    def watches(**given: Any) -> None:
        ringfence.watch(None, **dict(agree_seconds=180) | given).close()

    both("never met", watches, {}, {"on_hang": "shout"})
    both("hidden", prepares, {}, {"hidden": 0})
    both("device", prepares, {}, {"device": "gpu"})
    both("agree_seconds", prepares, {}, {"agree_seconds": "long"})
    both("top_k", prepares_experts, {}, {"top_k": 0})
    both("option", watches, {}, {"capture_sizes": [4]})
    both("op", compiles, {}, {"split_ops": ["nope::op"]})
    both("group_names", compiles, {}, {"group_names": {"tp:0": "nope"}})
    both("later", compiles, {}, {"collective": "trtllm"})  # found where the ranks have met
    both("disagree", watches, {"step_seconds": 30}, {"step_seconds": 31})
    both("by another name", prepares, {"group": "0"}, {"group": None})
    return heard


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    reduced = torch.ops._c10d_functional.all_reduce(x * 2, "sum", "0")
    summed = torch.ops._c10d_functional.wait_tensor(reduced) + x
    return torch.nn.functional.rms_norm(summed, (H,), None, 1e-6), summed


def compared(rank: int) -> list[str]:
    """With ``check_every_step``: steps that differ in one thing."""
    said = []
    for other in (("prefill", 4, False), ("decode", 5, False), ("decode", 4, True), ("decode", -1, False)):
        watch = ringfence.watch(None, agree_seconds=180, check_every_step=True)
        name, tokens, replay = other if rank else ("decode", 4, False)
        for mine in (("decode", 4, False), (name, tokens, replay)):
            try:
                with watch.step(mine[0], mine[1], replay=mine[2]):
                    pass
            except (ringfence.RankMismatch, ringfence.ArgumentError) as error:
                said.append(f"{type(error).__name__}: {error}")
        watch.close()  # only the last call was given up, so that all are in step still
    return said


def watched(rank: int, folder: str) -> dict[str, Any]:
    """Steps of an engine; in the fifth, rank 1 throws, and rank 0 hears of it between two of its own."""
    wrong, steps = wrong_on_rank_1(rank), compared(rank)
    watch = ringfence.watch(None, on_hang="report", step_seconds=30, journal_dir=folder, agree_seconds=180)
    unlike = watched_unlike(rank)  # which the one that runs survives
    x = torch.ones(4, H)
    for tokens in (4, 4, 1, 4):
        with watch.step("decode", tokens), torch.no_grad():
            ringfence.all_reduce(x[:tokens])
    before = watch.journal.position()
    heard = ""
    if rank == 1:
        try:
            with watch.step("prefill", 7):
                raise ValueError("out of pages")
        except ValueError as error:
            heard = str(error)
    deadline = time.monotonic() + 120
    while rank == 0 and not heard and time.monotonic() < deadline:
        try:
            with watch.step("prefill", 7, replay=True):
                time.sleep(0.1)
        except ringfence.GroupFailureError as error:
            heard = f"{type(error).__name__}: {error}"
    watch.close()
    return {"before": before, "heard": heard, "unlike": unlike, "wrong": wrong, "steps": steps}


def watched_unlike(rank: int) -> str:
    try:
        ringfence.watch("0", agree_seconds=180, check_every_step=bool(rank))
    except ringfence.RankMismatch as error:
        return str(error)
    return ""


def one_after_the_other(rank: int) -> dict[str, Any]:
    done = {}
    for body in (eager_and_traced, in_ringfences_graphs, prepared, disagreeing):
        torch._dynamo.reset()
        done[body.__name__] = body(rank)
    return done
