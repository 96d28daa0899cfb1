"""The tape: what a replay of the simulation does again, and what it does not."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ringfence.runtime.errors import CaptureError
from ringfence.runtime.replay.capture import SimulatedGraphs

HIDDEN = 8


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (x * 2 + 1, x.sum(0))


def rows(n: int = 4) -> Tensor:
    return torch.randn(n, HIDDEN)


# -- what a replay does not do -----------------------------------------------------------------


def is_float(tensor: Tensor) -> bool:
    """Floats play the device's memory, everything else the host's."""
    return tensor.is_floating_point()


def test_simulated_replay_runs_no_python() -> None:
    calls: list[Tensor] = []

    def piece(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (x * len(calls),)

    x = rows()
    captured = SimulatedGraphs().capture(piece, [x])
    for _ in range(2):
        x.copy_(rows())
        captured.replay()
        torch.testing.assert_close(captured.outputs[0], x)
    assert len(calls) == 1


@contextlib.contextmanager
def op(schema: str, call: Callable[..., Any], key: str = "CPU") -> Iterator[Callable[..., Any]]:
    with torch.library._scoped_library("ringfence_tests", "FRAGMENT") as library:
        name = library.define(schema)
        library.impl(name, call, key)
        yield getattr(torch.ops.ringfence_tests, name)


@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd"])
def test_simulated_replay_runs_what_a_custom_op_launches_and_not_its_python(key: str) -> None:
    calls: list[int] = []

    def call(x: Tensor, cache: Tensor) -> Tensor:
        calls.append(1)
        cache[:2] = x[:2] * len(calls)
        return x.sin().cos()

    with op("write_and_count(Tensor x, Tensor(a!) cache) -> Tensor", call, key) as write:
        x, cache = rows(), rows()
        before = cache.clone()
        captured = SimulatedGraphs().capture(lambda x, cache: (write(x, cache) + 1,), [x, cache])
        assert torch.equal(cache, before) and len(calls) == 1
        for _ in range(2):
            x.copy_(rows())
            captured.replay()
            torch.testing.assert_close(captured.outputs[0], x.sin().cos() + 1)
            torch.testing.assert_close(cache, torch.cat([x[:2], before[2:]]))
    assert len(calls) == 1


def test_simulated_replay_runs_what_a_higher_order_op_launches() -> None:
    def call(x: Tensor, out: Tensor) -> None:
        out.copy_(x * 2)

    with op("double_into(Tensor x, Tensor(a!) out) -> ()", call) as double_into:

        def piece(x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.higher_order.auto_functionalized(double_into.default, x=x, out=out)[1:]

        x, out = rows(), rows()
        before = out.clone()
        captured = SimulatedGraphs().capture(piece, [x, out])
        x.copy_(rows())
        captured.replay()
        torch.testing.assert_close(captured.outputs[0], x * 2)
        assert torch.equal(out, before)


def test_simulated_replay_gives_a_stale_value_where_an_op_runs_on_the_host() -> None:
    """PyTorch's test_graph_partition_log_message: y is on the CPU, and no graph runs its op again."""
    x, y = rows(), torch.arange(4)
    captured = SimulatedGraphs(is_float).capture(lambda x, y: (x + 1, y + 2), [x, y])
    assert torch.equal(captured.outputs[1], y + 2), "the host works while a stream is captured"
    stale = y + 2
    for i in range(1, 3):
        x.copy_(rows())
        y += i
        captured.replay()
        torch.testing.assert_close(captured.outputs[0], x + 1)
        assert torch.equal(captured.outputs[1], stale)


def test_simulated_replay_bakes_a_scalar_of_the_hosts_in() -> None:
    x, scale = rows(), torch.tensor(3)
    captured = SimulatedGraphs(is_float).capture(lambda x, s: (x * s, x + s.item()), [x, scale])
    scale.fill_(5)
    captured.replay()
    torch.testing.assert_close(captured.outputs, (x * 3, x + 3))


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, i: i.float(),
        lambda x, i: x.long(),
        lambda x, i: x.copy_(i),
        lambda x, i: x[i],
        lambda x, i: i.copy_(x[0, :4]),
        lambda x, i: x + torch.tensor([1.0] * HIDDEN),
    ],
    ids=["from_host", "to_host", "copy_from_host", "index", "copy_to_host", "made_of_numbers"],
)
def test_simulated_capture_refuses_to_move_values_between_host_and_device(mixed: Callable[..., Any]) -> None:
    x, i = rows(), torch.arange(4)
    before = x.clone(), i.clone()
    with pytest.raises(CaptureError, match="split_ops"):
        SimulatedGraphs(is_float).capture(lambda x, i: (mixed(x, i),), [x, i])
    assert torch.equal(x, before[0]) and torch.equal(i, before[1])


def test_simulated_random_numbers_are_fresh_in_every_replay_and_a_capture_draws_none() -> None:
    def piece(x: Tensor) -> tuple[Tensor, ...]:
        return x + torch.rand_like(x), torch.nn.functional.dropout(x, 0.5, training=True)

    x = rows()
    torch.manual_seed(5)
    captured = SimulatedGraphs().capture(piece, [x])
    ours = []
    for _ in range(3):
        captured.replay()
        ours.append([o.clone() for o in captured.outputs])
    torch.manual_seed(5)
    for outputs in ours:
        torch.testing.assert_close(outputs, list(piece(x)))
    assert not torch.equal(ours[0][0], ours[1][0])


def test_simulated_capture_refuses_a_generator_of_its_own() -> None:
    generator = torch.Generator()
    with pytest.raises(CaptureError, match="generator"):
        SimulatedGraphs().capture(lambda x: (torch.rand(4, generator=generator) + x[:, 0],), [rows()])


def test_simulated_views_are_returned_as_views() -> None:
    """Code that relies on copies must fail here as it would on a device."""

    def piece(x: Tensor) -> tuple[Tensor, ...]:
        h = x * 2
        return x[1:], h, h.view(-1)[3:], x

    x = rows()
    first = x.clone()
    captured = SimulatedGraphs().capture(piece, [x])
    tail, h, flat, itself = captured.outputs
    assert torch.equal(tail, first[1:]) and itself.data_ptr() == x.data_ptr(), "a view of an input shows the input"
    assert h.isnan().all() and flat.data_ptr() == h.data_ptr() + 3 * h.element_size()
    for _ in range(2):
        x.copy_(rows())
        assert torch.equal(tail, x[1:])
        captured.replay()
        torch.testing.assert_close((h, flat), (x * 2, (x * 2).view(-1)[3:]))
        h.zero_()
        assert not flat.any()


def test_simulated_capture_gives_back_everything_that_it_wrote() -> None:
    """Through views, by out= and by ops that write two: what a kernel writes is there after a replay, once."""

    def piece(x: Tensor, cache: Tensor) -> tuple[Tensor]:
        cache[1:3].t().add_(1)
        torch.mul(x, 2, out=cache[3])
        torch._foreach_add_([cache[0], x], 1)
        return (cache.sum(0),)

    x, cache = torch.randn(HIDDEN), rows()
    x_before, before = x.clone(), cache.clone()
    captured = SimulatedGraphs().capture(piece, [x, cache])
    assert torch.equal(x, x_before) and torch.equal(cache, before)
    captured.replay()
    expected_x, expected = x_before.clone(), before.clone()
    expected_sum = piece(expected_x, expected)
    torch.testing.assert_close((x, cache, *captured.outputs), (expected_x, expected, *expected_sum))


def test_simulated_capture_that_fails_gives_back_what_it_wrote() -> None:
    x = rows()
    before = x.clone()
    with pytest.raises(CaptureError):
        SimulatedGraphs().capture(lambda x: (x.add_(1).sum().item(),), [x])
    assert torch.equal(x, before)


def test_simulated_replay_of_memory_that_is_gone_is_an_error() -> None:
    x = rows()
    captured = SimulatedGraphs().capture(double, [x])
    del x
    with pytest.raises(CaptureError, match="freed"):
        captured.replay()


# -- compiled pieces ---------------------------------------------------------------------------


def compile_piece(call: Callable[..., Any], args: Sequence[Tensor]) -> Callable[..., Any]:
    """``call`` as Inductor compiles a piece of a split graph."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode()
    fake = [mode.from_tensor(a) for a in args]
    gm = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)
    with V.set_fake_mode(mode):
        compiled = compile_fx_inner(joint_graph_passes(gm), fake, is_inference=True, cudagraphs=BoxedBool(False))
    return lambda *args: compiled(list(args))


def test_simulated_compiled_piece_is_recorded_kernel_by_kernel() -> None:
    calls: list[int] = []

    def attend(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    def piece(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        h = torch.ops.ringfence_tests.attend((x.sin() + 1) * 3)
        noisy = (h @ x.t()).relu() + torch.rand(4, 4)
        cache.copy_(cache + x)
        return noisy, x[:, 2:], h.sum(-1).exp()

    with op("attend(Tensor x) -> Tensor", attend):
        torch.library.register_fake("ringfence_tests::attend", torch.empty_like)
        x, cache = rows(), rows()
        compiled = compile_piece(piece, [x, cache])
        before, state = cache.clone(), torch.get_rng_state()
        calls.clear()
        captured = SimulatedGraphs().capture(compiled, [x, cache])
        assert torch.equal(cache, before) and torch.equal(state, torch.get_rng_state()) and len(calls) == 1
        noisy, view, sums = captured.outputs
        assert noisy.isnan().all() and sums.isnan().all() and view.data_ptr() == x[:, 2:].data_ptr()
        drawn = []
        for seed in range(3):
            x.copy_(rows())
            torch.manual_seed(seed)
            captured.replay()
            assert len(calls) == 1 + seed
            before += x
            h = (x.sin() + 1) * 6
            torch.testing.assert_close((view, cache), (x[:, 2:], before))
            torch.testing.assert_close(sums, h.sum(-1).exp(), rtol=1e-4, atol=1e-5)
            drawn.append(noisy - (h @ x.t()).relu())
            assert (drawn[-1] > -1e-4).all() and (drawn[-1] < 1 + 1e-4).all()
            torch.manual_seed(seed)
            torch.testing.assert_close(compiled(x, before.clone())[0], noisy.clone())
        assert not torch.allclose(drawn[0], drawn[1])


def test_simulated_compiled_kernels_are_the_modules_own_again_after_a_capture() -> None:
    x = rows()
    compiled = compile_piece(lambda x: (x.sin() + 1,), [x])
    captured = SimulatedGraphs().capture(compiled, [x])
    kept = captured.outputs[0].clone()
    y = rows()
    torch.testing.assert_close(compiled(y)[0], y.sin() + 1)
    assert torch.equal(captured.outputs[0].isnan(), kept.isnan())


def test_simulated_pieces_hold_tensors_without_elements() -> None:
    """They have no memory, so nothing of theirs can be freed or written over."""

    def piece(x: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        none, more = torch.split(x, [0, 4])
        return torch.cat([x.new_zeros(0, 8) * 2, past, x, none]), (past * 2).sum(0), more + 1, past + 1

    x, past = rows(), torch.empty(0, 8)
    captured = SimulatedGraphs().capture(piece, [x, past])
    for _ in range(3):
        gc.collect()
        x.copy_(rows())
        captured.replay()
        torch.testing.assert_close(tuple(captured.outputs), piece(x, past))
