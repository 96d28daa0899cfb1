from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ringfence.runtime.collectives import ops, reference
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.errors import CollectiveUnavailableError, InputError
from support import relative_error, run_threaded, start_fake_group

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", [(5, 96), (2, 3, 128)], ids=["2d", "3d"])
every_magnitude = pytest.mark.parametrize("magnitude", [1.0, 1e-3])
every_weight = pytest.mark.parametrize(
    ("weighted", "weight_bias"), [(True, 0.0), (True, 1.0), (False, 0.0)], ids=["weight", "weight_plus_1", "no_weight"]
)


def data(shape: tuple[int, ...], dtype: torch.dtype, seed: int, magnitude: float = 1.0) -> Tensor:
    """Random, the same in every thread that asks with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude).to(dtype)


def norm64(x: Tensor, weight: Tensor | None, weight_bias: float, eps: float = EPS) -> Tensor:
    """RMSNorm in float64, written out."""
    wide = x.to(torch.float64)
    mean = (wide * wide).sum(dim=-1, keepdim=True) / wide.shape[-1]
    normed = wide / torch.sqrt(mean + eps)
    return normed if weight is None else normed * (weight.to(torch.float64) + weight_bias)


def one_rounding(dtype: torch.dtype) -> float:
    """What a single rounding to ``dtype``, of a float32 computation, may change."""
    return 0.5 * torch.finfo(dtype).eps + 1e-6


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


# -- the arithmetic ------------------------------------------------------------------------


@every_dtype
@every_magnitude
@every_weight
@every_shape
def test_rms_norm_matches_float64(
    dtype: torch.dtype, magnitude: float, weighted: bool, weight_bias: float, shape: tuple[int, ...]
) -> None:
    x = data(shape, dtype, 1, magnitude)
    weight = data(shape[-1:], dtype, 2) if weighted else None
    out = reference.rms_norm(x, weight, EPS, weight_bias)
    assert out.dtype is dtype and out.shape == x.shape
    assert relative_error(out, norm64(x, weight, weight_bias)) <= one_rounding(dtype)


@every_dtype
@every_magnitude
@every_weight
@every_shape
def test_add_rms_norm_matches_float64(
    dtype: torch.dtype, magnitude: float, weighted: bool, weight_bias: float, shape: tuple[int, ...]
) -> None:
    reduced, residual = data(shape, dtype, 1, magnitude), data(shape, dtype, 2, magnitude)
    weight = data(shape[-1:], dtype, 3) if weighted else None
    norm, summed = reference.add_rms_norm(reduced, residual, weight, EPS, weight_bias)
    assert norm.dtype is dtype and summed.dtype is dtype
    expected_sum = (reduced.double() + residual.double()).to(dtype)
    assert torch.equal(summed, expected_sum)
    assert relative_error(norm, norm64(expected_sum, weight, weight_bias)) <= one_rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_add_rms_norm_rounds_the_sum_before_the_norm(dtype: torch.dtype) -> None:
    reduced, residual = data((64, 256), dtype, 1), data((64, 256), dtype, 2)
    norm, summed = reference.add_rms_norm(reduced, residual, None, EPS, 0.0)
    exact = reduced.double() + residual.double()
    rounded_first = norm64(exact.to(dtype), None, 0.0).to(dtype)
    rounded_last = norm64(exact, None, 0.0).to(dtype)
    assert (rounded_first != rounded_last).double().mean() > 0.05  # the case can tell
    assert (norm != rounded_first).double().mean() < 0.005  # float32 lands on the other side of few midpoints
    assert not torch.equal(summed.double(), exact)


def test_rms_norm_rounds_once_with_the_weight() -> None:
    """Rounding before the weight is applied, as some models do, gives other numbers."""
    x, weight = data((64, 256), torch.bfloat16, 1), data((256,), torch.bfloat16, 2)
    out = reference.rms_norm(x, weight, EPS, 0.0)
    once = norm64(x, weight, 0.0).to(torch.bfloat16)
    twice = norm64(x, None, 0.0).to(torch.bfloat16) * weight
    assert (once != twice).double().mean() > 0.1
    assert (out != once).double().mean() < 0.005


def test_rms_norm_adds_the_weight_bias_in_float32() -> None:
    """A weight of 2 ** -9 is lost when 1 is added to it in bfloat16."""
    x, weight = data((64, 256), torch.bfloat16, 1), torch.full((256,), 2.0**-9, dtype=torch.bfloat16)
    out = reference.rms_norm(x, weight, EPS, 1.0)
    assert (out != norm64(x, weight, 1.0).to(torch.bfloat16)).double().mean() < 0.005
    assert (out != norm64(x, weight * 0, 1.0).to(torch.bfloat16)).double().mean() > 0.05


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-1])
def test_rms_norm_adds_eps_under_the_root(eps: float) -> None:
    x = data((4, 64), torch.float32, 1, 1e-2)
    assert relative_error(reference.rms_norm(x, None, eps, 0.0), norm64(x, None, 0.0, eps)) < 1e-6


def test_rms_norm_of_large_half_values_does_not_overflow() -> None:
    x = data((4, 64), torch.float16, 1, 1e4)
    out = reference.rms_norm(x, None, EPS, 0.0)
    assert relative_error(out, norm64(x, None, 0.0)) <= one_rounding(torch.float16)


@pytest.mark.parametrize("seed", range(3))
def test_add_rms_norm_is_not_changed_by_strides(seed: int) -> None:
    reduced, residual = data((64, 7), torch.bfloat16, seed).t(), data((7, 128), torch.bfloat16, seed + 10)[:, ::2]
    weight = data((128,), torch.bfloat16, seed + 20)[::2]
    strided = reference.add_rms_norm(reduced, residual, weight, EPS, 0.0)
    dense = reference.add_rms_norm(reduced.contiguous(), residual.contiguous(), weight.contiguous(), EPS, 0.0)
    for a, b in zip(strided, dense, strict=True):
        assert a.is_contiguous() and torch.equal(a, b)


# -- the ops over several ranks ---------------------------------------------------------------


def world() -> str:
    return str(dist.group.WORLD.group_name)


def contiguous(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_second_column(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


every_layout = pytest.mark.parametrize("layout", [contiguous, transposed, every_second_column])


@pytest.mark.parametrize("world_size", [2, 4])
@every_dtype
@every_layout
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 64)], ids=["2d", "3d"])
def test_all_reduce_add_rms_norm_sums_over_the_ranks(
    world_size: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    partial = [data(shape, dtype, rank) for rank in range(world_size)]
    residual = [data(shape, dtype, 100 + rank) for rank in range(world_size)]
    weight = data(shape[-1:], dtype, 200)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        arguments = (layout(partial[rank]), layout(residual[rank]), weight, EPS, 1.0, world(), "reference")
        return torch.ops.ringfence.all_reduce_add_rms_norm(*arguments)  # type: ignore[no-any-return]

    results = run_threaded(world_size, body)
    reduced = torch.stack(partial).double().sum(0)
    roundings = world_size * torch.finfo(dtype).eps
    for rank, (norm, summed) in enumerate(results):
        expected = reduced + residual[rank].double()
        assert distance(summed, expected) <= roundings
        assert relative_error(norm, norm64(summed, weight, 1.0)) <= one_rounding(dtype)
        assert distance(partial[rank].double() + residual[rank].double(), expected) > 0.2  # what a skip would give
        assert norm.is_contiguous() and summed.is_contiguous()
    assert len({float(summed.double().sum()) for _, summed in results}) == world_size  # residuals are not reduced


@pytest.mark.parametrize("world_size", [2, 4])
@every_dtype
@every_layout
def test_all_reduce_rms_norm_sums_over_the_ranks(
    world_size: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    partial = [data((5, 96), dtype, rank) for rank in range(world_size)]
    weight = data((96,), dtype, 200)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        arguments = (layout(partial[rank]), weight, EPS, 0.0, world(), "reference")
        return torch.ops.ringfence.all_reduce_rms_norm(*arguments)  # type: ignore[no-any-return]

    results = run_threaded(world_size, body)
    expected = torch.stack(partial).double().sum(0)
    for rank, (norm, reduced) in enumerate(results):
        assert distance(reduced, expected) <= world_size * torch.finfo(dtype).eps
        assert distance(partial[rank], expected) > 0.2
        assert relative_error(norm, norm64(reduced, weight, 0.0)) <= one_rounding(dtype)
        assert torch.equal(reduced, results[0][1]) and torch.equal(norm, results[0][0])
        assert norm.is_contiguous() and reduced.is_contiguous()


def test_fused_ops_reduce_over_the_group_that_is_named() -> None:
    x, residual = [data((3, 32), torch.float32, rank) for rank in range(4)], data((3, 32), torch.float32, 10)
    members = [[0, 2], [1, 3]]

    def body(rank: int) -> tuple[Tensor, Tensor]:
        name = [dist.new_group(ranks) for ranks in members][rank % 2].group_name
        _, summed = ops.all_reduce_add_rms_norm(x[rank], residual, None, EPS, 0.0, name, "reference")
        _, reduced = ops.all_reduce_rms_norm(x[rank], None, EPS, 0.0, name, "reference")
        return summed, reduced

    for rank, (summed, reduced) in enumerate(run_threaded(4, body)):
        a, b = members[rank % 2]
        torch.testing.assert_close(reduced, x[a] + x[b])
        torch.testing.assert_close(summed, x[a] + x[b] + residual)


def test_fused_ops_may_be_called_again_on_their_results() -> None:
    x = [data((3, 32), torch.float32, rank) for rank in range(2)]

    def body(rank: int) -> tuple[Tensor, Tensor]:
        first = ops.all_reduce_rms_norm(x[rank], None, EPS, 0.0, world(), "reference")
        return ops.all_reduce_add_rms_norm(first[0], first[1], None, EPS, 0.0, world(), "reference")  # type: ignore[no-any-return]

    results = run_threaded(2, body)
    reduced = (x[0] + x[1]).double()
    expected = 2 * norm64(reduced, None, 0.0) + reduced
    for norm, summed in results:
        assert distance(summed, expected) < 1e-6
        assert distance(norm, norm64(expected, None, 0.0)) < 1e-6


# -- the ops as torch ops ----------------------------------------------------------------------


def test_fused_ops_are_registered_by_one_module() -> None:
    """A second copy of the package would take the ops over, and destroy those that graphs hold."""
    assert [name for name in sys.modules if name.endswith("collectives.ops")] == [ops.__name__]


@pytest.mark.parametrize("world_size", [1, 2])
@every_dtype
def test_fused_ops_return_new_memory_and_leave_inputs_alone(world_size: int, dtype: torch.dtype) -> None:
    start_fake_group(world_size)
    try:
        x, residual, weight = data((4, 32), dtype, 1), data((4, 32), dtype, 2), data((32,), dtype, 3)
        kept = [t.clone() for t in (x, residual, weight)]
        outputs = [
            *ops.all_reduce_add_rms_norm(x, residual, weight, EPS, 0.0, world(), "reference"),
            *ops.all_reduce_rms_norm(x, weight, EPS, 0.0, world(), "reference"),
            *ops.all_reduce_rms_norm(x, None, EPS, 0.0, world(), "reference"),
        ]
    finally:
        dist.destroy_process_group()
    storages = [t.untyped_storage().data_ptr() for t in (x, residual, weight, *outputs)]
    assert len(set(storages)) == len(storages)
    for i, out in enumerate(outputs):
        others = [o.clone() for o in outputs[i + 1 :]]
        out.fill_(float("nan"))
        assert all(torch.equal(a, b) for a, b in zip(outputs[i + 1 :], others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, residual, weight), kept, strict=True))


def arguments_with_residual(layout: Callable[[Tensor], Tensor], weighted: bool) -> tuple[Any, ...]:
    weight = data((32,), torch.bfloat16, 3) if weighted else None
    x, residual = layout(data((2, 3, 32), torch.bfloat16, 1)), layout(data((2, 3, 32), torch.bfloat16, 2))
    return x, residual, weight, EPS, 1.0 if weighted else 0.0, world(), "reference"


def arguments_without_residual(layout: Callable[[Tensor], Tensor], weighted: bool) -> tuple[Any, ...]:
    x, _, *rest = arguments_with_residual(layout, weighted)
    return x, *rest


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (ops.all_reduce_add_rms_norm, arguments_with_residual),
        (ops.all_reduce_rms_norm, arguments_without_residual),
    ],
    ids=["add", "no_add"],
)
@pytest.mark.parametrize("layout", [contiguous, transposed])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no_weight"])
def test_fused_ops_pass_opcheck(
    op: Any, arguments: Callable[..., tuple[Any, ...]], layout: Callable[[Tensor], Tensor], weighted: bool
) -> None:
    torch.library.opcheck(op, arguments(layout, weighted))


# -- what the ops refuse -----------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (3, 0)], ids=str)
def test_fused_ops_refuse_an_empty_input(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    with pytest.raises(InputError, match=r"0.*at least one token"):
        ops.all_reduce_add_rms_norm(x, x.clone(), None, EPS, 0.0, world(), "reference")
    with pytest.raises(InputError, match=r"0.*at least one token"):
        ops.all_reduce_rms_norm(x, None, EPS, 0.0, world(), "reference")


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("name", ["flashinfr", "", "Reference"])
def test_fused_ops_refuse_an_unknown_collective(name: str) -> None:
    x = data((3, 32), torch.float32, 1)
    with pytest.raises(CollectiveUnavailableError, match=rf"'{name}'.*reference"):
        ops.all_reduce_add_rms_norm(x, x.clone(), None, EPS, 0.0, world(), name)
    with pytest.raises(CollectiveUnavailableError, match=rf"'{name}'.*reference"):
        ops.all_reduce_rms_norm(x, None, EPS, 0.0, world(), name)


@contextlib.contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """``torch.autocast("cuda")`` does nothing without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@every_dtype
@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
def test_autocast_changes_no_dtype(dtype: torch.dtype, weight_bias: float) -> None:
    """On a GPU autocast makes the norm of torch float32; the kernels know nothing of it, and which one serves depends
    on the size of a call."""
    epilogue = Epilogue(True, RmsNorm(EPS, weight_bias))
    with FakeTensorMode(), autocast_of_cuda():
        x, residual, weight = (torch.empty(s, dtype=dtype, device="cuda") for s in ((4, 64), (4, 64), 64))
        assert [t.dtype for t in reference.apply(epilogue, x, residual, weight)] == [dtype] * 2
