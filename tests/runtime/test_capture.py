"""The simulation: outputs, inputs, what a capture refuses, memory, nesting, release."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from replay.test_tape import op
from torch import Tensor

from ringfence.runtime.collectives import ops
from ringfence.runtime.errors import CaptureError, NestedCaptureError
from ringfence.runtime.replay.capture import SimulatedGraphs

HIDDEN = 8


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (x * 2 + 1, x.sum(0))


def rows(n: int = 4) -> Tensor:
    return torch.randn(n, HIDDEN)


# -- outputs -----------------------------------------------------------------------------


def test_simulated_outputs_are_poison_until_the_first_replay() -> None:
    x = rows()
    piece = SimulatedGraphs().capture(double, [x])
    assert [o.shape for o in piece.outputs] == [(4, HIDDEN), (HIDDEN,)]
    assert all(o.isnan().all() for o in piece.outputs)
    piece.replay()
    torch.testing.assert_close(piece.outputs, double(x))


@pytest.mark.parametrize(
    ("dtype", "is_poison"),
    [
        (torch.float16, torch.isnan),
        (torch.bfloat16, torch.isnan),
        (torch.float64, torch.isnan),
        (torch.float8_e4m3fn, lambda t: t.float().isnan()),
        (torch.complex64, torch.isnan),
        (torch.int64, lambda t: t == torch.iinfo(torch.int64).max),
        (torch.int32, lambda t: t == torch.iinfo(torch.int32).max),
        (torch.uint8, lambda t: t == 255),
        (torch.bool, lambda t: t),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "",
)
def test_simulated_outputs_of_any_dtype_are_poisoned_then_replayed(
    dtype: torch.dtype, is_poison: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randint(0, 2, (4, HIDDEN)).float()
    piece = SimulatedGraphs().capture(lambda x: (x.to(dtype),), [x])
    (out,) = piece.outputs
    assert out.dtype is dtype and is_poison(out).all()
    piece.replay()
    assert torch.equal(out.to(torch.complex64).real, x)


def test_simulated_outputs_keep_their_addresses_across_replays() -> None:
    x = rows()
    piece = SimulatedGraphs().capture(double, [x])
    before, addresses = piece.outputs, [o.data_ptr() for o in piece.outputs]
    for _ in range(3):
        x.copy_(rows())
        piece.replay()
        assert all(a is b for a, b in zip(piece.outputs, before, strict=True))
        assert [o.data_ptr() for o in piece.outputs] == addresses
        torch.testing.assert_close(before, double(x))


def test_simulated_outputs_keep_their_layout() -> None:
    x = rows()
    piece = SimulatedGraphs().capture(lambda x: ((x * 2).t(), x.new_ones(4, 3, 2).permute(2, 0, 1) * 2), [x])
    assert [o.stride() for o in piece.outputs] == [(1, HIDDEN), (1, 6, 2)]
    piece.replay()
    torch.testing.assert_close(piece.outputs[0], (x * 2).t())


def test_simulated_output_may_be_an_expanded_view() -> None:
    x = rows(1)
    piece = SimulatedGraphs().capture(lambda x: (x.expand(4, HIDDEN), x + 1), [x])
    x.copy_(rows(1))
    piece.replay()
    torch.testing.assert_close(piece.outputs, (x.expand(4, HIDDEN), x + 1))


def test_simulated_numbers_among_the_outputs_pass_through() -> None:
    x = rows()
    piece = SimulatedGraphs().capture(lambda x: (x * 2, x.shape[0], None), [x])
    piece.replay()
    assert piece.outputs[1:] == (4, None)


# -- inputs ------------------------------------------------------------------------------


def test_simulated_replay_reads_what_the_inputs_hold_now() -> None:
    x, y = rows(), rows()
    piece = SimulatedGraphs().capture(lambda x, y: (x - y,), [x, y])
    for _ in range(3):
        x.copy_(rows())
        y.mul_(-3)
        piece.replay()
        torch.testing.assert_close(piece.outputs[0], x - y)


def test_simulated_replay_reads_the_addresses_seen_at_capture() -> None:
    x = rows()
    args = [x]
    piece = SimulatedGraphs().capture(double, args)
    args[0] = rows()
    piece.replay()
    torch.testing.assert_close(piece.outputs, double(x))
    assert not torch.allclose(piece.outputs[0], double(args[0])[0])


def test_simulated_capture_computes_nothing() -> None:
    """A stream capture records the write and does not do it."""
    x = rows()
    before = x.clone()
    piece = SimulatedGraphs().capture(lambda x: (x.add_(1) * 2,), [x])
    assert torch.equal(x, before)
    piece.replay()
    torch.testing.assert_close(x, before + 1)
    torch.testing.assert_close(piece.outputs[0], (before + 1) * 2)


def test_simulated_warm_up_runs_what_it_is_given_once() -> None:
    runs: list[bool] = []
    graphs = SimulatedGraphs()

    def call(x: int) -> tuple[int, ...]:
        runs.append(graphs.is_capturing())
        return (x + 1,)

    assert graphs.warm_up(call, [2]) == (3,)
    assert runs == [False]


# -- what a capture refuses ------------------------------------------------------------------


def inside_an_op(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def op(x: Tensor) -> Tensor:
        read(x.reshape(-1)[:3])
        return x + 1

    op.__annotations__ = {"x": Tensor, "return": Tensor}
    return torch.library.custom_op("ringfence_test::reads_on_the_host", op, mutates_args=())


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: int(x.argmax()),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.allclose(x, x + 1),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), 0),
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        lambda x: np.asarray(x),
        torch.from_dlpack,
        repr,
        lambda x: f"{x.sum():.3f}",
        lambda x: inside_an_op(str)(x),
        lambda x: inside_an_op(Tensor.tolist)(x),
        lambda x: inside_an_op(np.asarray)(x),
    ],
    ids=[
        "item",
        "bool",
        "int",
        "equal",
        "allclose",
        "nonzero",
        "masked_select",
        "unique",
        "repeat_interleave",
        "tolist",
        "numpy",
        "cpu",
        "asarray",
        "dlpack",
        "repr",
        "format",
        "str_in_an_op",
        "tolist_in_an_op",
        "asarray_in_an_op",
    ],
)
def test_simulated_capture_refuses_a_host_sync(sync: Callable[[Tensor], Any]) -> None:
    def piece(x: Tensor) -> tuple[Tensor]:
        sync(x)
        return (x * 2,)

    graphs = SimulatedGraphs()
    with pytest.raises(CaptureError, match="split_ops"):
        graphs.capture(piece, [rows()])
    assert not graphs.is_capturing()
    x = rows()
    after = graphs.capture(double, [x])
    after.replay()
    torch.testing.assert_close(after.outputs, double(x))


def ring_add(x: Tensor) -> Any:
    return ops.all_reduce_add_rms_norm(x, x, None, 1e-6, 0.0, dist.group.WORLD.group_name, "reference")


def ring(x: Tensor) -> Any:
    return ops.all_reduce_rms_norm(x, None, 1e-6, 0.0, dist.group.WORLD.group_name, "reference")


def functional_all_reduce(x: Tensor) -> Any:
    out = torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name)
    return (torch.ops._c10d_functional.wait_tensor(out),)


def functional_all_gather(x: Tensor) -> Any:
    out = torch.ops._c10d_functional.all_gather_into_tensor(x, 2, dist.group.WORLD.group_name)
    return (torch.ops._c10d_functional.wait_tensor(out),)


def in_place_all_reduce(x: Tensor) -> Any:
    dist.all_reduce(x)
    return (x,)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(
    ("collective", "named"),
    [
        (ring_add, "ringfence.all_reduce_add_rms_norm"),
        (ring, "ringfence.all_reduce_rms_norm"),
        (functional_all_reduce, "_c10d_functional.all_reduce"),
        (functional_all_gather, "_c10d_functional.all_gather_into_tensor"),
        (in_place_all_reduce, "c10d.allreduce_"),
    ],
)
def test_simulated_capture_refuses_a_collective(collective: Callable[[Tensor], Any], named: str) -> None:
    graphs = SimulatedGraphs()
    collective(rows())  # fine outside a capture
    with pytest.raises(CaptureError, match=named):
        graphs.capture(collective, [rows()])
    assert not graphs.is_capturing()
    collective(rows())


# -- memory ------------------------------------------------------------------------------------


def test_simulated_pieces_share_what_is_free() -> None:
    """What one capture needs no longer, the next one uses."""
    graphs = SimulatedGraphs()
    given = x = torch.randn(64, 64)
    graphs.pool_for([given], own=True)  # nothing of other tests' is free in it
    pieces = []
    for _ in range(6):
        pieces.append(graphs.capture(lambda x: ((x + 1).sin().cos() * 2,), [x]))
        x = pieces[-1].outputs[0]
        for earlier in pieces[:-1]:
            earlier.free(0)
    assert graphs._pool is not None and graphs._pool.nbytes <= 4 * x.nbytes
    for piece in pieces:
        piece.replay()
    for _ in pieces:
        given = (given + 1).sin().cos() * 2
    torch.testing.assert_close(x, given)


def test_simulated_output_that_is_freed_too_early_reads_poison() -> None:
    graphs = SimulatedGraphs()
    x = rows()
    first = graphs.capture(lambda x: (x * 2,), [x])
    second = graphs.capture(lambda x: (x * 3,), [x])
    kept, freed = first.outputs[0], second.free(0)
    third = graphs.capture(lambda x: (x.sum(),), [x])  # has no use for that much, and yet may write there
    for piece in (first, second, third):
        piece.replay()
    torch.testing.assert_close(kept, x * 2)
    assert freed.isnan().sum() >= freed.numel() - 1
    second.replay()
    torch.testing.assert_close(freed, x * 3)


# -- nesting -----------------------------------------------------------------------------------


def test_simulated_nesting_is_seen_by_every_backend_of_the_thread() -> None:
    outer, other = SimulatedGraphs(), SimulatedGraphs()
    seen: list[tuple[bool, bool]] = []

    def piece(x: Tensor) -> tuple[Tensor]:
        seen.append((outer.is_capturing(), other.is_capturing()))
        return (x * 2,)

    assert not outer.is_capturing()
    x = rows()
    captured = outer.capture(piece, [x])
    assert not outer.is_capturing()
    captured.replay()
    assert seen == [(True, True)]


def test_simulated_capture_of_one_thread_is_none_of_another() -> None:
    graphs = SimulatedGraphs()
    seen: list[bool] = []

    def piece(x: Tensor) -> tuple[Tensor]:
        thread = threading.Thread(target=lambda: seen.append(graphs.is_capturing()))
        thread.start()
        thread.join()
        return (x * 2,)

    graphs.capture(piece, [rows()])
    assert seen == [False]


def test_simulated_nesting_is_seen_inside_a_custom_op() -> None:
    """A model may be called from an op; a stream stays in capture there."""
    graphs = SimulatedGraphs()
    seen: list[bool] = []

    def call(x: Tensor) -> Tensor:
        seen.append(graphs.is_capturing())
        return x * 2

    with op("call_model(Tensor x) -> Tensor", call, "CompositeExplicitAutograd") as call_model:
        graphs.capture(lambda x: (call_model(x),), [rows()])
    assert seen == [True]


def test_simulated_capture_refuses_another_one_inside() -> None:
    graphs = SimulatedGraphs()
    with pytest.raises(NestedCaptureError):
        graphs.capture(lambda x: graphs.capture(double, [x]).outputs, [rows()])


# -- release -----------------------------------------------------------------------------------


def test_simulated_release_lets_go_of_outputs_and_inputs_are_never_held() -> None:
    x = rows()
    piece = SimulatedGraphs().capture(double, [x])
    piece.replay()
    given, outputs = weakref.ref(x), [weakref.ref(t) for t in piece.outputs]
    del x
    assert given() is None
    assert all(ref() is not None for ref in outputs)
    piece.release()
    assert not any(ref() is not None for ref in outputs)
    assert piece.outputs == ()


def test_simulated_input_may_be_another_object_on_the_same_memory() -> None:
    x = rows()
    piece = SimulatedGraphs().capture(double, [x])
    x = x.detach()
    x.copy_(rows())
    piece.replay()
    torch.testing.assert_close(piece.outputs, tuple(double(x)))
