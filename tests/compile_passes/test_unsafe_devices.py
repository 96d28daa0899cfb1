"""Which tensors are on which device, and what of that must not be captured; with twins that may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from unsafe_graphs import GPU, LENGTHS, NUMBER, H, X, decided, on_the_gpu

from ringfence.compile_passes.devices import device_of
from ringfence.compile_passes.judge import Decision
from ringfence.compile_passes.sizes import size_rule
from ringfence.runtime.errors import InputError
from support import judge


@torch.library.custom_op("ringfence_unsafe::clock", mutates_args=())
def clock() -> Tensor:
    return torch.ones(())


@torch.library.custom_op("ringfence_unsafe::tell", mutates_args=())
def tell(x: Tensor) -> None:
    return None


clock.register_fake(lambda: torch.empty(()))
tell.register_fake(lambda x: None)
aten = torch.ops.aten


def test_nothing_is_cut_out_where_nothing_is_captured() -> None:
    gm = on_the_gpu(lambda x, n: (x + 1, n + 1), X, LENGTHS)
    (verdict,) = judge(gm, backends={}, capture=False)
    assert (verdict.rule, verdict.decision) == ("no_capture", Decision.IN_GRAPH)


# -- where the tensors are ---------------------------------------------------------------

THREE, PLACES = torch.tensor(3.0), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("fn", "arguments", "expected"),
    [
        (lambda x, n: (x + 1, n + 1), (X, LENGTHS), [("aten::add", "cpu_op")]),
        (lambda n, x: (n.max(), x + 1), (LENGTHS, X), [("aten::max", "cpu_op")]),
        (lambda x, n: (x + 1, n.view(2, 2)), (X, LENGTHS), [("aten::view", "cpu_op")]),
        (
            lambda x, n: (x * 2, torch.cumsum(n + 1, 0)),
            (X, LENGTHS),
            [("aten::add", "cpu_op"), ("aten::cumsum", "cpu_op")],
        ),
        (lambda x, n: (x * 2, tell(n)), (X, LENGTHS), [("ringfence_unsafe::tell", "cpu_op")]),
        (lambda x, s: x * s, (X, NUMBER), [("aten::mul", "host_memory")]),
        (lambda x, s: x * (s + 1), (X, NUMBER), [("aten::add", "cpu_op"), ("aten::mul", "host_memory")]),
        (lambda x: x.cpu(), (X,), [("aten::_to_copy", "host_memory")]),
        (lambda n: n.to(GPU) + 1, (LENGTHS,), [("aten::_to_copy", "host_memory")]),
        (lambda x, n: aten.index.Tensor(x, [n]), (X, LENGTHS), [("aten::index", "host_memory")]),
        (lambda n: n.to(GPU), (LENGTHS,), [("aten::_to_copy", "host_memory")]),
        (lambda x, n: aten.copy_.default(n, x), (X, (H, H, {"device": "cpu"})), [("aten::copy_", "host_memory")]),
    ],
)
def test_ops_of_the_cpu_beside_a_gpu_are_islands(
    fn: Callable[..., Any], arguments: tuple[Any, ...], expected: list[tuple[str, str]]
) -> None:
    assert decided(on_the_gpu(fn, *arguments)) == expected


@pytest.mark.parametrize(
    ("fn", "arguments"),
    [
        (lambda x, n: (x + 1, n.view(2, 2), torch.cumsum(n, 0)), ((H, H, {"device": "cpu"}), LENGTHS)),
        (lambda x, s: x * (s + 1), ((H, {"device": "cpu"}), NUMBER)),
        (lambda x, n: (x + 1, n + 1), (X, (H, {"dtype": torch.int64}))),
        (lambda x, n: (x + aten.sym_size.int(n, 0), n), (X, LENGTHS)),
        (lambda x, n: (x + 1, n), (X, LENGTHS)),
    ],
    ids=["all on the cpu", "a number of the cpu's", "all on the gpu", "a size", "handed through"],
)
def test_graphs_on_one_device_are_one_piece(fn: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert decided(on_the_gpu(fn, *arguments)) == []


def constant_across_a_cut(x: Tensor) -> tuple[Tensor, Tensor]:
    number = torch.full((), 2.0) + 1
    return x.exp() * number, (x * number).cpu() + torch.arange(H)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * THREE,
        lambda x: x * torch.full((), 2.0),
        lambda x: torch.where(x > 0, x, torch.full((), 2.0) + 1),
        lambda x: x.masked_fill(x > 0, THREE),
        lambda x: (x + 1, torch.arange(H) + 1),
        lambda x: x + torch.arange(H, device=GPU),
    ],
)
def test_constants_of_the_cpu_may_be_captured(fn: Callable[..., Any]) -> None:
    assert decided(on_the_gpu(fn, X)) == []


def test_a_constant_stays_one_in_the_next_piece() -> None:
    assert decided(on_the_gpu(constant_across_a_cut, X)) == [("aten::_to_copy", "host_memory"), ("aten::add", "cpu_op")]


def written_constant(x: Tensor) -> Tensor:
    number = torch.full((), 2.0)
    number.add_(1.0)
    return x * number


def constant_written_through_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = torch.zeros(H)
    buffer[1:2].add_(1.0)
    return x + 1, buffer + 1


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (written_constant, {"aten::full": "cpu_op", "aten::add_": "cpu_op", "aten::mul": "host_memory"}),
        (
            constant_written_through_a_view,
            dict.fromkeys(["aten::zeros", "aten::slice", "aten::add_", "aten::add"], "cpu_op"),
        ),
        (lambda x: x * torch.rand(()), {"aten::rand": "cpu_op", "aten::mul": "host_memory"}),
        (lambda x: x * clock(), {"ringfence_unsafe::clock": "cpu_op", "aten::mul": "host_memory"}),
        (lambda x: x + torch.arange(H).to(GPU), {"aten::_to_copy": "host_memory"}),
        (lambda x: aten.index.Tensor(x, [PLACES]), {"aten::index": "host_memory"}),
        (lambda x: torch.index_put(x, [torch.arange(H, device=GPU)], THREE), {"aten::index_put": "host_memory"}),
    ],
    ids=["written", "written through a view", "random", "somebody's op", "copied", "index", "copied by the op"],
)
def test_what_looks_like_a_constant(fn: Callable[..., Any], expected: dict[str, str]) -> None:
    assert dict(decided(on_the_gpu(fn, X))) == expected


def test_other_devices_are_islands() -> None:
    gm = on_the_gpu(lambda x: (x + 1, torch.empty(3, device="meta").relu()), X)
    assert decided(gm) == [("aten::empty", "other_device"), ("aten::relu", "other_device")]
    assert decided(on_the_gpu(lambda x: (x + 1, torch.empty(3, device=GPU).relu()), X)) == []


def test_the_device_of_a_graph_is_its_accelerator() -> None:
    def made_inside(n: Tensor) -> Tensor:
        return n.to(GPU) + 1

    assert device_of(on_the_gpu(lambda x, n: (x + 1, n + 1), X, LENGTHS)) == GPU
    assert device_of(on_the_gpu(lambda n, x: (n.max(), x + 1), LENGTHS, X)) == GPU
    assert device_of(on_the_gpu(made_inside, LENGTHS)) == GPU
    assert device_of(on_the_gpu(lambda n: torch.full((2,), 1.0, device=GPU), LENGTHS)) == GPU
    assert device_of(on_the_gpu(lambda n: n + 1, LENGTHS)) == torch.device("cpu")
    assert device_of(on_the_gpu(lambda n: n + 1, (H, {"device": "meta"}))) == torch.device("meta")
    assert device_of(on_the_gpu(lambda x: (x + 1, torch.empty(3, device="meta")), X)) == GPU


def test_token_count_is_that_of_the_accelerator() -> None:
    lengths = (3, {"device": "cpu", "dtype": torch.int64})
    gm = on_the_gpu(lambda n, x: (n.max(), x + 1), lengths, X)
    tokens = size_rule(gm, [], frozenset()).tokens
    assert tokens is not None and tokens(()) == H
    gm = on_the_gpu(lambda n, x: (n.max(), x + 1), lengths, (H, {"device": "cpu"}))
    tokens = size_rule(gm, [], frozenset()).tokens
    assert tokens is not None and tokens(()) == 3


def test_two_accelerators_are_refused_by_name() -> None:
    other = torch.device("cuda", 1)
    for gm in (
        on_the_gpu(lambda x, y: (x + 1, y + 1), X, (H, {"device": other})),
        on_the_gpu(lambda n, x: (n.to(other), x + 1), LENGTHS, X),
    ):
        with pytest.raises(InputError, match=r"\['cpu', 'cuda:0', 'cuda:1'\]|\['cuda:0', 'cuda:1'\]") as error:
            device_of(gm)
        assert "'x_1' on cuda:0" in str(error.value) and "move model and inputs to one" in str(error.value)
    with pytest.raises(InputError, match=r"\['cuda:0', 'meta'\]"):
        device_of(on_the_gpu(lambda x, y: (x + 1, y + 1), X, (H, {"device": "meta"})))
