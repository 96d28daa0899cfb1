"""In vLLM: what is asked for, what is hooked and what the configuration becomes, with stand-ins for vLLM's modules."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest
import torch
from fake_vllm import (
    ALL_TARGETS,
    SIGNATURES,
    SIGNATURES_0_33,
    CompilationMode,
    CUDAGraphMode,
    FakeVllm,
    replaced,
    wrapped,
)
from fake_vllm import said as said
from fake_vllm import vllm as vllm

from ringfence.integrations import environment, sglang
from ringfence.integrations.targets import moved, parameters_of, resolve
from ringfence.integrations.vllm import backend as named_backend
from ringfence.integrations.vllm import digest, hooked, register, request, whole, worker
from ringfence.integrations.vllm.request import Request
from ringfence.runtime.errors import OptionsError

MODES = tuple(hooked.TARGETS)
pytestmark = pytest.mark.usefixtures("engines")


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
