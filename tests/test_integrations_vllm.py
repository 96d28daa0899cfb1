"""In vLLM: what is asked for, what is hooked, and what each mode does, with stand-ins for vLLM's modules and ops."""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import engine_ops
import pytest
import torch
import torch.distributed as dist
from fake_vllm import SIGNATURES, SIGNATURES_0_33, CompilationMode, CUDAGraphMode, FakeVllm, replaced
from torch import Tensor

import ringfence
from ringfence.integrations import environment, sglang
from ringfence.integrations.targets import Target, moved, parameters_of, resolve
from ringfence.integrations.vllm import backend as named_backend
from ringfence.integrations.vllm import digest, guard, hooked, passes, register, request, whole, worker
from ringfence.integrations.vllm.request import Request
from ringfence.runtime.channel import Channel
from ringfence.runtime.collectives import ops, reference
from ringfence.runtime.collectives.prepared import Prepared
from ringfence.runtime.errors import HangError, HazardError, OptionsError, PoisonedError
from ringfence.runtime.groups import group_exists
from ringfence.runtime.watch.steps import Watch
from ringfence.runtime.watch.supervision import Asked, Supervision
from ringfence.runtime.watch.supervisor import supervisor_for
from support import BoundedKernels, aot_graph

H, LAYERS = 16, 3
MODES = tuple(hooked.TARGETS)
ALL_TARGETS = tuple(dict.fromkeys(t for targets in hooked.TARGETS.values() for t in targets))


pytestmark = pytest.mark.usefixtures("engines")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    monkeypatch.delenv("RINGFENCE", raising=False)
    monkeypatch.delenv("RINGFENCE_OPTIONS", raising=False)
    return FakeVllm(monkeypatch)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged where vLLM shows it, by line."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("vllm.ringfence")
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    yield lines
    log.setLevel(before)
    log.removeHandler(handler)


def by_name(patch: pytest.MonkeyPatch) -> None:
    """Pass mode by the reference, which fuses only where somebody asks for it."""
    patch.setenv("RINGFENCE", "pass")
    patch.setenv("RINGFENCE_OPTIONS", '{"collective": "reference"}')


def wrapped(*targets: Target) -> list[str]:
    """Which of vLLM's functions have something of ours around them."""
    return [t.path for t in targets or ALL_TARGETS if hasattr(resolve(t.path), "__ringfence_wraps__")]


# -- contracts ------------------------------------------------------------------------


def test_what_is_hooked_has_the_stored_signatures(vllm: FakeVllm) -> None:
    assert {t.path: t.parameters for t in ALL_TARGETS} == SIGNATURES
    for path, parameters in SIGNATURES.items():
        if parameters is not None:
            assert parameters_of(resolve(path)) == parameters
    assert moved(ALL_TARGETS) == ()


def test_a_wrapper_has_the_signature_of_what_it_wraps(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the second process that registers would take its own wrapper for a moved target."""
    monkeypatch.setenv("RINGFENCE", "pass")
    for _ in range(2):
        register()
        assert moved(ALL_TARGETS) == ()
    once = resolve(hooked.EXECUTE_MODEL.path)
    assert not hasattr(once.__wrapped__, "__ringfence_wraps__"), "wrapped once, however often it registers"


# -- what is asked for ----------------------------------------------------------------


def test_nothing_is_done_unless_asked(vllm: FakeVllm, said: list[str]) -> None:
    register()
    config = vllm.config({"other": 1})
    assert config.additional_config == {"other": 1}
    assert config.compilation_config.pass_config.fuse_allreduce_rms is None
    started = vllm.started(config)
    assert started.worker.compile_or_warm_up_model() == "warm" and not hasattr(started, worker.STATUS)
    assert started.execute_model(types.SimpleNamespace(total_num_scheduled_tokens=3)) == 3
    assert said == []


def test_off_wraps_nothing_and_overrules_the_configuration(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE", "off")
    register()
    assert wrapped() == []
    monkeypatch.delenv("RINGFENCE")
    register()
    monkeypatch.setenv("RINGFENCE", "off")
    assert request.KEY not in vllm.config({"ringfence": "pass"}).additional_config


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RINGFENCE": "pas"}, "RINGFENCE='pas' is none of pass, backend, guard, nor 'off'"),
        ({"RINGFENCE_OPTIONS": "{}"}, "RINGFENCE_OPTIONS is set and RINGFENCE is not"),
        ({"RINGFENCE": "pass", "RINGFENCE_OPTIONS": "{on_hang"}, "RINGFENCE_OPTIONS is no JSON"),
        ({"RINGFENCE": "pass", "RINGFENCE_OPTIONS": "[1]"}, "RINGFENCE_OPTIONS holds [1], and is an object"),
        ({"RINGFENCE": "pass", "RINGFENCE_OPTIONS": '{"numeric": "strict"}'}, "did you mean 'numerics'?"),
        ({"RINGFENCE": "pass", "RINGFENCE_OPTIONS": '{"numerics": 3}'}, "numerics=3 is not one of"),
        ({"RINGFENCE": "guard", "RINGFENCE_OPTIONS": '{"capture_sizes": [1]}'}, "nothing that mode 'guard' takes"),
        ({"RINGFENCE": "pass", "RINGFENCE_OPTIONS": '{"on_hazard": "clean"}'}, "on_hazard='clean' is the backend's"),
        ({"RINGFENCE": "pass", "RINGFENCE_OPTIONS": '{"skip_sites": ["*.mlp", "layers.1"]}'}, "apart ('layers.1')"),
        (
            {"RINGFENCE": "pass", "RINGFENCE_OPTIONS": '{"skip_sites": ["layers.[01].*"]}'},
            "compiles those that are alike",
        ),
        ({"RINGFENCE": "backend", "RINGFENCE_OPTIONS": '{"outer_capture": true}'}, "nothing that mode 'backend' takes"),
    ],
)
def test_a_bad_request_ends_in_one_line(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        register()
    line = str(ended.value)
    assert line.startswith("ringfence: ") and says in line and "\n" not in line and wrapped() == []


@pytest.mark.parametrize(
    ("more", "others", "says"),
    [
        ({"ringfence": "pas"}, {}, "additional_config['ringfence']['mode']='pas' is none of"),
        ({"ringfence": ["pass"]}, {}, "it is a mode, or {'mode': ..., 'options': {...}}"),
        ({"ringfence": {"mode": "pass", "option": {}}}, {}, "it is a mode, or {'mode': ..., 'options': {...}}"),
        ({"ringfence": {"mode": "pass", "options": {"fuse": True}}}, {}, "'fuse', which is nothing that mode 'pass'"),
        ({"ringfence": "backend"}, {"mode": CompilationMode.VLLM_COMPILE}, "-cc.mode is VLLM_COMPILE"),
        ({"ringfence": "backend"}, {"backend": "eager"}, "-cc.backend is 'eager'"),
    ],
)
def test_a_bad_configuration_ends_in_one_line(vllm: FakeVllm, more: Any, others: Any, says: str) -> None:
    register()
    with pytest.raises(SystemExit, match=r"^ringfence: ") as ended:
        vllm.config(more, **others)
    assert says in str(ended.value) and "\n" not in str(ended.value)


# -- moved targets ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_moved_target_is_one_warning_and_no_action(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str], mode: str
) -> None:
    monkeypatch.setenv("RINGFENCE", mode)
    for target in hooked.TARGETS[mode]:
        for by in (None, lambda other: None) if target.parameters is not None else (None,):
            with monkeypatch.context() as patch:
                said.clear()
                replaced(target, by, patch)
                register()
                (message,) = said
                assert "ringfence does nothing in vLLM 0.32.0" in message and target.path in message
                assert wrapped(*(t for t in ALL_TARGETS if t is not target)) == []


def test_only_the_process_that_starts_the_engine_warns(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """The engine's core and its workers find the same: with eight ranks it would be said ten times."""
    monkeypatch.setenv("RINGFENCE", "pass")
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    replaced(hooked.CONFIGURE, None, monkeypatch)
    register()
    others = [t for t in ALL_TARGETS if t is not hooked.CONFIGURE]
    assert said == [] and wrapped(*others) == []


def test_a_later_release_that_was_read_is_no_other_one(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    assert {t.path: t.also for t in ALL_TARGETS if t.also} == {p: (s,) for p, s in SIGNATURES_0_33.items()}

    def init_backend(
        self: Any, vllm_config: Any, prefix: str = "", is_encoder: bool = False, use_aot_compile: bool = True
    ) -> Any:
        return self.backend

    replaced(hooked.INIT_BACKEND, init_backend, monkeypatch)
    monkeypatch.setenv("RINGFENCE", "backend")
    register()
    assert said == [] and wrapped(hooked.POST_INIT)


def test_a_target_of_another_mode_may_have_moved(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE", "pass")
    replaced(hooked.CREATE_WORKSPACE, None, monkeypatch)
    register()
    assert wrapped(hooked.POST_INIT, hooked.INIT_DEVICE)


def test_a_request_in_the_configuration_looks_at_the_targets_too(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    register()
    replaced(hooked.CONFIGURE, None, monkeypatch)
    config = vllm.config({"ringfence": "pass"})
    assert len(said) == 1 and "PostGradPassManager.configure" in said[0]
    assert request.KEY not in config.additional_config, "so no worker does anything either"
    assert config.compilation_config.pass_config.fuse_allreduce_rms is None


# -- the configuration ----------------------------------------------------------------


def test_pass_takes_the_place_of_vllms_pass(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE", "pass")
    monkeypatch.setenv("RINGFENCE_OPTIONS", '{"numerics": "strict"}')
    register()
    config = vllm.config({"other": 1})
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL_AND_PIECEWISE
    kept = json.loads(json.dumps(config.additional_config))  # vLLM hashes it as JSON
    assert kept["other"] == 1 and kept["ringfence"]["options"] == {"numerics": "strict"}
    asked = request.of_config(config)
    assert asked is not None and asked.mode == "pass" and asked.digest == digest.digest_of(asked)


def test_backend_takes_vllms_sizes_and_its_captures(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE", "backend")
    register()
    config = vllm.config()
    compilation = config.compilation_config
    assert (compilation.mode, compilation.backend) == (CompilationMode.DYNAMO_TRACE_ONCE, hooked.BACKEND)
    assert compilation.cudagraph_mode is CUDAGraphMode.NONE and compilation.cudagraph_capture_sizes == []
    for _ in range(2):  # vLLM runs it again where it copies a configuration, without sizes then
        asked = request.of_config(config)
        assert asked is not None and asked.sizes == (1, 2, 4, 8, 64)
        config.__post_init__()
    given = whole.options_for(asked, config)
    assert given["capture_sizes"] == [1, 2, 4, 8] and given["max_tokens"] == 32
    mine = Request("backend", {"capture_sizes": [3], "split_ops": ["aten::sin"]}, sizes=(1, 2))
    given = whole.options_for(mine, config)
    assert given["capture_sizes"] == [3] and "aten::sin" in given["split_ops"]
    assert "vllm::nobody_registers_this" not in given["split_ops"]


def test_backend_splits_at_what_reads_a_context_of_python(vllm: FakeVllm) -> None:
    """Attention, and the updates of caches, which vLLM lists apart."""
    library = torch.library.Library("vllm", "FRAGMENT")
    try:
        for name in ("unified_attention_with_output", "unified_kv_cache_update"):
            library.define(f"{name}(Tensor x) -> Tensor")
        given = whole.options_for(Request("backend"), vllm.config())
    finally:
        library._destroy()
    assert given["split_ops"] == ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"]


def test_the_backends_name_alone_asks_for_it(vllm: FakeVllm) -> None:
    register()
    config = vllm.config(backend=hooked.BACKEND, mode=CompilationMode.DYNAMO_TRACE_ONCE)
    asked = request.of_config(config)
    assert asked is not None and asked.mode == "backend"


def test_a_request_in_the_configuration_reaches_a_worker_of_the_same_process(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM imports its workers after it has registered plugins, and registers only once."""
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, hooked.WORKER)
        register()
    assert wrapped(hooked.INIT_DEVICE, hooked.EXECUTE_MODEL) == []
    vllm.config({"ringfence": "guard"})
    assert len(wrapped(hooked.INIT_DEVICE, hooked.EXECUTE_MODEL)) == 2


@pytest.mark.parametrize("mode", ["pass", "backend"])
def test_where_vllm_compiles_nothing_it_says_so(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, said: list[str], mode: str
) -> None:
    monkeypatch.setenv("RINGFENCE", mode)
    register()
    config = vllm.config(eager=True)
    assert len(said) == 1 and "RINGFENCE=guard works without" in said[0] and request.KEY not in config.additional_config


# -- what each mode does ----------------------------------------------------------------


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
    for skipped, kept in ((["test_integrations_vllm.py:*"], 0), (["another.py:*"], 2 * LAYERS + 1)):
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


# -- vLLM's workspace, by vote ------------------------------------------------------------


class TheirWorkspace:
    """vLLM's, of two ranks that are threads. spoils: adds this to what it sums."""

    def __init__(self, rank: int, meeting: threading.Barrier, slots: list[Any], spoils: float = 0.0) -> None:
        self.rank, self.meeting, self.slots, self.spoils = rank, meeting, slots, spoils
        self.destroyed = False

    def sum(self, x: Tensor) -> Tensor:
        self.slots[self.rank] = x.clone()
        self.meeting.wait(120)
        total = self.slots[0] + self.slots[1] + self.spoils
        self.meeting.wait(120)
        return total

    def destroy(self) -> None:
        self.destroyed = True


def allreduce_fusion(
    input: Tensor,
    workspace: TheirWorkspace,
    pattern: str,
    residual_out: Tensor,
    norm_out: Tensor,
    residual_in: Tensor,
    rms_gamma: Tensor,
    rms_eps: float,
    **how: Any,
) -> None:
    assert pattern == "norm" and how["launch_with_pdl"] and how["trigger_completion_at_end"], "as vLLM calls it"
    residual_out.copy_(workspace.sum(input) + residual_in)
    norm_out.copy_(reference.rms_norm(residual_out, rms_gamma, rms_eps, 0.0))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    package, comm = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.comm")
    vars(comm).update(
        allreduce_fusion=allreduce_fusion, AllReduceFusionPattern=types.SimpleNamespace(kARResidualRMSNorm="norm")
    )
    vars(package).update(comm=comm, __version__="0.7.2.post1")
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.comm", comm)
    monkeypatch.setattr(guard, "own_opt_outs", lambda: ())
    monkeypatch.setattr(guard, "versions", lambda: {"flashinfer-python": "0.7.2.post1"})


def guarded_by_two(
    make: Callable[[int, TheirWorkspace], Any], backend: str = "trtllm", on_hazard: str = "refuse", **others: Any
) -> tuple[list[Any], list[TheirWorkspace], list[guard.Guarded]]:
    """What each rank gets of ``_create_workspace``, what it had made, and what it found."""
    store, meeting, slots = dist.HashStore(), threading.Barrier(2), [None, None]
    theirs = [TheirWorkspace(rank, meeting, slots) for rank in range(2)]
    found, results, errors = [guard.Guarded(), guard.Guarded()], [None, None], []
    dtype = others.get("dtype", torch.float32)

    def run(rank: int) -> None:
        channel = Channel(store, rank, 2, seconds=120)
        opened = lambda group: channel  # noqa: E731
        device = torch.device("cpu")
        try:
            results[rank] = guard.create_workspace(
                *(found[rank], opened, device, on_hazard, True, lambda *_: make(rank, theirs[rank])),
                *(backend, 2, rank, 8, 1024, dtype, None),
            )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads)
    if errors:
        raise errors[0]
    return results, theirs, found


def test_a_workspace_that_all_made_and_that_works_is_kept(flashinfer: None) -> None:
    results, theirs, found = guarded_by_two(lambda rank, mine: mine)
    assert results == theirs and not any(one.destroyed for one in theirs)
    assert [one.collective for one in found] == ["trtllm/peer"] * 2 and found[0].hazards == ()


def test_a_workspace_that_one_rank_lacks_is_given_back_by_all(flashinfer: None, said: list[str]) -> None:
    """vLLM by itself: rank 1 falls back alone, and rank 0 waits for it in the kernel for ever."""
    results, theirs, found = guarded_by_two(lambda rank, mine: mine if rank == 0 else None)
    assert results == [None, None] and [one.destroyed for one in theirs] == [True, False]
    assert len(said) == 2 and "rank 1: vLLM could not make it" in said[0] and found[0].collective == "none"


def test_a_workspace_that_sums_wrongly_on_one_rank_is_given_back_by_all(flashinfer: None, said: list[str]) -> None:
    def make(rank: int, mine: TheirWorkspace) -> TheirWorkspace:
        mine.spoils = float(rank)
        return mine

    results, theirs, _ = guarded_by_two(make)
    assert results == [None, None] and all(one.destroyed for one in theirs)
    assert "its self-test failed: rank 1: eager" in said[0]


def test_multicast_is_not_made_where_a_rank_forbids_it(
    flashinfer: None, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(guard, "own_opt_outs", lambda: ("NCCL_NVLS_ENABLE=0",))
    asked: list[int] = []
    results, _, _ = guarded_by_two(lambda rank, mine: asked.append(rank), backend="mnnvl")
    assert results == [None, None] and asked == [], "it must not even be tried"
    assert "rank 0 forbids NVLink multicast (NCCL_NVLS_ENABLE=0)" in said[0]


@pytest.mark.parametrize("other", [{"release": "0.6.10"}, {"capability": (9, 0), "release": "0.5.3"}])
def test_what_one_rank_alone_would_refuse_is_refused_by_all(
    flashinfer: None, monkeypatch: pytest.MonkeyPatch, said: list[str], other: dict[str, Any]
) -> None:
    """Or the one waits in a barrier for the other, which waits in the vote."""
    of_rank = [{"release": "0.7.2", "capability": (10, 0)}, {"release": "0.7.2", "capability": (10, 0)} | other]

    def mine(fact: str) -> Any:
        return of_rank[int(threading.current_thread().name)][fact]

    monkeypatch.setattr(guard, "versions", lambda: {"flashinfer-python": mine("release")})
    monkeypatch.setattr(guard, "_capability", lambda device: mine("capability"))
    asked: list[int] = []
    results, _, found = guarded_by_two(lambda rank, mine: asked.append(rank), backend="mnnvl")
    assert results == [None, None] and asked == [] and len(said) == 2
    assert found[0].hazards == found[1].hazards and "M1" in found[0].hazards
    assert ("M10" in found[0].hazards) is ("capability" in other)


@pytest.mark.parametrize("on_hazard", ["refuse", "raise"])
def test_a_hazard_bars_vllms_workspace(flashinfer: None, said: list[str], on_hazard: str) -> None:
    """M49: one-shot mnnvl squares in float16."""
    asked: list[int] = []

    def run() -> tuple[list[Any], list[TheirWorkspace], list[guard.Guarded]]:
        return guarded_by_two(lambda rank, mine: asked.append(rank), "mnnvl", on_hazard, dtype=torch.float16)

    if on_hazard == "raise":
        with pytest.raises(HazardError, match="M49"):
            run()
    else:
        results, _, found = run()
        assert results == [None, None] and found[0].hazards == ("M49",) and "M49" in said[0]
    assert asked == []


def test_without_vllm_its_plugin_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its backend says what to give torch.compile instead."""
    lines: list[str] = []
    monkeypatch.setattr(environment, "warn", lambda log, message, *args: lines.append(message % args))
    monkeypatch.setenv("RINGFENCE", "guard")
    register()
    sglang.register()
    assert lines == [
        "ringfence does nothing: it is asked for in vLLM, and no package 'vllm' is installed here",
        "ringfence does nothing: it is asked for in SGLang, and no package 'sglang' is installed here",
    ]
    with pytest.raises(OptionsError, match=r"no package 'vllm' is installed here: give torch\.compile a ringfence"):
        named_backend(torch.fx.symbolic_trace(lambda x: -x), [])
