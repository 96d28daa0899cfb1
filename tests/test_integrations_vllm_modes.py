"""What each mode does in vLLM, with stand-ins for vLLM's modules and ops: its pass, its backend, its worker."""

from __future__ import annotations

import json
import types
from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
from fake_vllm import CompilationMode, CUDAGraphMode, FakeVllm, wrapped
from fake_vllm import said as said
from fake_vllm import vllm as vllm
from torch import Tensor

import ringfence
from ringfence.integrations.targets import resolve
from ringfence.integrations.vllm import backend as named_backend
from ringfence.integrations.vllm import digest, hooked, passes, register, request, worker
from ringfence.integrations.vllm.request import Request
from ringfence.runtime.collectives import ops
from ringfence.runtime.collectives.prepared import Prepared
from ringfence.runtime.errors import HangError, PoisonedError
from ringfence.runtime.groups import group_exists
from ringfence.runtime.watch.steps import Watch
from ringfence.runtime.watch.supervision import Asked, Supervision
from ringfence.runtime.watch.supervisor import supervisor_for
from support import BoundedKernels, aot_graph

H, LAYERS = 16, 3
pytestmark = pytest.mark.usefixtures("engines")


def by_name(patch: pytest.MonkeyPatch) -> None:
    """Pass mode by the reference, which fuses only where somebody asks for it."""
    patch.setenv("RINGFENCE", "pass")
    patch.setenv("RINGFENCE_OPTIONS", '{"collective": "reference"}')


def layers(x: Tensor, *weights: Tensor) -> Tensor:
    """The embedding's all-reduce and a first norm; then two of each in every layer, as vLLM's Llama has them."""
    all_reduce = engine_ops.op("vllm::all_reduce")
    residual = all_reduce(x, "tp:0")
    x = engine_ops.op("vllm_ir::rms_norm")(residual, weights[0], 1e-6)
    for weight in weights[1:]:
        x = all_reduce(torch.tanh(x), "tp:0")
        x, residual = engine_ops.op("vllm_ir::fused_add_rms_norm")(x, residual, weight, 1e-6)
    return x


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(H, generator=generator) + 0.5 for _ in range(2 * LAYERS + 1)]
    return [torch.randn(4, H, generator=generator), *weights]


def test_the_pass_fuses_every_site_and_needs_no_group(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that compiles may stand beside one that loads: it can ask nobody, and leaves what is found at the call."""
    assert not dist.is_initialized()
    by_name(monkeypatch)
    register()
    config = vllm.config()
    manager = resolve("vllm.compilation.passes.pass_manager.PostGradPassManager")()
    wrapping = resolve("ringfence.integrations.vllm.wrapping.wrap")
    wrapping(hooked.CONFIGURE, passes.configure)
    for _ in range(2):
        manager.configure(config)
    assert [type(one).__name__ for one in manager.passes] == ["NoOpEliminationPass"] * 2 + ["FusePass"]
    gm = aot_graph(layers, *inputs())
    manager(gm.graph)
    fused = [n for n in gm.graph.nodes if n.target in ops.FUSED]
    assert len(fused) == 2 * LAYERS + 1
    assert {n.args[-2:] for n in fused} == {("tp:0", ops.PREPARED)}
    assert not [n for n in gm.graph.nodes if "vllm" in str(n.target)]


def test_the_pass_leaves_what_is_to_be_skipped(vllm: FakeVllm) -> None:
    for skipped, kept in ((["test_integrations_vllm_modes.py:*"], 0), (["another.py:*"], 2 * LAYERS + 1)):
        one = passes.FusePass(request.Request("pass", {"skip_sites": skipped}), torch.device("cpu"))
        assert sum(site.fused for site in one.fuse(aot_graph(layers, *inputs()).graph)) == kept


def test_larger_steps_than_vllms_fusion_takes_stay_as_they_are(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what a kernel serves, the op would be an all-reduce, an add and a norm that nothing compiles together."""
    monkeypatch.setenv("RINGFENCE", "pass")
    register()
    cases: list[tuple[dict[str, Any], str, int | None]] = [
        ({}, "cuda", 1024 // (H * 4)),  # vLLM's limit in bytes, by the bytes of a token
        ({"max_tokens": 8}, "cuda", 8),
        ({"max_tokens": 8}, "cpu", 8),
        ({}, "cpu", None),
    ]
    for options, device, up_to in cases:
        monkeypatch.setenv("RINGFENCE_OPTIONS", json.dumps(options))
        config = vllm.config(device=device)
        asked = request.of_config(config)
        assert asked is not None and asked.up_to == up_to
        assert config.compilation_config.compile_ranges_endpoints == ([up_to] if up_to else None)
        one = passes.FusePass(asked, torch.device("cpu"))
        ranges = [types.SimpleNamespace(start=1, end=8), types.SimpleNamespace(start=9, end=32)]
        wanted = [True, True] if up_to is None else [up_to >= 8, False]
        assert [one.is_applicable_for_range(r) for r in ranges] == wanted


def test_a_pass_of_other_options_release_or_device_is_another_one(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    plain = Request("pass")
    found = [digest.digest_of(plain), digest.digest_of(plain, torch.device("cpu"))]
    found.append(digest.digest_of(Request("pass", {"numerics": "strict"})))
    found.append(digest.digest_of(Request("pass", up_to=8)))
    found.append(digest.digest_of(Request("pass", prepared="trtllm")))
    table = tmp_path / "table.json"
    for text in ("1", "2"):
        table.write_text(text)
        found.append(digest.digest_of(Request("pass", {"size_table": str(table)})))
    with monkeypatch.context() as patch:
        patch.setattr(digest, "versions", lambda: {"flashinfer-python": "0.7.2"})
        found.append(digest.digest_of(plain))
    with monkeypatch.context() as patch:
        patch.setattr(digest, "sources", lambda: [("compile_passes/find.py", b"another")])
        found.append(digest.digest_of(plain))
    assert len(set(found)) == len(found)
    assert digest.digest_of(Request("pass")) == found[0]
    names = [name for name, _ in digest.sources()]
    for part in ("compile_passes/find.py", "collectives/ops.py", "collectives/cuda/", "integrations/vllm/passes.py"):
        assert any(part in name for name in names), part


@pytest.fixture
def tp(vllm: FakeVllm, fake_group: None) -> FakeVllm:
    vllm.group.device_group = dist.new_group([0, 1])
    return vllm


def run_by_the_worker(tp: FakeVllm, config: Any) -> dict[str, Any]:
    """What a worker says of itself whose graph went through vLLM's passes after it had started."""
    started = tp.started(config)
    assert group_exists("tp:0"), "graphs name it so, also those that another process compiled"
    gm = aot_graph(layers, *inputs())
    manager = resolve("vllm.compilation.passes.pass_manager.PostGradPassManager")()
    manager.configure(config)
    manager.passes = [one for one in manager.passes if type(one).__name__ != "AllReduceFusionPass"]  # vLLM: off
    manager(gm.graph)

    def step(tokens: int, **_: Any) -> None:
        tp.steps.append(tokens)
        gm(*inputs())
        engine_ops.op("vllm::all_reduce")(inputs()[0], "tp:0")  # of no graph: the sampler's, say

    started.worker.model_runner._dummy_run = step
    assert started.worker.compile_or_warm_up_model() == "warm"
    status: dict[str, Any] = started.ringfence()
    return status


def test_where_no_kernels_serve_vllms_all_reduces_stay(
    tp: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """The reference would displace vLLM's own all-reduce, which is faster."""
    monkeypatch.setenv("RINGFENCE", "pass")
    register()
    status = run_by_the_worker(tp, tp.config())
    assert (status["sites"], status["fused"], status["collective"]) == (8, 0, "none")
    (line,) = said
    assert ": pass, 0 of 8 all-reduces fused, all of them are vLLM's own, because no kernels serve here (" in line
    assert line.endswith("captured: as vLLM does; hazards: none")


def test_the_pass_goes_as_far_as_the_kernels(tp: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond them vLLM's all-reduce is the faster one; and caches tell by the digest who carries the op out."""
    row = H * 4
    found: dict[int, Request] = {}
    for takes in (0, 4, 1000):

        def prepare(name: str, *_: Any, takes: int = takes, **others: Any) -> Prepared:
            who = "trtllm" if takes else "reference"
            return Prepared(name, who, (), H, "float32", 32, takes * row, 0, True, "device_epoch: it counts itself")

        monkeypatch.setattr(worker, "prepare", prepare)
        monkeypatch.setenv("RINGFENCE", "pass")
        register()
        config = tp.config({"other": 1})
        tp.started(config)
        for _ in range(2):  # vLLM runs it again where it copies a configuration
            asked = request.of_config(config)
            assert asked is not None and asked.fuses is (takes > 0) and asked.up_to == (4 if takes == 4 else None)
            json.dumps(config.additional_config)
            config.__post_init__()
        endpoints = config.compilation_config.compile_ranges_endpoints
        assert set(endpoints or ()) == ({4, 32} if takes == 4 else set())
        manager = resolve("vllm.compilation.passes.pass_manager.PostGradPassManager")()
        manager.configure(config)
        assert ("FusePass" in [type(one).__name__ for one in manager.passes]) is (takes > 0)
        found[takes] = asked
    digests = {one.digest for one in found.values()} | {digest.digest_of(Request("pass"))}
    assert len(digests) == 4


def test_a_step_that_nobody_watches_ends_the_patience_of_kernels_and_tells_a_lost_wait(
    tp: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """No other code of the host's runs while vLLM replays its graphs."""
    supervisor, kernels = supervisor_for(asked := Asked()), BoundedKernels()

    def prepare(name: str, *_: Any, **others: Any) -> Prepared:
        supervisor.waits.add(name, kernels, 30.0)
        supervisor.waits.prepared(1800.0)
        return Prepared(name, "ringfence", (), H, "float32", 32, 1 << 20, 0, True, "bounded_waits: they end")

    def watch(name: str, **options: Any) -> Watch:
        """As for a peer that is one."""
        assert options == {"device": torch.device(tp.group.device)}, "no option of a watch"
        return Watch(name, Supervision(supervisor), supervisor.journal, asked)

    monkeypatch.setattr(worker, "prepare", prepare)
    monkeypatch.setattr(worker, "watch", watch)
    monkeypatch.setenv("RINGFENCE", "pass")
    register()
    started, steps = tp.started(tp.config()), types.SimpleNamespace(total_num_scheduled_tokens=3)
    started.worker.compile_or_warm_up_model()
    assert kernels.seconds == 1800.0 and not said[0].endswith("watched")
    assert [started.execute_model(steps) for _ in range(2)] == [3, 3]
    assert kernels.seconds == 30.0, "the first step has ended"
    kernels.lost = HangError("rank 0 waited in vain for rank 1", (1,))
    with pytest.raises(HangError, match="waited in vain for rank 1"):
        started.execute_model(steps)
    kernels.lost = None
    for call in (lambda: started.execute_model(steps), started.__dict__["_ringfence"].watch.check):
        with pytest.raises(PoisonedError, match="waited in vain for rank 1"):
            call()
    assert supervisor.knows(asked)


def test_a_worker_prepares_before_it_compiles_anything(
    tp: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    by_name(monkeypatch)
    register()
    status = run_by_the_worker(tp, tp.config())
    assert (status["sites"], status["fused"], status["collective"]) == (8, 7, "reference") and tp.steps == [32]
    (line,) = said
    assert line.startswith(f"ringfence {ringfence.__version__} in vLLM 0.32.0: pass, 7 of 8 all-reduces fused, ")
    assert "carried out by reference" in line and line.endswith("hazards: none") and "\n" not in line


@pytest.mark.parametrize(
    ("version", "read"),
    [("0.32.0+cpu", True), ("0.33.1.dev3+cu130", True), ("0.31.9", False), ("0.34.0", False), ("dev", False)],
)
def test_the_line_says_of_which_releases_vllm_was_read(
    tp: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str], version: str, read: bool
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setenv("RINGFENCE", "guard")
    register()
    tp.started(tp.config()).worker.compile_or_warm_up_model()
    (line,) = said
    assert (
        f"in vLLM {version}{'' if read else ' (read from 0.32 to before 0.34)'}: guard, vLLM's fused all-reduce: none; "
        in line
    )
    assert line.endswith("; steps are watched")


def test_another_rank_than_the_first_says_nothing(
    tp: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("RINGFENCE", "pass")
    register()
    tp.group.rank_in_group = 1
    started = tp.started(tp.config())
    started.worker.compile_or_warm_up_model()
    assert said == []


def test_one_rank_alone_is_left_as_it_is(tp: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE", "backend")
    register()
    tp.group.world_size = 1
    started = tp.started(tp.config())
    started.worker.compile_or_warm_up_model()
    assert tp.steps == [] and wrapped(hooked.INIT_BACKEND) == [] and started.ringfence()["collective"] == "none"


def test_backend_compiles_captures_and_counts(tp: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch.compile: what vLLM is handed in place of the backend's name."""
    monkeypatch.setenv("RINGFENCE", "backend")
    options = {"piece_compiler": "eager", "graphs": "simulated", "capture_sizes": [2, 4]}
    monkeypatch.setenv("RINGFENCE_OPTIONS", json.dumps(options))
    register()
    config = tp.config()
    started = tp.started(config)
    backend = config.compilation_config.init_backend(config, prefix="backbone")
    assert isinstance(backend, ringfence.Backend) and "vllm::all_reduce" in backend.options.all_reduce_ops
    _, *weights = inputs()
    torch._dynamo.reset()
    model = torch.compile(layers, backend=backend, fullgraph=True)

    def step(tokens: int, **_: Any) -> None:
        tp.steps.append(tokens)
        x = torch.randn(tokens, H)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with torch.no_grad():
            model(x, *weights)

    step(7)
    started.worker.model_runner._dummy_run = step
    started.worker.compile_or_warm_up_model()
    assert tp.steps == [7, 4, 2], "each size is captured before a user's step has it"
    status = started.ringfence()
    assert (status["fused"], status["sites"], status["captured"]) == (7, 7, "sizes 2, 4")


def test_the_function_that_the_backends_name_stands_for(tp: FakeVllm) -> None:
    """vLLM calls it where nobody put a backend with options in its place."""
    ringfence.register_group("tp:0", tp.group.device_group)
    tp.current = tp.config({"ringfence": {"mode": "backend", "options": {"piece_compiler": "eager"}}})
    x, *weights = inputs()
    with torch.no_grad():
        expected = layers(x, *weights)
        torch.testing.assert_close(torch.compile(layers, backend=named_backend)(x, *weights), expected)


def test_guard_makes_vllms_workspace_ahead(tp: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that loads its graphs would not come to where the others make it."""
    monkeypatch.setenv("RINGFENCE", "guard")
    register()
    config = tp.config()
    tp.started(config)
    assert tp.made == [], "vLLM would not have made any"
    config.compilation_config.pass_config.fuse_allreduce_rms = True
    tp.started(config)
    assert tp.made == [(2, 0, 1024 // (32 * 4), 32, torch.float32, None)]
    config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
    tp.started(config)
    assert len(tp.made) == 1, "without vLLM's compiler nothing fuses"


def test_guard_watches_the_steps(tp: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE", "guard")
    register()
    config = tp.config()
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL_AND_PIECEWISE
    assert config.compilation_config.pass_config.fuse_allreduce_rms is None, "vLLM's kernels stay"
    started = tp.started(config)
    assert wrapped(hooked.CREATE_WORKSPACE)
    running = started.__dict__["_ringfence"]
    before = len(running.watch.journal.to_dict()["steps"])
    for tokens in (3, 0, 5):
        assert started.execute_model(types.SimpleNamespace(total_num_scheduled_tokens=tokens)) == tokens
    assert len(running.watch.journal.to_dict()["steps"]) - before == 2, "a step without tokens launches nothing"
    running.watch.close()
