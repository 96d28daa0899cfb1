"""The backend: a compiled model is the eager one, cut where it was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend_model import H, Model, cause, rows
from test_backend_refusals import functional_sum, refusal
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.multiprocessing.reductions import StorageWeakRef

import ringfence
from ringfence.runtime.errors import (
    MovedInputWarning,
    OptionsError,
)
from support import TOLERANCE, engine_library, relative_error, run_python, run_threaded


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


# -- the job -------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
def test_after_close_calls_go_on_and_nobody_watches() -> None:
    """What was compiled, and what is compiled then; another backend may ask for another watch."""
    model = Model()
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[3], graphs="simulated", on_hang="report")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(rows(3))
    for _ in range(2):
        backend.close()
        for n in (3, 4, 3):
            x = rows(n)
            assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    assert len(backend.reports) == 2 and backend.stats.graphs[0].replays >= 1
    with ringfence.Backend(on_hang="abort") as other:
        assert other.supervisor is backend.supervisor
    assert other.supervisor.watchdog is None or not other.supervisor.watchdog.runs


@pytest.mark.parametrize("capture_sizes", [(), (3, 5)])
@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
@pytest.mark.usefixtures("fake_group")
def test_compiled_model_equals_eager(piece_compiler: str, capture_sizes: tuple[int, ...]) -> None:
    model = Model()
    backend = ringfence.Backend(
        piece_compiler=piece_compiler, capture_sizes=capture_sizes, graphs="simulated", verify=True
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 4, 5, 3, 5, 3, 7):
        x = rows(n)
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    ringfence.assert_fused(report, count=2)
    assert len([p for p in report.pieces if p.island]) == (2 if capture_sizes else 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_numbers_are_right_across_threaded_ranks(world_size: int) -> None:
    torch.manual_seed(0)
    shards = [Model() for _ in range(world_size)]
    for shard in shards[1:]:  # the norms are replicated, the linears are shards
        for ours, first in zip(shard.layers, shards[0].layers, strict=True):
            ours.norm.load_state_dict(first.norm.state_dict())
    batches = [rows(n) for n in (2, 3, 2, 5)]

    def expected(x: Tensor) -> Tensor:
        residual = x = x.double()
        for i in range(2):
            layers = [s.layers[i] for s in shards]
            partial = [F.silu(x @ m.up.weight.double().t()) @ m.down.weight.double().t() for m in layers]
            residual = residual + sum(partial)
            x = F.rms_norm(residual, (H,), layers[0].norm.weight.double(), 1e-5)
        return x

    def body(rank: int) -> list[Tensor]:
        with torch.no_grad():
            backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[2, 5], graphs="simulated")
            compiled = torch.compile(shards[rank], backend=backend, fullgraph=True, dynamic=True)
            outputs = [compiled(x) for x in batches]
        ringfence.assert_fused(backend.reports[0], count=2)
        return outputs

    for outputs in run_threaded(world_size, body):
        for x, actual in zip(batches, outputs, strict=True):
            assert relative_error(actual, expected(x)) <= 1e-4


@pytest.mark.usefixtures("fake_group")
def test_entry_point_is_the_same_backend() -> None:
    reports: list[ringfence.CompileReport] = []
    model, x = Model(), rows(3)
    options = {"piece_compiler": "eager", "on_report": reports.append}
    compiled = torch.compile(model, backend="ringfence", options=options)
    assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    ringfence.assert_fused(reports[0], count=2)
    with pytest.raises(Exception, match="unknown option 'capture'"):
        torch.compile(Model(), backend="ringfence", options={"capture": [1]})(x)
    with pytest.raises(Exception, match="mode='max-autotune' has no meaning"):
        torch.compile(Model(), backend="ringfence", mode="max-autotune")(x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"mode": "reduce-overhead"},
            r"mode='reduce-overhead' has no meaning .*capture_sizes.*CompileConfig\(mode=None",
        ),
        ({"options": {"capture_sizes": [4]}}, r"ringfence.Backend\(capture_sizes=\[4\]\)"),
    ],
)
@pytest.mark.usefixtures("fake_group")
def test_mode_and_options_beside_a_backend_are_refused(given: dict[str, Any], said: str) -> None:
    compiled = torch.compile(Model(), backend=ringfence.Backend(piece_compiler="eager"), **given)
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(rows(3))
    assert isinstance(error.value.inner_exception, OptionsError) and re.search(said, str(error.value))
    torch._dynamo.reset()
    compiled = torch.compile(Model(), backend=ringfence.Backend(piece_compiler="eager"), mode="default")
    compiled(rows(3))


@pytest.mark.parametrize("options", [{}, {"capture_sizes": [4], "graphs": "simulated"}], ids=["", "captured"])
@pytest.mark.usefixtures("fake_group")
def test_two_models_with_a_mesh_each(options: dict[str, Any]) -> None:
    """DTensor knows one mesh of these ranks: the other is a constant of its graph, and no op reads it."""

    for mesh in [init_device_mesh("cpu", (2,)) for _ in range(2)]:
        torch._dynamo.reset()
        shard = torch.randn(H, H // 2)
        weight = DTensor.from_local(shard, mesh, [Shard(1)], run_check=False)

        def model(x: Tensor, mesh: DeviceMesh = mesh, weight: DTensor = weight) -> Tensor:
            return DTensor.from_local(x, mesh, [Replicate()], run_check=False) @ weight

        backend = ringfence.Backend(piece_compiler="eager", **options)
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        for _ in range(3):
            x = rows(4)
            actual = compiled(x)
            assert isinstance(actual, DTensor) and actual.placements == (Shard(1),)
            torch.testing.assert_close(actual.to_local(), x @ shard)


@pytest.mark.usefixtures("fake_group")
def test_layers_compiled_one_by_one_share_a_graph_but_no_captures() -> None:
    model = Model(layers=3)
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    reference = Model(layers=3)
    reference.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for _ in range(3):
        x = rows(4)
        assert relative_error(model(x), reference(x)) <= 8 * TOLERANCE[torch.float32]
    assert len(backend.reports) == 2  # the first layer is given one tensor twice, the others share a graph


@pytest.mark.usefixtures("fake_group")
def test_parameters_may_change_in_place_and_move() -> None:
    model = Model()
    compiled = torch.compile(
        model, backend=ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    )
    compiled(rows(4))
    weight = model.layers[0].norm.weight
    weight.copy_(torch.randn(H))
    x = rows(4)
    assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    for _ in range(2):
        weight.data = torch.randn(H)
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    with pytest.warns(MovedInputWarning, match=r"layers.*norm.*weight.*reshard_after_forward"):
        weight.data = torch.randn(H)
        assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]


def test_a_cache_that_is_an_argument_is_named_in_the_report() -> None:
    def serve(x: Tensor, cache: Tensor) -> Tensor:
        h = x * 2
        cache[:4] = h
        return cache.sum(0) + h

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    compiled = torch.compile(serve, backend=backend)
    caches = [torch.randn(1 << 16, H) for _ in range(2)]
    with torch.no_grad():
        for cache in (*caches, *caches):
            x, kept = rows(4), cache.clone()
            torch.testing.assert_close(compiled(x, cache), serve(x, kept))
            assert torch.equal(cache, kept)
    (note,) = [note for note in backend.reports[0].notes if "mark_static_address" in note]
    assert "cache" in note and "(4.0 MiB)" in note


@pytest.mark.usefixtures("fake_group")
def test_padding_serves_smaller_sizes_by_a_captured_one() -> None:
    model = Model()
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[8], graphs="simulated", pad_to_capture_size=True)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for n in (8, 3, 7, 5, 8, 2, 9):
        x = rows(n)
        actual = compiled(x)
        assert actual.shape == (n, H)
        assert relative_error(actual, model(x)) <= 8 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("fake_group")
def test_padding_is_refused_with_a_note_where_rows_are_unknown() -> None:
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[8], graphs="simulated", pad_to_capture_size=True)
    compiled = torch.compile(lambda x: torch.cat([x, x]), backend=backend, dynamic=True)
    x = rows(3)
    assert torch.equal(compiled(x), torch.cat([x, x]))
    assert any("not padded" in note for note in backend.reports[0].notes)


@pytest.mark.usefixtures("fake_group")
def test_caller_owns_outputs_unless_static() -> None:
    for static in (False, True):
        torch._dynamo.reset()
        backend = ringfence.Backend(
            piece_compiler="eager", capture_sizes=[4], graphs="simulated", static_outputs=static
        )
        model = Model()
        compiled = torch.compile(lambda x, model=model: model(x) * 2, backend=backend)  # ends in a captured piece
        compiled(rows(4))
        first = compiled(rows(4))
        kept = first.clone()
        compiled(rows(4))
        assert torch.equal(first, kept) is not static


# -- split ops -------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
def test_split_ops_cut_the_graph_without_capture_too() -> None:
    model, x = Model(), rows(3)
    backend = ringfence.Backend(piece_compiler="eager", split_ops=["aten::silu"])
    compiled = torch.compile(model, backend=backend)
    assert relative_error(compiled(x), model(x)) <= 8 * TOLERANCE[torch.float32]
    (report,) = backend.reports
    assert [p.ops for p in report.pieces if p.island] == [("aten::silu",), ("aten::silu",)]
    assert {v.rule for v in report.verdicts if v.op == "aten::silu"} == {"split_op"}


@pytest.mark.usefixtures("fake_group")
def test_split_op_that_is_not_registered_is_refused() -> None:
    compiled = torch.compile(Model(), backend=ringfence.Backend(split_ops=["aten::atention"]))
    with pytest.raises(Exception, match="aten::atention") as error:
        compiled(rows(3))
    assert isinstance(cause(error.value), OptionsError)


@pytest.mark.usefixtures("fake_group")
def test_split_op_that_was_decomposed_is_refused() -> None:
    """Only where the model calls it: one Backend compiles several graphs, and not each has every op."""

    def split_softmax(fn: Callable[[Tensor], Tensor], compiler: str) -> ringfence.Backend:
        torch._dynamo.reset()
        backend = ringfence.Backend(split_ops=["aten::_softmax"], piece_compiler=compiler)
        x = rows(3)
        assert torch.allclose(torch.compile(fn, backend=backend)(x), fn(x), atol=1e-6)
        return backend

    report = split_softmax(lambda x: torch.softmax(x * 2, -1), "eager").reports[0]
    assert [p.ops for p in report.pieces if p.island] == [("aten::_softmax",)] and len(report.notes) == 1
    report = split_softmax(lambda x: x * 2, "inductor").reports[0]
    assert report.notes[1] == "split_ops names aten::_softmax: no graph so far has such an op"
    with pytest.raises(BackendCompilerFailed) as error:
        split_softmax(lambda x: torch.softmax(x * 2, -1), "inductor")
    said = str(cause(error.value))
    assert isinstance(cause(error.value), OptionsError)
    assert re.search(r"split_ops names 'aten::_softmax'.*aten::amax.*piece_compiler='eager'", said), said


@pytest.mark.parametrize("name", ["aten::linear", "aten::softmax", "aten::softmax.int"])
@pytest.mark.usefixtures("fake_group")
def test_split_op_that_no_backend_ever_sees_is_refused(name: str) -> None:
    error = refusal(functional_sum, rows(3), split_ops=[name])
    assert isinstance(error, OptionsError) and f"split_ops holds '{name}', which torch replaces" in str(error)


@pytest.mark.usefixtures("fake_group")
def test_an_op_that_another_graph_had_is_not_missed() -> None:
    def broken(x: Tensor) -> Tensor:
        x = F.silu(x * 2)
        torch._dynamo.graph_break()
        return x + 1

    backend = ringfence.Backend(piece_compiler="eager", split_ops=["aten::silu", "aten::sinh"])
    torch.compile(broken, backend=backend)(rows(3))
    notes = [[n for n in r.notes if n.startswith("split_ops")] for r in backend.reports]
    assert notes == [["split_ops names aten::sinh: no graph so far has such an op"]] * 2


@pytest.mark.usefixtures("fake_group")
def test_data_dependent_op_becomes_an_island() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        picked = x[x[:, 0] > 0]
        return torch.relu(picked).sum(0) + x.sum(0), picked

    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[6], graphs="simulated")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend=backend, fullgraph=True)
        for _ in range(4):
            x = rows(6)
            for actual, expected in zip(compiled(x), run(x), strict=True):
                assert torch.allclose(actual, expected, atol=1e-6)
    assert "data_dependent" in {v.rule for v in backend.reports[0].verdicts}


class _Keeps(ringfence.Backend):
    """Hands out what it gives AOT, which calls it with a list of arguments."""

    compiled: Callable[..., Any]

    def _compile(self, *args: Any) -> Callable[..., Any]:
        self.compiled = super()._compile(*args)
        return self.compiled


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("split", [{}, {"split_ops": ["frees::look"]}], ids=["whole", "split"])
@pytest.mark.parametrize("options", [{}, {"capture_sizes": [5], "graphs": "simulated"}], ids=["off", "size"])
def test_an_argument_is_held_up_to_its_last_use(split: dict[str, Any], options: dict[str, Any]) -> None:
    """As Inductor does, in the midst of a piece too, and in a call whose size is none of the captured ones."""
    dead: list[list[bool]] = []
    made: list[StorageWeakRef] = []

    def look(x: Tensor) -> Tensor:
        dead.append([ref.expired() for ref in made])
        return x * 1

    def run(x: Tensor, y: Tensor) -> Tensor:
        return torch.cos(torch.ops.frees.look(torch.sin(x)) + x + y)

    def last_use(x: Tensor, y: Tensor) -> Tensor:
        return torch.cos(torch.ops.frees.look(torch.sin(x)) + y)

    backend = _Keeps(**split, **options)
    with engine_library("frees", ("look(Tensor x) -> Tensor", look, torch.empty_like)), torch.no_grad():
        for function, expected in ((run, [False, False]), (last_use, [True, False])):
            torch.compile(function, backend=backend, dynamic=False)(rows(6), rows(6))
            given = [rows(6), rows(6)]
            made = [StorageWeakRef(x.untyped_storage()) for x in given]
            right = function(*given)
            dead.clear()
            (out,) = backend.compiled(given)
            assert torch.allclose(out, right, atol=1e-5)
            assert dead == [expected]
            assert not given
            made = []


# -- the package ---------------------------------------------------------------------------


def test_import_needs_only_torch_and_has_no_side_effects() -> None:
    program = """
import os, sys
before = dict(os.environ)
import torch
import torch.distributed as dist
loaded = set(sys.modules)
import ringfence
assert dict(os.environ) == before, "the environment changed"
assert not dist.is_initialized()
new = {m.split(".")[0] for m in set(sys.modules) - loaded}
for heavy in ("transformers", "flashinfer", "depyf", "tabulate", "accelerate"):
    assert heavy not in new, heavy
assert "torch._inductor.compile_fx" not in sys.modules
"""
    result = run_python("-W", "error", "-c", program)
    assert result.returncode == 0, result.stderr
